"""The kernels of tall factors, one program a tile of rows of one factor: ``measure``, ``rows``, ``apply``. All sums are
taken tile by tile, and added up in order by the kernels that follow: no atomics, so a step is deterministic.

In float32, with r×r matrices that come in FLOAT. BLOCK rows are worked on at a time. VECTOR: all addresses are
multiples of 16 bytes, and all strides of 4 elements. STRIDED: some factor lies otherwise in its parameter than
(r, rows) or (rows, r).
"""

# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from ..algebra.rounding import CHECKED_ROWS
from . import matrices as mx
from .small import TRANSPORT, decay_of, entry, number, option, rate, shrink_of, state_of
from .tables import (
    BETA1,
    BLOCKS,
    EQUILIBRATED,
    FIRST_MOMENT,
    FIRST_ROW,
    FIRST_STEP,
    MOVES,
    OFFSET,
    PARAMETER,
    POSITION,
    RANK_FIRST,
    RANK_STRIDE,
    ROW_BETA,
    ROW_MOMENT,
    ROW_STRIDE,
    ROWS,
)

CHECKED = tl.constexpr(CHECKED_ROWS)


@triton.jit
def _where(factors, f, rows, n, RANK: tl.constexpr, R: tl.constexpr, FIRST: tl.constexpr, STRIDED: tl.constexpr):
    """Offsets of rows in a factor, and their mask; a stride of 1 is a constant, so that loads are coalesced."""
    i = tl.arange(0, R)
    if STRIDED:
        row_stride, rank_stride = (
            entry(factors, f, ROW_STRIDE).to(tl.int32),
            entry(factors, f, RANK_STRIDE).to(tl.int32),
        )
        offsets = rows[:, None] * row_stride + i[None, :] * rank_stride
    elif FIRST:
        offsets = i[None, :] * n + rows[:, None]
    else:
        offsets = rows[:, None] * RANK + i[None, :]
    return offsets, (rows < n)[:, None] & (i < RANK)[None, :]


@triton.jit
def _tile(factors, tiles, BLOCK: tl.constexpr, STEPS: tl.constexpr, VECTOR: tl.constexpr):
    """Factor, first row, number of rows, and blocks to work on."""
    t = tl.program_id(0)
    f, first = tl.load(tiles + 2 * t), tl.load(tiles + 2 * t + 1)
    n = entry(factors, f, ROWS).to(tl.int32)
    steps = tl.minimum(STEPS, tl.cdiv(n - first, BLOCK))
    if VECTOR:
        first, n = tl.multiple_of(first, 16), tl.multiple_of(n, 4)
    return f, first, n, steps


