"""How a parameter holds the factors of its pairs, and views of it as tall matrices."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: The keys of a parameter group that say how its parameters hold several pairs.
LAYOUT_KEYS = ("blocks", "columns")


class Layout(NamedTuple):
    """How a parameter holds the factor of ``blocks`` pairs: A (blocks·r, n, …), one after the other; B (blocks·m, r, …)
    likewise, or, where ``columns`` is "interleaved", (m, r·blocks), the pair running fastest (PEFT's experts), or,
    "side by side", (m, blocks·r), the pair running slowest (a block-diagonal A)."""

    rank_first: bool
    blocks: int = 1
    columns: str = ""

    @property
    def long_dim(self) -> int:
        """The dimension of a parameter along which the rows of its tall factor lie."""
        return int(self.rank_first)

    def num_rows(self, p: Tensor) -> int:
        """The number of rows of a tall factor."""
        return p.shape[1:].numel() if self.rank_first else p.shape[0] // (1 if self.columns else self.blocks)

    def tall(self, tensors: Sequence[Tensor], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """(p, rows, r), tall factors, from parameters or what has their shape; a view where there is one tensor of that
        dtype, else in ``out`` where that is given."""
        flat = flattened(tensors)
        if len(flat) == 1:
            stacked = flat[0][None].to(dtype)
        elif out is not None and self.blocks == 1:
            stacked = out.mT if self.rank_first else out
            torch._foreach_copy_(list(stacked.unbind()), flat)  # torch.stack would use one core alone.
        else:
            stacked = torch.stack(flat).to(dtype)
        return self.apart(stacked)

    def apart(self, stacked: Tensor) -> Tensor:
        """(p, rows, r), tall factors, from parameters' matrices one above the other; a view where a parameter holds one
        factor."""
        if self.columns == "interleaved":
            stacked = stacked.unflatten(2, (-1, self.blocks)).movedim(3, 1).flatten(0, 1)
        elif self.columns:
            stacked = stacked.unflatten(2, (self.blocks, -1)).movedim(2, 1).flatten(0, 1)
        elif self.blocks > 1:
            stacked = stacked.unflatten(1, (self.blocks, -1)).flatten(0, 1)
        return stacked.mT if self.rank_first else stacked

    def flat(self, x: Tensor) -> Tensor:
        """The opposite of :meth:`apart`: (p / blocks, …) laid out as the parameters are, flattened to matrices."""
        x = x.mT if self.rank_first else x
        if self.columns:
            return x.unflatten(0, (-1, self.blocks)).movedim(1, 3 if self.columns == "interleaved" else 2).flatten(2)
        return x.unflatten(0, (-1, self.blocks)).flatten(1, 2)


def flattened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Matrices, of which some may be convolutions (r, n, …)."""
    return [t if t.ndim == 2 else t.flatten(1) for t in tensors]


def layouts(group: dict[str, Any]) -> tuple[Layout, Layout]:
    """Of A and of B in a group."""
    blocks = group.get("blocks", 1)
    return Layout(True, blocks), Layout(False, blocks, group.get("columns", ""))


def layout_options(group: dict[str, Any]) -> dict[str, Any]:
    """``blocks`` and ``columns`` of a group, where it has them."""
    return {key: group[key] for key in LAYOUT_KEYS if key in group}


def rank_of(group: dict[str, Any], a: Tensor) -> int:
    """The rank of a pair of the group whose A is part of ``a``."""
    return a.shape[0] // group.get("blocks", 1)
