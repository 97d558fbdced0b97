"""Wall time of a plain PyTorch loop with each optimizer: forward and backward pass, step, zero_grad, and nothing that
lets the host wait but what the optimizer does. Random weights and tokens, the adapter in float32.

    python benchmarks/bench_loop.py --model gemma-2b --batch_size 8 --length 1024 --device cuda --out loop.json
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from lora_rite.bench.cases import DTYPES
from lora_rite.bench.contenders import optimizers
from lora_rite.bench.shapes import network
from lora_rite.run.files import write_json
from lora_rite.run.versions import versions

NAMES = ("none", "AdamW (fused)", "LoRARite", "LoRARite (triton)")
WARM_UP = 3


def loop(model, tokens, optimizer, steps, device):
    """Seconds a step, over so many steps with no wait between them."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        if optimizer is None:
            model.zero_grad()
        else:
            optimizer.step()
            optimizer.zero_grad()
    synchronize()
    return (time.perf_counter() - start) / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = network(options.model, None, options.rank, options.device, DTYPES[options.dtype]).train()
    tokens = torch.randint(model.config.vocab_size, (options.batch_size, options.length), device=options.device)
    start = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
    makers = {"none": lambda: None, **optimizers(model, options.device)}
    times, engines = {name: [] for name in NAMES if name in makers}, {}
    for _ in range(options.rounds):
        for name in times:
            with torch.no_grad():
                for p, value in start.items():
                    p.copy_(value)
            optimizer = makers[name]()
            loop(model, tokens, optimizer, WARM_UP, options.device)
            times[name].append(loop(model, tokens, optimizer, options.steps, options.device))
            if name.startswith("LoRARite"):
                engines[name] = optimizer.report()["engine"]
    result = {
        **{key: str(value) if key == "out" else value for key, value in vars(options).items()},
        "device_name": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "versions": versions(),
        "seconds": {name: {"median": statistics.median(found), "all": found} for name, found in times.items()},
        "engines": engines,
    }
    print({name: round(found["median"], 5) for name, found in result["seconds"].items()})
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
