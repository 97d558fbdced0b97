"""Where the published step blows up, why, and what damping changes and costs."""

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import LoRARiteValueError
from ..optim.optimizer import LoRARite
from ..options import PUBLISHED
from .variant import Variant

EXPECTED = """After the first step from B = 0, B's singular values are about lr·√m along the gradient's directions,
and rounding noise (1e-16 or 1e-7 of that) along the r − k others, k the rank of the gradient. T_B⁺ inverts them, A
moves by lr over the noise in the second step, and B multiplies that into W in the third: the second-order term
lr²·M_B(T_B·T_Aᵀ)⁻¹M_Aᵀ. So the published step should blow up where k < r, from the third step on, at every lr, and
more in float64 than in float32 as the noise is smaller there; and not where k ≥ r. Damped, W should stay within a
random walk of its steps everywhere, and the loss where k ≥ r should not suffer by more than the held-back start of
A."""


def optimizers() -> dict[str, Any]:
    """Label → maker (pair, lr). The published step is run as the authors' code is (QR and pinv with its tolerance),
    from the package that carries it, and as ours is, which counts rounding noise as null."""
    try:
        from pytorch_optimizer import LoRARite as Authors  # type: ignore[import-not-found]
    except ImportError:
        raise LoRARiteValueError('needs the published code: pip install "lora-rite[bench]"') from None
    return {
        "published (pytorch_optimizer)": lambda pair, lr: Authors(pair, lr=lr),
        "published, pinv of the dtype": lambda pair, lr: Variant(
            pair, lr, damping=0.0, rows=None, relative_eps=0.0, update_skipping=1.0,
            null=2e-15 if pair[0].dtype == torch.float64 else 1e-6,
        ),
        "published, noise is null (ours)": lambda pair, lr: LoRARite(pair, lr=lr, **PUBLISHED),
        "damping 0": lambda pair, lr: LoRARite(pair, lr=lr, damping=0.0),
        "damping 1": lambda pair, lr: LoRARite(pair, lr=lr, damping=1.0),
        "damping 20": lambda pair, lr: LoRARite(pair, lr=lr),
        "damping 100": lambda pair, lr: LoRARite(pair, lr=lr, damping=100.0),
    }  # fmt: skip


def run(
    rank: int = 8,
    n: int = 50,
    m: int = 40,
    gradient_ranks: tuple[int, ...] = (1, 2, 4, 7, 8, 16),
    lrs: tuple[float, ...] = (1e-3, 1e-2, 1e-1),
    steps: int = 100,
    seeds: int = 3,
) -> dict[str, Any]:
    """Two problems from B = 0. ``noise``: random gradients of W of rank k; the largest ‖W‖ on the way, in units of
    lr·√steps·√(m·r), what a random walk of full steps comes to. ``learn``: least squares on k samples a step with a
    target of rank 4; the loss at the end, at its start 1."""
    rows = []
    for name, make in optimizers().items():
        for dtype in (torch.float64, torch.float32):
            for k in gradient_ranks:
                for lr in lrs:
                    for problem, one in (("noise", _noise), ("learn", _learn)):
                        values = [one(make, dtype, k, lr, rank, n, m, steps, seed) for seed in range(seeds)]
                        rows.append({"optimizer": name, "dtype": str(dtype)[6:], "gradient_rank": k, "lr": lr,
                                     "problem": problem, "values": values, "worst": max(values)})  # fmt: skip
    settings = {"rank": rank, "n": n, "m": m, "gradient_ranks": gradient_ranks, "lrs": lrs, "steps": steps,
                "seeds": seeds}  # fmt: skip
    return {"settings": settings, "rows": rows}


def _start(rank: int, n: int, m: int, dtype: torch.dtype, seed: int) -> tuple[list[Any], Any]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    pair = [torch.nn.Parameter((draw(rank, n) * n**-0.5).to(dtype)), torch.nn.Parameter(torch.zeros(m, rank).to(dtype))]
    return pair, draw


