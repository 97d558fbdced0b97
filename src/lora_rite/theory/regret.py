"""Theorems 3 and 4: average regret, over the number of steps and over the imbalance of the factors."""

import math
from typing import Any

import torch
from torch import Tensor

from .problems import slope
from .variant import Variant

EXPECTED = """Theorem 3: (1/T)Σ ∇θᵀ(θ_t − θ_t+1)/η falls as T^-½. Theorem 4: with ‖A‖ ≤ D_A and ‖B‖ ≤ D_B the average
regret is O(G·D_A·D_B·T^-½) for LoRA-RITE (V summed, ρ on, no first moment) and O(G·(D_A² + D_B²)·T^-½) for one-sided
Adagrad on each factor. Rescaling (B, A) to (B/s, sA) leaves D_A·D_B and multiplies (D_A² + D_B²)/2 by (s² + s^-2)/2:
the regret of LoRA-RITE should not change at all, Adagrad's should grow in proportion to D_A/D_B = s² until nothing is
learnt. Both at their best constant lr, found anew for each imbalance."""


class OneSidedAdagrad(torch.optim.Optimizer):
    """X ← X − lr·g·(Σ gᵀg)^-½ for both tall factors: full-matrix Adagrad on the side of the rank."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                g = p.grad.mT if i % 2 == 0 else p.grad
                state = self.state[p]
                state["sum"] = state.get("sum", 0.0) + g.mT @ g
                values, u = torch.linalg.eigh(state["sum"])
                s = g @ (u / (values.clamp(min=0).sqrt() + 1e-12)) @ u.mT
                p -= group["lr"] * (s.mT if i % 2 == 0 else s)


def theorem_3(pair: list[Tensor], lr: float) -> torch.optim.Optimizer:
    """LoRA-RITE as the theorems have it."""
    return Variant(
        pair, lr, betas=(0.0, 1.0), eps=1e-12, damping=0.0, relative_eps=0.0, rows=None, clip_unmagnified_grad=0.0,
        apply_escape=True,
    )  # fmt: skip


OPTIMIZERS: dict[str, Any] = {"LoRA-RITE": theorem_3, "one-sided Adagrad": OneSidedAdagrad}


def run(
    size: int = 8,
    rank: int = 2,
    steps: int = 2048,
    imbalances: tuple[float, ...] = (1.0, 1e1, 1e2, 1e3, 1e4),
    lrs: tuple[float, ...] = tuple(2.0**k for k in range(-7, 6)),
    seeds: int = 2,
) -> dict[str, Any]:
    """Online absolute regression |⟨xyᵀ, W⟩ − ⟨xyᵀ, W*⟩| with unit x and y (convex in W, G = 1, smallest loss 0).

    The factors start at random and are as large as those of W* (norms √r each before the rescaling).
    """
    times = [2**k for k in range(4, int(math.log2(steps)) + 1)]
    rows = []
    for name, make in OPTIMIZERS.items():
        for imbalance in imbalances:
            for lr in lrs:
                # η in units of the factors would be tuned per factor; one lr for both is what the theorem has
                runs = [_regret(make, lr, size, rank, steps, imbalance, seed) for seed in range(seeds)]
                mean = [sum(values) / seeds for values in zip(*(r[0] for r in runs), strict=True)]
                first_order = [sum(values) / seeds for values in zip(*(r[1] for r in runs), strict=True)]
                rows.append({"optimizer": name, "imbalance": imbalance, "lr": lr,
                             "regret": [mean[t - 1] for t in times],
                             "first_order": [first_order[t - 1] for t in times]})  # fmt: skip
    best, late = [], len(times) // 3
    for name in OPTIMIZERS:
        for imbalance in imbalances:
            own = [r for r in rows if (r["optimizer"], r["imbalance"]) == (name, imbalance)]
            lowest = [min(r["regret"][i] for r in own) for i in range(len(times))]  # the best lr for each T
            chosen = min(own, key=lambda r: r["regret"][-1])
            best.append({"optimizer": name, "imbalance": imbalance, "lr": chosen["lr"], "regret": lowest,
                         "first_order": chosen["first_order"],
                         "slope": slope(times[late:], lowest[late:]),
                         "first_order_slope": slope(times[late:], chosen["first_order"][late:])})  # fmt: skip
    settings = {"size": size, "rank": rank, "steps": steps, "imbalances": imbalances, "lrs": lrs, "seeds": seeds}
    return {"settings": settings, "times": times, "rows": rows, "best": best}


def _regret(
    make: Any, lr: float, size: int, rank: int, steps: int, imbalance: float, seed: int
) -> tuple[list[float], list[float]]:
    """For T = 1, 2, …: the average regret (1/T)Σ loss_t, and (1/T)Σ ∇θᵀ(θ_t − θ_t+1)/η."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    orthonormal = lambda: torch.linalg.qr(draw(size, rank))[0]
    target = orthonormal() @ orthonormal().mT
    s = imbalance**0.5
    pair = [torch.nn.Parameter(orthonormal().mT * s), torch.nn.Parameter(orthonormal() / s)]
    optimizer = make(pair, lr)
    regret, first_order, sums = [], [], [0.0, 0.0]
    for step in range(1, steps + 1):
        x, y = (v / v.norm() for v in (draw(size), draw(size)))
        a, b = (p.detach().clone() for p in pair)
        error = x @ b @ (a @ y) - x @ target @ y
        sign = error.sign()
        gradients = sign * torch.outer(b.mT @ x, y), sign * torch.outer(x, a @ y)
        pair[0].grad, pair[1].grad = gradients
        optimizer.step()
        if not all(p.isfinite().all() for p in pair):
            return [*regret, *[math.inf] * (steps - step + 1)], [*first_order, *[math.inf] * (steps - step + 1)]
        sums[0] += float(error.abs())
        moved = sum((g * (old - p.detach())).sum() for g, p, old in zip(gradients, pair, (a, b), strict=True))
        sums[1] += float(moved) / lr
        regret.append(sums[0] / step)
        first_order.append(sums[1] / step)
    return regret, first_order


def found(result: dict[str, Any]) -> str:
    parts = []
    for name in OPTIMIZERS:
        own = [b for b in result["best"] if b["optimizer"] == name]
        values = ", ".join(f"{b['regret'][-1]:.3g} at {b['imbalance']:g}" for b in own)
        parts.append(
            f"{name}: average regret at T = {result['times'][-1]} for D_A/D_B: {values}; falls as "
            f"T^{own[0]['slope']:.2f} and Theorem 3's sum as T^{own[0]['first_order_slope']:.2f} (balanced factors)"
        )
    return ". ".join(parts) + "."


def plot(result: dict[str, Any], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    times, own = result["times"], []
    for i, name in enumerate(OPTIMIZERS):
        own = [b for b in result["best"] if b["optimizer"] == name]
        for j, b in enumerate(own):
            label = f"{name}, D_A/D_B {b['imbalance']:g}"
            left.loglog(times, b["regret"], color=f"C{i}", alpha=1 - 0.18 * j, label=label)
        right.loglog([b["imbalance"] for b in own], [b["regret"][-1] for b in own], marker="o", label=name)
    start = result["best"][0]["regret"][0]
    left.loglog(times, [start * (times[0] / t) ** 0.5 for t in times], "k:", label="T^-½")
    left.set(xlabel="T", ylabel="average regret (best lr)", title="over time")
    right.set(
        xlabel="D_A / D_B", ylabel=f"average regret at T = {times[-1]}", title="over the imbalance of the factors"
    )
    for axis in (left, right):
        axis.legend(fontsize="x-small")
        axis.grid(alpha=0.3)
