"""Compiles every kernel of a step for GPUs that need not be there, as a launch on them would. Writes a line of JSON for
each: registers and bytes of spills a thread, bytes of shared memory. In a process of its own, without TRITON_INTERPRET:

    python tests/compile_kernels.py KIND RANK DTYPE CAPABILITY …

KIND is "whole", of pairs as most models have them, "single", the same with r×r algebra in float32, or "strided", of
experts that lie interleaved in a parameter, with all that can be otherwise: capturable, lr in a tensor, addresses at
odd places, rows in odd numbers.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.runtime.jit import JITFunction

from lora_rite import LoRARite
from lora_rite.bench.pretended import pretended_card
from lora_rite.kernels import launch

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def optimizer_of(kind, rank, dtype):
    new = lambda *shape: torch.nn.Parameter(torch.randn(shape).to(dtype))
    if kind != "strided":
        algebra = "float32" if kind == "single" else None
        return LoRARite([new(rank, 4096), new(2048, rank)], engine="triton", algebra_dtype=algebra)
    count, rows = 3, 5
    a = torch.nn.Parameter(torch.randn(count * rank * rows + 1).to(dtype)[1:].view(count * rank, rows))
    group = {"params": [a, new(7, rank * count)], "kind": "lora", "blocks": count, "columns": "interleaved"}
    return LoRARite([group], lr=torch.tensor(1e-3), engine="triton", capturable=True)


def step(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.report()["engine"] == "triton"


def resources(kernel, capability):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(kernel.asm["ptx"])
        architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [PTXAS, f"-arch={architecture}", "-v", path, "-o", Path(folder, "kernel")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    find = lambda pattern: int(re.search(pattern, said)[1])
    return {"registers": find(r"Used (\d+) registers"), "spills": find(r"(\d+) bytes spill stores")}


def main(kind, rank, dtype, *capabilities):
    launched = [x for name, x in vars(launch).items() if isinstance(x, JITFunction) and name.endswith("_kernel")]
    for capability in map(int, capabilities):
        with pretended_card(capability):
            step(optimizer_of(kind, int(rank), getattr(torch, dtype)))
        for function in launched:
            (kernel,) = function.device_caches[capability][0].values()
            found = {**resources(kernel, capability), "shared": kernel.metadata.shared}
            name = function.__name__
            print(json.dumps({"kernel": name, "rank": int(rank), "dtype": dtype, "capability": capability, **found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
