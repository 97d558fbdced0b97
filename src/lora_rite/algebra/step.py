"""The equations of the step in the paper's order (Algorithm 1), for the r×r matrices of p factors at once.

A pair adds W = B·A to a layer. Both factors are handled tall: X is Aᵀ (n, r) or B (m, r), and Y is the other one, so
one code path serves both sides. With X = Q·T, Q orthonormal (its *basis*), T (r, r) its *coordinates*:

    K   with Q = X·K ("basis" in the state): never a tall matrix is decomposed, and none is stored
    D   the *unmagnifier*: ḡ = g·D is the unmagnified gradient of X; D = T_Y⁺ as published (Eq. 7), or its damped form
    V   (r, r) second moment of ḡ;  M (rows, r) first moment of the preconditioned ḡ; both in the basis of Y
    P   (r, r) = Q_newᵀ·Q_old of Y, carries V and M from the old basis of Y into the new one
    X ← X − lr·M·Dᵀ  (Eq. 11)

Shapes: p factors, ``num_rows`` = n or m, r rank. r×r tensors are (p, r, r) in the *algebra* dtype, float64 or float32;
numbers of a factor (p, 1, 1). Tall tensors are in :mod:`lora_rite.execute.tall`. Paper: Yen et al., "LoRA Done RITE",
arXiv 2410.20625.
"""

import torch
from torch import Tensor

from .linalg import eigh, eye_like, finite, inverse_root, stacked_inverse, trace

#: What is added to the root mean square of each row of S, in units of that of all rows: rows of nothing but rounding
#: noise are then not equilibrated to full size. (Not in units of the largest, which may be √(rows/r) times as large, as
#: of an outlier feature or of the most frequent token: small rows would then not be equilibrated.)
ROW_FLOOR = 1e-2


def bias_corrected_decay(step: Tensor, beta: Tensor) -> Tensor:
    """β(1 − βᵗ⁻¹)/(1 − βᵗ): the decay that makes an exponential average unbiased at the 1-based step t; 1 for β = 1."""
    return torch.where(beta == 1, beta, beta * (1 - beta ** (step - 1)) / (1 - beta**step))


def damped_inverse(s: Tensor, delta: Tensor) -> Tensor:
    """V diag(σ/(σ² + δ²)) Uᵀ of S = U diag(σ) Vᵀ (p, r, r), for δ (p, 1, 1).

    With S = T_Y·T_Xᵀ, whose σ are the singular values of BA itself, D = T_Xᵀ times this is T_Y⁻¹ times σ²/(σ² + δ²)
    along the singular directions of BA: the damped T_Y⁺ of the side X, invariant also where Y is rank-deficient. 0
    where σ = 0, also for δ = 0.

    δ is at least 1e-6·‖S‖ (in float64; eps^⅜), so that σ that are rounding noise count for little.
    """
    good = finite(s)
    s = torch.where(good, s, 0)
    least = torch.finfo(torch.float64).eps ** 0.375 * torch.linalg.matrix_norm(s, keepdim=True)
    delta = delta.maximum(least).clamp_min(1e-30)
    inverse = stacked_inverse(torch.cat([s, delta * eye_like(s)], -1), passes=2)
    return torch.where(good, inverse, torch.nan)


def second_moment(moment: Tensor, squares: Tensor, decay: Tensor, summed: bool) -> Tensor:
    """V ← β₂ₜ·V + (1−β₂ₜ)·``squares``, of ``squares`` = ḡᵀḡ/rows; V ← V + ``squares`` where ``summed`` (Algorithm 1,
    Theorems 3 and 4)."""
    return moment + squares if summed else decay * moment + (1 - decay) * squares


def preconditioner(
    moment: Tensor, escaped: Tensor, eps: float, relative_eps: float, iterate: bool = False, asks: bool = True
) -> Tensor:
    """U diag(1/(√(λ+ρ) + eps + relative_eps·√(λ+ρ)_max)) Uᵀ of V = U diag(λ) Uᵀ (Eq. 8), for ρ (p, 1, 1).

    ``relative_eps`` keeps directions of V that are rounding noise from being whitened to full size, invariantly, and
    whatever the scale of the gradient. Without eigenvalues where ``iterate``, and then with answers to the host where
    it ``asks``.
    """
    if iterate:
        return inverse_root(moment + escaped * eye_like(moment), eps, relative_eps, asks)
    w, u = eigh(moment)
    root = (w.clamp_min(0) + escaped[..., 0]).sqrt()
    inverse = 1 / (root + eps + relative_eps * root[..., -1:])
    return (u * inverse[..., None, :]) @ u.mT


def row_scales(squares: Tensor, row_moment: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """A factor for each row of S (p, rows, r), 1/(√R + ROW_FLOOR·√mean R), from the sums of the squares of its rows,
    R, their mean squares averaged over steps, both (p, rows, 1), and the mean of R over all rows (p, 1, 1). Returns the
    factors, and ‖S‖² and ‖factors∘S‖² (p, 1, 2).

    Norms of rows do not see rotations of the basis: exactly invariant.
    """
    factors = (row_moment.sqrt() + ROW_FLOOR * mean.sqrt() + 1e-12).reciprocal()
    sums = [squares.sum(-2, keepdim=True), (squares * factors.square()).sum(-2, keepdim=True)]
    return factors, torch.cat(sums, -1)


def capped(step: Tensor, norm: Tensor, num_rows: Tensor | int, cap: float) -> Tensor:
    """``step`` (p, r, r), smaller where M (of that many rows, with Frobenius norm ``norm`` (p, 1, 1)) has a root mean
    square above ``cap``; as it is where ``cap`` is 0."""
    return step / (norm / (num_rows * step.shape[-1]) ** 0.5 / cap).clamp_min(1) if cap else step


def transport(moment: Tensor, p: Tensor) -> Tensor:
    """V in the new basis: P·V·Pᵀ."""
    return p @ moment @ p.mT


def escaped_mass(old: Tensor, new: Tensor) -> Tensor:
    """min(max_i (λ_i(V_old) − λ_i(V_new))₊, (tr V_old − tr V_new)₊): what the new basis no longer sees (d_λ of Alg. 1).

    old, new (p, r, r); returns (p, 1, 1).
    """
    lost = eigh(old)[0] - eigh(new)[0]
    return lost.amax(-1)[..., None, None].clamp_min(0).minimum(trace(old - new).clamp_min(0))
