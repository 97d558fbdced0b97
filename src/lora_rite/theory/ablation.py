"""Every part of the step taken out or exchanged: a synthetic problem with a known answer, and the embedded model."""

import math
import statistics
from typing import Any, Literal

import torch

from ..errors import NonFiniteError
from .embedded import pair_parameters, train_embedded
from .problems import Regression, adamw, rite
from .variant import Variant

EXPECTED = """What the literature leaves open: nobody has published what the parts of LoRA-RITE are worth alone.
LoRA-Muon claims that the core without second moment does as well; the paper's analysis needs the escaped mass and the
transport; its reviewers asked for a row-wise or element-wise counterpart. If a part is worth having, the loss at the
best learning rate without it is higher by more than the spread over seeds."""

#: Label → options of :class:`.variant.Variant`. "LoRARite" is its defaults.
CASES: dict[str, dict[str, Any]] = {
    "LoRARite": {},
    "escaped mass": {"apply_escape": True},
    "no second moment": {"second_moment": False},
    "no transport": {"transport": False},
    "clip each pair": {"clip_scope": "pair"},
    "no clip": {"clip_unmagnified_grad": 0.0},
    "skip above 1": {"update_skipping": 1.0},
    "relative_eps 0": {"relative_eps": 0.0},
    "relative_eps 1e-2": {"relative_eps": 1e-2},
    "relative_eps 1e-1": {"relative_eps": 1e-1},
    "damping 0": {"damping": 0.0},
    "damping 1": {"damping": 1.0},
    "damping 5": {"damping": 5.0},
    "damping 10": {"damping": 10.0},
    "damping 40": {"damping": 40.0},
    "damping 100": {"damping": 100.0},
    "no rows": {"rows": None},
    "rows after momentum": {"rows": "after"},
    "element-wise": {"rows": "element"},
    "row_floor 0": {"row_floor": 0.0},
    "row_floor 1e-3": {"row_floor": 1e-3},
    "row_floor 1e-1": {"row_floor": 1e-1},
    "momentum before": {"momentum": "before"},
    "no rows, no second moment": {"rows": None, "second_moment": False},
    "core: no damping, rows, second moment": {"damping": 0.0, "rows": None, "second_moment": False},
    "published": {"damping": 0.0, "rows": None, "relative_eps": 0.0},
}
#: What is run on the embedded model, with its learning rates (a run is a minute or two).
EMBEDDED: dict[str, tuple[float, ...]] = {
    "LoRARite": (2e-2,),
    "row_floor 0": (2e-2,),
    "row_floor 1e-3": (2e-2,),
    "row_floor 1e-1": (2e-2,),
    "no second moment": (2e-2,),
    "no clip": (2e-2,),
    "momentum before": (2e-2,),
    "no transport": (2e-2,),
    "rows after momentum": (2e-2,),
    "element-wise": (2e-2,),
    "no rows": (1e-2,),
    "core: no damping, rows, second moment": (1e-2,),
    "published": (1e-2,),
}


def run(
    problem: Literal["synthetic", "embedded", "gauge"] = "synthetic",
    cases: tuple[str, ...] | None = None,
    widths: tuple[int, ...] = (48, 192),
    rank: int = 8,
    steps: tuple[int, ...] = (50, 200),
    warmups: tuple[float, ...] = (0.1,),
    lrs: tuple[float, ...] = (1e-2, 3e-2, 1e-1, 3e-1),
    seeds: int = 5,
    embedded_seeds: tuple[int, ...] = (100, 101, 102, 103, 104),
) -> dict[str, Any]:
    """Synthetic: relative loss on fresh samples of :class:`.problems.Regression` with noisy targets; lr chosen with
    seed 100, then ``seeds`` other ones. Embedded: validation loss after 200 steps, rank 16. Gauge: LoRARite
    with and without ``balance_param``, in float32 and bfloat16, from factors that are balanced or a thousand times
    larger in A; synthetic, lr 3e-2."""
    if problem == "gauge":
        settings = {"problem": problem, "width": widths[0], "rank": rank, "steps": steps[-1], "seeds": seeds}
        return {"settings": settings, "rows": _gauge(widths[0], rank, steps[-1], seeds)}
    torch.set_num_threads(1)
    rows = []
    for case in cases or (EMBEDDED if problem == "embedded" else (*CASES, "AdamW")):
        if problem == "embedded":
            options = CASES[case]
            for lr in EMBEDDED[case]:
                make = lambda model, lr=lr, options=options: Variant(pair_parameters(model), lr, **options)
                outcomes = [train_embedded(make, steps=200, seed=seed) for seed in embedded_seeds]
                losses = [outcome["validation_loss"] for outcome in outcomes]
                rows.append({"case": case, "lr": lr, "losses": losses})
                print(f"{case}, lr {lr:g}: {losses}", flush=True)
            continue
        for width in widths:
            for number in steps:
                for warmup in warmups:
                    setting = (case, width, rank, number, warmup)
                    first = {lr: _loss(*setting, lr, 100) for lr in lrs}
                    best = min(first, key=first.__getitem__)
                    losses = [_loss(*setting, best, seed) for seed in range(seeds)]
                    rows.append({"case": case, "width": width, "steps": number, "warmup": warmup, "lr": best,
                                 "losses": losses, "by_lr": list(first.values())})  # fmt: skip
        print(case, [f"{statistics.mean(r['losses']):.4f}" for r in rows if r["case"] == case], flush=True)
    settings = {
        "problem": problem,
        "rank": rank,
        "seeds": seeds if problem == "synthetic" else embedded_seeds,
        "lrs": lrs,
    }
    return {"settings": settings, "rows": rows}


