"""r×r algebra in Triton: each matrix in the registers of the one program that works on it, in the algebra dtype FLOAT
(float64 or float32), which ``load`` and ``eye`` are given, and all else has from its arguments.

RANK is the rank; R, to which matrices are padded, the next power of two from 16 on (``tl.dot`` takes no less). Products
are padded with zeros, what is decomposed or inverted with the identity. The functions are those of
:mod:`lora_rite.algebra` of the same names, but that roots and signs of matrices come from products alone.
"""

# pyright: reportMissingImports=false

import triton
import triton.language as tl

from ..algebra import basis

#: Triton's code sees globals of this type alone.
LIVE = tl.constexpr(basis.LIVE)
EPS, EPS_SINGLE = tl.constexpr(2.0**-52), tl.constexpr(2.0**-23)
TINY_DOUBLE, TINY_SINGLE = tl.constexpr(1e-300), tl.constexpr(1e-37)


@triton.jit
def load(base, RANK: tl.constexpr, R: tl.constexpr, FLOAT: tl.constexpr):
    """A (RANK, RANK) matrix of any dtype."""
    i = tl.arange(0, R)
    inside = (i[:, None] < RANK) & (i[None, :] < RANK)
    return tl.load(base + i[:, None] * RANK + i[None, :], mask=inside, other=0.0).to(FLOAT)


@triton.jit
def load_transposed(base, RANK: tl.constexpr, R: tl.constexpr, FLOAT: tl.constexpr):
    i = tl.arange(0, R)
    inside = (i[:, None] < RANK) & (i[None, :] < RANK)
    return tl.load(base + i[None, :] * RANK + i[:, None], mask=inside, other=0.0).to(FLOAT)


