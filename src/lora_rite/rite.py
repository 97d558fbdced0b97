"""The mathematics of LoRA-RITE: pure functions of batched tensors; nothing here knows parameters, groups or state.

A pair adds W = B·A to a layer. Both factors are handled tall: X is Aᵀ (n, r) or B (m, r), and Y is the other one, so
one code path serves both sides. With X = Q·T, Q orthonormal (its *basis*), T (r, r) its *coordinates*:

    K   with Q = X·K ("basis" in the state): never a tall matrix is decomposed, and none is stored
    D   maps a gradient of X to the *unmagnified gradient* ḡ = g·D; D = T_Y⁺ as published (Eq. 7), or its damped form
    V   (r, r) second moment of ḡ;  M (rows, r) first moment of the preconditioned ḡ; both in the basis of Y
    P   (r, r) = Q_newᵀ·Q_old of Y, carries V and M from the old basis of Y into the new one
    X ← X − lr·M·Dᵀ  (Eq. 11)

Shapes: p pairs of one batch, ``rows`` = n or m, r rank. Tall tensors are (p, rows, r) in the *work* dtype (float32, or
float64 where a factor is float64); r×r tensors are (p, r, r) in the *algebra* dtype, float64.
Paper: Yen et al., "LoRA Done RITE", arXiv 2410.20625, Algorithm 1.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .sharding import Shards

#: Directions of X·K_w with less than this share of the largest eigenvalue of its Gram matrix are rounding noise or less
#: than a thirtieth of the last step: they count as null.
LIVE = 1e-3
#: The rounding noise of X is taken for eps to this power (6e-6 of ‖X‖ in float32, 2e-12 in float64): with a margin,
#: because K_w is rounded too, where it is largest, and because the directions that are only noise in X·K_w turn the
#: others by about the square of that noise.
NOISE = 0.75

#: What is added to the root mean square of each row of S, in units of that of all rows: rows of nothing but rounding
#: noise are then not equilibrated to full size. (Not in units of the largest, which may be √(rows/r) times as large, as
#: of an outlier feature or of the most frequent token: small rows would then not be equilibrated.)
ROW_FLOOR = 1e-2

#: So many rows of a factor are compared with what the last step left. (A change of other rows alone passes: the next
#: basis is measured from the factor as it is.)
CHECKED_ROWS = 256

#: Of the trace of V, what is added to its diagonal: the least of these that makes it numerically definite.
JITTER = (1e-18, 1e-14, 1e-8, 1e-7, 1e-5, 1e-2)


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


def bias_corrected_decay(step: Tensor, beta: Tensor) -> Tensor:
    """β(1 − βᵗ⁻¹)/(1 − βᵗ): the decay that makes an exponential average unbiased at the 1-based step t; 1 for β = 1."""
    return torch.where(beta == 1, beta, beta * (1 - beta ** (step - 1)) / (1 - beta**step))


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
    return torch.bmm(x.mT, y)


def row_sums(x: Tensor) -> Tensor:
    """(p, rows, 1) of tall x, as a product (on a CPU faster than a sum over so few columns)."""
    p, rows, r = x.shape
    if x.is_contiguous():
        return (x.view(-1, r) @ _ones(r, x.dtype, x.device)).view(p, rows, 1)
    return torch.bmm(_ones(r, x.dtype, x.device).expand(p, 1, r), x.mT).mT


def trace(m: Tensor) -> Tensor:
    """(p, 1, 1) traces of (p, r, r)."""
    return m.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def finite(m: Tensor) -> Tensor:
    """(p, 1, 1) whether all elements of (p, r, r) are finite.

    LAPACK is not asked about others (some sizes raise, some return plausible numbers); what comes of them is NaN.
    """
    return (m * 0).sum((-2, -1), keepdim=True) == 0


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and eigenvectors of symmetric matrices that are positive semidefinite up to rounding; all
    NaN for one that is not finite. By LAPACK's singular values where its eigenvalues fail to converge."""
    matrix = _symmetric(matrix)
    good = finite(matrix)
    matrix = torch.where(good, matrix, _eye_like(matrix))
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        vectors = torch.linalg.svd(matrix)[0].flip(-1)
        values = (vectors * (matrix @ vectors)).sum(-2)
    return torch.where(good[..., 0], values, torch.nan), torch.where(good, vectors, torch.nan)


