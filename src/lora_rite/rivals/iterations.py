"""Functions of positive semidefinite r×r matrices by products alone, in batches; the host waits for nothing."""

import torch
from torch import Tensor

#: Polar Express (Amsel et al., arXiv:2505.16932): odd polynomials ax + bx³ + cx⁵ that bring singular values from 1e-3
#: to 1 in this order, the values that PoLoRA takes. All but the last are used a little away from 1, see ``SAFETY``.
POLAR_EXPRESS = (
    (8.31968561540051, -23.85945031896673, 17.53144504181025),
    (4.123266419055485, -2.980709974760902, 0.5520797360741728),
    (3.9656114721772022, -2.941248486368672, 0.5589295013119786),
    (3.3312009004415994, -2.4980080275937966, 0.5111272954169234),
    (2.320007312889811, -1.6862169729967622, 0.42068027340235137),
    (1.8951443404954809, -1.2722050191923813, 0.377227344813122),
    (1.875006772051659, -1.250007524486259, 0.37500075245392533),
    (1.8750008025096776, -1.2500016050034328, 0.375000802493755),
)
#: Values that rounding has put above 1 stay in the basin of the iteration.
SAFETY = 1.01
SQUARINGS = 10


def trace(s: Tensor) -> Tensor:
    """(…, 1, 1), never zero."""
    return s.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(1e-30)


def inverse_root(s: Tensor) -> Tensor:
    """S^-½ (…, r, r) by Gram Newton–Schulz iterations. Eigenvalues below 1e-6 of the trace come out too small, at most
    6,600/√trace, so that nothing is infinite; that of zero is finite too."""
    scale = trace(s)
    r = s / scale
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    q = eye.expand_as(s)
    for i, (a, b, c) in enumerate(POLAR_EXPRESS):
        safety = SAFETY if i < len(POLAR_EXPRESS) - 1 else 1.0
        m = (a / safety) * eye + (b / safety**3) * r + (c / safety**5) * (r @ r)
        q, r = m @ q, m @ r @ m
    return q / scale.sqrt()


def polar_factors(xs: list[Tensor]) -> list[Tensor]:
    """UVᵀ of each X = UΣVᵀ (k, rows, r), all of one k and r; zero for zero. Also called msign(X)."""
    roots = inverse_root(torch.stack([x.mT @ x for x in xs]))
    return [x @ root for x, root in zip(xs, roots, strict=True)]


def largest_eigenvalue(s: Tensor) -> Tensor:
    """(…, 1, 1), too large by a factor of r^(1/2N) at most, N = 2^SQUARINGS: 0.14% for r = 16. It is ‖Sᴺ‖^(1/N)."""
    log, share = torch.zeros_like(trace(s)), 1.0
    for i in range(SQUARINGS + 1):
        norm = torch.linalg.matrix_norm(s, keepdim=True).clamp_min(1e-30)
        log, s, share = log + share * norm.log(), s / norm, share / 2
        s = s @ s if i < SQUARINGS else s
    return log.exp()


def spectral_norms(xs: list[Tensor]) -> list[Tensor]:
    """‖X‖₂ (k, 1, 1) of each X (k, rows, r), all of one k and r; at most 0.07% too large for r = 16."""
    return list(largest_eigenvalue(torch.stack([x.mT @ x for x in xs])).sqrt())
