"""The kernels of r×r matrices, one program a factor: ``invert``, ``reduce``, ``precondition``, ``scales``, ``basis``;
and ``decide``, one for all."""

# pyright: reportMissingImports=false

import triton
import triton.language as tl

from ..algebra.step import ROW_FLOOR
from . import matrices as mx
from .tables import (
    BETA1,
    BETA2,
    BLOCKS,
    CLIP,
    COLUMNS,
    DAMPED,
    DAMPING,
    EPS,
    EQUILIBRATED,
    FIRST_ROW,
    FIRST_TILE,
    FLAG,
    GROUP,
    LR,
    LR_SCALE,
    MATRICES,
    MOVES,
    NUM_OPTIONS,
    NUMBERS,
    PAIR,
    PARTNER,
    RELATIVE_EPS,
    ROW_MOMENT,
    ROWS,
    SCALING,
    SIGN,
    SKIPPING,
    STEP,
    TILES,
    WEIGHT_DECAY,
)

FLOOR = tl.constexpr(ROW_FLOOR)
#: What the least damping is relative to ‖S‖, see ``lora_rite.algebra.step.damped_inverse``.
LEAST_DAMPING = tl.constexpr(2.220446049250313e-16**0.375)
#: Where the matrices of a factor's state are.
SECOND_MOMENT, TRANSPORT, BASIS, COORDINATES, WARM = (tl.constexpr(i) for i in range(5))


@triton.jit
def entry(factors, f, COLUMN: tl.constexpr):
    return tl.load(factors + f * COLUMNS + COLUMN)


@triton.jit
def option(hyper, factors, f, COLUMN: tl.constexpr):
    return tl.load(hyper + entry(factors, f, GROUP) * NUM_OPTIONS + COLUMN)


@triton.jit
def rate(hyper, factors, f):
    """The learning rate of B·A."""
    return option(hyper, factors, f, LR) * option(hyper, factors, f, LR_SCALE)


@triton.jit
def shrink_of(hyper, factors, f):
    """What weight decay leaves of a factor."""
    return 1 - option(hyper, factors, f, LR) * option(hyper, factors, f, WEIGHT_DECAY)


@triton.jit
def state_of(factors, f, MATRIX: tl.constexpr, RANK: tl.constexpr):
    """Where a matrix of the state of a factor is."""
    return entry(factors, f, MATRICES).to(tl.pointer_type(tl.float32)) + MATRIX * RANK * RANK


@triton.jit
def number(factors, f, COLUMN: tl.constexpr):
    return entry(factors, f, NUMBERS).to(tl.pointer_type(tl.float32)) + COLUMN


@triton.jit
def decay_of(factors, f, beta):
    """The bias-corrected decay at the step that is made: β(1 − βᵗ⁻¹)/(1 − βᵗ)."""
    before = tl.load(entry(factors, f, STEP).to(tl.pointer_type(tl.float32))).to(tl.float64)
    safe = tl.where((beta > 0) & (beta < 1), beta, 0.5)
    power = tl.exp(before * tl.log(safe))
    decay = safe * (1 - power) / (1 - safe * power)
    return tl.where(safe == beta, decay, beta)  # 0 and 1 stay as they are


