"""Batched linear algebra of tall (p, rows, r) and small (p, r, r) matrices, without a decomposition of a tall one.

What LAPACK would do with eigenvalues has a second form here, of Cholesky decompositions, triangular solves and products
alone: on a GPU those are the fast ones, and none lets the host wait.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

#: Of the trace of V, what is added to its diagonal: the least of these that makes it numerically definite.
JITTER = (1e-18, 1e-14, 1e-8, 1e-7, 1e-5, 1e-2)
#: On a GPU, Gram matrices of four times as many rows are made of parts of so many.
SPLIT_ROWS = 1024


def times(x: Tensor, k: Tensor, out: Tensor | None = None) -> Tensor:
    """x·k, tall times (p, r, r), in the memory layout of x: A is stored (r, n), and its products stay so."""
    if x.is_contiguous():
        return torch.bmm(x, k, out=out)  # type: ignore[arg-type]
    return torch.bmm(k.mT, x.mT, out=None if out is None else out.mT).mT  # type: ignore[arg-type]


def add_times_(x: Tensor, y: Tensor, k: Tensor, alpha: float = 1) -> Tensor:
    """x ← x + alpha·y·k, in place, tall times (p, r, r), in the memory layout of x."""
    if x.is_contiguous():
        return x.baddbmm_(y, k, alpha=alpha)
    return x.mT.baddbmm_(k.mT, y.mT, alpha=alpha).mT


def gram(x: Tensor, y: Tensor) -> Tensor:
    """xᵀ·y, (p, r, r), of tall x and y."""
    if x.is_cuda and x.shape[1] >= 4 * SPLIT_ROWS:
        return split_gram(x, y, SPLIT_ROWS)
    return torch.bmm(x.mT, y)


def split_gram(x: Tensor, y: Tensor, rows: int) -> Tensor:
    """The same, as the sum of products over so many rows each, that are one batch: for results that are small and rows
    that are many, a GPU's library takes few of its processors."""
    count = x.shape[1] // rows
    cut = [t[:, : count * rows].unflatten(1, (count, rows)).flatten(0, 1) for t in (x, y)]
    total = torch.bmm(cut[0].mT, cut[1]).unflatten(0, (len(x), count)).sum(1)
    rest = [t[:, count * rows :] for t in (x, y)]
    return total.baddbmm_(rest[0].mT, rest[1]) if rest[0].shape[1] else total


def row_sums(x: Tensor) -> Tensor:
    """(p, rows, 1) of tall x, as a product (on a CPU faster than a sum over so few columns)."""
    p, rows, r = x.shape
    if x.is_contiguous():
        return (x.view(-1, r) @ _ones(r, x.dtype, x.device)).view(p, rows, 1)
    return torch.bmm(_ones(r, x.dtype, x.device).expand(p, 1, r), x.mT).mT


def trace(m: Tensor) -> Tensor:
    """(p, 1, 1) traces of (p, r, r)."""
    return m.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def tiny(m: Tensor) -> float:
    """What stands for 0 in a division."""
    return 1e-300 if m.dtype == torch.float64 else 1e-37


def finite(m: Tensor) -> Tensor:
    """(p, 1, 1) whether all elements of (p, r, r) are finite.

    LAPACK is not asked about others (some sizes raise, some return plausible numbers); what comes of them is NaN.
    """
    return (m * 0).sum((-2, -1), keepdim=True) == 0


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and eigenvectors of symmetric matrices that are positive semidefinite up to rounding; all
    NaN for one that is not finite. By LAPACK's singular values where its eigenvalues fail to converge."""
    matrix = symmetric(matrix)
    good = finite(matrix)
    matrix = torch.where(good, matrix, eye_like(matrix))
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        vectors = torch.linalg.svd(matrix)[0].flip(-1)
        values = (vectors * (matrix @ vectors)).sum(-2)
    return torch.where(good[..., 0], values, torch.nan), torch.where(good, vectors, torch.nan)


def polar(x: Tensor, least: float) -> Tensor:
    """U of X = U·H, U orthogonal and H symmetric positive semidefinite, for (p, r, r) with no singular value above 1.

    Those below ``least`` may come out as less than 1 in U (no matter, where it is H that is wanted). Dynamically
    weighted Halley iterations (Nakatsukasa, Bai, Gygi 2010), with Cholesky decompositions: a few batched calls, however
    large r is, and none for which the host waits. In float32, in which those would fail, by products alone.
    """
    if x.dtype == torch.float32:
        return _polar_by_products(x, max(least, torch.finfo(x.dtype).eps))
    eye = eye_like(x).expand_as(x)
    for a, b, c in _weights(least):
        # One pass loses the digits of singular values below c^-½, so that ill-conditioned x take two.
        passes = 2 if c > 100 else 1
        q = orthonormal_columns(torch.cat([math.sqrt(c) * x, eye], -2), passes)[0]
        top, bottom = q.chunk(2, -2)
        x = torch.baddbmm(x, top, bottom.mT, beta=b / c, alpha=(a - b / c) / math.sqrt(c))
    return x


def _polar_by_products(x: Tensor, least: float) -> Tensor:
    """The same by scaled Newton-Schulz iterations (Chen and Chow 2014)."""
    eye, x = eye_like(x), x / 1.01  # what rounding has made larger than 1 is not to change its sign
    while 1 - least > 1e-7:
        # The scale that is best for singular values from 1e-2 on loses nothing, and leaves that margin.
        floor = max(least, 1e-2)
        scale = math.sqrt(3 / (1 + floor + floor**2))
        x = x @ (1.5 * scale * eye - 0.5 * scale**3 * (x.mT @ x))
        least = min(0.5 * scale * least * (3 - (scale * least) ** 2), 1.0)
    return x


