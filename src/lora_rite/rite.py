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

#: So many rows of a factor are compared with what the last step left. (A change of other rows alone passes: the next
#: basis is measured from the factor as it is.)
CHECKED_ROWS = 1024

#: Sweeps of Jacobi rotations over all pairs of columns, and one more for each bit of the rank.
SWEEPS = 6


class Basis(NamedTuple):
    """A tall factor X (rows, r) in terms of r×r matrices.

    basis        K (p, r, r): X·K has orthonormal columns, and zero columns where X has no rank
    coordinates  T (p, r, r): X = (X·K)·T, zero rows where X has no rank. Not K⁻¹ where X is rank-deficient
    warm         K_w (p, r, r): invertible. In X·K_w no direction is longer than 1 or can outgrow its last step, so that
                 a Gram matrix taken there is exact to rounding however ill-conditioned X itself is
    """

    basis: Tensor
    coordinates: Tensor
    warm: Tensor


def bias_corrected_decay(step: Tensor, beta: float) -> Tensor:
    """β(1 − βᵗ⁻¹)/(1 − βᵗ): the decay that makes an exponential average unbiased at the 1-based step t; 1 for β = 1."""
    if beta in (0, 1):
        return torch.full_like(step, beta)
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


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


def trace(m: Tensor) -> Tensor:
    """(p, 1, 1) traces of (p, r, r)."""
    return m.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def finite(m: Tensor) -> Tensor:
    """(p, 1, 1) whether all elements of (p, r, r) are finite.

    LAPACK is not asked about others (some sizes raise, some return plausible numbers); what comes of them is NaN.
    """
    return m.isfinite().all(-1).all(-1)[..., None, None]


def eigh(matrix: Tensor, jacobi: bool = False) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and eigenvectors of symmetric matrices; all NaN for one that is not finite.

    By LAPACK, or, with ``jacobi`` and where that fails to converge, by Jacobi rotations.
    """
    matrix = (matrix + matrix.mT) / 2
    good = finite(matrix)
    matrix = torch.where(good, matrix, _eye_like(matrix))
    try:
        values, vectors = _jacobi_eigh(matrix) if jacobi else torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        values, vectors = _jacobi_eigh(matrix)
    return torch.where(good[..., 0], values, torch.nan), torch.where(good, vectors, torch.nan)


def _jacobi_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    rotated, vectors = _jacobi(matrix, symmetric=True)
    values, order = rotated.diagonal(dim1=-2, dim2=-1).sort()
    return values, vectors.gather(-1, order[..., None, :].expand_as(vectors))


def _jacobi(matrix: Tensor, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Products of Jacobi rotations: V (p, r, r), orthogonal, such that B = ``matrix``·V has orthogonal columns
    (one-sided, Hestenes: B = U·diag(σ)), or, if ``symmetric``, that B = Vᵀ·``matrix``·V is diagonal. Returns B, V.

    r/2 rotations at a time: nothing but batched products and element-wise operations on the device, so that the host
    never waits for it and a CUDA graph can hold it.
    """
    r = matrix.shape[-1]
    both = torch.cat([matrix, _eye_like(matrix).expand_as(matrix)], -2)
    identity = _eye_like(matrix).flatten().expand(*matrix.shape[:-2], -1)
    for _ in range(SWEEPS + r.bit_length()):
        for read, write in _rounds(r, matrix.device):
            b = both[..., :r, :]
            pp, qq, pq = (b if symmetric else b.mT @ b).flatten(-2)[..., read].chunk(3, -1)
            half = (qq - pp) / 2
            t = torch.where(half < 0, -pq, pq) / (half.abs() + torch.hypot(half, pq)).clamp_min(1e-30)
            c = (1 + t * t).rsqrt()
            s = t * c
            values = torch.cat([c, c, s, -s], -1)
            rotation = identity.scatter(-1, write.expand_as(values), values).unflatten(-1, (r, r))
            both = both @ rotation
            if symmetric:
                both[..., :r, :] = rotation.mT @ both[..., :r, :]
    b, v = both.split(r, -2)
    return b, v