def _polar(x: Tensor, least: float) -> Tensor:
    """U of X = U·H, U orthogonal and H symmetric positive semidefinite, for (p, r, r) with no singular value above 1.

    Those below ``least`` may come out as less than 1 in U (no matter, where it is H that is wanted). Dynamically
    weighted Halley iterations (Nakatsukasa, Bai, Gygi 2010), with Cholesky decompositions: a few batched calls, however
    large r is, and none for which the host waits.
    """
    eye = _eye_like(x).expand_as(x)
    for a, b, c in _weights(least):
        q = _orthonormal(torch.cat([math.sqrt(c) * x, eye], -2), 1 + (c > 100))[0]
        top, bottom = q.chunk(2, -2)
        x = torch.baddbmm(x, top, bottom.mT, beta=b / c, alpha=(a - b / c) / math.sqrt(c))
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


def _solve(root: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """x·L⁻¹, or x·L⁻ᵀ, for lower triangular L."""
    return torch.linalg.solve_triangular(root.mT if transposed else root, x, upper=transposed, left=False)


def _largest(m: Tensor, squarings: tuple[int, ...] = (6, 5, 5)) -> Tensor:
    """(p, 1, 1) the largest eigenvalue λ_max of positive semidefinite matrices: the average of all with the weights λᴺ,
    N = 2^Σ squarings. Too small by (r − 1)/(e·N) of it at most, and by rounding where no other one is that near.
    (So many squarings at a time do not underflow.)"""
    power = m
    for count in squarings:
        power = power / torch.linalg.matrix_norm(power, keepdim=True).clamp_min(1e-300)
        for _ in range(count):
            power = power @ power
    return (power * m).sum((-2, -1), keepdim=True) / trace(power).clamp_min(1e-300)


def _inverse_root(moment: Tensor, eps: float, relative_eps: float) -> Tensor:
    """U diag(1/(√λ + eps + relative_eps·√λ_max)) Uᵀ of V = U diag(λ) Uᵀ, without eigenvalues.

    V^½ is the positive semidefinite polar factor of Lᵀ, V = L·Lᵀ. That needs λ > 0: the least of some multiples of the
    trace is added that makes it so, and it is not larger than what rounding has made negative.
    """
    moment = _symmetric(moment)
    good = finite(moment)
    moment = torch.where(good, moment, 0)
    eye, size = _eye_like(moment), trace(moment).clamp_min(1e-300)
    scaled = moment / size
    root = torch.linalg.cholesky_ex(scaled.add(eye, alpha=JITTER[-1]))[0]
    for share in JITTER[-2::-1]:
        found, failed = torch.linalg.cholesky_ex(scaled.add(eye, alpha=share))
        root = torch.where((failed == 0)[:, None, None], found, root)
    half = _symmetric(_polar(root.mT, 1e-9).mT @ root.mT) * size.sqrt()
    added = eps + relative_eps * _largest(moment).sqrt()
    root = torch.linalg.cholesky_ex(half + added * eye)[0]
    inverse = _solve(root, _solve(root, eye.expand_as(root), transposed=True))
    return torch.where(good, inverse, torch.nan)


def _symmetric(m: Tensor) -> Tensor:
    return (m + m.mT) / 2


def _eye_like(m: Tensor) -> Tensor:
    return torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)


