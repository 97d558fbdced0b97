"""The orthonormal basis of a tall factor, known by r×r matrices alone: measured anew after every step."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .linalg import (
    eigh,
    eye_like,
    gram,
    inverse_of,
    largest_eigenvalue,
    polar,
    pseudo_inverse,
    solve,
    symmetric,
    times,
    tiny,
    trace,
)

#: Directions of X·K_w with less than this share of the largest eigenvalue of its Gram matrix are rounding noise or less
#: than a thirtieth of the last step: they count as null.
LIVE = 1e-3
#: We assume a relative rounding error of eps to this power for X (6e-6 in float32, 2e-12 in float64). That is 50 times
#: float32's eps, because K_w itself is rounded, most where it is largest, and because directions that are noise alone
#: in X·K_w turn the others by about the square of that noise.
NOISE = 0.75


class Basis(NamedTuple):
    """A tall factor X (rows, r) in terms of r×r matrices.

    basis        K (p, r, r), T⁺: X·K = Q has orthonormal columns. Where X is rank-deficient, QᵀQ is a projection
                 instead, of the rank of X
    coordinates  T (p, r, r): X = Q·T, QᵀQ·T = T
    warm         K_w (p, r, r): invertible. In X·K_w no direction is longer than 1 or can outgrow its last step, so that
                 a Gram matrix taken there is exact to rounding however ill-conditioned X itself is
    """

    basis: Tensor
    coordinates: Tensor
    warm: Tensor


def initial_basis(
    x: Tensor,
    dtype: torch.dtype,
    total: Callable[[Tensor], Tensor] = lambda part: part,
    largest: Callable[[Tensor], Tensor] = lambda part: part,
    device: torch.device | None = None,
) -> Basis:
    """The basis of an arbitrary factor: scaled to 1, then made orthonormal three times, each of which makes the Gram
    matrix better conditioned (one pass is exact up to a condition number of about eps^-½).

    x (p, …, r) holds this process's share of the rows; ``total`` and ``largest`` add up, and compare, over processes.
    The basis is of ``dtype``, and on ``device``, where r×r matrices are computed; None is that of x.
    """
    device = device or x.device
    eye = torch.eye(x.shape[-1], dtype=dtype, device=device).expand(*x.shape[:-2], -1, -1)
    own = torch.linalg.vector_norm(x, torch.inf, (-2, -1), keepdim=True) if x.numel() else x.new_zeros(len(x), 1, 1)
    scale = largest(own).to(device).to(dtype)
    warm = eye / torch.where(scale == 0, 1, scale)
    eps = torch.finfo(x.dtype).eps

    def measured(warm: Tensor) -> Tensor:
        z = times(x, warm.to(x.dtype).to(x.device))
        return total(gram(z, z)).to(device).to(dtype)

    squares = measured(warm)
    size = scale * trace(squares).sqrt()  # ‖X‖
    for _ in range(3):
        w, u = eigh(squares)
        turned = warm @ u
        rounding = (
            eps**NOISE * size * torch.linalg.vector_norm(turned, dim=-2, keepdim=True)
        )  # X = 0 may measure as this much
        s = w.maximum(w[..., -1:] * (10 * eps)).sqrt()[..., None, :].maximum(rounding)
        warm = torch.where((w[..., -1:] <= 0)[..., None], warm, turned / s).to(x.dtype).to(dtype)
        squares = measured(warm)
    # Null directions of K_w are as large as 1/eps and have left their noise in the others, so K_w is taken once more
    # without them.
    noisy = orthonormalise(warm, squares)[0]
    nulls = torch.stack([eye - noisy.basis @ noisy.coordinates, eye - noisy.coordinates @ noisy.basis])
    (values, others), (v, u) = eigh(nulls)
    null = (
        v * (values.minimum(others) > 0.5)[..., None, :]
    ) @ u.mT  # maps the complement of the range of T to its null space
    warm = (noisy.basis + null / torch.where(size == 0, 1, size)).to(x.dtype).to(dtype)
    return orthonormalise(warm, measured(warm))[0]


def warm_basis(old: Basis, step: Tensor, norm: Tensor, rounding: Tensor) -> Tensor:
    """K_w for the factor after a step X − M·``step``, before that is taken: from r×r matrices alone.

    In it, neither X, nor the step (``step`` (p, r, r) = lr·Dᵀ; ``norm`` (p, 1, 1) bounds the Frobenius norm of M), nor
    the rounding of X (its relative size ``rounding`` (p, 1, 1), see NOISE) is longer than 1, so neither is the factor
    after the step.
    """
    x, moved = old.coordinates @ old.warm, step @ old.warm
    size = torch.linalg.matrix_norm(old.coordinates, keepdim=True)
    noise = (rounding * size) * old.warm
    f = 2 * (x.mT @ x + norm**2 * (moved.mT @ moved) + noise.mT @ noise)
    # Columns are scaled to 1 before the decomposition: those of a null direction may be 1/eps times the others.
    diagonal = f.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1).rsqrt()
    eye = eye_like(f)
    scaled = torch.where(diagonal.amax(-1)[..., None, None] > 0, f * scale[..., None, :] * scale[..., None], eye)
    jitter = f.shape[-1] * 10 * torch.finfo(f.dtype).eps  # makes f, positive semidefinite, numerically definite
    root = torch.linalg.cholesky_ex(scaled + jitter * eye)[0]
    return solve(root, old.warm * scale[..., None, :], transposed=True)


def orthonormalise(
    warm: Tensor, gram_z: Tensor, iterate: bool = False, asks: bool = True
) -> tuple[Basis, Tensor, Tensor]:
    """The basis of X from K_w and the Gram matrix of z = X·K_w; also c (p, r, r) with Q = z·c, and K_w⁻¹.

    By a Cholesky decomposition, and where X has no full rank, after a projection on its live directions (everywhere,
    unless the host ``asks``). With ``iterate`` without LAPACK.
    """
    inverse = inverse_of(warm) if iterate else torch.linalg.inv_ex(warm).inverse
    if not asks:
        basis, t, c = _projected(warm, gram_z, inverse)
    else:
        root, failed = torch.linalg.cholesky_ex(gram_z)
        c = solve(root, eye_like(root).expand_as(root), transposed=True)
        powers = torch.stack([gram_z, c @ c.mT])  # G and its inverse
        powers = torch.linalg.matrix_norm(powers @ powers)  # λ_max² and 1/λ_min² at most
        null = ~((failed == 0) & (powers[0] * powers[1] < LIVE**-2))
        basis, t = warm @ c, root.mT @ inverse
        if null.any().tolist():
            basis[null], t[null], c[null] = _projected(warm[null], gram_z[null], inverse[null])
    return Basis(basis, t, warm), c, inverse


def _projected(warm: Tensor, gram_z: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K, T and c of :func:`orthonormalise`, of factors of any rank."""
    eye, r = eye_like(warm), warm.shape[-1]
    # The projection on the eigenvectors with a share of λ_max above LIVE comes from the sign of G − LIVE·λ_max.
    largest = largest_eigenvalue(gram_z, (5, 5))
    shifted = (gram_z - LIVE * largest * eye) / torch.linalg.matrix_norm(gram_z, keepdim=True).clamp_min(tiny(gram_z))
    live = torch.where(largest > 0, (eye + polar(symmetric(shifted), 1e-8)) / 2, 0)
    null = eye - live
    root = torch.linalg.cholesky_ex(live @ gram_z @ live + null)[0]
    c, t = solve(root, live, transposed=True), root.mT @ live @ inverse
    null = solve(root, null, transposed=True)
    # K_w·c is a right inverse of T too, but it has parts of the size 1/eps in the null space of T, into which the other
    # factor would then move.
    return torch.where(trace(live) > r - 0.5, warm @ c, pseudo_inverse(t, null.mT @ null)), t, c