@lru_cache(maxsize=64)
def _rounds(r: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """A tournament in which each two columns meet once. For each round, where to read (p, p), (q, q), (p, q) in a
    flattened Gram matrix, and where to write c, c, s, −s of the rotations into a flattened matrix."""
    players = list(range(r + r % 2))
    rounds = []
    for _ in range(r - 1 + r % 2 if r > 1 else 0):
        pairs = [sorted(pair) for pair in zip(players, reversed(players), strict=True)][: len(players) // 2]
        pairs = [pair for pair in pairs if pair[1] < r]  # (with an odd number, one sits out)
        ps, qs = torch.tensor(pairs, device=device).unbind(1)
        read, write = [ps * r + ps, qs * r + qs, ps * r + qs], [ps * r + ps, qs * r + qs, ps * r + qs, qs * r + ps]
        rounds.append((torch.cat(read), torch.cat(write)))
        players = [players[0], players[-1], *players[1:-1]]
    return rounds


def _eye_like(m: Tensor) -> Tensor:
    return torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)


def initial_basis(x: Tensor, dtype: torch.dtype, jacobi: bool, rows: int, shards: Shards) -> Basis:
    """The basis of an arbitrary factor: scaled to 1, then made orthonormal three times, each of which makes the Gram
    matrix better conditioned (one pass is exact up to a condition number of about eps^-½). x (p, …, r) holds this
    process's share of ``rows`` rows."""
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
        w, u = eigh(squares, jacobi)
        turned = warm @ u
        rounding = eps**NOISE * size * torch.linalg.vector_norm(turned, dim=-2, keepdim=True)  # what X = 0 may give
        s = w.maximum(w[..., -1:] * (10 * eps)).sqrt()[..., None, :].maximum(rounding)
        warm = torch.where((w[..., -1:] <= 0)[..., None], warm, turned / s).to(x.dtype).to(dtype)
        squares = measured(warm)
    # once more, without the noise that null directions of K_w, so large, have left in the others
    limit = torch.full_like(scale, rows)
    noisy = orthonormalise(warm, squares, limit, jacobi)[0]
    null = _pseudo_inverse(noisy.coordinates, jacobi)[1] / torch.where(size == 0, 1, size)
    warm = (noisy.basis + null).to(x.dtype).to(dtype)
    return orthonormalise(warm, measured(warm), limit, jacobi)[0]


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
    return torch.linalg.solve_triangular(root.mT, old.warm * scale[..., None, :], upper=True, left=False)


def orthonormalise(warm: Tensor, gram_z: Tensor, rows: Tensor, jacobi: bool) -> tuple[Basis, Tensor, Tensor]:
    """The basis of X from K_w, the Gram matrix of z = X·K_w and the number of rows of X, (p, 1, 1), which bounds its
    rank; also c (p, r, r) with Q = z·c, and K_w⁻¹."""
    w, u = eigh(gram_z, jacobi)
    r = w.shape[-1]
    live = (w > w[..., -1:] * LIVE) & (torch.arange(r, 0, -1, device=w.device) <= rows[..., 0])
    s = torch.where(live, w, 1).sqrt()
    c = u * torch.where(live, 1 / s, 0)[..., None, :]
    inverse = torch.linalg.inv_ex(warm).inverse
    t = torch.where(live, s, 0)[..., None] * (u.mT @ inverse)
    basis = warm @ c
    if jacobi or w.device.type != "cpu" or not live.all().tolist():  # (asking costs nothing on a CPU)
        basis = torch.where(live.all(-1)[..., None, None], basis, _pseudo_inverse(t, jacobi)[0])
    return Basis(basis, t, warm), c, inverse


def _pseudo_inverse(t: Tensor, jacobi: bool) -> tuple[Tensor, Tensor]:
    """T⁺ where the first rows of T are zero, and as columns in their places an orthonormal basis of T's null space.
    (There warm·c is a right inverse too, but with parts of the size 1/eps in the null space of T, into which the other
    factor would move.)"""
    good, live = finite(t), (t != 0).any(-1)[..., None, :]
    if jacobi:
        b, v = _jacobi(torch.where(good, t, 0))
        square = b.square().sum(-2, keepdim=True)
        square, order = square.sort(-1)
        b, v = (m.gather(-1, order.expand_as(m)) for m in (b, v))
        inverse = (v / torch.where(live, square, torch.inf)) @ b.mT
        return torch.where(good, inverse, torch.nan), torch.where(live | ~good, 0, v)
    q, root = torch.linalg.qr(torch.where(good, t, 0).flip(-2).mT)  # T's live rows first: Tᵀ = Q·[R 0]
    mask = live.flip(-1).to(t.dtype)
    root = root * mask + torch.diag_embed(1 - mask[..., 0, :])
    inverse = torch.linalg.solve_triangular(root.mT, q * mask, upper=False, left=False)
    return torch.where(good, inverse.flip(-1), torch.nan), torch.where(live | ~good, 0, q.flip(-1))


def damped_inverse(s: Tensor, delta: Tensor, jacobi: bool = False) -> Tensor:
    """V diag(σ/(σ² + δ²)) Uᵀ of S = U diag(σ) Vᵀ (p, r, r), for δ (p, 1, 1).

    With S = T_Y·T_Xᵀ, whose σ are the singular values of BA itself, D = T_Xᵀ times this is T_Y⁻¹ times σ²/(σ² + δ²)
    along the singular directions of BA: the damped T_Y⁺ of the side X, invariant also where Y is rank-deficient. 0
    where σ = 0, also for δ = 0.

    Sᵀ(SSᵀ + δ²)⁻¹ without the square, which would square the condition number: from the QR decomposition of [Sᵀ; δ].
    δ is at least 1e-6·‖S‖ (in float64; eps^⅜), so that σ that are rounding noise count for little.
    """
    good = finite(s)
    s = torch.where(good, s, 0)
    r, eps = s.shape[-1], torch.finfo(s.dtype).eps
    delta = delta.maximum(eps**0.375 * torch.linalg.matrix_norm(s, keepdim=True)).clamp_min(1e-30)
    if jacobi:
        b, v = _jacobi(s)
        inverse = (v / (b.square().sum(-2, keepdim=True) + delta**2)) @ b.mT
    else:
        q, root = torch.linalg.qr(torch.cat([s.mT, delta * _eye_like(s)], -2))
        inverse = torch.linalg.solve_triangular(root.mT, q[..., :r, :], upper=False, left=False)
    return torch.where(good, inverse, torch.nan)


def unmagnified_gram(gradient: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    """ḡᵀ·ḡ (p, r, r) of the unmagnified gradient ḡ = g·D (Eq. 7); not finite where g is not, or beyond about 1e18.

    ḡ is formed (in ``out``) before its Gram matrix is: Dᵀ(gᵀg)D loses twice the digits.
    """
    unmagnified = times(gradient, inverse, out)
    return gram(unmagnified, unmagnified)


def second_moment(
    moment: Tensor,
    escaped: Tensor,
    squares: Tensor,
    decay: Tensor,
    *,
    summed: bool,
    eps: float,
    relative_eps: float,
    jacobi: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """V ← β₂ₜ·V + (1−β₂ₜ)·``squares``, ρ ← β₂ₜ·ρ, and the preconditioner U diag(1/(√(λ+ρ) + eps + …)) Uᵀ (Eq. 8);
    V ← V + ``squares`` where ``summed`` (Algorithm 1, Theorems 3 and 4).

    ``relative_eps``·√(λ+ρ)_max is added to eps: directions of V that are rounding noise are then not whitened to full
    size, invariantly, and whatever the scale of the gradient.
    """
    moment = moment + squares if summed else decay * moment + (1 - decay) * squares
    escaped = decay * escaped
    w, u = eigh(moment, jacobi)
    root = (w.clamp_min(0) + escaped[..., 0]).sqrt()
    inverse_root = 1 / (root + eps + relative_eps * root[..., -1:])
    return moment, escaped, (u * inverse_root[..., None, :]) @ u.mT


def row_factors(squares: Tensor, row_moment: Tensor) -> tuple[Tensor, Tensor]:
    """A factor for each row of S (p, rows, r), from the sums of the squares of its rows and their averages over steps,
    (p, rows, 1): one over the root of the latter. Returns the factors, and ‖S‖² and ‖factors∘S‖² (p, 1, 2).

    Norms of rows do not see rotations of the basis: exactly invariant.
    """
    moment = row_moment + 1e-24
    sums = [squares.sum(-2, keepdim=True), (squares / moment).sum(-2, keepdim=True)]
    return moment.rsqrt(), torch.cat(sums, -1)


def transport(moment: Tensor, p: Tensor) -> Tensor:
    """V in the new basis: P·V·Pᵀ."""
    return p @ moment @ p.mT


def escaped_mass(old: Tensor, new: Tensor, jacobi: bool = False) -> Tensor:
    """min(max_i (λ_i(V_old) − λ_i(V_new))₊, (tr V_old − tr V_new)₊): what the new basis no longer sees (d_λ of Alg. 1).

    old, new (p, r, r); returns (p, 1, 1).
    """
    lost = eigh(old, jacobi)[0] - eigh(new, jacobi)[0]
    return lost.amax(-1)[..., None, None].clamp_min(0).minimum(trace(old - new).clamp_min(0))


def checksum(x: Tensor, start: int = 0) -> Tensor:
    """The sum of the first rows of a factor with signs that look random: (p, r). x (p, rows, r) are its rows from
    ``start`` on."""
    some = x[:, : max(CHECKED_ROWS - start, 0)]
    signs = _signs(CHECKED_ROWS, x.dtype, x.device)[:, start : start + some.shape[1]]
    return (signs @ some)[:, 0]


@lru_cache(maxsize=64)
def _signs(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1, n) of ±1."""
    return (1 - 2 * (_hash(torch.arange(n, device=device)) & 1)).to(dtype)[None]


def stochastic_round(x: Tensor, dtype: torch.dtype, key: Tensor, first: int = 0, width: int | None = None) -> Tensor:
    """x (p, …) float32, rounded to bfloat16 or float16, up or down with the probabilities that make it unbiased.

    The noise is a hash of ``key`` (p,) int64 and the element's index: no generator, no state, the same on every rank
    and machine. Values that ``dtype`` has stay as they are. x may be part of matrices that are ``width`` wide, from
    their element ``first`` on.
    """
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    dropped_bits = 23 + int(math.log2(eps))
    if width is None:
        index = torch.arange(x[0].numel(), device=x.device).reshape(x[0].shape)
    else:
        index = first + torch.arange(x.shape[1], device=x.device)[:, None] * width
        index = index + torch.arange(x.shape[2], device=x.device)
    noise = _hash(index + _hash(key).reshape(-1, *[1] * (x.ndim - 1))) & (2**dropped_bits - 1)
    exponent = torch.frexp(x.abs().clamp_min(tiny)).exponent - 1
    quantum = torch.ldexp(torch.full_like(x, eps), exponent)
    return ((x / quantum + noise.to(x.dtype) / 2**dropped_bits).floor() * quantum).to(dtype)


def _hash(h: Tensor) -> Tensor:
    """A 32-bit integer hash in int64 ("lowbias32" of C. Wellons' hash prospector)."""
    h = h & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)