def initial_basis(x: Tensor, dtype: torch.dtype, shards: Shards) -> Basis:
    """The basis of an arbitrary factor: scaled to 1, then made orthonormal three times, each of which makes the Gram
    matrix better conditioned (one pass is exact up to a condition number of about eps^-½). x (p, …, r) holds this
    process's share of the rows."""
    eye = torch.eye(x.shape[-1], dtype=dtype, device=x.device).expand(*x.shape[:-2], -1, -1)
    largest = torch.linalg.vector_norm(x, torch.inf, (-2, -1), keepdim=True) if x.numel() else x.new_zeros(len(x), 1, 1)
    scale = shards.largest(largest).to(dtype)
    warm = eye / torch.where(scale == 0, 1, scale)
    eps = torch.finfo(x.dtype).eps

    def measured(warm: Tensor) -> Tensor:
        z = times(x, warm.to(x.dtype))
        return shards.total(gram(z, z))[0].to(dtype)

    squares = measured(warm)
    size = scale * trace(squares).sqrt()  # ‖X‖
    for _ in range(3):
        w, u = eigh(squares)
        turned = warm @ u
        rounding = eps**NOISE * size * torch.linalg.vector_norm(turned, dim=-2, keepdim=True)  # what X = 0 may give
        s = w.maximum(w[..., -1:] * (10 * eps)).sqrt()[..., None, :].maximum(rounding)
        warm = torch.where((w[..., -1:] <= 0)[..., None], warm, turned / s).to(x.dtype).to(dtype)
        squares = measured(warm)
    # once more, without the noise that null directions of K_w, so large, have left in the others
    noisy = orthonormalise(warm, squares)[0]
    nulls = torch.stack([eye - noisy.basis @ noisy.coordinates, eye - noisy.coordinates @ noisy.basis])
    (values, others), (v, u) = eigh(nulls)
    null = (v * (values.minimum(others) > 0.5)[..., None, :]) @ u.mT  # from outside the range of T to its null space
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
    diagonal = f.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1).rsqrt()  # columns of 1: those of a null direction may be 1/eps
    eye = _eye_like(f)
    scaled = torch.where(diagonal.amax(-1)[..., None, None] > 0, f * scale[..., None, :] * scale[..., None], eye)
    jitter = f.shape[-1] * 10 * torch.finfo(f.dtype).eps  # makes f, positive semidefinite, numerically definite
    root = torch.linalg.cholesky_ex(scaled + jitter * eye)[0]
    return _solve(root, old.warm * scale[..., None, :], transposed=True)


def orthonormalise(warm: Tensor, gram_z: Tensor, iterate: bool = False) -> tuple[Basis, Tensor, Tensor]:
    """The basis of X from K_w and the Gram matrix of z = X·K_w; also c (p, r, r) with Q = z·c, and K_w⁻¹.

    By a Cholesky decomposition, and where X has no full rank, after a projection on its live directions (with
    ``iterate`` everywhere: the host does not ask).
    """
    if iterate:
        inverse = _inverse(warm)
        basis, t, c = _projected(warm, gram_z, inverse)
    else:
        inverse = torch.linalg.inv_ex(warm).inverse
        root, failed = torch.linalg.cholesky_ex(gram_z)
        c = _solve(root, _eye_like(root).expand_as(root), transposed=True)
        powers = torch.stack([gram_z, c @ c.mT])  # G and its inverse
        powers = torch.linalg.matrix_norm(powers @ powers)  # λ_max² and 1/λ_min² at most
        null = ~((failed == 0) & (powers[0] * powers[1] < LIVE**-2))
        basis, t = warm @ c, root.mT @ inverse
        if null.any().tolist():  # (on a CPU, where asking costs nothing)
            basis[null], t[null], c[null] = _projected(warm[null], gram_z[null], inverse[null])
    return Basis(basis, t, warm), c, inverse


