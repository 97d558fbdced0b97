"""The step as launches of kernels: the second engine of a plan."""

# pyright: reportMissingImports=false, reportIndexIssue=false

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from itertools import chain
from operator import or_
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..execute.engine import Decided
from ..plan.plan import Bucket, Plan
from .small import (
    basis_kernel,
    carry_kernel,
    decide_kernel,
    invert_kernel,
    precondition_kernel,
    reduce_kernel,
    scales_kernel,
)
from .tables import DTYPES, LR, OPTIONS, TILE, Launch, launches, options_of, smallest_clip
from .tall import apply_kernel, measure_kernel, rows_kernel

#: Of the padded rank: rows that a program works on at a time, its warps and stages of loads, the warps of one for r×r
#: matrices. (More stages at 64 would take more shared memory than there is.)
SHAPES = {16: (64, 4, 3, 1), 32: (32, 4, 2, 4), 64: (32, 8, 1, 8)}


class Kernels:
    """A plan with its tables on the device. What changes from step to step, the addresses of parameters and gradients
    and the hyperparameters, is one tensor, which is renewed by one asynchronous copy when it changes."""

    def __init__(self, plan: Plan):
        segments = [segment for bucket in plan.buckets for segment in bucket.segments]
        self.num_pairs, self.groups = len(plan.pairs), [(bucket.group, bucket.rank) for bucket in plan.buckets]
        moving = {p: segment.moves for segment in segments for p in segment.params}
        self.params, self.moving = list(moving), list(moving.values())
        self.device = plan.buckets[0].device
        both = list(launches(plan, {p: i for i, p in enumerate(self.params)}))
        self.launches = [launch for launch, _ in both]
        new = lambda *shape, dtype: torch.zeros(shape, dtype=dtype, device=self.device)
        self.traces = new(sum(len(launch.factors) for launch in self.launches), dtype=torch.float64)
        self.flags = new(2, self.num_pairs, dtype=torch.int8)
        self.ok, self.norm = new(1, dtype=torch.int8), new(dtype=torch.float32)
        self.table, self.seen, self.spare, self.captured = self._new_table(), ([], []), None, []
        self.options = [self._constants(launch) for launch in self.launches]
        self.looked_at: list[int] = []
        self.aligned: list[bool] = []
        parts = {id(bucket): part for launch, buckets in both for bucket, part in _parts(launch, buckets)}
        self.parts, self.turn = [parts[id(bucket)] for bucket in plan.buckets], 0

    def _new_table(self) -> tuple[Tensor, Tensor, Tensor]:
        """The table on the device, its part of float64 numbers, and pinned memory for it on the host."""
        addresses, numbers = 2 * len(self.params), len(self.groups) * len(OPTIONS) + 1
        table = torch.zeros(addresses + numbers, dtype=torch.int64, device=self.device)
        host = torch.zeros(addresses + numbers, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return table, table[addresses:].view(torch.float64), host

    def _constants(self, launch: Launch) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments that kernels of tall and of r×r matrices are compiled for."""
        padded = max(16, triton.next_power_of_2(launch.rank))
        block, warps, stages, small_warps = SHAPES[padded]
        common = {"RANK": launch.rank, "R": padded, "FLOAT": DTYPES[launch.algebra]}
        tall = {**common, "BLOCK": block, "STEPS": TILE // block, "STRIDED": launch.strided}
        return {**tall, "num_warps": warps, "num_stages": stages}, {**common, "num_warps": small_warps, "num_stages": 1}

    def refresh(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Brings what has changed since the last step to the device: the addresses, the numbers. And the gradients, to
        be kept until the last launch."""
        gradients = [p.grad.contiguous() if m else p for p, m in zip(self.params, self.moving, strict=True)]  # type: ignore[union-attr]
        addresses = list(map(Tensor.data_ptr, chain.from_iterable(zip(self.params, gradients, strict=True))))
        groups = [group for group, _ in self.groups]
        numbers = [*chain.from_iterable(options_of(*row) for row in self.groups), smallest_clip(groups)]
        now = (addresses, numbers)
        if addresses != self.looked_at:
            self.looked_at = addresses
            self.aligned = [self._is_aligned(launch) for launch in self.launches]
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing:
            # A graph copies what is on the host when it is replayed, so that this must be its own.
            table, self.spare = self.spare or self._new_table(), None
            self.captured.append(table)
            self._send(table, now)
        else:
            if self.spare is None and self.device.type == "cuda" and groups[0]["capturable"]:
                self.spare = self._new_table()  # because a capture cannot make it
            table = self.table
            if now != self.seen:
                # Pinned memory that is not used again before the copy is done.
                table = self.table = (*table[:2], self._pinned(table[2]))
                self._send(table, now)
                self.seen = now
        for i, group in enumerate(groups):
            if isinstance(group["lr"], Tensor):
                at = i * len(OPTIONS) + LR.value
                table[1][at : at + 1].copy_(group["lr"].detach().reshape(1))
        return table[0], table[1], gradients

    def _pinned(self, host: Tensor) -> Tensor:
        return torch.empty(host.shape, dtype=host.dtype, pin_memory=self.device.type == "cuda")

    def _send(self, table: tuple[Tensor, Tensor, Tensor], now: tuple[list[int], list[float]]) -> None:
        values = torch.tensor(now[0], dtype=torch.int64), torch.tensor(now[1], dtype=torch.float64).view(torch.int64)
        torch.cat(values, out=table[2])
        table[0].copy_(table[2], non_blocking=True)

    def _is_aligned(self, launch: Launch) -> bool:
        """Whether all its addresses, also those of several factors in a parameter, are multiples of 16 bytes, and all
        strides of 4 elements."""
        # (One OR: a test for each address would take a tenth of the host's time.)
        return launch.aligned and reduce(or_, map(self.looked_at.__getitem__, launch.addresses)) % 16 == 0

    # ----------------------------------------------------------------------------------------------------------- step

    def measure(self, others: Sequence[Tensor], counts: Tensor, capturable: bool) -> Decided:
        """The first half of a step, which writes to the memory of this object alone.

        Args:
            others: further flags, (k,) bool each, that have to be up for the step to be made.
            counts: (4,) float32, on the device, see :class:`lora_rite.optim.statistics.Statistics`.
        """
        with self._on_device():
            addresses, numbers, gradients = self.refresh()
            for launch, aligned, (tall, small) in zip(self.launches, self.aligned, self.options, strict=True):
                self._measure(launch, addresses, numbers, aligned, tall, small)
            for launch, (_, small) in zip(self.launches, self.options, strict=True):
                self._precondition(launch, numbers, small)
            flags = self.flags.view(torch.bool)
            more = torch.cat([flag.to(self.device) for flag in others]) if others else flags[0, :0]
            decide_kernel[(1,)](
                self.flags, 2 * self.num_pairs, more.view(torch.int8), more.numel(), self.traces, len(self.traces),
                numbers[-1:], counts, self.ok, self.norm, CAPTURABLE=capturable,
            )  # fmt: skip
        return Decided(
            flags=torch.cat([flags[0], more, flags[1]]) if others else flags.view(-1),
            ok=self.ok.view(torch.bool)[0],
            norm=self.norm,
            products=[
                (part.launch.product[self.turn, part.pairs], part.launch.delta[self.turn, part.pairs, None, None])
                for part in self.parts
                if part.group["damping"] and not part.one_sided
            ],
            kept=[part.launch.kept[2 * part.pairs.start : 2 * part.pairs.stop] for part in self.parts],
            moves=[lambda _, kept=gradients: self._move(addresses, numbers, capturable)],
            engine="triton",
            counted=True,
        )

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _measure(
        self,
        launch: Launch,
        addresses: Tensor,
        numbers: Tensor,
        aligned: bool,
        tall: dict[str, Any],
        small: dict[str, Any],
    ) -> None:
        count = (len(launch.factors),)
        invert_kernel[count](
            launch.factors,
            numbers,
            launch.unmagnifier,
            launch.product[self.turn],
            launch.delta[self.turn],
            self.flags,
            self.num_pairs,
            **small,
        )
        measure_kernel[(len(launch.tiles),)](
            addresses, launch.factors, launch.tiles, launch.unmagnifier, launch.partial, launch.checksums,
            VECTOR=aligned, DTYPE=DTYPES[launch.dtype], G_DTYPE=DTYPES[launch.gradient_dtype], **tall,
        )  # fmt: skip
        reduce_kernel[count](
            launch.factors, numbers, launch.partial, launch.checksums, launch.grams, self.traces[launch.first :],
            launch.kept, self.flags[1], **small,
        )  # fmt: skip

    def _precondition(self, launch: Launch, numbers: Tensor, small: dict[str, Any]) -> None:
        precondition_kernel[(len(launch.factors),)](
            launch.factors, numbers, self.traces, len(self.traces), self.traces[launch.first :], launch.grams,
            launch.kept, launch.unmagnifier, launch.second_moment, launch.preconditioner, launch.warm,
            launch.escaped, launch.gates, self.flags, launch.noise, **small,
        )  # fmt: skip

    def _move(self, addresses: Tensor, numbers: Tensor, capturable: bool) -> None:
        """The second half, which writes where ``ok`` is set on the device."""
        if not capturable:
            # Else the next step would overwrite S and δ, which are reported, also where it is skipped.
            self.turn = 1 - self.turn
        with self._on_device():
            for launch, aligned, (tall, small) in zip(self.launches, self.aligned, self.options, strict=True):
                count, tiles = (len(launch.factors),), (len(launch.tiles),)
                dtypes = {"VECTOR": aligned, "G_DTYPE": DTYPES[launch.gradient_dtype]}
                rows_kernel[tiles](
                    addresses, launch.factors, numbers, launch.tiles, launch.preconditioner, launch.squares,
                    launch.row_partial, launch.gates, self.ok, **dtypes, **tall,
                )  # fmt: skip
                scales_kernel[count](
                    launch.factors, numbers, launch.row_partial, launch.squares, launch.gates, self.ok, launch.scales,
                    num_warps=4,
                )  # fmt: skip
                apply_kernel[tiles](
                    addresses, launch.factors, numbers, launch.tiles, launch.scales, launch.preconditioner,
                    launch.unmagnifier, launch.warm, launch.partial, launch.gates, self.ok, DTYPE=DTYPES[launch.dtype],
                    **dtypes, **tall,
                )  # fmt: skip
                basis_kernel[count](
                    launch.factors, launch.partial, launch.warm, launch.grams, launch.inverses, launch.preconditioner,
                    launch.turns, launch.gates, self.ok, **small,
                )  # fmt: skip
                carry_kernel[count](
                    launch.factors, numbers, launch.partial, launch.unmagnifier, launch.second_moment, launch.grams,
                    launch.inverses, launch.preconditioner, launch.turns, launch.escaped, launch.gates, self.ok,
                    LOW=launch.dtype != torch.float32, **small,
                )  # fmt: skip


class _Part(NamedTuple):
    """Where the pairs of a bucket are in its launch."""

    group: dict[str, Any]
    one_sided: bool
    launch: Launch
    pairs: slice


def _parts(launch: Launch, buckets: list[Bucket]) -> Iterator[tuple[Bucket, _Part]]:
    pair = 0
    for bucket in buckets:
        yield bucket, _Part(bucket.group, bucket.one_sided, launch, slice(pair, pair + bucket.count))
        pair += bucket.count