@triton.jit
def invert_kernel(
    factors, hyper, d, product, delta, flags, num_flags, RANK: tl.constexpr, R: tl.constexpr, FLOAT: tl.constexpr
):  # fmt: skip
    """D of each factor: T⁺ of its partner, damped where that is; and S and δ of the damping. Raises the flags of all
    pairs, for later kernels to lower."""
    f = tl.program_id(0)
    y = entry(factors, f, PARTNER)
    flag = flags + entry(factors, f, FLAG)
    tl.store(flag, 1)
    tl.store(flag + num_flags, 1)
    damping, damped = option(hyper, factors, f, DAMPING), entry(factors, y, DAMPED)
    hot = 0
    if (damping > 0) & (damped != 0) & (entry(factors, f, MOVES) * entry(factors, y, MOVES) != 0):
        hot = tl.load(damped.to(tl.pointer_type(tl.int8))).to(tl.int32)
    if hot == 0:
        mx.store(d + f * RANK * RANK, mx.load(state_of(factors, y, BASIS, RANK), RANK, R, FLOAT), RANK, R)
    else:
        x = mx.load_transposed(state_of(factors, f, COORDINATES, RANK), RANK, R, FLOAT)
        s = mx.times(mx.load(state_of(factors, y, COORDINATES, RANK), RANK, R, FLOAT), x)
        by = damping * rate(hyper, factors, f) * tl.sqrt(entry(factors, y, ROWS).to(tl.float64))
        pair = entry(factors, f, PAIR)
        tl.store(delta + pair, by)
        mx.store(product + pair * RANK * RANK, s, RANK, R)
        by = tl.maximum(tl.maximum(by.to(FLOAT), mx.norm(s) * LEAST_DAMPING), 1e-30)
        inverse = mx.stacked_inverse(tl.trans(s), by * mx.eye(R, 0, FLOAT), 2, RANK, R)
        mx.store(d + f * RANK * RANK, mx.times(x, inverse), RANK, R)


@triton.jit
def total_of(partial, f, factors, stride, RANK: tl.constexpr, R: tl.constexpr):
    """The sum of a factor's partial matrices, in float64, in their order."""
    partial += entry(factors, f, FIRST_TILE) * stride
    count = entry(factors, f, TILES)
    # So many at a time, as their loads wait for memory together.
    many: tl.constexpr = 2048 // (R * R) if R < 64 else 1
    i, t = tl.arange(0, R), tl.arange(0, many)
    at = t[:, None, None] * stride + i[None, :, None] * RANK + i[None, None, :]
    inside = (i[None, :, None] < RANK) & (i[None, None, :] < RANK)
    total = tl.zeros([R, R], tl.float64)
    for begin in range(0, count, many):
        x = tl.load(partial + begin * stride + at, mask=inside & (begin + t < count)[:, None, None], other=0.0)
        total += tl.sum(x.to(tl.float64), 0)
    return total


