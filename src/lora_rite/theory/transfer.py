"""Which learning rate is best, over width and rank: the lr that transfers."""

import math
from typing import Any

from .problems import Makers, Regression, adamw, loraplus, rite

EXPECTED = """If both parts of the change of the output grow with the same power of the width (Theorem 1), one power
of n in lr keeps the optimum in place. A step of LoRA-RITE writes lr·√(n·r) into W in Frobenius norm, and what
training has to write here grows as √(n·n) with the width, at a given number of steps: lr* ∝ n^½·r^-½ if the norm of W
decided; lr* ∝ n^-½ if the change of the output did (aligned features: √n for each step). Adam: lr* ∝ n^-½ (Theorem
1's opposite: A's part is lr²·n)."""

OPTIMIZERS: Makers = {
    "LoRARite": rite(),
    "LoRARite, damping 0": rite(damping=0.0),
    "AdamW": adamw,
    "LoRA+ (ratio 16)": loraplus(16),
}


def run(
    widths: tuple[int, ...] = (64, 512, 4096),
    ranks: tuple[int, ...] = (4, 16, 64),
    lrs: tuple[float, ...] = tuple(2.0**-k for k in range(13, 3, -1)),
    steps: int = 100,
    seeds: int = 1,
) -> dict[str, Any]:
    """Loss after ``steps`` (fresh samples, cosine after 10% of warm-up) for every width, rank and lr; the best lr by a
    parabola through the best three in log lr; exponents over width and rank by least squares."""
    rows = []
    for name, make in OPTIMIZERS.items():
        for width in widths:
            for rank in ranks:
                losses = [_mean_loss(make, width, rank, lr, steps, seeds) for lr in lrs]
                rows.append({"optimizer": name, "width": width, "rank": rank, "losses": losses,
                             "best_lr": minimum(lrs, losses), "best_loss": min(losses)})  # fmt: skip
    fits = []
    for name in OPTIMIZERS:
        own = [row for row in rows if row["optimizer"] == name]
        fits.append({"optimizer": name, **_exponents(own)})
    return {
        "settings": {"widths": widths, "ranks": ranks, "lrs": lrs, "steps": steps, "seeds": seeds},
        "rows": rows,
        "fits": fits,
    }


def _mean_loss(make: Any, width: int, rank: int, lr: float, steps: int, seeds: int) -> float:
    total = 0.0
    for seed in range(seeds):
        problem = Regression(width, rank, seed)
        held_out = problem.data(128)
        optimizer = make([problem.a, problem.b], lr)
        ratios = [group["lr"] / lr for group in optimizer.param_groups]
        for step in range(1, steps + 1):
            factor = min(step / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                group["lr"] = lr * ratio * factor
            problem.gradients(*problem.data())
            if not all(p.grad.isfinite().all() for p in (problem.a, problem.b)):  # type: ignore[union-attr]
                return math.inf
            optimizer.step()
        total += problem.loss(*held_out)
    return total / seeds if math.isfinite(total) else math.inf


def minimum(lrs: tuple[float, ...], losses: list[float]) -> float:
    """The minimum of the parabola in log lr and log loss through the best lr and its neighbours."""
    import numpy as np

    i = min(range(len(lrs)), key=losses.__getitem__)
    near = [j for j in (i - 1, i, i + 1) if 0 <= j < len(lrs) and math.isfinite(losses[j])]
    if len(near) < 3:
        return lrs[i]
    bend, tilt, _ = np.polyfit([math.log(lrs[j]) for j in near], [math.log(losses[j]) for j in near], 2)
    return math.exp(-tilt / (2 * bend)) if bend > 0 else lrs[i]


def _exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """lr* ≈ c·widthᵃ·rankᵇ; ``spread``: the largest ratio of lr* to that, or its inverse."""
    import numpy as np

    features = np.array([[math.log(row["width"]), math.log(row["rank"]), 1.0] for row in rows])
    target = np.log([row["best_lr"] for row in rows])
    solution = np.linalg.lstsq(features, target, rcond=None)[0]
    return {
        "width": float(solution[0]),
        "rank": float(solution[1]),
        "constant": math.exp(solution[2]),
        "spread": math.exp(float(np.abs(features @ solution - target).max())),
    }


def found(result: dict[str, Any]) -> str:
    parts = [
        f"{f['optimizer']}: lr* ≈ {f['constant']:.2g}·n^{f['width']:.2f}·r^{f['rank']:.2f} (within a factor of "
        f"{f['spread']:.1f})"
        for f in result["fits"]
    ]
    best = {
        name: sum(r["best_loss"] for r in own) / len(own)
        for name in OPTIMIZERS
        if (own := [r for r in result["rows"] if r["optimizer"] == name])
    }
    losses = ", ".join(f"{name} {loss:.3g}" for name, loss in best.items())
    return f"{'; '.join(parts)}. Mean over widths and ranks of the loss at each one's best lr: {losses}."


def plot(result: dict[str, Any], figure: Any) -> None:
    settings = result["settings"]
    for axis, name in zip(figure.subplots(1, len(OPTIMIZERS), sharey=True), OPTIMIZERS, strict=True):
        for i, rank in enumerate(settings["ranks"]):
            for j, width in enumerate(settings["widths"]):
                row = next(r for r in result["rows"] if (r["optimizer"], r["width"], r["rank"]) == (name, width, rank))
                shade = 0.25 + 0.75 * (j + 1) / len(settings["widths"])
                label = f"r {rank}" if j == len(settings["widths"]) - 1 else None
                axis.loglog(settings["lrs"], row["losses"], color=f"C{i}", alpha=shade, label=label)
        axis.set(title=name, xlabel="lr", ylim=(None, 2))
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small", title=f"width {settings['widths'][0]} (pale) to {settings['widths'][-1]}")
    figure.axes[0].set_ylabel("loss / loss of zero")
