"""Theorem 1: efficient feature learning. How much the output changes through A and through B, as the width grows."""

from typing import Any

import torch

from ..options import PUBLISHED
from .problems import Makers, Regression, adamw, loraplus, rite, slope

EXPECTED = """Theorem 1: with the same rule for both factors, a transformation-invariant optimizer changes the output
through A (B·δA·x) and through B (δB·A·x) by amounts of the same order in the width n, so that one power of n in lr
makes both Θ(1). At a constant lr: the same exponent for both. Adam: exponent 1 through A (sign-like steps of A add up
over n inputs) and 0 through B, so that lr ∝ n^-½, which keeps A's part bounded (it is of second order in lr), lets
B's vanish as n^-½. LoRA+ with a constant ratio shifts the constants only."""

OPTIMIZERS: Makers = {
    "LoRARite": rite(),
    "LoRARite, damping 0": rite(damping=0.0),
    "published step": rite(**{**PUBLISHED, "update_skipping": 0.0}),  # (which would skip all steps of A here)
    "AdamW": adamw,
    "LoRA+ (ratio 16)": loraplus(16),
}


def run(
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096, 8192),
    rank: int = 8,
    lr: float = 3e-5,
    steps: int = 50,
    seeds: int = 5,
) -> dict[str, Any]:
    """Root mean squares over batch and outputs of both parts of a step's change of the output: at step 2 (the first in
    which A moves, as B = 0 before) and at step ``steps``; means over seeds; exponents fitted over the widths."""
    rows = []
    for name, make in OPTIMIZERS.items():
        for width in widths:
            for seed in range(seeds):
                problem = Regression(width, rank, seed)
                optimizer = make([problem.a, problem.b], lr)
                for step in range(1, steps + 1):
                    x, y = problem.data()
                    a, b = problem.a.detach().clone(), problem.b.detach().clone()
                    problem.gradients(x, y)
                    optimizer.step()
                    if step in (2, steps):
                        with torch.no_grad():
                            parts = x @ (problem.a - a).mT @ problem.b.mT, x @ a.mT @ (problem.b - b).mT
                        through_a, through_b = (float(part.square().mean().sqrt()) for part in parts)
                        rows.append({"optimizer": name, "width": width, "seed": seed, "step": step,
                                     "through_a": through_a, "through_b": through_b})  # fmt: skip
    fits = []
    for name in OPTIMIZERS:
        for step in (2, steps):
            mean = {
                key: [_mean(rows, name, width, step, key) for width in widths] for key in ("through_a", "through_b")
            }
            fits.append({"optimizer": name, "step": step, **{k: slope(widths, v) for k, v in mean.items()}})
    settings = {"widths": widths, "rank": rank, "lr": lr, "steps": steps, "seeds": seeds}
    return {"settings": settings, "rows": rows, "fits": fits}


def _mean(rows: list[dict[str, Any]], name: str, width: int, step: int, key: str) -> float:
    own = [r[key] for r in rows if (r["optimizer"], r["width"], r["step"]) == (name, width, step)]
    return sum(own) / len(own)


def found(result: dict[str, Any]) -> str:
    last = result["settings"]["steps"]
    parts = [
        f"{f['optimizer']}: n^{f['through_a']:.2f} through A and n^{f['through_b']:.2f} through B"
        for f in result["fits"]
        if f["step"] == last
    ]
    first = [
        f"{f['optimizer']} {f['through_a']:.2f} and {f['through_b']:.2f}" for f in result["fits"] if f["step"] == 2
    ]
    return f"At step {last}, constant lr: {'; '.join(parts)}. (At step 2, the first that moves A: {'; '.join(first)}.)"


def plot(result: dict[str, Any], figure: Any) -> None:
    steps, widths = result["settings"]["steps"], result["settings"]["widths"]
    for axis, step in zip(figure.subplots(1, 2, sharey=True), (2, steps), strict=True):
        for i, name in enumerate(OPTIMIZERS):
            for key, style in (("through_a", "-"), ("through_b", "--")):
                fit = next(f for f in result["fits"] if (f["optimizer"], f["step"]) == (name, step))
                values = [_mean(result["rows"], name, width, step, key) for width in widths]
                label = f"{name}, {key[-1].upper()}: n^{fit[key]:.2f}"
                axis.loglog(widths, values, style, color=f"C{i}", marker=".", label=label)
        axis.set(title=f"change of the output in step {step}", xlabel="width n")
        axis.legend(fontsize="x-small")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("root mean square (— through A, -- through B)")
