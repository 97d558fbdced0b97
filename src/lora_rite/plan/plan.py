"""The plan of a step: which pairs are stepped, in which order and with which tensors. Made when the groups, parameters,
gradients or states change in kind, and kept while they do not; nothing is computed here.
"""

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .layout import Layout, layouts, rank_of
from .marks import Marks
from .sharding import Shards, local
from .state import (
    FROZEN_KEYS,
    Arena,
    FactorPair,
    State,
    algebra_dtype,
    frozen_state,
    moment_dtype,
    moments,
    new_state,
    of_its_own,
    work_dtype,
)


@dataclass(frozen=True)
class Limits:
    """How the work of a step is cut.

    segment_elements  tall products are done for factors of one shape together, up to so many elements; None is 2²⁴ on a
                      GPU (64 MiB of float32 a temporary), and on a CPU 2²⁰ (4 MiB, so that temporaries stay in the
                      cache). Where that is more than 2¹⁸, up to an eighth of all elements too
    direct_elements   on a CPU, factors of so many elements are multiplied one by one, as they lie, instead of stacked
                      and then together: the copy takes as long as the product
    iterate           r×r matrices are decomposed without LAPACK, by which the host of a GPU would wait; None is where
                      the device is one, or the optimizer capturable
    asks_rank         above this rank (and on a CPU at each) the host asks whether factors and second moments have full
                      rank, but for a capturable optimizer: waiting costs less than computing as if some had not
    """

    segment_elements: int | None = None
    direct_elements: int = 2**13
    iterate: bool | None = None
    asks_rank: int = 64


@dataclass(eq=False)
class Segment:
    """Factors of one shape, dtype and side: a run of a bucket's factors, on which tall products are done. Of factors
    that are cut over processes, this one's rows.

    params        the parameters, k of them
    positions     (k,) int64, their positions in the optimizer
    layout        how each holds ``layout.blocks`` factors; ``count`` = k·blocks
    moves         False: the factors are frozen
    num_rows      of a factor; this process has ``local_rows`` from ``start`` on
    direct        whether the factors are multiplied one by one as they lie
    first_moment  (k, …), the states' first moments one above the other, of ``dtype`` or of less precision; None where
                  nothing moves
    row_moment    (k, …), likewise, of ``dtype``
    steps         (k, blocks), the states' step counts
    """

    params: list[Tensor]
    positions: Tensor
    layout: Layout
    shards: Shards
    moves: bool
    dtype: torch.dtype
    rank: int
    num_rows: int
    start: int
    local_rows: int
    count: int
    direct: bool
    steps: Tensor
    first_moment: Tensor | None = None
    row_moment: Tensor | None = None

    def parts(self) -> Iterator[State]:
        """The moments of each parameter, of its own shape."""
        if self.first_moment is None or self.row_moment is None:
            return
        rows = (self.layout.blocks, self.num_rows) if self.layout.blocks > 1 else (self.num_rows,)
        both = zip(self.params, self.first_moment.unbind(), self.row_moment.unbind(), strict=True)
        for p, first, row in both:
            yield {
                "first_moment": self.shards.wrapped(first, p.shape, self.layout.long_dim),
                "row_moment": self.shards.wrapped(row, rows, len(rows) - 1),
            }

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.params] if self.moves else []  # type: ignore[misc]


