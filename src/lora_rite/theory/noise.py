"""Long runs: 20,000 steps of noise, and a weak signal in heavy noise."""

import math
from typing import Any

import torch

from ..optim.optimizer import LoRARite
from ..plan.state import MATRICES
from .problems import rite

EXPECTED = """White noise has nothing to learn: W should do a random walk, ‖W‖ growing no faster than √steps at a
constant lr, factors should grow no more than W needs (‖A‖ and ‖B‖ of the order of √‖W‖, or of what they were), bases
stay orthonormal and V symmetric, in float32 and in bfloat16. Heavy noise on top of a signal (as of differentially
private training: here 10 and 100 times the signal's gradient): the step stays bounded by lr·√(rows·r) per factor
whatever the noise, and the distance to the target falls or stays, it does not blow up."""


def run(
    steps: int = 20_000, rank: int = 8, n: int = 40, m: int = 30, lr: float = 1e-3, seed: int = 0, points: int = 40
) -> dict[str, Any]:
    """Noise: gradients of W with independent entries, of full rank and of rank 2, from B = 0. Signal: the gradient
    W − W* of ‖W − W*‖²/2 with ‖W*‖ = 1 of rank 4, plus noise of a multiple of its norm at the start; lr falls as a
    cosine there."""
    times = sorted({round(steps ** (i / (points - 1))) for i in range(points)})
    walks = [
        {"dtype": dtype, "gradient_rank": k or min(m, n), **_walk(dtype, k, steps, rank, n, m, lr, seed, times)}
        for dtype in ("float32", "bfloat16")
        for k in (2, 0)
    ]
    signals = [
        {"noise": noise, "optimizer": name, **_signal(make, noise, steps // 10, rank, n, m, 10 * lr, seed)}
        for noise in (0.0, 10.0, 100.0)
        for name, make in (("LoRARite", rite()), ("LoRARite, damping 0", rite(damping=0.0)))
    ]
    settings = {"steps": steps, "rank": rank, "n": n, "m": m, "lr": lr, "seed": seed}
    return {"settings": settings, "times": times, "walks": walks, "signals": signals}


def _pair(rank: int, n: int, m: int, dtype: torch.dtype, generator: torch.Generator) -> list[torch.nn.Parameter]:
    a = torch.randn(rank, n, generator=generator) * n**-0.5
    return [torch.nn.Parameter(a.to(dtype)), torch.nn.Parameter(torch.zeros(m, rank, dtype=dtype))]


def _set(pair: list[torch.nn.Parameter], g: torch.Tensor) -> None:
    a, b = (p.detach().float() for p in pair)
    pair[0].grad, pair[1].grad = (b.mT @ g).to(pair[0].dtype), (g @ a.mT).to(pair[1].dtype)


def _walk(
    name: str, k: int, steps: int, rank: int, n: int, m: int, lr: float, seed: int, times: list[int]
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    dtype = getattr(torch, name)
    pair = _pair(rank, n, m, dtype, generator)
    optimizer = LoRARite(pair, lr=lr)
    norms: dict[str, list[float]] = {"w": [], "a": [], "b": []}
    drift = 0.0
    for step in range(1, steps + 1):
        _set(pair, draw(m, k) @ draw(k, n) / k**0.5 if k else draw(m, n))
        optimizer.step()
        if step in times:
            a, b = (p.detach().double() for p in pair)
            for key, value in (("w", b @ a), ("a", a), ("b", b)):
                norms[key].append(float(value.norm()))
            drift = max(drift, *(_drift(optimizer.state[p], x) for p, x in zip(pair, (a.mT, b), strict=True)))
    late = len(times) // 2
    exponent = (math.log(norms["w"][-1]) - math.log(norms["w"][late])) / (math.log(times[-1]) - math.log(times[late]))
    return {
        **norms,
        "exponent": exponent,
        "drift": drift,
        # in a balanced factorisation both factors have a norm of at least √‖W‖ and at most √(√r·‖W‖)
        "excess": max(norms["a"][-1], norms["b"][-1]) / (rank**0.5 * norms["w"][-1]) ** 0.5,
        "skipped": optimizer.report()["skipped"],
    }


def _drift(state: dict[str, torch.Tensor], x: torch.Tensor) -> float:
    """How far the kept basis is from orthonormal directions, or V from symmetric (relative), whichever is more."""
    q = x @ state["matrices"][MATRICES.index("basis")].double()
    live = q.mT @ q  # a projection: those that X has not are left out
    v = state["matrices"][MATRICES.index("second_moment")]
    return max(float((live @ live - live).abs().max()), float((v - v.mT).abs().max() / v.abs().max()))


def _signal(make: Any, noise: float, steps: int, rank: int, n: int, m: int, lr: float, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    target = draw(m, 4) @ draw(4, n)
    target /= target.norm()
    pair = _pair(rank, n, m, torch.float32, generator)
    optimizer = make(pair, lr)
    largest, size = 0.0, noise / (m * n) ** 0.5
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = now = lr * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps))
        before = (pair[1] @ pair[0]).detach()
        _set(pair, before - target + size * draw(m, n))
        optimizer.step()
        change = (pair[1] @ pair[0]).detach() - before
        largest = max(largest, float(change.norm()) / (now * ((m * rank) ** 0.5 + (n * rank) ** 0.5)))
    distance = float(((pair[1] @ pair[0]).detach() - target).norm())
    return {"distance": distance, "largest_step": largest}


def found(result: dict[str, Any]) -> str:
    last = result["times"][-1]
    walks = [
        f"{w['dtype']}, gradients of rank {w['gradient_rank']}: ‖W‖ {w['w'][-1]:.2f} after {last} steps, growing as "
        f"steps^{w['exponent']:.2f} in the second half (in logarithms), the larger factor {w['excess']:.2f} times "
        f"√(√r·‖W‖), drift of bases and V {w['drift']:.1e}, {w['skipped']} steps skipped"
        for w in result["walks"]
    ]
    signals = [
        f"{s['optimizer']}, noise {s['noise']:g}: distance to the target 1 → {s['distance']:.2f}, largest change of W "
        f"in a step {s['largest_step']:.2f} × lr·(√(m·r) + √(n·r))"
        for s in result["signals"]
    ]
    return "; ".join(walks) + ". " + "; ".join(signals) + "."


def plot(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots(1, 2)
    for axis, key, title in zip(axes, ("w", "b"), ("‖W‖", "‖A‖ (--) and ‖B‖ (—)"), strict=True):
        for i, walk in enumerate(result["walks"]):
            label = f"{walk['dtype']}, gradients of rank {walk['gradient_rank']}"
            axis.loglog(result["times"], walk[key], color=f"C{i}", label=label)
            if key == "b":
                axis.loglog(result["times"], walk["a"], "--", color=f"C{i}")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    times = result["times"]
    axes[0].loglog(times, [result["walks"][0]["w"][0] * t**0.5 for t in times], "k:", label="√steps")
    axes[0].legend(fontsize="small")