@triton.jit
def _at(address, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _in_parameter(addresses, factors, f, WHICH: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Where a factor (WHICH = 0) or its gradient (1) begins in its parameter."""
    pointer = tl.load(addresses + 2 * entry(factors, f, PARAMETER) + WHICH).to(tl.pointer_type(DTYPE))
    pointer += entry(factors, f, OFFSET)
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _hash(h):
    """As ``lora_rite.algebra.rounding``'s, of uint32."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _signs(rows):
    return 1.0 - 2.0 * (_hash(rows.to(tl.uint32)) & 1).to(tl.float32)


@triton.jit
def measure_kernel(
    addresses, factors, tiles, d, partial, checksums, RANK: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr, VECTOR: tl.constexpr, STRIDED: tl.constexpr, DTYPE: tl.constexpr, G_DTYPE: tl.constexpr,
    FLOAT: tl.constexpr,
):  # fmt: skip
    """(g·D)ᵀ(g·D) of each tile, and in each first one the checksum of the factor."""
    f, first, n, steps = _tile(factors, tiles, BLOCK, STEPS, VECTOR)
    if first == 0:
        x = _in_parameter(addresses, factors, f, 0, DTYPE, VECTOR)
        if entry(factors, f, RANK_FIRST) != 0:
            _check(factors, f, x, n, steps, checksums, RANK, R, BLOCK, True, STRIDED)
        else:
            _check(factors, f, x, n, steps, checksums, RANK, R, BLOCK, False, STRIDED)
    if entry(factors, f, MOVES) != 0:
        g = _in_parameter(addresses, factors, f, 1, G_DTYPE, VECTOR)
        by = mx.load(d + f * RANK * RANK, RANK, R, FLOAT).to(tl.float32)
        out = partial + tl.program_id(0).to(tl.int64) * RANK * RANK
        if entry(factors, f, RANK_FIRST) != 0:
            _measure(factors, f, g, n, first, steps, by, out, RANK, R, BLOCK, True, STRIDED)
        else:
            _measure(factors, f, g, n, first, steps, by, out, RANK, R, BLOCK, False, STRIDED)


@triton.jit
def _check(
    factors, f, x, n, steps, checksums, RANK: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr,
    STRIDED: tl.constexpr,
):  # fmt: skip
    i, sums = tl.arange(0, R), tl.zeros([R], tl.float32)
    for step in range(tl.minimum(steps, tl.cdiv(CHECKED, BLOCK))):
        rows = step * BLOCK + tl.arange(0, BLOCK)
        at, inside = _where(factors, f, rows, n, RANK, R, FIRST, STRIDED)
        sums += _checksum(tl.load(x + at, mask=inside, other=0.0).to(tl.float32), rows)
    tl.store(checksums + f * RANK + i, sums, mask=i < RANK)


@triton.jit
def _checksum(x, rows):
    return tl.sum(x * tl.where(rows < CHECKED, _signs(rows), 0.0)[:, None], 0)


@triton.jit
def _measure(
    factors, f, g, n, first, steps, by, out, RANK: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    FIRST: tl.constexpr, STRIDED: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([R, R], tl.float32)
    for step in range(steps):
        at, inside = _where(factors, f, first + step * BLOCK + tl.arange(0, BLOCK), n, RANK, R, FIRST, STRIDED)
        unmagnified = _product(tl.load(g + at, mask=inside, other=0.0).to(tl.float32), by)
        total = tl.dot(tl.trans(unmagnified), unmagnified, total, input_precision="ieee")
    mx.store(out, total, RANK, R)


@triton.jit
def _product(x, by):
    return tl.dot(x, by, input_precision="ieee")


@triton.jit
def rows_kernel(
    addresses, factors, hyper, tiles, w, squares, row_partial, gates, ok, RANK: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, VECTOR: tl.constexpr, STRIDED: tl.constexpr, G_DTYPE: tl.constexpr,
    FLOAT: tl.constexpr,
):  # fmt: skip
    """The sums of the squares of the rows of S = g·W, the rows' moments, advanced in the state, and their sum."""
    f, first, n, steps = _tile(factors, tiles, BLOCK, STEPS, VECTOR)
    moves = (tl.load(ok) != 0) & (tl.load(gates + f) != 0)
    if moves & (option(hyper, factors, f, EQUILIBRATED) != 0):
        g = _in_parameter(addresses, factors, f, 1, G_DTYPE, VECTOR)
        if entry(factors, f, RANK_FIRST) != 0:
            total = _rows(factors, hyper, f, g, w, squares, n, first, steps, RANK, R, BLOCK, True, STRIDED)
            tl.store(row_partial + tl.program_id(0), total)
        else:
            total = _rows(factors, hyper, f, g, w, squares, n, first, steps, RANK, R, BLOCK, False, STRIDED)
            tl.store(row_partial + tl.program_id(0), total)


@triton.jit
def _rows(
    factors, hyper, f, g, w, squares, n, first, steps, RANK: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    FIRST: tl.constexpr, STRIDED: tl.constexpr,
):  # fmt: skip
    moment = _at(entry(factors, f, ROW_MOMENT), tl.float32, False)
    squares += entry(factors, f, FIRST_ROW)
    by = mx.load(w + f * RANK * RANK, RANK, R, tl.float32)
    decay = decay_of(factors, f, option(hyper, factors, f, ROW_BETA))
    rest, decay = ((1 - decay) / RANK).to(tl.float32), decay.to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(steps):
        rows = first + step * BLOCK + tl.arange(0, BLOCK)
        at, inside = _where(factors, f, rows, n, RANK, R, FIRST, STRIDED)
        s = _product(tl.load(g + at, mask=inside, other=0.0).to(tl.float32), by)
        square = tl.sum(s * s, 1)
        new = decay * tl.load(moment + rows, mask=rows < n, other=0.0) + rest * square
        tl.store(moment + rows, new, mask=rows < n)
        tl.store(squares + rows, square, mask=rows < n)
        total += new
    return tl.sum(total, 0)


@triton.jit
def apply_kernel(
    addresses, factors, hyper, tiles, scales, w, d, warm, partial, gates, ok, RANK: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, VECTOR: tl.constexpr, STRIDED: tl.constexpr, DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """M ← M·C + scales∘(g·W) and X ← X·shrink − M·S, in place; the new checksum; of each tile, with z = X·K_w, zᵀz,
    what becomes zᵀ·(X_old·shrink − X), and ‖M‖²."""
    f, first, n, steps = _tile(factors, tiles, BLOCK, STEPS, VECTOR)
    if (tl.load(ok) != 0) & (tl.load(gates + f) != 0):
        if entry(factors, f, RANK_FIRST) != 0:
            _apply(addresses, factors, hyper, f, first, n, steps, scales, w, d, warm, partial, RANK, R, BLOCK, VECTOR,
                   STRIDED, DTYPE, G_DTYPE, FLOAT, True)  # fmt: skip
        else:
            _apply(addresses, factors, hyper, f, first, n, steps, scales, w, d, warm, partial, RANK, R, BLOCK, VECTOR,
                   STRIDED, DTYPE, G_DTYPE, FLOAT, False)  # fmt: skip


@triton.jit
def _apply(
    addresses, factors, hyper, f, first, n, steps, scales, w, d, warm, partial, RANK: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, STRIDED: tl.constexpr, DTYPE: tl.constexpr, G_DTYPE: tl.constexpr,
    FLOAT: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    x_base = _in_parameter(addresses, factors, f, 0, DTYPE, VECTOR)
    g_base = _in_parameter(addresses, factors, f, 1, G_DTYPE, VECTOR)
    m_base = _at(entry(factors, f, FIRST_MOMENT), tl.float32, VECTOR)
    moment = _at(entry(factors, f, ROW_MOMENT), tl.float32, False)
    floor, scale = tl.load(scales + 2 * f), tl.load(scales + 2 * f + 1)
    lr = rate(hyper, factors, f)
    shrink = shrink_of(hyper, factors, f).to(tl.float32)
    decay = decay_of(factors, f, option(hyper, factors, f, BETA1))
    own = f * RANK * RANK
    w, d, warm, transport = w + own, d + own, warm + own, state_of(factors, f, TRANSPORT, RANK)
    key = _key(factors, f)
    if R < 64:
        by_w, by_c, by_s, by_k = _factors(w, d, warm, transport, lr, decay, RANK, R, FLOAT)
    zz, shift = tl.zeros([R, R], tl.float32), tl.zeros([R, R], tl.float32)
    size, sums = tl.zeros([BLOCK], tl.float32), tl.zeros([R], tl.float32)
    for step in range(steps):
        if R >= 64:  # They would not fit in the registers all the time.
            by_w, by_c, by_s, by_k = _factors(w, d, warm, transport, lr, decay, RANK, R, FLOAT)
        rows = first + step * BLOCK + tl.arange(0, BLOCK)
        at, inside = _where(factors, f, rows, n, RANK, R, FIRST, STRIDED)
        row_scale = tl.sqrt(tl.load(moment + rows, mask=rows < n, other=1.0)) + floor
        row_scale = scale / tl.where(floor < 0, 1.0, row_scale)
        g = tl.load(g_base + at, mask=inside, other=0.0).to(tl.float32)
        m = _product(g, by_w) * row_scale[:, None]
        m = tl.dot(tl.load(m_base + at, mask=inside, other=0.0), by_c, m, input_precision="ieee")
        tl.store(m_base + at, m, mask=inside)
        size += tl.sum(m * m, 1)
        x = tl.load(x_base + at, mask=inside, other=0.0).to(tl.float32) * shrink
        new = x - _product(m, by_s)
        if tl.float32 != DTYPE:
            new = _rounded(new, at + entry(factors, f, OFFSET), key, DTYPE)
            m = x - new
        tl.store(x_base + at, new.to(DTYPE), mask=inside)
        sums += _checksum(new, rows)
        z = tl.trans(_product(new, by_k))
        zz = tl.dot(z, tl.trans(z), zz, input_precision="ieee")
        shift = tl.dot(z, m, shift, input_precision="ieee")
    out = partial + tl.program_id(0).to(tl.int64) * (2 * RANK * RANK + 1)
    mx.store(out, zz, RANK, R)
    mx.store(out + RANK * RANK, shift, RANK, R)
    tl.store(out + 2 * RANK * RANK, tl.sum(size, 0))
    if first == 0:
        i = tl.arange(0, R)
        tl.store(number(factors, f, 0) + i, sums, mask=i < RANK)


@triton.jit
def _factors(w, d, warm, transport, lr, decay, RANK: tl.constexpr, R: tl.constexpr, FLOAT: tl.constexpr):
    """W, C = β₁ₜ·Pᵀ, S = lr·Dᵀ and K_w, in float32."""
    by_w, by_k = mx.load(w, RANK, R, tl.float32), mx.load(warm, RANK, R, tl.float32)
    by_c = mx.load_transposed(transport, RANK, R, FLOAT) * decay.to(FLOAT)
    by_s = mx.load_transposed(d, RANK, R, FLOAT) * lr.to(FLOAT)
    return by_w, by_c.to(tl.float32), by_s.to(tl.float32), by_k


@triton.jit
def _key(factors, f):
    """Of the noise: of the step, the largest of the factors in the parameter, and of the parameter's position."""
    steps = entry(factors, f, FIRST_STEP).to(tl.pointer_type(tl.float32))
    most = tl.load(steps)
    for b in range(1, entry(factors, f, BLOCKS).to(tl.int32)):
        most = tl.maximum(most, tl.load(steps + b))
    key = most.to(tl.int64) * 0x1000003 + entry(factors, f, POSITION)
    return _hash((key & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def _rounded(x, index, key, DTYPE: tl.constexpr):
    """x in the values of DTYPE, as ``lora_rite.algebra.rounding.stochastic_round`` makes them."""
    noise = _hash(index.to(tl.uint32) + key)
    if tl.bfloat16 == DTYPE:  # the upper half of a float32
        bits = x.to(tl.uint32, bitcast=True) + (noise & 0xFFFF)
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    noise = (noise & 0x1FFF).to(tl.float32) / 0x2000
    exponent = tl.maximum(tl.abs(x), 6.103515625e-05).to(tl.uint32, bitcast=True) >> 23
    quantum = ((exponent - 10) << 23).to(tl.float32, bitcast=True)
    return tl.floor(x / quantum + noise) * quantum
