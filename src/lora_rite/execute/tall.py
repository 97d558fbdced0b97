"""Products with tall matrices (p, rows, r), of the factors of one segment: gradients, moments and the factors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algebra.linalg import add_times_, gram, times
from ..algebra.rounding import CHECKED_ROWS, OF_MOMENT, checksum, rounding_key, stochastic_round
from ..plan.layout import flattened
from ..plan.plan import Segment
from ..plan.state import LOW_PRECISION


@dataclass(frozen=True)
class Tall:
    """The factors of a segment in one step: this process's rows of parameters and gradients, and temporaries.

    first, second, spare  (count, rows, r) tensors to write into, laid out as the factors are; ``spare``, to stack
                          factors in, is None where they are multiplied as they lie.
    """

    segment: Segment
    params: list[Tensor]
    gradients: list[Tensor]
    first: Tensor
    second: Tensor
    spare: Tensor | None

    @classmethod
    def of(cls, segment: Segment, workspace: list[Tensor], with_gradients: bool = True) -> "Tall":
        layout, shards = segment.layout, segment.shards
        shape = (segment.rank, segment.local_rows) if layout.rank_first else (segment.local_rows, segment.rank)
        size = segment.count * segment.local_rows * segment.rank
        buffers = [x[:size].view(segment.count, *shape) for x in workspace[: 2 if segment.direct else 3]]
        first, second, *spare = [x.mT for x in buffers] if layout.rank_first else buffers
        gradients = segment.gradients() if with_gradients else []
        return cls(
            segment,
            shards.rows(segment.params, layout.long_dim),
            shards.rows(gradients, layout.long_dim) if gradients else [],
            first,
            second,
            spare[0] if spare else None,
        )

    def stacked(self, tensors: Sequence[Tensor]) -> Tensor:
        """(count, rows, r) from what has the shape of the parameters, see :meth:`Layout.tall`."""
        return self.segment.layout.tall(tensors, self.segment.dtype, self.spare)

    def moment(self) -> Tensor:
        """The first moments (count, rows, r) in the work dtype: a view where the state has them in it and a parameter
        holds one factor, else in ``spare`` or in memory of their own."""
        moments: Any = self.segment.first_moment
        if moments.dtype != self.segment.dtype:
            return self.stacked(moments.unbind())
        return self.segment.layout.apart(moments.flatten(2))

    def gradient_times(self, k: Tensor, ok: Tensor | None = None) -> Tensor:
        """g·k, in ``first``; 0 without ``ok``, a scalar."""
        if self.segment.direct:  # The device decides nothing then, so ``ok`` is None.
            return self._each_times(flattened(self.gradients), k)
        x = self.stacked(self.gradients)
        if ok is not None:
            x = torch.where(ok, x, x.new_zeros(()))  # 0·NaN is NaN, so masking must select, not multiply.
        return times(x, k, self.first)

    def param_times(self, k: Tensor) -> Tensor:
        """X·k, in ``first``."""
        if self.segment.direct:
            return self._each_times(flattened(self.params), k)
        return times(self.stacked(self.params), k, self.first)

    def moment_times(self, k: Tensor) -> Tensor:
        """M·k, in ``first``."""
        if self.segment.direct:
            return self._each_times(self._matrices(self.moment()), k)
        return times(self.moment(), k, self.first)

    def _each_times(self, matrices: Sequence[Tensor], k: Tensor) -> Tensor:
        for y, x, by in zip(self._matrices(self.first), matrices, k.unbind(), strict=True):
            self._add_times_(y, x, by, beta=0)
        return self.first

    def gram_of(self, tensors: Sequence[Tensor]) -> Tensor:
        """xᵀ·x (count, r, r), of factors that are multiplied as they lie, or of what has their shape."""
        return torch.stack([self._gram(x, x) for x in flattened(tensors)])

    def _gram(self, x: Tensor, y: Tensor) -> Tensor:
        """xᵀ·y (r, r), of one factor."""
        if self.segment.layout.rank_first:
            return x @ y.mT
        if x.numel() < 2**17 or x.shape[0] % 8:
            return x.mT @ y
        # x.mT @ y would use one core alone.
        return torch.bmm(x.view(8, -1, x.shape[1]).mT, y.view(8, -1, x.shape[1])).sum(0)

    def advance_moment(self, s: Tensor, transport: Tensor) -> Tensor:
        """M ← M·transport + s, in the state and in s."""
        first_moment: Any = self.segment.first_moment
        rounds = first_moment.dtype != self.segment.dtype
        if self.segment.direct:
            old = self._matrices(self.moment())
            for m, before, by in zip(self._matrices(s), old, transport.unbind(), strict=True):
                self._add_times_(m, before, by)
                if not rounds:
                    before.copy_(m)  # now, while it is in the cache
        else:
            s = add_times_(s, self.moment(), transport)
        if rounds:
            first_moment.copy_(self._rounded(s, first_moment.dtype, OF_MOMENT).view_as(first_moment))
        elif not self.segment.direct:
            first_moment.copy_(self.segment.layout.flat(s).reshape(first_moment.shape))
        return s

    def advance(self, m: Tensor, step: Tensor, shrink: Tensor | None, warm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X ← X·shrink − M·step. Returns zᵀz (XᵀX of what is multiplied as it lies) and zᵀ·(X_old·shrink − X), with
        z = X·K_w, and the checksums of X."""
        if self.segment.direct:
            return self._advance_each(m, step, shrink, warm)
        x = self.stacked(self.params)
        x = x if shrink is None else x.mul_(shrink)
        if self.params[0].dtype == self.segment.dtype:
            x = add_times_(x, m, step, alpha=-1)
            self.commit(x)
            z = times(x, warm, self.second)
            return gram(z, z), gram(z, m) @ step, checksum(x, self.segment.start)
        new = self.rounded(add_times_(x.clone(), m, step, alpha=-1))
        self.commit(new)
        new = new.to(self.segment.dtype)
        z = times(new, warm, self.second)
        return gram(z, z), gram(z, x.sub_(new)), checksum(new, self.segment.start)

    def _advance_each(
        self, m: Tensor, step: Tensor, shrink: Tensor | None, warm: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if shrink is not None:
            torch._foreach_mul_(self.params, list(shrink.unbind()))
        squares, products = [], []
        for x, by, k in zip(flattened(self.params), self._matrices(m), step.unbind(), strict=True):
            self._add_times_(x, by, k, alpha=-1)
            squares.append(self._gram(x, x))
            products.append(self._gram(x, by))
        self.share()
        return torch.stack(squares), warm.mT @ torch.stack(products) @ step, self.checksums()

    def _matrices(self, x: Tensor) -> Sequence[Tensor]:
        """One a factor of x (count, rows, r), laid out as the parameters are."""
        return (x.mT if self.segment.layout.rank_first else x).unbind()

    def _add_times_(self, y: Tensor, x: Tensor, k: Tensor, alpha: float = 1, beta: float = 1) -> None:
        """y ← beta·y + alpha·x·k, of one factor, laid out as its parameter is."""
        y.addmm_(*((k.mT, x) if self.segment.layout.rank_first else (x, k)), alpha=alpha, beta=beta)

    def checksums(self) -> Tensor:
        """(count, r), of the factors as they are."""
        layout, start = self.segment.layout, self.segment.start
        if layout.blocks > 1:
            return checksum(self.stacked(self.params), start)
        some = [p[:, :CHECKED_ROWS] if layout.rank_first else p[:CHECKED_ROWS] for p in flattened(self.params)]
        return checksum(layout.tall(some, self.segment.dtype), start)

    def commit(self, x: Tensor) -> None:
        """Sets the factors to x (count, rows, r)."""
        flat = self.segment.layout.flat(x)
        if flat.data_ptr() != self.params[0].data_ptr():  # else x is a view of the parameter, and there already
            torch._foreach_copy_(self.params, list(flat.reshape(len(self.params), *self.params[0].shape).unbind()))
        self.share()

    def share(self) -> None:
        """Brings this process's rows of the factors, which it has written, to where they belong."""
        segment = self.segment
        if segment.shards.mesh is not None:
            segment.shards.put_back(segment.params, self.params, segment.layout.long_dim)

    def rounded(self, x: Tensor) -> Tensor:
        """x (count, rows, r) in the dtype of the factors."""
        dtype = self.params[0].dtype
        return self.segment.layout.apart(self._rounded(x, dtype)) if dtype in LOW_PRECISION else x.to(dtype)

    def _rounded(self, x: Tensor, dtype: torch.dtype, stream: int = 0) -> Tensor:
        """x (count, rows, r), rounded stochastically, laid out as the parameters are: so the noise belongs to elements
        whatever the batch."""
        segment = self.segment
        flat = segment.layout.flat(x).contiguous()
        key = rounding_key(segment.steps.amax(1), segment.positions, stream)
        width = segment.num_rows if segment.layout.rank_first else flat.shape[-1]  # of the whole parameter
        first = segment.start if segment.layout.rank_first else segment.start * width
        return stochastic_round(flat, dtype, key, first, width)