@triton.jit
def sum_of(values, count, stride):
    """Of so many numbers, in float64."""
    i = tl.arange(0, 128)
    total = tl.zeros([128], tl.float64)
    for begin in range(0, count, 128):
        total += tl.load(values + (begin + i) * stride, mask=begin + i < count, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def reduce_kernel(
    factors, hyper, partial, checksums, grams, traces, kept, flags, RANK: tl.constexpr, R: tl.constexpr,
    FLOAT: tl.constexpr,
):  # fmt: skip
    """ḡᵀḡ, 0 where ``update_skipping`` drops the gradient, and its trace, with respect to scaling·B·A; and whether the
    factor is what the last step left: its checksums are, to rounding."""
    f = tl.program_id(0)
    rows, scaling = entry(factors, f, ROWS).to(tl.float64), option(hyper, factors, f, SCALING)
    total = tl.zeros([R, R], tl.float64)
    keep = 1
    if entry(factors, f, MOVES) != 0:
        total = total_of(partial, f, factors, RANK * RANK, RANK, R)
        limit = option(hyper, factors, f, SKIPPING) * scaling
        keep = 1 - ((limit > 0) & (mx.trace(total, RANK, R) / (rows * RANK) > limit * limit)).to(tl.int32)
        total *= keep.to(tl.float64)
    tl.store(kept + f, keep)
    mx.store(grams + f * RANK * RANK, total, RANK, R)
    tl.store(traces + f, mx.trace(total, RANK, R) / (scaling * scaling))
    i = tl.arange(0, R)
    t = mx.load(state_of(factors, f, COORDINATES, RANK), RANK, R, FLOAT)
    tolerance = 128 * mx.EPS_SINGLE * tl.sqrt(rows) * tl.sqrt(tl.sum(t * t, 0))
    seen = tl.load(checksums + f * RANK + i, mask=i < RANK, other=0.0)
    known = tl.load(number(factors, f, 0) + i, mask=i < RANK, other=0.0)
    same = tl.abs((seen - known).to(tl.float64)) <= tolerance  # False for NaN
    if tl.sum(tl.where(same, 0, 1), 0) != 0:
        tl.store(flags + entry(factors, f, FLAG), 0)


@triton.jit
def precondition_kernel(
    factors, hyper, traces, num_traces, own_traces, grams, kept, d, v, w, warm, escaped, gates, flags, noise,
    RANK: tl.constexpr, R: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """Clipping by the norm of all gradients, V and W = D·V^-½ of this step, whether they are finite, K_w of the factor
    after the step, and whether it is to move."""
    f = tl.program_id(0)
    at, y = f * RANK * RANK, entry(factors, f, PARTNER)
    seen = (tl.load(own_traces + f) > 0) | (tl.load(own_traces + y) > 0)
    # Of several pairs in one parameter (experts), those without any gradient are passed over.
    seen = (seen | (entry(factors, f, BLOCKS) == 1)) & (entry(factors, f, MOVES) != 0)
    tl.store(gates + f, seen.to(tl.int32))
    clip = option(hyper, factors, f, CLIP)
    scale = tl.where(clip > 0, clip / tl.maximum(tl.sqrt(sum_of(traces, num_traces, 1)), tl.maximum(clip, 1e-300)), 1.0)
    squares = mx.load(grams + at, RANK, R, FLOAT) * (scale * scale).to(FLOAT)
    decay = decay_of(factors, f, option(hyper, factors, f, BETA2))
    weight = tl.where(decay == 1, 1.0, 1 - decay)  # V is summed where β₂ is 1
    moment = decay.to(FLOAT) * mx.load(state_of(factors, f, SECOND_MOMENT, RANK), RANK, R, FLOAT)
    moment += (weight / entry(factors, f, ROWS).to(tl.float64)).to(FLOAT) * squares
    mx.store(v + at, moment, RANK, R)
    mass = decay * tl.load(number(factors, f, RANK + 1)).to(tl.float64)
    tl.store(escaped + f, mass)
    eps, relative_eps = option(hyper, factors, f, EPS), option(hyper, factors, f, RELATIVE_EPS)
    eps *= option(hyper, factors, f, SCALING)
    root = mx.preconditioner(moment, mass, eps, relative_eps, RANK, R)
    d_own = mx.load(d + at, RANK, R, FLOAT)
    sign = scale * option(hyper, factors, f, SIGN) * tl.load(kept + f).to(tl.float64)
    by = mx.times(d_own, root) * sign.to(FLOAT)
    mx.store(w + at, by, RANK, R)
    if mx.finite(moment) * mx.finite(by) * mx.finite(d_own) == 0:
        tl.store(flags + entry(factors, f, FLAG), 0)
    square = mx.total(mx.times(root, squares) * root)
    decay = decay_of(factors, f, option(hyper, factors, f, BETA1))
    length = decay * tl.load(number(factors, f, RANK)).to(tl.float64) + (1 - decay) * tl.sqrt(tl.maximum(square, 0.0))
    old = mx.load(state_of(factors, f, WARM, RANK), RANK, R, FLOAT)
    t = mx.load(state_of(factors, f, COORDINATES, RANK), RANK, R, FLOAT)
    step = tl.trans(d_own) * rate(hyper, factors, f).to(FLOAT)
    mx.store(warm + at, warm_basis(old, t, step, length.to(FLOAT), noise, RANK, R), RANK, R)


@triton.jit
def warm_basis(old, t, step, length, noise, RANK: tl.constexpr, R: tl.constexpr):
    """K_w for the factor after a step X − M·``step``, ‖M‖ ≤ ``length``."""
    x, moved = mx.times(t, old), mx.times(step, old) * length
    near = old * (noise * mx.norm(t)).to(old.dtype)
    form = 2 * (mx.times(tl.trans(x), x) + mx.times(tl.trans(moved), moved) + mx.times(tl.trans(near), near))
    # Its columns are scaled to 1, by rows and by columns, both without a change of layout.
    diagonal = mx.eye(R, 0, old.dtype)
    column, row = tl.sum(form * diagonal, 1), tl.sum(form * diagonal, 0)
    if tl.max(row, 0) > 0:
        form += mx.eye(R, RANK, old.dtype)
    else:
        form = mx.eye(R, 0, old.dtype)
    column, row = 1 / tl.sqrt(tl.where(column > 0, column, 1.0)), 1 / tl.sqrt(tl.where(row > 0, row, 1.0))
    jitter = RANK * 10 * (mx.EPS_SINGLE if old.dtype == tl.float32 else mx.EPS)
    _, inverse, _ = mx.cholesky(form * column[:, None] * row[None, :] + jitter * diagonal, RANK, R)
    return mx.times(old * row[None, :], tl.trans(inverse))


@triton.jit
def decide_kernel(
    flags, num_flags, others, num_others, traces, num_traces, clip, counts, ok, norm, CAPTURABLE: tl.constexpr
):  # fmt: skip
    """Whether the step is to be made: all flags are up, also those of ``others``; the norm of all gradients; counts of
    steps, of clipped ones and, where the device decides alone, of those skipped in a row and in all."""
    i = tl.arange(0, 1024)
    down = tl.zeros([1024], tl.int32)
    for begin in range(0, num_flags, 1024):
        down += tl.where(tl.load(flags + begin + i, mask=begin + i < num_flags, other=1) == 0, 1, 0)
    for begin in range(0, num_others, 1024):
        down += tl.where(tl.load(others + begin + i, mask=begin + i < num_others, other=1) == 0, 1, 0)
    fine = tl.where(tl.sum(down, 0) == 0, 1, 0)
    size = tl.sqrt(sum_of(traces, num_traces, 1)).to(tl.float32)
    tl.store(ok, fine.to(tl.int8))
    if not CAPTURABLE:
        size = tl.where(fine == 1, size, tl.load(norm))  # the last step that was made
    tl.store(norm, size)
    tl.store(counts, tl.load(counts) + fine)
    tl.store(counts + 1, tl.load(counts + 1) + tl.where(size > tl.load(clip), fine, 0))
    if CAPTURABLE:
        tl.store(counts + 2, (tl.load(counts + 2) + 1) * (1 - fine))
        tl.store(counts + 3, tl.load(counts + 3) + 1 - fine)


@triton.jit
def scales_kernel(factors, hyper, row_partial, squares, gates, ok, scales):
    """What ``apply`` multiplies a row of S by is scales[1]/(√R + scales[0]), which leaves the norm of S as it is; all
    without equilibration are multiplied alike, and scales[0] is −1."""
    f = tl.program_id(0)
    if (tl.load(ok) != 0) & (tl.load(gates + f) != 0):
        rest = 1 - decay_of(factors, f, option(hyper, factors, f, BETA1))
        if option(hyper, factors, f, EQUILIBRATED) == 0:
            tl.store(scales + 2 * f, -1.0)
            tl.store(scales + 2 * f + 1, rest.to(tl.float32))
        else:
            rows = entry(factors, f, ROWS)
            mean = sum_of(row_partial + entry(factors, f, FIRST_TILE), entry(factors, f, TILES), 1)
            floor = (tl.sqrt(mean / rows.to(tl.float64)) * FLOOR + 1e-12).to(tl.float32)
            squares += entry(factors, f, FIRST_ROW)
            moment = entry(factors, f, ROW_MOMENT).to(tl.pointer_type(tl.float32))
            i = tl.arange(0, 1024)
            before, after = tl.zeros([1024], tl.float32), tl.zeros([1024], tl.float32)
            for begin in range(0, rows, 1024):
                inside = begin + i < rows
                square = tl.load(squares + begin + i, mask=inside, other=0.0)
                by = 1 / (tl.sqrt(tl.load(moment + begin + i, mask=inside, other=1.0)) + floor)
                before += square
                after += square * by * by
            ratio = tl.sum(before.to(tl.float64), 0) / tl.maximum(tl.sum(after.to(tl.float64), 0), 1e-30)
            tl.store(scales + 2 * f, floor)
            tl.store(scales + 2 * f + 1, (rest * tl.sqrt(ratio)).to(tl.float32))


@triton.jit
def basis_kernel(
    factors, partial, warm, grams, inverses, k, c, gates, ok, RANK: tl.constexpr, R: tl.constexpr, FLOAT: tl.constexpr
):  # fmt: skip
    """Of the factors that have moved, T and K_w in the state; zᵀz, K_w⁻¹, K and c for ``carry``."""
    f = tl.program_id(0)
    if (tl.load(ok) != 0) & (tl.load(gates + f) != 0):
        at = f * RANK * RANK
        mx.store(grams + at, total_of(partial, f, factors, 2 * RANK * RANK + 1, RANK, R), RANK, R)
        k_warm = mx.load(warm + at, RANK, R, FLOAT)
        mx.store(state_of(factors, f, WARM, RANK), k_warm, RANK, R)
        mx.store(inverses + at, mx.inverse_of(k_warm + mx.eye(R, RANK, FLOAT), RANK, R), RANK, R)
        tl.debug_barrier()  # Else a thread may load what another one has not stored yet.
        t = state_of(factors, f, COORDINATES, RANK)
        mx.orthonormalise(warm + at, inverses + at, grams + at, k + at, t, c + at, RANK, R, FLOAT)


@triton.jit
def carry_kernel(
    factors, hyper, partial, d, v, grams, inverses, k, c, escaped, gates, ok, LOW: tl.constexpr, RANK: tl.constexpr,
    R: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """The rest of the state of the factors that have moved: K, and P of the partner and V ← P·V·Pᵀ there."""
    f = tl.program_id(0)
    if (tl.load(ok) != 0) & (tl.load(gates + f) != 0):
        at, y = f * RANK * RANK, entry(factors, f, PARTNER)
        stride: tl.constexpr = 2 * RANK * RANK + 1
        shift = total_of(partial + RANK * RANK, f, factors, stride, RANK, R).to(FLOAT)
        if not LOW:
            step = mx.load_transposed(d + at, RANK, R, FLOAT) * rate(hyper, factors, f).to(FLOAT)
            shift = mx.times(shift, step.to(tl.float32).to(FLOAT))
        # zᵀ·X_old, with z = X_new·K_w, from X_old = (X_new + what it moved by)/shrink.
        cross = mx.times(mx.load(grams + at, RANK, R, FLOAT), mx.load(inverses + at, RANK, R, FLOAT)) + shift
        cross /= shrink_of(hyper, factors, f).to(FLOAT)
        basis = state_of(factors, f, BASIS, RANK)
        p = mx.times(mx.times(mx.load_transposed(c + at, RANK, R, FLOAT), cross), mx.load(basis, RANK, R, FLOAT))
        if entry(factors, y, MOVES) != 0:
            moment = mx.load(v + y * RANK * RANK, RANK, R, FLOAT)
            mx.store(state_of(factors, y, TRANSPORT, RANK), p, RANK, R)
            mx.store(state_of(factors, y, SECOND_MOMENT, RANK), mx.times(mx.times(p, moment), tl.trans(p)), RANK, R)
        else:  # The basis of a frozen partner stays.
            mx.store(state_of(factors, f, TRANSPORT, RANK), mx.eye(R, 0, FLOAT), RANK, R)
            mx.store(state_of(factors, f, SECOND_MOMENT, RANK), mx.load(v + at, RANK, R, FLOAT), RANK, R)
        tl.debug_barrier()  # Else a thread may store to what another one has not loaded yet.
        mx.store(basis, mx.load(k + at, RANK, R, FLOAT), RANK, R)
        sizes = partial + entry(factors, f, FIRST_TILE) * stride + 2 * RANK * RANK
        size = sum_of(sizes, entry(factors, f, TILES), stride)
        tl.store(number(factors, f, RANK), tl.sqrt(size).to(tl.float32))
        tl.store(number(factors, f, RANK + 1), tl.load(escaped + f).to(tl.float32))
        count = entry(factors, f, STEP).to(tl.pointer_type(tl.float32))
        tl.store(count, tl.load(count) + 1)