def _projected(warm: Tensor, gram_z: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K, T and c of :func:`orthonormalise`, of factors of any rank."""
    eye, r = _eye_like(warm), warm.shape[-1]
    # I on the eigenvectors with a share of λ_max above LIVE, 0 on the others, from the sign of G − LIVE·λ_max
    largest = _largest(gram_z, (5, 5))
    shifted = (gram_z - LIVE * largest * eye) / torch.linalg.matrix_norm(gram_z, keepdim=True).clamp_min(1e-300)
    live = torch.where(largest > 0, (eye + _polar(_symmetric(shifted), 1e-8)) / 2, 0)
    null = eye - live
    root = torch.linalg.cholesky_ex(live @ gram_z @ live + null)[0]
    c, t = _solve(root, live, transposed=True), root.mT @ live @ inverse
    null = _solve(root, null, transposed=True)
    # (K_w·c is a right inverse of T too, but with parts of the size 1/eps in the null space of T, into which the other
    # factor would move)
    return torch.where(trace(live) > r - 0.5, warm @ c, _pseudo_inverse(t, null.mT @ null)), t, c


def _pseudo_inverse(t: Tensor, null: Tensor) -> Tensor:
    """T⁺, where ``null`` projects on the orthogonal complement of the range of T."""
    null = null * torch.linalg.matrix_norm(t, keepdim=True).clamp_min(1e-30)
    return _stacked_inverse(torch.cat([t, null], -1), passes=3)


def _inverse(k: Tensor) -> Tensor:
    """K⁻¹, without the LU decomposition, for which some versions of torch on CUDA let the host wait. Columns of K may
    differ in length as they like."""
    lengths = torch.linalg.vector_norm(k, dim=-2, keepdim=True)
    return _stacked_inverse((k / lengths).mT, passes=3).mT / lengths.mT


def _stacked_inverse(stacked: Tensor, passes: int) -> Tensor:
    """Sᵀ(SSᵀ + EEᵀ)⁻¹, of [S, E] (p, r, r + …), without the square, which would square the condition number: from
    Q·R = [Sᵀ; Eᵀ]."""
    r, eps = stacked.shape[-2], torch.finfo(stacked.dtype).eps
    q, roots = _orthonormal(stacked.mT, passes, shift=16 * r * eps)
    inverse = q[..., :r, :]
    for root in reversed(roots):
        inverse = _solve(root, inverse)
    return inverse


def _orthonormal(q: Tensor, passes: int, shift: float = 0.0) -> tuple[Tensor, list[Tensor]]:
    """Orthonormal columns for those of (p, …, r), by Cholesky decompositions L·Lᵀ of their Gram matrices, and the L of
    each pass. Two passes are exact to rounding up to a condition number of about eps^-½; three, the first with a shift
    of its diagonal (times the trace), up to 1/eps (Fukaya et al. 2020)."""
    roots = []
    for i in range(passes):
        square = gram(q, q)
        if shift and i == 0:
            square = square + shift * trace(square) * _eye_like(square)
        roots.append(torch.linalg.cholesky_ex(square)[0])
        q = _solve(roots[-1], q, transposed=True)
    return q, roots


def damped_inverse(s: Tensor, delta: Tensor) -> Tensor:
    """V diag(σ/(σ² + δ²)) Uᵀ of S = U diag(σ) Vᵀ (p, r, r), for δ (p, 1, 1).

    With S = T_Y·T_Xᵀ, whose σ are the singular values of BA itself, D = T_Xᵀ times this is T_Y⁻¹ times σ²/(σ² + δ²)
    along the singular directions of BA: the damped T_Y⁺ of the side X, invariant also where Y is rank-deficient. 0
    where σ = 0, also for δ = 0.

    δ is at least 1e-6·‖S‖ (in float64; eps^⅜), so that σ that are rounding noise count for little.
    """
    good = finite(s)
    s = torch.where(good, s, 0)
    least = torch.finfo(s.dtype).eps ** 0.375 * torch.linalg.matrix_norm(s, keepdim=True)
    delta = delta.maximum(least).clamp_min(1e-30)
    inverse = _stacked_inverse(torch.cat([s, delta * _eye_like(s)], -1), passes=2)
    return torch.where(good, inverse, torch.nan)


def second_moment(
    moment: Tensor,
    escaped: Tensor,
    squares: Tensor,
    decay: Tensor,
    *,
    summed: bool,
    eps: float,
    relative_eps: float,
    iterate: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """V ← β₂ₜ·V + (1−β₂ₜ)·``squares``, ρ ← β₂ₜ·ρ, and the preconditioner U diag(1/(√(λ+ρ) + eps + …)) Uᵀ (Eq. 8);
    V ← V + ``squares`` where ``summed`` (Algorithm 1, Theorems 3 and 4).

    ``relative_eps``·√(λ+ρ)_max is added to eps: directions of V that are rounding noise are then not whitened to full
    size, invariantly, and whatever the scale of the gradient.
    """
    moment = moment + squares if summed else decay * moment + (1 - decay) * squares
    escaped = decay * escaped
    if iterate:
        return moment, escaped, _inverse_root(moment + escaped * _eye_like(moment), eps, relative_eps)
    w, u = eigh(moment)
    root = (w.clamp_min(0) + escaped[..., 0]).sqrt()
    inverse_root = 1 / (root + eps + relative_eps * root[..., -1:])
    return moment, escaped, (u * inverse_root[..., None, :]) @ u.mT


def row_factors(squares: Tensor, row_moment: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """A factor for each row of S (p, rows, r), 1/(√R + ROW_FLOOR·√mean R), from the sums of the squares of its rows,
    R, their mean squares averaged over steps, both (p, rows, 1), and the mean of R over all rows (p, 1, 1). Returns the
    factors, and ‖S‖² and ‖factors∘S‖² (p, 1, 2).

    Norms of rows do not see rotations of the basis: exactly invariant.
    """
    factors = (row_moment.sqrt() + ROW_FLOOR * mean.sqrt() + 1e-12).reciprocal()
    sums = [squares.sum(-2, keepdim=True), (squares * factors.square()).sum(-2, keepdim=True)]
    return factors, torch.cat(sums, -1)


def transport(moment: Tensor, p: Tensor) -> Tensor:
    """V in the new basis: P·V·Pᵀ."""
    return p @ moment @ p.mT


def escaped_mass(old: Tensor, new: Tensor) -> Tensor:
    """min(max_i (λ_i(V_old) − λ_i(V_new))₊, (tr V_old − tr V_new)₊): what the new basis no longer sees (d_λ of Alg. 1).

    old, new (p, r, r); returns (p, 1, 1).
    """
    lost = eigh(old)[0] - eigh(new)[0]
    return lost.amax(-1)[..., None, None].clamp_min(0).minimum(trace(old - new).clamp_min(0))


def checksum(x: Tensor, start: int = 0) -> Tensor:
    """The sum of the first rows of a factor with signs that look random: (p, r). x (p, rows, r) are its rows from
    ``start`` on."""
    some = x[:, : max(CHECKED_ROWS - start, 0)]
    signs = _signs(CHECKED_ROWS, x.dtype, x.device)[:, start : start + some.shape[1]]
    return (signs @ some)[:, 0]


@lru_cache(maxsize=64)
def _ones(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(n, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _signs(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1, n) of ±1."""
    return (1 - 2 * (_hash(torch.arange(n, device=device, dtype=torch.int32)) & 1)).to(dtype)[None]


def stochastic_round(x: Tensor, dtype: torch.dtype, key: Tensor, first: int = 0, width: int | None = None) -> Tensor:
    """x (p, …) float32, rounded to bfloat16 or float16, up or down with the probabilities that make it unbiased.

    The noise is a hash of ``key`` (p,) int64 and the element's index: no generator, no state, the same on every rank
    and machine. Values that ``dtype`` has stay as they are. With ``width``, x (p, rows, columns) is part of matrices
    that are so wide, from their element ``first`` on.
    """
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    dropped = 2 ** (23 + int(math.log2(eps)))
    if width is None:
        return stochastic_round(x.reshape(len(x), 1, -1), dtype, key, 0, x[0].numel()).view(x.shape)
    rows = (first + torch.arange(x.shape[1], device=x.device) * width).to(torch.int32)
    index = rows[:, None] + torch.arange(x.shape[2], device=x.device, dtype=torch.int32)
    noise = _hash(index + _hash(key.to(torch.int32))[:, None, None])
    noise = noise.bitwise_and_(dropped - 1)
    if dtype == torch.bfloat16:  # the upper half of a float32
        return noise.add_(x.float().view(torch.int32)).bitwise_and_(-dropped).view(torch.float32).to(dtype)
    exponent = torch.frexp(x.abs().clamp_min(tiny)).exponent - 1
    quantum = torch.ldexp(torch.full_like(x, eps), exponent)
    return ((x / quantum + noise.to(x.dtype) / dropped).floor() * quantum).to(dtype)


def _hash(h: Tensor) -> Tensor:
    """A hash of int32 ("lowbias32" of C. Wellons' hash prospector), in place."""
    shifted = torch.empty_like(h)
    for bits, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
        torch.bitwise_right_shift(h, bits, out=shifted)
        h.bitwise_xor_(shifted.bitwise_and_(2 ** (32 - bits) - 1)).mul_(factor)
    return h
