"""Compiles every kernel of a step for GPUs that need not be there. Writes a line of JSON for each: registers and bytes
of spills a thread, bytes of shared memory. In a process of its own, without TRITON_INTERPRET:

    python tests/compile_kernels.py RANK DTYPE CAPABILITY …
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from lora_rite import LoRARite
from lora_rite.kernels.launch import Kernels
from lora_rite.optim.selection import alike
from lora_rite.plan.plan import Limits, make_plan

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


class Compiled(dict):
    """Instead of launching, compiles for a GPU of this capability, as a launch with these arguments would."""

    def __init__(self, capability):
        super().__init__()
        self.capability = capability

    def __call__(self, function, *args, grid, warmup, **kwargs):
        options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages") if key in kwargs}
        values = {**dict(zip(function.arg_names, args, strict=False)), **kwargs}
        constants = {p.name: values[p.name] for p in function.params if p.is_constexpr}
        signature = {n: "constexpr" if n in constants else mangle_type(values[n]) for n in function.arg_names}
        index = function.arg_names.index
        source = ASTSource(
            fn=function,
            signature=signature,
            constexprs={(index(n),): value for n, value in constants.items()},
            attrs={(index(n),): [["tt.divisibility", 16]] for n, kind in signature.items() if kind.startswith("*")},
        )
        kernel = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        self[function.__name__] = {**self.resources(kernel.asm["ptx"]), "shared": kernel.metadata.shared}

    def resources(self, ptx):
        suffix = "a" if self.capability >= 90 else ""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel.ptx")
            path.write_text(ptx)
            command = [PTXAS, f"-arch=sm_{self.capability}{suffix}", "-v", path, "-o", Path(folder, "kernel")]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        find = lambda pattern: int(re.search(pattern, said)[1])
        return {"registers": find(r"Used (\d+) registers"), "spills": find(r"(\d+) bytes spill stores")}


def kernels_of(rank, dtype):
    """The kernels of a plan of one pair, with damping."""
    pair = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((rank, 4096), (2048, rank))]
    for p in pair:
        p.grad = torch.randn_like(p)
    optimizer = LoRARite(pair)
    stepped = alike(optimizer.param_groups, optimizer.state, lambda a, b: True)
    return Kernels(make_plan(stepped, optimizer.state, Limits()))


@torch.no_grad()
def main(rank, dtype, *capabilities):
    kernels = kernels_of(int(rank), getattr(torch, dtype))
    for capability in map(int, capabilities):
        compiled = Compiled(capability)
        JITFunction.run = lambda function, *args, compiled=compiled, **kwargs: compiled(function, *args, **kwargs)
        for move in kernels.measure([], torch.zeros(4), capturable=False).moves:
            move(None)
        for name, found in compiled.items():
            print(json.dumps({"kernel": name, "rank": int(rank), "dtype": dtype, "capability": capability, **found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