@lru_cache(maxsize=8)
def _weights(least: float) -> list[tuple[float, float, float]]:
    """The weights of the iterations that bring singular values from ``least`` on to 1."""
    weights = []
    while 1 - least > 1e-15:
        square = least**2
        d = (4 * (1 - square) / square**2) ** (1 / 3)
        a = math.sqrt(1 + d) + math.sqrt(8 - 4 * d + 8 * (2 - square) / (square * math.sqrt(1 + d))) / 2
        b = (a - 1) ** 2 / 4
        weights.append((a, b, a + b - 1))
        least = min(1.0, least * (a + b * square) / (1 + (a + b - 1) * square))
    return weights


def solve(root: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """x·L⁻¹, or x·L⁻ᵀ, for lower triangular L."""
    return torch.linalg.solve_triangular(root.mT if transposed else root, x, upper=transposed, left=False)


def largest_eigenvalue(m: Tensor, squarings: tuple[int, ...] = (6, 5, 5)) -> Tensor:
    """(p, 1, 1) the largest eigenvalue λ_max of positive semidefinite matrices: the average of all with the weights λᴺ,
    N = 2^Σ squarings. Too small by (r − 1)/(e·N) of it at most, and by rounding where no other one is that near.
    (So many squarings at a time do not underflow.)"""
    power, every = m, 3 if m.dtype == torch.float32 else max(squarings)
    for count in squarings:
        for i in range(count):
            if i % every == 0:
                power = power / torch.linalg.matrix_norm(power, keepdim=True).clamp_min(tiny(m))
            power = power @ power
    return (power * m).sum((-2, -1), keepdim=True) / trace(power).clamp_min(tiny(m))


def inverse_root(moment: Tensor, eps: float, relative_eps: float, asks: bool = True) -> Tensor:
    """U diag(1/(√λ + eps + relative_eps·√λ_max)) Uᵀ of V = U diag(λ) Uᵀ, without eigenvalues.

    V^½ is the positive semidefinite polar factor of Lᵀ, V = L·Lᵀ. That needs λ > 0: the least of some multiples of the
    trace is added that makes it so, and it is not larger than what rounding has made negative. (All are tried, unless
    the host ``asks`` whether one has.)
    """
    moment = symmetric(moment)
    good = finite(moment)
    moment = torch.where(good, moment, 0)
    eye, size = eye_like(moment), trace(moment).clamp_min(tiny(moment))
    scaled = moment / size
    root, done = scaled, torch.zeros_like(size, dtype=torch.bool)
    for share in JITTER:
        found, failed = torch.linalg.cholesky_ex(scaled.add(eye, alpha=share))
        root, done = torch.where(done, root, found), done | (failed == 0)[:, None, None]
        if asks and done.all().tolist():
            break
    half = symmetric(polar(root.mT, 1e-9).mT @ root.mT) * size.sqrt()
    added = eps + relative_eps * largest_eigenvalue(moment).sqrt()
    root = torch.linalg.cholesky_ex(half + added * eye)[0]
    inverse = solve(root, solve(root, eye.expand_as(root), transposed=True))
    return torch.where(good, inverse, torch.nan)


def pseudo_inverse(t: Tensor, null: Tensor) -> Tensor:
    """T⁺, where ``null`` projects on the orthogonal complement of the range of T."""
    null = null * torch.linalg.matrix_norm(t, keepdim=True).clamp_min(1e-30)
    return stacked_inverse(torch.cat([t, null], -1), passes=3)


def inverse_of(k: Tensor) -> Tensor:
    """K⁻¹, without the LU decomposition, for which some versions of torch on CUDA let the host wait. Columns of K may
    differ in length as they like."""
    lengths = torch.linalg.vector_norm(k, dim=-2, keepdim=True)
    return stacked_inverse((k / lengths).mT, passes=3).mT / lengths.mT


def stacked_inverse(stacked: Tensor, passes: int) -> Tensor:
    """Sᵀ(SSᵀ + EEᵀ)⁻¹, of [S, E] (p, r, r + …), without the square, which would square the condition number: from
    Q·R = [Sᵀ; Eᵀ]."""
    r, eps = stacked.shape[-2], torch.finfo(stacked.dtype).eps
    passes += 2 * (stacked.dtype == torch.float32)
    q, roots = orthonormal_columns(stacked.mT, passes, shift=16 * r * eps)
    inverse = q[..., :r, :]
    for root in reversed(roots):
        inverse = solve(root, inverse)
    return inverse


def orthonormal_columns(q: Tensor, passes: int, shift: float = 0.0) -> tuple[Tensor, list[Tensor]]:
    """Orthonormal columns for those of (p, …, r), by Cholesky decompositions L·Lᵀ of their Gram matrices, and the L of
    each pass. Two passes are exact to rounding up to a condition number of about eps^-½; three, the first with a shift
    of its diagonal (times the trace), up to 1/eps (Fukaya et al. 2020)."""
    roots = []
    for i in range(passes):
        square = gram(q, q)
        if shift and i < max(passes - 2, 1):
            square = square + shift * trace(square) * eye_like(square)
        roots.append(torch.linalg.cholesky_ex(square)[0])
        q = solve(roots[-1], q, transposed=True)
    return q, roots


def symmetric(m: Tensor) -> Tensor:
    return (m + m.mT) / 2


def eye_like(m: Tensor) -> Tensor:
    return torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)


@lru_cache(maxsize=64)
def _ones(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(n, dtype=dtype, device=device)
