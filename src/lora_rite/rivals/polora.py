"""PoLoRA (Ghosh, Parshakova, Gower 2026, arXiv:2607.17620)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..plan.state import State
from .base import PairOptimizer, Side
from .iterations import inverse_root, largest_eigenvalue, polar_factors, spectral_norms

#: Of the curvature before the first step, and the least that is added to a matrix: the authors' ε.
LEAST = 1e-12


class PoLoRA(PairOptimizer):
    """PoLoRA's Algorithm 1: a matrix sign in a metric of the curvature, and steps of a fixed spectral norm.

    With G the gradients, B (m, r), A (r, n), q (n) and p (m)::

        M ← β₁M + (1 − β₁)G,  M̂ = β₁M + (1 − β₁)G                      of both factors
        Q = diag(q/max q),  P = diag(p/max p),  C_A = BᵀPB,  C_B = AQAᵀ
        D_A = C_A^-½ msign(C_A^-½ M̂_A Q^-½) Q^-½,  D_B = P^-½ msign(P^-½ M̂_B C_B^-½) C_B^-½
        ρ = lr/(‖A‖₂ + ‖B‖₂),  A ← A − ρ D_A/‖D_A‖₂,  B ← B − ρ D_B/‖D_B‖₂
        q ← β₂q + (1 − β₂) diag(G_Aᵀ C_A⁻¹ G_A)/r,  p ← β₂p + (1 − β₂) diag(G_B C_B⁻¹ G_Bᵀ)/r

    The defaults are the paper's (its table of hyperparameters: β₁ 0.9, β₂ 0.99, δ 1e-4, eight iterations); its best lr
    is 1e-2 at every rank, with α = r. Two things differ from the authors' code, which computes the same: spectral
    norms come from powers of r×r matrices instead of warm-started power iterations (theirs are too small by up to some
    percent in the first steps, ours too large by 0.07% at r = 16), and what theirs refuses (convolutions, a step in
    which a pair has no gradient) is taken, see :class:`PairOptimizer`. Weight decay is ours, as AdamW's.

    Args:
        params: the model, or its ``named_parameters()``.
        lr: the spectral norm that a step writes into W = BA at most, to first order.
        betas: of the momentum and of the curvature.
        damping: δ. The inverse roots are those of P + δ, Q + δ and C + δλ_max(C).
        weight_decay: decoupled, of both factors.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        damping: float = 1e-4,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "damping": damping, "weight_decay": weight_decay})

    def new_state(self, x: Tensor) -> State:
        return {"momentum": torch.zeros_like(x), "curvature": torch.full_like(x[..., 0], LEAST)}

    def update(self, sides: tuple[Side, Side], group: dict[str, Any]) -> list[Tensor]:
        (beta, beta_curvature), lr, damping = group["betas"], group["lr"], group["damping"]
        xs = [side.x for side in sides]
        ahead, rows = [], []
        for side in sides:
            momentum = side.state["momentum"].lerp(side.grad, 1 - beta)
            side.state["momentum"] = momentum
            ahead.append(momentum.lerp(side.grad, 1 - beta))
            curvature = side.state["curvature"]
            rows.append((curvature / curvature.amax(-1, keepdim=True) + damping)[..., None])
        metric = torch.stack([x.mT @ (row * x) for x, row in zip(xs, rows, strict=True)])
        added = (damping * largest_eigenvalue(metric)).clamp_min(LEAST)
        eye = torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device)
        roots = inverse_root(metric + added * eye).flip(0)  # A is stepped in the metric of B, and B in that of A
        whitened = [(m * row.rsqrt()) @ root for m, row, root in zip(ahead, rows, roots, strict=True)]
        signs = polar_factors(whitened)
        directions = [row.rsqrt() * (sign @ root) for sign, row, root in zip(signs, rows, roots, strict=True)]
        *norms, norm_a, norm_b = spectral_norms(xs + directions)
        step, keep = lr / sum(norms).clamp_min(LEAST), 1 - lr * group["weight_decay"]  # type: ignore[union-attr]
        for side, root in zip(sides, roots, strict=True):
            squares = (side.grad @ root).square().sum(-1) / root.shape[-1]
            side.state["curvature"] = side.state["curvature"].lerp(squares, 1 - beta_curvature)
        return [
            keep * x - step * direction / norm.clamp_min(LEAST)
            for x, direction, norm in zip(xs, directions, (norm_a, norm_b), strict=True)
        ]