def _step(optimizer: torch.optim.Optimizer, pair: list[Any], left: Tensor, right: Tensor) -> float:
    """A step with the gradient left·right of W; ‖W‖ after it (inf where it is not finite)."""
    a, b = (p.detach() for p in pair)
    left, right = left.to(a.dtype), right.to(a.dtype)
    pair[0].grad, pair[1].grad = (b.mT @ left) @ right, left @ (right @ a.mT)
    try:
        optimizer.step()
    except (RuntimeError, torch.linalg.LinAlgError):  # not finite
        return math.inf
    norm = float((pair[1].detach().double() @ pair[0].detach().double()).norm())
    return norm if math.isfinite(norm) else math.inf


def _noise(make: Any, dtype: torch.dtype, k: int, lr: float, rank: int, n: int, m: int, steps: int, seed: int) -> float:
    pair, draw = _start(rank, n, m, dtype, seed)
    optimizer = make(pair, lr)
    norms = []
    for _ in range(steps):
        norms.append(_step(optimizer, pair, 0.1 * draw(m, k), draw(k, n)))
        if norms[-1] == math.inf:
            break
    return max(norms) / (lr * (steps * m * rank) ** 0.5)


def _learn(make: Any, dtype: torch.dtype, k: int, lr: float, rank: int, n: int, m: int, steps: int, seed: int) -> float:
    pair, draw = _start(rank, n, m, dtype, seed)
    target = draw(m, 4) @ draw(4, n) / (4 * n) ** 0.5
    optimizer = make(pair, lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        x = draw(k, n)
        error = x @ ((pair[1] @ pair[0]).detach().double() - target).mT
        if _step(optimizer, pair, error.mT / k, x) == math.inf:
            return math.inf
    return float(((pair[1] @ pair[0]).detach().double() - target).square().sum() / target.square().sum())


def found(result: dict[str, Any]) -> str:
    settings, rows = result["settings"], result["rows"]
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    below = [k for k in settings["gradient_ranks"] if k < settings["rank"]]

    def worst(name: str, problem: str, dtype: str, ks: list[int]) -> float:
        return max(
            r["worst"]
            for r in rows
            if (r["optimizer"], r["problem"], r["dtype"]) == (name, problem, dtype) and r["gradient_rank"] in ks
        )

    def best(name: str, ks: list[int]) -> float:
        """Mean over k of the loss at the best lr, float32."""
        losses = [
            min(sum(r["values"]) / len(r["values"]) for r in rows
                if (r["optimizer"], r["problem"], r["dtype"], r["gradient_rank"]) == (name, "learn", "float32", k))
            for k in ks
        ]  # fmt: skip
        return sum(losses) / len(losses)

    above = [k for k in settings["gradient_ranks"] if k >= settings["rank"]]
    parts = [
        f"{name}: largest ‖W‖ in random walks {worst(name, 'noise', 'float64', below):.1e} (k < r, float64), "
        f"{worst(name, 'noise', 'float32', below):.1e} (float32), {worst(name, 'noise', 'float64', above):.1e} "
        f"(k ≥ r, float64); least squares at the best lr {best(name, below):.2f} (k < r) and {best(name, above):.2f} "
        f"(k ≥ r)"
        for name in names
    ]
    return "; ".join(parts) + "."


def plot(result: dict[str, Any], figure: Any) -> None:
    settings, rows = result["settings"], result["rows"]
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    axes = figure.subplots(1, 3)
    panels = [("noise", "float64"), ("noise", "float32"), ("learn", "float32")]
    lr = settings["lrs"][len(settings["lrs"]) // 2]
    for axis, (problem, dtype) in zip(axes, panels, strict=True):
        for i, name in enumerate(names):
            own = {
                r["gradient_rank"]: r["worst"]
                for r in rows
                if (r["optimizer"], r["problem"], r["dtype"], r["lr"]) == (name, problem, dtype, lr)
            }
            axis.loglog(list(own), [min(v, 1e12) for v in own.values()], marker=".", color=f"C{i}", label=name)
        axis.axvline(settings["rank"], color="black", linewidth=0.7)
        axis.set(title=f"{problem}, {dtype}, lr {lr:g}", xlabel="rank k of the gradient (line: r)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("largest ‖W‖ / (lr·√(steps·m·r))")
    axes[2].set_ylabel("loss at the end")
    axes[0].legend(fontsize="x-small")