def _gauge(width: int, rank: int, steps: int, seeds: int) -> list[dict[str, Any]]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for scale in (1.0, 1e3):
            for balance in (False, True):
                make = rite(balance_param=balance)
                losses = [_train(make, width, rank, steps, 0.1, 3e-2, seed, dtype, scale) for seed in range(seeds)]
                case = f"{str(dtype)[6:]}, A × {scale:g}, {'balanced' if balance else 'as it is'}"
                rows.append({"case": case, "lr": 3e-2, "losses": losses})
    return rows


def _loss(case: str, width: int, rank: int, steps: int, warmup: float, lr: float, seed: int) -> float:
    make = adamw if case == "AdamW" else lambda pair, lr: Variant(pair, lr, **CASES[case])
    return _train(make, width, rank, steps, warmup, lr, seed)


def _train(
    make: Any, width: int, rank: int, steps: int, warmup: float, lr: float, seed: int,
    dtype: torch.dtype = torch.float32, scale: float = 1.0,
) -> float:  # fmt: skip
    problem = Regression(width, rank, seed, batch=8)
    held_out = problem.data(256)
    pair = [problem.a, problem.b]
    for p, factor in zip(pair, (scale, 1 / scale), strict=True):
        p.data = (p.data * factor).to(dtype)
    optimizer = make(pair, lr)
    for step in range(1, steps + 1):
        rise = step / (warmup * steps) if warmup else 1.0
        optimizer.param_groups[0]["lr"] = lr * min(1.0, rise, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        x, y = problem.data()
        problem.gradients(x, y + torch.randn(y.shape, generator=problem.generator) * y.std())
        try:
            optimizer.step()
        except (torch.linalg.LinAlgError, NonFiniteError):
            return math.inf
    value = problem.loss(*held_out)
    return value if math.isfinite(value) else math.inf


def found(result: dict[str, Any]) -> str:
    parts = []
    keys = list(dict.fromkeys((r.get("width"), r.get("steps"), r.get("warmup")) for r in result["rows"]))
    for width, steps, warmup in keys:
        own = [r for r in result["rows"] if (r.get("width"), r.get("steps"), r.get("warmup")) == (width, steps, warmup)]
        best: dict[str, dict[str, Any]] = {}
        for row in own:
            if row["case"] not in best or statistics.mean(row["losses"]) < statistics.mean(best[row["case"]]["losses"]):
                best[row["case"]] = row
        text = ", ".join(
            f"{case} {statistics.mean(r['losses']):.4f}"
            + (f" ± {statistics.stdev(r['losses']):.4f}" if len(r["losses"]) > 1 else "")
            + f" (lr {r['lr']:g})"
            for case, r in sorted(best.items(), key=lambda item: statistics.mean(item[1]["losses"]))
        )
        other = f"{result['settings']['problem'].capitalize()}, 200 steps"
        where = f"Width {width}, {steps} steps, warm-up {warmup:g}" if width else other
        parts.append(f"{where}: {text}.")
    return " ".join(parts)


def plot(result: dict[str, Any], figure: Any) -> None:
    keys = list(dict.fromkeys((r.get("width"), r.get("steps"), r.get("warmup")) for r in result["rows"]))
    figure.set_size_inches(3.2 * len(keys) + 3, 7)
    axes = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    cases = list(dict.fromkeys(r["case"] for r in result["rows"]))
    for axis, (width, steps, warmup) in zip(axes, keys, strict=True):
        base = None
        for i, case in enumerate(cases):
            own = [
                r
                for r in result["rows"]
                if (r["case"], r.get("width"), r.get("steps"), r.get("warmup")) == (case, width, steps, warmup)
            ]
            losses = min((r["losses"] for r in own), key=statistics.mean)
            base = statistics.mean(losses) if base is None else base
            axis.plot(losses, [i] * len(losses), ".", color="tab:gray", markersize=4)
            axis.plot(statistics.mean(losses), i, "|", color="tab:blue", markersize=14, markeredgewidth=2)
        axis.axvline(base, color="black", linewidth=0.7)
        axis.set(yticks=range(len(cases)), yticklabels=cases, xscale="log",
                 title=f"width {width}, {steps} steps" if width else result["settings"]["problem"])  # fmt: skip
        axis.tick_params(axis="x", which="minor", labelbottom=False)
        axis.grid(alpha=0.3, which="both")
    axes[0].invert_yaxis()