@dataclass(eq=False)
class Bucket:
    """Pairs of one group, rank, dtype and device. r×r algebra is done for all their factors together, those of A first
    and then those of B; tall products in segments. One side may be frozen in all of them: it is measured once, and
    does not move.

    num_rows, moves   (2p, 1, 1), of each factor
    dtype, algebra    of the arithmetic with tall factors, and of that with r×r matrices
    iterate           r×r matrices are not decomposed by LAPACK, nor by its slow, waiting likes on other devices
    asks              the host waits to be told whether factors and second moments have full rank
    arena             the states of the factors together
    """

    group: dict[str, Any]
    pairs: list[FactorPair]
    segments: list[Segment]
    shards: Shards
    device: torch.device
    dtype: torch.dtype
    algebra: torch.dtype
    rank: int
    one_sided: bool
    iterate: bool
    asks: bool
    num_rows: Tensor
    moves: Tensor
    arena: Arena

    @property
    def count(self) -> int:
        """The number p of pairs."""
        return len(self.num_rows) // 2

    def partners(self, x: Tensor) -> Tensor:
        """What belongs to the other factor of each pair, of (2p, …)."""
        return x.roll(self.count, 0)

    def by_segment(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (2p, …) in the work dtype, cut into what belongs to each segment."""
        return x.to(self.dtype).split([s.count for s in self.segments])

    def workspace_sizes(self) -> tuple[int, int, int]:
        """Elements of the three tall temporaries that a step needs for one segment after the other."""
        sizes = [(s.local_rows * s.count * s.rank, s.direct) for s in self.segments]
        largest, stacked = max(sizes)[0], max((size for size, direct in sizes if not direct), default=0)
        return largest, largest, stacked


@dataclass(eq=False)
class Plan:
    """``buckets``, and the states of their parameters as views of the buckets' tensors (``views``), which
    :meth:`install` puts in place. ``fresh``: parameters whose states begin here; while the plan is not installed, the
    optimizer's own states are as they were. ``marks``: what a plan that is kept rests on."""

    buckets: list[Bucket]
    views: dict[Tensor, State]
    fresh: set[Tensor]
    marks: Marks | None = None
    installed: bool = False

    @property
    def pairs(self) -> list[FactorPair]:
        return [pair for bucket in self.buckets for pair in bucket.pairs]

    def adopts(self, states: dict[Tensor, State]) -> bool:
        """Whether the views are to take the place of the states: where all states are among them, or some are new, or
        of another dtype. A step of some pairs alone writes its results back instead, as tensors that are half used
        would pile up."""
        if self.fresh or all(p in self.views for p, state in states.items() if "matrices" in state):
            return True
        return any(states[p]["first_moment"].dtype != view["first_moment"].dtype for p, view in self.views.items())

    def install(self, states: dict[Tensor, State]) -> None:
        """Puts the views in the place of the states; of other pairs, the states no longer share memory with these."""
        states.update(self.views)
        for p, state in states.items():
            if p not in self.views:
                state.update({key: of_its_own(t) for key, t in state.items() if isinstance(t, Tensor)})
        self.views, self.fresh, self.installed = {}, set(), True

    def keep(self, groups: list[dict[str, Any]], states: dict[Tensor, State]) -> None:
        """Marks what the plan rests on, so that it can serve further steps. It is given up as soon as a tensor of the
        states is gone (``optimizer.state.clear()``, an offload), as the arenas would stay in memory for nothing."""
        kept = weakref.ref(self)

        def give_up(tensor: Any) -> None:
            plan = kept()
            if plan is not None:
                plan.marks, plan.buckets = None, []

        self.marks = Marks(groups, states, give_up)

    def holds(self, groups: list[dict[str, Any]], states: dict[Tensor, State]) -> bool:
        """Whether what the plan rests on, gradients left aside, is as it was when the plan was kept."""
        return self.marks is not None and self.marks.hold(groups, states)

    def gradients_hold(self) -> bool:
        """Whether the same parameters have gradients, of the same dtypes and layouts, as when the plan was kept."""
        return self.marks is not None and self.marks.gradients_hold()

    def write_back(self, states: dict[Tensor, State]) -> None:
        """Copies the views into the states."""
        both = [(local(states[p][key]), local(t)) for p, view in self.views.items() for key, t in view.items()]
        if both:
            torch._foreach_copy_([state for state, _ in both], [view for _, view in both])

    def workspaces(self) -> list[list[Tensor]]:
        """Tall temporaries of each bucket, for its segments in turn; buckets of one device and dtype have the same
        ones. Fresh memory for each segment would be slower than the arithmetic."""
        sizes: dict[Any, list[tuple[int, ...]]] = {}
        for bucket in self.buckets:
            sizes.setdefault((bucket.device, bucket.dtype), []).append(bucket.workspace_sizes())
        memory = {
            kind: [torch.empty(n, device=kind[0], dtype=kind[1]) for n in map(max, zip(*of_kind, strict=True))]
            for kind, of_kind in sizes.items()
        }
        return [memory[bucket.device, bucket.dtype] for bucket in self.buckets]


def make_plan(
    alike: Iterable[tuple[dict[str, Any], list[FactorPair]]],
    states: dict[Tensor, State],
    limits: Limits,
    anew: Iterable[FactorPair] = (),
) -> Plan:
    """A bucket for each (group, pairs). ``states`` is read alone; pairs that have no state yet, and those that are to
    begin ``anew``, get one in the plan."""
    forgotten = {p for pair in anew for p in pair[:2]}
    buckets: list[Bucket] = []
    views: dict[Tensor, State] = {}
    fresh: set[Tensor] = set()
    for group, pairs in alike:
        own: dict[Tensor, State] = {}
        for pair in pairs:
            known = {p: state for p in pair[:2] if p not in forgotten and (state := states.get(p))}
            own.update(known or new_state(group, pair))
            fresh.update(() if known else pair[:2])
        bucket, of_bucket = _bucket(group, pairs, own, limits)
        buckets.append(bucket)
        views.update(of_bucket)
    return Plan(buckets, views, fresh)


def _bucket(
    group: dict[str, Any], pairs: list[FactorPair], states: dict[Tensor, State], limits: Limits
) -> tuple[Bucket, dict[Tensor, State]]:
    """And the states of the parameters, as views of its tensors."""
    # Pairs of the same shapes stand side by side, so that segments are runs.
    kind = lambda p: (tuple(p.shape), str(p.dtype))
    pairs = sorted(pairs, key=lambda pair: (kind(pair.a), kind(pair.b)))
    params = [pair.a for pair in pairs] + [pair.b for pair in pairs]
    own = [states.get(p) for p in params]
    partners = own[len(pairs) :] + own[: len(pairs)]
    full: list[State] = [state or frozen_state(other) for state, other in zip(own, partners, strict=True)]  # type: ignore[arg-type]
    device, dtype, blocks = pairs[0].a.device, work_dtype(*pairs[0][:2]), group.get("blocks", 1)
    algebra, rank = algebra_dtype(group, *pairs[0][:2]), rank_of(group, pairs[0].a)
    iterate = group["capturable"] or device.type != "cpu" if limits.iterate is None else limits.iterate
    smallest = limits.direct_elements if not iterate and blocks == 1 else None
    arena = Arena(full, blocks)
    runs = list(_runs(params, Shards(pairs[0].a), device, limits))
    segments = [_segment(group, pairs, full, run, dtype, smallest, arena) for run in runs]
    bucket = Bucket(
        group=group,
        pairs=pairs,
        segments=segments,
        shards=Shards(pairs[0].a),
        device=device,
        dtype=dtype,
        algebra=algebra,
        rank=rank,
        one_sided=not all(own),
        iterate=iterate,
        asks=not iterate or (not group["capturable"] and rank > limits.asks_rank),
        num_rows=constant(tuple(s.num_rows for s in segments for _ in range(s.count)), algebra, device)[:, None, None],
        moves=constant(tuple(s.moves for s in segments for _ in range(s.count)), torch.bool, device)[:, None, None],
        arena=arena,
    )
    small = arena.views()
    views: dict[Tensor, State] = {}
    for p, state, part in zip(params, own, small, strict=True):
        views[p] = {**state, **part} if state else {}
    for p, partner, part in zip(params, params[len(pairs) :] + params[: len(pairs)], small, strict=True):
        if not views[p]:
            views[partner].update({key: part[key.removeprefix("frozen_")] for key in FROZEN_KEYS})
    for segment in segments:
        for p, parts in zip(segment.params, segment.parts(), strict=segment.moves):
            views[p].update(parts)
    return bucket, {p: state for p, state in views.items() if state}


def _runs(params: list[Tensor], shards: Shards, device: torch.device, limits: Limits) -> Iterator[slice]:
    """Runs of factors of one side, shape and dtype, none of more elements than fit."""
    begin, n = 0, len(params) // 2
    limit = limits.segment_elements or (2**20 if device.type == "cpu" else 2**24)
    limit = min(limit, max(2**18, sum(p.numel() for p in params) // 8)) * shards.size
    for end in range(1, 2 * n + 1):
        first = params[begin]
        other = params[end] if end not in (n, 2 * n) else None  # no segment has factors of both sides
        alike = other is not None and (other.shape, other.dtype) == (first.shape, first.dtype)
        if not alike or (end + 1 - begin) * first.numel() > limit:
            yield slice(begin, end)
            begin = end


def _segment(
    group: dict[str, Any],
    pairs: list[FactorPair],
    states: list[State],
    run: slice,
    dtype: torch.dtype,
    direct_elements: int | None,
    arena: Arena,
) -> Segment:
    params = ([pair.a for pair in pairs] + [pair.b for pair in pairs])[run]
    of_moments = moment_dtype(group, *pairs[0][:2])
    positions = ([pair.position for pair in pairs] + [pair.position + 1 for pair in pairs])[run]
    first, layout, shards = params[0], layouts(group)[run.start >= len(pairs)], Shards(params[0])
    moves, num_rows = "first_moment" in states[run][0], layout.num_rows(params[0])
    # What is cut is a dimension of the parameter, of which a convolution's A has several rows an entry.
    length = first.shape[layout.long_dim]
    width = num_rows // length if layout.rank_first else 1
    start, share = shards.start(length) * width, shards.share(length) * width
    return Segment(
        params=params,
        positions=constant(tuple(positions), torch.int64, first.device),
        layout=layout,
        shards=shards,
        moves=moves,
        dtype=dtype,
        rank=rank_of(group, pairs[0].a),
        num_rows=num_rows,
        start=start,
        local_rows=num_rows if shards.mesh is None else share,
        count=len(params) * layout.blocks,
        direct=direct_elements is not None
        # Without the factor, processes that hold unequal shares would decide differently, and add up different things.
        and first.numel() >= direct_elements * shards.size
        and (shards.mesh is not None or all(p.is_contiguous() for p in params))
        and all(p.dtype == dtype and (p.grad is None or p.grad.dtype == dtype) for p in params),
        steps=arena.steps.view(-1, layout.blocks)[run],
        first_moment=moments(states[run], "first_moment", of_moments) if moves else None,
        row_moment=moments(states[run], "row_moment", dtype) if moves else None,
    )


@lru_cache(maxsize=1024)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(p,), made once."""
    return torch.tensor(values, dtype=dtype).to(device)
