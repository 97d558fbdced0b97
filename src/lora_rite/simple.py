"""LoRA-RITE for one pair as in the paper (Yen et al., arXiv 2410.20625, Algorithm 1), plus damping and even rows.

In float64, slow, without safeguards: to read, and to test against. W = B·A, with A (r, n) and B (m, r). X is Aᵀ (n, r)
or B (m, r), and Y the other one: with G = ∂loss/∂W, X's gradient is G·Y (or Gᵀ·Y). k is the smaller of r and Y's rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.999)  # β₂ = 1: V is a sum, as in Algorithm 1
    eps: float = 1e-6
    relative_eps: float = 1e-3
    damping: float = 20.0  # 0: the published step
    row_beta: float | None = 0.99  # None: the published step
    row_floor: float = 1e-2
    clip: float = 1.0
    weight_decay: float = 0.0
    escape: bool = False  # whether ρ of Algorithm 1 is kept
    null: float = 1e-11  # singular values of a factor up to this share of the largest one count as zero


class Moments:
    """What is kept of a factor X between steps, in the basis of Y."""

    def __init__(self, x: Tensor, y: Tensor):
        k = min(y.shape)
        self.first = x.new_zeros(len(x), k)  # M
        self.second = x.new_zeros(k, k)  # V
        self.rows = x.new_zeros(len(x), 1)  # R, the average squares of the rows of S
        self.escaped: float | Tensor = 0.0  # ρ
        self.basis: Tensor | None = None  # Q of Y (rows of Y, k) in the last step
        self.t = 0


def initial_state(a: Tensor, b: Tensor) -> tuple[Moments, Moments, bool]:
    """Moments of A and of B, and whether it is A's inverse that is damped: that of the factor which starts at zero."""
    return Moments(a.mT, b), Moments(b, a.mT), not a.any() and bool(b.any())


def step(a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, state: tuple, o: Options) -> tuple[Tensor, Tensor]:
    """The factors after one step; advances the moments. (The clip is over all pairs, of which there is one here.)"""
    moments_a, moments_b, damps_a = state
    (q_a, d_a), (q_b, d_b) = bases(a, b, damps_a, o)
    g_a, g_b = grad_a.mT @ d_b, grad_b @ d_a  # unmagnified gradients ḡ (rows of X, k), Eq. 7
    scale = clip_scale([g_a, g_b], o.clip)
    return move(a.mT, scale * g_a, q_b, d_b, moments_a, o).mT, move(b, scale * g_b, q_a, d_a, moments_b, o)


def bases(a: Tensor, b: Tensor, damps_a: bool, o: Options) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of A and of B: Q, and D (r, k) with ḡ = g·D: T⁺ as published, damped for one of them."""
    (q_a, t_a, d_a), (q_b, t_b, d_b) = polar(a.mT, o.null), polar(b, o.null)
    if o.damping and damps_a:
        d_a = damped_inverse(t_a, t_b, o.damping * o.lr * a.shape[1] ** 0.5)
    elif o.damping:
        d_b = damped_inverse(t_b, t_a, o.damping * o.lr * b.shape[0] ** 0.5)
    return (q_a, d_a), (q_b, d_b)


def polar(y: Tensor, null: float) -> tuple[Tensor, Tensor, Tensor]:
    """Y = Q·T with orthonormal columns of Q (zero where Y has no rank), T (k, r), and T⁺."""
    u, sigma, vh = torch.linalg.svd(y, full_matrices=False)
    live = (sigma > null * sigma[0]).to(y.dtype)
    return u * live, (sigma * live)[:, None] * vh, vh.mT * torch.where(live > 0, 1 / sigma, 0)


def damped_inverse(t_y: Tensor, t_x: Tensor, delta: float) -> Tensor:
    """Ours: T_Y⁻¹, times σ²/(σ² + δ²) along the singular directions of B·A, whose singular values are σ."""
    u, sigma, vh = torch.linalg.svd(t_y @ t_x.mT, full_matrices=False)
    return t_x.mT @ vh.mT @ torch.where(sigma > 1e-15 * sigma[0], sigma / (sigma**2 + delta**2), 0).diag() @ u.mT


def clip_scale(gradients: list[Tensor], clip: float) -> float:
    norm = float(sum(g.square().sum() for g in gradients)) ** 0.5
    return clip / norm if clip and norm > clip else 1.0


def move(x: Tensor, g: Tensor, q: Tensor, d: Tensor, kept: Moments, o: Options) -> Tensor:
    """X after the step, from its unmagnified gradient, and Q and D of Y."""
    p = transport_and_accumulate(g, q, kept, o)
    s = g @ inverse_root(kept, o)  # the preconditioned gradient, Eq. 8
    s = s if o.row_beta is None else equilibrated(s, kept, o.row_beta, o.row_floor)
    beta = bias_corrected(o.betas[0], kept.t)
    kept.first = beta * kept.first @ p.mT + (1 - beta) * s
    return x - o.lr * (kept.first @ d.mT + o.weight_decay * x)  # Eq. 11


def transport_and_accumulate(g: Tensor, q: Tensor, kept: Moments, o: Options) -> Tensor:
    """V and ρ of this step, and P (k, k), which carries moments from the old basis of Y into the new one."""
    kept.t += 1
    beta = bias_corrected(o.betas[1], kept.t)
    p = torch.eye(q.shape[1], dtype=q.dtype) if kept.basis is None else q.mT @ kept.basis
    old, moved, kept.basis = kept.second, p @ kept.second @ p.mT, q
    if o.escape:  # d_λ, the mass of V that the new basis does not see
        lost = (torch.linalg.eigvalsh(old) - torch.linalg.eigvalsh(moved)).max().clamp(min=0)
        kept.escaped = beta * (kept.escaped + lost.minimum((old.trace() - moved.trace()).clamp(min=0)))
    kept.second = beta * moved + (1 - beta if beta < 1 else 1) * g.mT @ g / len(g)
    return p


def inverse_root(kept: Moments, o: Options) -> Tensor:
    values, u = torch.linalg.eigh(kept.second)
    root = (values.clamp(min=0) + kept.escaped).sqrt()
    return u @ (1 / (root + o.eps + o.relative_eps * root[-1])).diag() @ u.mT


def equilibrated(s: Tensor, kept: Moments, row_beta: float, floor: float) -> Tensor:
    """Ours: each row of S over its average size, the norm of S as it was."""
    beta = bias_corrected(row_beta, kept.t)
    kept.rows = beta * kept.rows + (1 - beta) * s.square().mean(1, keepdim=True)
    even = s / (kept.rows.sqrt() + floor * kept.rows.mean().sqrt() + 1e-12)
    return even * s.norm() / even.norm().clamp(min=1e-30)


def bias_corrected(beta: float, t: int) -> float:
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t) if beta < 1 else 1.0
