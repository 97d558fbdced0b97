"""What the kernels read of a plan: tables of factors and of tiles, hyperparameters, and the memory for what is handed
from one kernel to the next."""

# pyright: reportMissingImports=false

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..algebra.basis import NOISE
from ..algebra.rounding import CHECKED_ROWS
from ..options import lr_scale, product_scale
from ..plan.plan import Bucket, Plan, Segment

#: Rows of a factor that one program works on: the checked ones are all in the first tile.
TILE = 512
assert TILE >= CHECKED_ROWS

#: Columns of the table of factors. Addresses: of the first moment, the rows' moment, the r×r matrices, the numbers, the
#: steps (of the factor, and of the first one in its parameter) and whether it is damped.
FIRST_MOMENT, ROW_MOMENT, MATRICES, NUMBERS, STEP, FIRST_STEP, DAMPED = (tl.constexpr(i) for i in range(7))
#: Integers: how many rows, and where its tiles and rows are in those of all; which its partner, pair, bucket (GROUP),
#: parameter and the pair of parameters are; whether it moves; how it lies in its parameter; its position, for noise.
ROWS, RANK_FIRST, FIRST_TILE, TILES, FIRST_ROW = (tl.constexpr(i) for i in range(7, 12))
PARTNER, PAIR, GROUP, PARAMETER, FLAG, MOVES = (tl.constexpr(i) for i in range(12, 18))
ROW_STRIDE, RANK_STRIDE, OFFSET, BLOCKS, POSITION = (tl.constexpr(i) for i in range(18, 23))
COLUMNS = tl.constexpr(23)

#: Columns of the table of hyperparameters, float64.
OPTIONS = (
    "lr", "beta1", "beta2", "row_beta", "eps", "relative_eps", "damping", "weight_decay", "clip_unmagnified_grad",
    "update_skipping", "sign", "row_equilibration", "lr_scale", "scaling",
)  # fmt: skip
LR, BETA1, BETA2, ROW_BETA, EPS, RELATIVE_EPS, DAMPING = (tl.constexpr(i) for i in range(7))
WEIGHT_DECAY, CLIP, SKIPPING, SIGN, EQUILIBRATED, LR_SCALE, SCALING = (tl.constexpr(i) for i in range(7, 14))
NUM_OPTIONS = tl.constexpr(14)

DTYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def options_of(group: dict[str, Any], rank: int) -> list[float]:
    """A row of the table. Where lr is a tensor it is filled in on the device, and here −1: a number that replaces it, 0
    too, is noticed then."""
    lr = group["lr"]
    return [
        -1.0 if isinstance(lr, Tensor) else float(lr),
        *map(float, (*group["betas"], group["row_beta"], group["eps"], group["relative_eps"], group["damping"])),
        *map(float, (group["weight_decay"], group["clip_unmagnified_grad"], group["update_skipping"])),
        -1.0 if group["maximize"] else 1.0,
        float(group["row_equilibration"]),
        lr_scale(group.get("scaling"), rank),
        float(product_scale(group.get("scaling"))),
    ]


def smallest_clip(groups: Sequence[dict[str, Any]]) -> float:
    return min(
        (float(group["clip_unmagnified_grad"]) for group in groups if group["clip_unmagnified_grad"]), default=inf
    )


@dataclass(eq=False)
class Launch:
    """Factors of one rank and dtypes, also that of their algebra, which the kernels work on together. It knows their
    memory by address alone, so that it is not what keeps it.

    factors   (F, COLUMNS) int64;  tiles (T, 2) int32, the factor and its first row
    first     where these factors begin among all of the plan
    aligned   whether addresses of their moments are multiples of 16 bytes, and all strides of 4 elements
    addresses where those of their parameters and gradients are among all of the plan
    unmagnifier, second_moment, grams, inverses (of K_w), turns (c, to the new basis) (F, r, r)   in ``algebra``
    escaped (F,); of the last step that was made and of the present one, product (2, P or P + 1, r, r), delta
              (2, P or P + 1)   float64
    preconditioner (and then K), warm (F, r, r), checksums (F, r), scales (F, 2), squares (rows,), row_partial (T,)
              float32
    partial   (T·(2r² + 1),) float32, of ``measure`` and then of ``apply``
    kept, gates (F,) int32
    """

    rank: int
    dtype: torch.dtype
    gradient_dtype: torch.dtype
    algebra: torch.dtype
    first: int
    strided: bool
    factors: Tensor
    tiles: Tensor
    aligned: bool
    addresses: list[int]
    noise: float
    memory: dict[str, Tensor]

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["memory"][name]
        except KeyError:
            raise AttributeError(name) from None


def launches(plan: Plan, parameters: dict[Tensor, int]) -> Iterator[tuple[Launch, list[Bucket]]]:
    """A launch for each rank and kind of dtypes, and its buckets; ``parameters`` numbers those of the whole plan."""
    alike: dict[Any, list[Bucket]] = {}
    for bucket in plan.buckets:
        alike.setdefault(kind_of(bucket), []).append(bucket)
    first = 0
    for kind, buckets in alike.items():
        table = _Table(buckets, buckets[0].rank, plan, parameters)
        yield _launch(table, buckets[0].device, *kind, first), buckets
        first += len(table.factors)


def kind_of(bucket: Bucket) -> tuple[int, torch.dtype, torch.dtype, torch.dtype]:
    """Rank, dtype of the factors and that of the gradients, which are each one in what the kernels take, and that of
    r×r algebra."""
    gradients = [g for segment in bucket.segments for g in segment.gradients()[:1]]
    return bucket.rank, bucket.segments[0].params[0].dtype, gradients[0].dtype, bucket.algebra


