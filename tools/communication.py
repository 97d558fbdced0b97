"""What a step of LoRARite sends between processes under FSDP2, beside gathering whole factors: measured on gloo.

    torchrun --nproc-per-node 4 tools/communication.py [--layers 1] [--rank 16] [--out FILE.json]

Bytes are counted where the optimizer asks for a collective: what one process sends, for a ring all-reduce
2·(N−1)/N of the tensor, for an all-to-all (N−1)/N of its share, for an all-gather (N−1) times its share.
"""

import json
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from torch.distributed.fsdp import fully_shard

from lora_rite import LoRARite
from lora_rite.bench.shapes import linear_maps
from lora_rite.invariance.problems import Adapter
from lora_rite.optim.optimizer import state_bytes
from lora_rite.plan.sharding import Shards


class Sharded(Adapter):
    def forward(self) -> None:
        return


def main(layers: int = 1, rank: int = 16, steps: int = 5, out: Path | None = None) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    n = dist.get_world_size()
    adapter = Sharded(linear_maps("gemma-2b", layers, rank), torch.float32, "cpu")
    whole = sum(p.numel() for p in adapter.parameters()) * 4
    fully_shard(adapter, mesh=dist.init_device_mesh("cpu", (n,)))
    optimizer = LoRARite(adapter.named_parameters(), lr=1e-4)
    for p in adapter.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    optimizer.step()
    sent, calls = Counter(), Counter()
    reduced, exchange = Shards._reduced, Shards._exchange

    def counted_reduce(self, parts, op):
        sent["all-reduce"] += sum(p.numel() * p.element_size() for p in parts) * 2 * (n - 1) // n
        calls["all-reduce"] += 1
        return reduced(self, parts, op)

    def counted_exchange(self, shares, shape, placements, dim):
        sent["all-to-all"] += sum(p.numel() * p.element_size() for p in shares) * (n - 1) // n
        calls["all-to-all"] += 1
        return exchange(self, shares, shape, placements, dim)

    Shards._reduced, Shards._exchange = counted_reduce, counted_exchange
    seconds = []
    for _ in range(steps):
        dist.barrier()
        begin = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    result = {
        "processes": n,
        "layers": layers,
        "rank": rank,
        "sent_bytes": {k: v // steps for k, v in sent.items()},
        "collectives": {k: v // steps for k, v in calls.items()},
        "gathering_factors_and_gradients_bytes": 2 * whole * (n - 1) // n,
        "state_bytes": state_bytes(optimizer),
        "median_seconds_gloo": statistics.median(seconds),
        "torch": torch.__version__,
    }
    if dist.get_rank() == 0:
        print(json.dumps(result, indent=1))
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