@triton.jit
def store(base, x, RANK: tl.constexpr, R: tl.constexpr):
    """In the dtype of ``base``."""
    i = tl.arange(0, R)
    inside = (i[:, None] < RANK) & (i[None, :] < RANK)
    tl.store(base + i[:, None] * RANK + i[None, :], x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def eye(R: tl.constexpr, first: tl.constexpr, FLOAT: tl.constexpr):
    """The identity, from row ``first`` on."""
    i = tl.arange(0, R)
    return tl.where((i[:, None] == i[None, :]) & (i[:, None] >= first), 1.0, 0.0).to(FLOAT)


@triton.jit
def own_eye(RANK: tl.constexpr, R: tl.constexpr, FLOAT: tl.constexpr):
    """The identity, up to row RANK."""
    i = tl.arange(0, R)
    return tl.where((i[:, None] == i[None, :]) & (i[:, None] < RANK), 1.0, 0.0).to(FLOAT)


@triton.jit
def times(a, b):
    return tl.dot(a, b, out_dtype=a.dtype, input_precision="ieee")


@triton.jit
def total(a):
    return tl.sum(tl.sum(a, 1), 0)


@triton.jit
def trace(a, RANK: tl.constexpr, R: tl.constexpr):
    return total(a * own_eye(RANK, R, a.dtype))


@triton.jit
def norm(a):
    return tl.sqrt(total(a * a))


@triton.jit
def finite(a):
    """1, or 0 where an element is not finite in float32."""
    a = a.to(tl.float32)
    return tl.where(total(tl.where(a * 0 == 0, 0, 1)) == 0, 1, 0)


@triton.jit
def cholesky(a, RANK: tl.constexpr, R: tl.constexpr):
    """L, L⁻¹, and the number of pivots that were not positive (those count as 1)."""
    i = tl.arange(0, R)
    lower, inverse, failed = eye(R, RANK, a.dtype), eye(R, 0, a.dtype), 0
    for j in range(RANK):
        # a stays symmetric, so its row and its column both come without a change of layout.
        column = tl.sum(tl.where(i[None, :] == j, a, 0.0), 1)
        row = tl.sum(tl.where(i[:, None] == j, a, 0.0), 0)
        pivot = tl.sum(tl.where(i == j, column, 0.0), 0)
        bad = (pivot > 0) == 0  # NaN too
        failed += bad.to(tl.int32)
        scale = 1 / tl.sqrt(tl.where(bad, 1.0, pivot))
        column = tl.where(i >= j, column * scale, 0.0)
        a -= column[:, None] * tl.where(i >= j, row * scale, 0.0)[None, :]
        lower = tl.where(i[None, :] == j, column[:, None], lower)
        solved = tl.sum(tl.where(i[:, None] == j, inverse, 0.0), 0) * scale
        below = tl.where(i > j, column, 0.0)
        inverse = tl.where(i[:, None] == j, solved[None, :], inverse - below[:, None] * solved[None, :])
    return lower, inverse, failed


@triton.jit
def inverse_of(a, RANK: tl.constexpr, R: tl.constexpr):
    """a⁻¹, of a padded with the identity: Gauss-Jordan elimination with a pivot row for each column; rows are not
    exchanged, but sorted at the end."""
    i = tl.arange(0, R)
    x, free = eye(R, 0, a.dtype), tl.full([R], 1, tl.int32)
    for j in range(RANK):
        column = tl.sum(tl.where(i[None, :] == j, a, 0.0), 1)
        p = tl.argmax(tl.where(free == 1, tl.abs(column), -1.0), 0)
        free = tl.where(i == p, 0, free)
        scale = 1 / tl.sum(tl.where(i == p, column, 0.0), 0)
        by = tl.where(i == p, 0.0, column)[:, None]
        row_a = tl.sum(tl.where(i[:, None] == p, a, 0.0), 0) * scale
        row_x = tl.sum(tl.where(i[:, None] == p, x, 0.0), 0) * scale
        a = tl.where(i[:, None] == p, row_a[None, :], a - by * row_a[None, :])
        x = tl.where(i[:, None] == p, row_x[None, :], x - by * row_x[None, :])
        a = tl.where(i[None, :] == j, tl.where(i[:, None] == p, 1.0, 0.0), a)
    return times(tl.trans(a), x)


@triton.jit
def stacked_inverse(top, bottom, PASSES: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr):
    """topᵀ's part of the pseudo-inverse of [topᵀ, bottomᵀ]: q·L_n⁻¹…L₁⁻¹, with q the upper half of the orthonormal
    columns for those of [top; bottom], and L of each pass, of which float32 takes two more."""
    SINGLE: tl.constexpr = top.dtype == tl.float32
    ALL: tl.constexpr = PASSES + 2 if SINGLE else PASSES
    # The padding of bottom may be of any size, and is not part of what the shift is relative to.
    shift = 16 * RANK * (EPS_SINGLE if SINGLE else EPS) * eye(R, 0, top.dtype)
    square = times(tl.trans(top), top) + times(tl.trans(bottom), bottom)
    _, back, _ = cholesky(square + trace(square, RANK, R) * shift, RANK, R)
    by = tl.trans(back)
    top, bottom = times(top, by), times(bottom, by)
    for i in tl.static_range(ALL - 1):
        square = times(tl.trans(top), top) + times(tl.trans(bottom), bottom)
        if i < ALL - 3:
            square += trace(square, RANK, R) * shift
        _, inverse, _ = cholesky(square, RANK, R)
        by = tl.trans(inverse)
        top, bottom, back = times(top, by), times(bottom, by), times(inverse, back)
    return times(top, back)


@triton.jit
def largest_eigenvalue(a, SQUARINGS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr):
    """By the average of all with the weights λᴺ, N = 2^SQUARINGS or more; so many at a time do not underflow."""
    TINY: tl.constexpr = TINY_SINGLE if a.dtype == tl.float32 else TINY_DOUBLE
    AT_ONCE: tl.constexpr = 3 if a.dtype == tl.float32 else 5
    power = a
    for _ in tl.static_range((SQUARINGS + AT_ONCE - 1) // AT_ONCE):
        power = power / tl.maximum(norm(power), TINY)
        for _ in range(AT_ONCE):
            power = times(power, power)
    return total(power * a) / tl.maximum(trace(power, RANK, R), TINY)


@triton.jit
def polar(x, R: tl.constexpr):
    """The orthogonal polar factor of x, whose singular values are 1 at most, by scaled Newton-Schulz iterations (Chen
    and Chow 2014); those below 1e-9 (in float32, its eps) may come out as less than 1."""
    SINGLE: tl.constexpr = x.dtype == tl.float32
    if SINGLE:  # As ``lora_rite.algebra.linalg.polar`` does.
        x = x / 1.01
    least, one = tl.full([], EPS_SINGLE if SINGLE else 1e-9, x.dtype), eye(R, 0, x.dtype)
    for _ in range(22 if SINGLE else 28):
        best = tl.maximum(least, 1e-2) if SINGLE else least
        scale = tl.sqrt(3 / (1 + best + best * best))
        x = times(x, 1.5 * scale * one - 0.5 * scale * scale * scale * times(tl.trans(x), x))
        least = tl.minimum(0.5 * scale * least * (3 - scale * scale * least * least), 1.0)
    return x


@triton.jit
def root_of(a, RANK: tl.constexpr, R: tl.constexpr):
    """a^½ of a positive semidefinite matrix: the polar factor H of Lᵀ, a = L·Lᵀ."""
    size = tl.maximum(trace(a, RANK, R), TINY_SINGLE if a.dtype == tl.float32 else TINY_DOUBLE)
    a = a / size + eye(R, RANK, a.dtype)
    lower, failed, share = a, 1, tl.full([], 1e-18, a.dtype)
    for j in range(6):  # JITTER; a loop that ends when it succeeds crashes Triton 3.6
        if failed != 0:
            lower, _, failed = cholesky(a + share * eye(R, 0, a.dtype), RANK, R)
            share = tl.where(
                j == 0, 1e-14, tl.where(j == 1, 1e-8, tl.where(j == 2, 1e-7, tl.where(j == 3, 1e-5, 1e-2)))
            )
            share = share.to(a.dtype)
    upper = tl.where(eye(R, RANK, a.dtype) > 0, 1.0, tl.trans(lower))
    # After that jitter singular values may exceed 1 by half of it.
    half = times(tl.trans(polar(upper / 1.006, R)), upper)
    return (half + tl.trans(half)) * (0.5 * tl.sqrt(size))


@triton.jit
def preconditioner(v, escaped, eps, relative_eps, RANK: tl.constexpr, R: tl.constexpr):
    """U diag(1/(√(λ + escaped) + eps + relative_eps·√(λ + escaped)_max)) Uᵀ of V = U diag(λ) Uᵀ."""
    own, one = own_block(RANK, R, v.dtype), own_eye(RANK, R, v.dtype)
    v = (v + tl.trans(v)) * 0.5 + escaped.to(v.dtype) * one
    added = eps.to(v.dtype) + relative_eps.to(v.dtype) * tl.sqrt(largest_eigenvalue(v, 15, RANK, R))
    _, inverse, _ = cholesky(root_of(v, RANK, R) * own + added * one + eye(R, RANK, v.dtype), RANK, R)
    return times(tl.trans(inverse), inverse) * own


@triton.jit
def own_block(RANK: tl.constexpr, R: tl.constexpr, FLOAT: tl.constexpr):
    """1 in the first RANK rows and columns."""
    i = tl.arange(0, R)
    return tl.where((i[:, None] < RANK) & (i[None, :] < RANK), 1.0, 0.0).to(FLOAT)


@triton.jit
def orthonormalise(
    warm, inverse_warm, gram, k, t, c, RANK: tl.constexpr, R: tl.constexpr, FLOAT: tl.constexpr
):  # fmt: skip
    """K and T of the basis of X, and c, Q = z·c, from K_w, K_w⁻¹ and the Gram matrix of z = X·K_w; all are places in
    memory, so that no more of them than are needed are held in registers."""
    z, own = load(gram, RANK, R, FLOAT), own_block(RANK, R, FLOAT)
    lower, inverse, failed = cholesky(z + eye(R, RANK, FLOAT), RANK, R)
    by = tl.trans(inverse) * own
    inverse = times(by, tl.trans(by))
    condition = norm(times(z, z)) * norm(times(inverse, inverse))  # its square at most
    if tl.where((failed == 0) & (condition * LIVE * LIVE < 1), 1, 0) == 1:  # not for NaN
        store(c, by, RANK, R)
        store(k, times(load(warm, RANK, R, FLOAT), by), RANK, R)
        store(t, times(tl.trans(lower) * own, load(inverse_warm, RANK, R, FLOAT)), RANK, R)
    else:
        projected(warm, inverse_warm, gram, k, t, c, RANK, R, FLOAT)


@triton.jit
def projected(
    warm, inverse_warm, gram, k, t, c, RANK: tl.constexpr, R: tl.constexpr, FLOAT: tl.constexpr
):  # fmt: skip
    """The same of factors of any rank: on the eigenvectors of ``gram`` with a share of the largest above LIVE."""
    live, one = live_part(load(gram, RANK, R, FLOAT), RANK, R), eye(R, 0, FLOAT)
    form = times(times(live, load(gram, RANK, R, FLOAT)), live) + one - live
    lower, inverse, _ = cholesky(form, RANK, R)
    by = times(live, tl.trans(inverse))
    store(c, by, RANK, R)
    store(k, times(load(warm, RANK, R, FLOAT), by), RANK, R)
    coordinates = times(times(tl.trans(lower), live), load(inverse_warm, RANK, R, FLOAT))
    store(t, coordinates, RANK, R)
    if trace(live, RANK, R) <= RANK - 0.5:
        rest = times(one - live, tl.trans(inverse))
        rest = times(tl.trans(rest), rest) * tl.maximum(norm(coordinates), 1e-30)
        # T⁺: k has parts of the size 1/eps in the null space of T, into which the other factor would then move.
        store(k, stacked_inverse(tl.trans(coordinates), rest, 3, RANK, R), RANK, R)


@triton.jit
def live_part(gram, RANK: tl.constexpr, R: tl.constexpr):
    """The projection on the eigenvectors of ``gram`` with a share of the largest eigenvalue above LIVE."""
    largest, own = largest_eigenvalue(gram, 10, RANK, R), own_block(RANK, R, gram.dtype)
    one = eye(R, 0, gram.dtype)
    size = tl.maximum(norm(gram), TINY_SINGLE if gram.dtype == tl.float32 else TINY_DOUBLE)
    shifted = (gram - largest * LIVE * one) / size
    # The padding has to stay within 1.
    shifted = tl.where(own > 0, (shifted + tl.trans(shifted)) * 0.5, 0.0) - eye(R, RANK, gram.dtype)
    live = (one + polar(shifted, R)) * 0.5
    return tl.where(largest > 0, live, 0.0) * own