class _Table:
    """The rows of ``factors`` and ``tiles``, as lists."""

    def __init__(self, buckets: list[Bucket], rank: int, plan: Plan, parameters: dict[Tensor, int]):
        self.rank, self.factors, self.tiles, self.num_rows = rank, [], [], 0
        self.parameters, self.groups = parameters, {id(bucket): i for i, bucket in enumerate(plan.buckets)}
        self.flags = {p: i for i, pair in enumerate(plan.pairs) for p in pair[:2]}
        self.positions = {p: pair.position + side for pair in plan.pairs for side, p in enumerate(pair[:2])}
        self.strided, self.pairs, self.addresses = False, 0, []
        for bucket in buckets:
            self._add(bucket)

    def _add(self, bucket: Bucket) -> None:
        start, n, done = len(self.factors), bucket.count, 0
        blocks = bucket.group.get("blocks", 1)
        for segment in bucket.segments:
            for k, p in enumerate(segment.params):
                for b in range(blocks):
                    self._factor(bucket, segment, p, k, b, done + k * blocks + b, start)
            done += segment.count
        self.pairs += n

    def _factor(self, bucket: Bucket, segment: Segment, p: Tensor, k: int, b: int, index: int, start: int) -> None:
        """The b-th one of the k-th parameter of a segment, the index-th one of its bucket."""
        layout, arena, r, n = segment.layout, bucket.arena, self.rank, bucket.count
        rows, moments = segment.num_rows, (0, 0)
        row_stride, rank_stride, offset = strides(layout.rank_first, layout.columns, layout.blocks, rows, r, b)
        self.strided |= bool(layout.columns)
        if segment.first_moment is not None and segment.row_moment is not None:
            first, row = segment.first_moment, segment.row_moment
            moments = (
                first.data_ptr() + 4 * (k * first[0].numel() + offset),
                row.data_ptr() + 4 * (k * layout.blocks + b) * rows,
            )
            self.addresses += moments
        f, tiles = len(self.factors), range(0, rows if segment.moves else min(rows, CHECKED_ROWS), TILE)
        self.factors.append((
            *moments,
            arena.matrices.data_ptr() + 4 * index * 5 * r * r,
            arena.numbers.data_ptr() + 4 * index * (r + 2),
            arena.steps.data_ptr() + 4 * index,
            arena.steps.data_ptr() + 4 * (index - b),
            0 if arena.damped is None else arena.damped.data_ptr() + index,
            rows, layout.rank_first, len(self.tiles), len(tiles), self.num_rows,
            start + (index + n) % (2 * n), self.pairs + index % n, self.groups[id(bucket)], self.parameters[p],
            self.flags[p], segment.moves, row_stride, rank_stride, offset, layout.blocks, self.positions[p],
        ))  # fmt: skip
        self.tiles += [(f, first) for first in tiles]
        self.num_rows += rows


def strides(rank_first: bool, columns: str, blocks: int, rows: int, r: int, block: int) -> tuple[int, int, int]:
    """Of rows and of the rank, and where a factor begins, in the elements of a contiguous parameter
    (:class:`lora_rite.plan.layout.Layout`)."""
    if rank_first:
        return 1, rows, block * r * rows
    if columns == "interleaved":
        return r * blocks, blocks, block
    if columns:
        return r * blocks, 1, block * r
    return r, 1, block * rows * r


def _launch(
    table: _Table,
    device: torch.device,
    rank: int,
    dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    algebra: torch.dtype,
    first: int,
) -> Launch:
    count, tiles, r = len(table.factors), len(table.tiles), rank
    zeros = lambda *shape, dtype=torch.float64: torch.zeros(shape, dtype=dtype, device=device)
    single = lambda *shape: zeros(*shape, dtype=torch.float32)
    elements = 4 if dtype == gradient_dtype == torch.float32 else 8
    sizes = [r, *(row[ROWS.value] for row in table.factors)]
    even = table.pairs + table.pairs % 2  # Triton compiles anew for addresses that are no multiples of 16 bytes.
    memory = {
        **{
            key: zeros(count, r, r, dtype=algebra)
            for key in ("unmagnifier", "second_moment", "grams", "inverses", "turns")
        },
        "product": zeros(2, even, r, r),
        "delta": zeros(2, even),
        "escaped": zeros(count),
        **{key: single(count, r, r) for key in ("preconditioner", "warm")},
        "checksums": single(count, r),
        "scales": single(count, 2),
        "squares": single(table.num_rows),
        "row_partial": single(tiles),
        "partial": single(tiles * (2 * r * r + 1)),
        **{key: zeros(count, dtype=torch.int32) for key in ("kept", "gates")},
    }
    return Launch(
        rank=rank,
        dtype=dtype,
        gradient_dtype=gradient_dtype,
        algebra=algebra,
        first=first,
        strided=table.strided,
        factors=torch.tensor([[int(x) for x in row] for row in table.factors], dtype=torch.int64).to(device),
        tiles=torch.tensor(table.tiles, dtype=torch.int32).reshape(-1, 2).to(device),
        aligned=not table.strided and not any(x % 16 for x in table.addresses) and not any(x % elements for x in sizes),
        addresses=[2 * i + k for i in sorted({row[PARAMETER.value] for row in table.factors}) for k in (0, 1)],
        # NOISE's margin is for float32: eps of bfloat16 and float16 to that power would be no noise.
        noise=max(torch.finfo(torch.float32).eps ** NOISE, torch.finfo(dtype).eps),
        memory=memory,
    )
