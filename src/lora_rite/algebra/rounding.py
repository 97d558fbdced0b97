"""Checksums of factors, and stochastic rounding by a hash."""

import math
from functools import lru_cache

import torch
from torch import Tensor

#: So many rows of a factor are compared with what the last step left. (A change of other rows alone passes: the next
#: basis is measured from the factor as it is.)
CHECKED_ROWS = 256
#: Another key for the noise of a parameter's first moment than for that of the parameter in the same step.
OF_MOMENT = 2**31


def checksum(x: Tensor, start: int = 0) -> Tensor:
    """The sum of the first rows of a factor with signs that look random: (p, r). x (p, rows, r) are its rows from
    ``start`` on."""
    some = x[:, : max(CHECKED_ROWS - start, 0)]
    signs = _signs(CHECKED_ROWS, x.dtype, x.device)[:, start : start + some.shape[1]]
    return (signs @ some)[:, 0]


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
    x = x.float()
    size = x.abs().clamp(tiny, torch.finfo(x.dtype).max)
    exponents = size.view(torch.int32).bitwise_and_(-(2**23))  # of the powers of 2 below x
    quantum = exponents.view(torch.float32) * eps
    return ((x / quantum + noise.to(x.dtype) / dropped).floor() * quantum).to(dtype)


def rounding_key(steps: Tensor, positions: Tensor, stream: int = 0) -> Tensor:
    """The keys (p,) int64 of the rounding noise: by step (p,) and by the position (p,) of the parameter in the
    optimizer; of its first moment, another one (``stream`` is OF_MOMENT)."""
    return steps.to(torch.int64) * 0x1000003 + positions + stream


def _hash(h: Tensor) -> Tensor:
    """A hash of int32 ("lowbias32" of C. Wellons' hash prospector), in place."""
    shifted = torch.empty_like(h)
    for bits, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
        torch.bitwise_right_shift(h, bits, out=shifted)
        h.bitwise_xor_(shifted.bitwise_and_(2 ** (32 - bits) - 1)).mul_(factor)
    return h
