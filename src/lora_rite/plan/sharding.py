"""Factors that are cut over processes (DTensor, as of FSDP2): their rows go to the processes, r×r matrices to all.

FSDP2 cuts dimension 0: of B (m, r) the rows, of A (r, n) the rank. All mathematics here wants rows of the tall factors,
so A and its gradient come in, and A goes out, by an all-to-all that makes of (r/N, n) shards (r, n/N) ones. Then tall
arithmetic needs no other process, and Gram matrices are summed over them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LoRARiteValueError


def is_sharded(t: Any) -> bool:
    """Whether t is a DTensor (without importing torch.distributed)."""
    return hasattr(t, "device_mesh")


def local(t: Tensor) -> Tensor:
    """What this process holds of a tensor, as a view."""
    return t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined]


def check_sharding(name: str, p: Tensor) -> None:
    """Raises LoRARiteValueError where a DTensor is not laid out as FSDP2 or HSDP lay out theirs."""
    if not is_sharded(p):
        return
    from torch.distributed.tensor import Replicate, Shard

    if not local(p).is_contiguous():
        raise LoRARiteValueError(f"{name} is a DTensor whose part in this process is not contiguous: make it so")
    placements: Any = p.placements  # type: ignore[attr-defined]
    cut = [q for q in placements if type(q) is Shard]
    if len(cut) != 1 or cut[0].dim > 1 or not all(type(q) in (Shard, Replicate) for q in placements):
        raise LoRARiteValueError(
            f"{name} is a DTensor with placements {tuple(placements)}: LoRARite takes those of FSDP2 and HSDP, that "
            "cut dimension 0 over one dimension of the mesh; keep adapters out of a tensor-parallel plan"
        )


class Shards:
    """How the factors of a batch are cut: along ``dim``, over the one dimension of their mesh that cuts them. ``mesh``
    is None where they are whole; everything is the identity then."""

    def __init__(self, like: Tensor):
        self.mesh: Any = getattr(like, "device_mesh", None)
        self.placements: Any = getattr(like, "placements", ())
        self.size, self.index, self.dim = 1, 0, 0
        if self.mesh is not None:
            dimension = next(i for i, q in enumerate(self.placements) if q.is_shard())
            self.dim = self.placements[dimension].dim
            self.group = self.mesh.get_group(dimension)
            self.size, self.index = self.mesh.size(dimension), self.mesh.get_local_rank(dimension)
            self._check_backend(local(like).device.type)

    def _check_backend(self, device: str) -> None:
        """Raises LoRARiteValueError where factors are offloaded to the CPU and processes cannot sum there."""
        backends = torch.distributed.get_backend_config(self.group)
        if device == "cpu" and "cpu" not in (part.partition(":")[0] for part in backends.split(",")):
            raise LoRARiteValueError(
                f"factors are offloaded to the CPU (CPUOffloadPolicy), where their process group ({backends}) has no "
                'backend: call torch.distributed.init_process_group("cpu:gloo,cuda:nccl")'
            )

    def start(self, length: int) -> int:
        """Where this process's share of so many rows begins: DTensors are cut as torch.chunk cuts."""
        return min(self.index * -(-length // self.size), length)

    def share(self, length: int) -> int:
        """How many of so many rows are this process's."""
        return min(-(-length // self.size), length - self.start(length))

    def total(self, *parts: Tensor) -> list[Tensor]:
        """Sums over processes, in one collective."""
        if self.mesh is None:
            return list(parts)
        return self._reduced(parts, torch.distributed.ReduceOp.SUM)

    def largest(self, part: Tensor) -> Tensor:
        """Maximum over processes."""
        return part if self.mesh is None else self._reduced([part], torch.distributed.ReduceOp.MAX)[0]

    def _reduced(self, parts: Sequence[Tensor], op: Any) -> list[Tensor]:
        flat = torch.cat([part.flatten() for part in parts])
        torch.distributed.all_reduce(flat, op, group=self.group)
        return [x.view(part.shape) for x, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]

    def rows(self, tensors: Sequence[Tensor], dim: int) -> list[Tensor]:
        """The shares of this process of DTensors of one shape, cut along ``dim``: views where they are cut so."""
        return [t.contiguous() for t in self._cut(tensors, dim)] if self.mesh is not None else list(tensors)

    def _cut(self, tensors: Sequence[Any], dim: int) -> Sequence[Tensor]:
        if next(q for q in tensors[0].placements if q.is_shard()).dim == dim:
            return [t.to_local() for t in tensors]
        return self._exchange([t.to_local() for t in tensors], tensors[0].shape, tensors[0].placements, dim).unbind()

    def put_back(self, tensors: Sequence[Any], shares: Sequence[Tensor], dim: int) -> None:
        """Writes shares that are cut along ``dim`` into DTensors, whichever way they are cut."""
        placements = tensors[0].placements
        cut = next(q for q in placements if q.is_shard()).dim
        if cut != dim:  # else the shares were views
            back = self._exchange(shares, tensors[0].shape, self._along(dim), cut)
            torch._foreach_copy_([t.to_local() for t in tensors], list(back.unbind()))

    def wrapped(self, share: Tensor, shape: Sequence[int], dim: int) -> Tensor:
        """A DTensor of the global shape, from a share that is cut along ``dim``."""
        if self.mesh is None:
            return share
        from torch.distributed.tensor import DTensor

        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(share, self.mesh, self._along(dim), run_check=False, shape=shape, stride=stride)  # type: ignore[arg-type]

    def _along(self, dim: int) -> list[Any]:
        from torch.distributed.tensor import Shard

        return [Shard(dim) if q.is_shard() else q for q in self.placements]

    def _exchange(self, shares: Sequence[Tensor], shape: Sequence[int], placements: Sequence[Any], dim: int) -> Tensor:
        """All-to-all of DTensors of one shape at once: (k, …), cut along ``dim`` of each."""
        from torch.distributed.tensor import DTensor, Shard

        whole = (len(shares), *shape)
        stacked = DTensor.from_local(
            torch.stack(list(shares)),
            self.mesh,
            [Shard(q.dim + 1) if q.is_shard() else q for q in placements],
            run_check=False,
            shape=torch.Size(whole),
            stride=torch.empty(whole, device="meta").stride(),
        )
        return stacked.redistribute(self.mesh, self._along(dim + 1)).to_local()
