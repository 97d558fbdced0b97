"""What a step costs: operations, time and memory over width and rank."""

import math
import statistics
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..optim.optimizer import LoRARite, state_bytes
from .problems import slope

#: What the counter leaves out; of shapes.
IN_PLACE = dict.fromkeys(
    (torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), lambda _, x, y, **options: 2 * math.prod(x) * y[-1]
)

EXPECTED = """Per pair of A (r, n) and B (m, r): O(m·r² + n·r² + r³) operations and O(m·r + n·r) memory. Ours: some
six products of a tall factor with an r×r or a tall matrix (two operations each for each element and each unit of rank),
eight where the factor is small or badly conditioned, or on a GPU, and 4·(m + n)(r + 1) + 40·r² bytes of state and some
scalars in float32, against 8·(m + n)·r for AdamW."""


def run(
    widths: tuple[int, ...] = (2048, 4096, 16384, 32768, 65536),
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64),
    rounds: int = 5,
) -> dict[str, Any]:
    """One pair with n = m = width. ``operations``: of matrix products, counted (not those of eigenvalues,
    Cholesky decompositions and triangular solves, which are O(r³)); ``seconds``: the median; ``state_bytes``. Fits:
    operations and bytes by least squares on (m+n)·r², r³ and on (m+n)·r, (m+n), r²; exponents of time at the
    largest width and at rank 16 (else the first)."""
    import numpy as np

    rows = []
    for width in widths:
        for rank in ranks:
            generator = torch.Generator().manual_seed(0)
            draw = lambda *shape, g=generator: torch.randn(*shape, generator=g)
            pair = [torch.nn.Parameter(draw(rank, width)), torch.nn.Parameter(torch.zeros(width, rank))]
            optimizer = LoRARite(pair, lr=1e-4)
            for p in pair:
                p.grad = draw(*p.shape)
            for _ in range(2):
                optimizer.step()
            with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
                optimizer.step()
            seconds = []
            for _ in range(rounds):
                begin = time.perf_counter()
                optimizer.step()
                seconds.append(time.perf_counter() - begin)
            rows.append({"width": width, "rank": rank, "operations": counter.get_total_flops(),
                         "seconds": statistics.median(seconds), "state_bytes": state_bytes(optimizer),
                         "adamw_bytes": 8 * sum(p.numel() for p in pair)})  # fmt: skip
    columns = lambda *terms: np.array([[term(2.0 * row["width"], row["rank"]) for term in terms] for row in rows])
    solve = lambda features, key: np.linalg.lstsq(features, np.array([float(r[key]) for r in rows]), rcond=None)[0]
    flops = columns(lambda s, r: s * r * r, lambda s, r: r**3)
    memory = columns(lambda s, r: s * r, lambda s, r: s, lambda s, r: r * r, lambda s, r: 1.0)
    flop_fit, memory_fit = solve(flops, "operations"), solve(memory, "state_bytes")
    error = lambda features, fit, key: float(
        max(abs(f @ fit - row[key]) / row[key] for f, row in zip(features, rows, strict=True))
    )
    at = lambda key, value: [row for row in rows if row[key] == value]
    widest, middle = at("width", widths[-1]), at("rank", 16 if 16 in ranks else ranks[0])
    return {
        "settings": {"widths": widths, "ranks": ranks, "rounds": rounds, "threads": torch.get_num_threads()},
        "rows": rows,
        "operations": {"(m+n)r²": float(flop_fit[0]), "r³": float(flop_fit[1]),
                       "largest_error": error(flops, flop_fit, "operations")},
        "bytes": dict(zip(("(m+n)r", "m+n", "r²", "1"), map(float, memory_fit), strict=True))
        | {"largest_error": error(memory, memory_fit, "state_bytes")},
        "time": {
            "rank": middle[0]["rank"],
            "exponent_of_width": slope([r["width"] for r in middle[-3:]], [r["seconds"] for r in middle[-3:]]),
            "exponent_of_rank": slope([r["rank"] for r in widest], [r["seconds"] for r in widest]),
        },
    }  # fmt: skip


def found(result: dict[str, Any]) -> str:
    operations, memory, times = result["operations"], result["bytes"], result["time"]
    return (
        f"Operations of matrix products: {operations['(m+n)r²']:.1f}·(m+n)·r² + {operations['r³']:.0f}·r³ (every case "
        f"within {operations['largest_error']:.1%}). State: {memory['(m+n)r']:.2f}·(m+n)·r + {memory['m+n']:.2f}·(m+n) "
        f"+ {memory['r²']:.0f}·r² + {memory['1']:.0f} bytes (within {memory['largest_error']:.1%}). Time of a step: "
        f"width^{times['exponent_of_width']:.2f} at rank {times['rank']} and the three largest widths, "
        f"rank^{times['exponent_of_rank']:.2f} at width {result['settings']['widths'][-1]}, "
        f"{result['settings']['threads']} thread(s)."
    )


def plot(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots(1, 3)
    keys = {"operations": "operations of matrix products", "seconds": "seconds a step", "state_bytes": "state, bytes"}
    for axis, (key, title) in zip(axes, keys.items(), strict=True):
        for i, rank in enumerate(result["settings"]["ranks"]):
            own = [row for row in result["rows"] if row["rank"] == rank]
            widths = [row["width"] for row in own]
            axis.loglog(widths, [row[key] for row in own], marker=".", color=f"C{i}", label=f"r {rank}")
            if key == "state_bytes":
                axis.loglog(widths, [row["adamw_bytes"] for row in own], ":", color=f"C{i}")
        axis.set(title=title, xlabel="m = n")
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    axes[2].set_title("state, bytes (dotted: AdamW)")
