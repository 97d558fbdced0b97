"""What an engine hands to the optimizer, and the engine in PyTorch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..plan.plan import Plan
from . import eager


@dataclass(frozen=True)
class Decided:
    """A step before anything is written.

    flags     (k,) bool: what is finite, pair of parameters by pair and then group of AdamW by group, and then which
              pairs are what the last step left
    ok        (), whether all are up
    norm      (), of all unmagnified gradients
    products  S (p, r, r) and δ (p, 1, 1) of each bucket with damping
    kept      of each bucket, which gradients ``update_skipping`` has not dropped
    moves     make the step, one after the other; given ``ok`` where the device decides, else None
    engine    by which it is made
    counted   whether this step is among the counts of the statistics already
    """

    flags: Tensor
    ok: Tensor
    norm: Tensor
    products: Sequence[tuple[Tensor, Tensor]]
    kept: Sequence[Tensor]
    moves: Sequence[Callable[[Tensor | None], None]]
    engine: str
    counted: bool = field(default=False)


def measure(plan: Plan, others: Sequence[Tensor]) -> Decided:
    """All buckets, measured, and whether the step can be made. Reads parameters, gradients and state only; ``others``
    are further flags that have to be up."""
    buckets = plan.buckets
    starts = [eager.begin(bucket, memory) for bucket, memory in zip(buckets, plan.workspaces(), strict=True)]
    measured = [eager.measure(bucket, start) for bucket, start in zip(buckets, starts, strict=True)]
    squares = [eager.norm_square(*of_bucket) for of_bucket in zip(buckets, measured, strict=True)]
    norm = sum((s.to(squares[0].device) for s in squares[1:]), squares[0]).sqrt() if buckets else torch.zeros(())
    so_far = list(zip(buckets, starts, measured, strict=True))
    work = [(*phases, eager.precondition(*phases, norm)) for phases in so_far]
    verdicts = [eager.decide(*phases) for phases in work]
    flags = joined([*(v.finite for v in verdicts), *others, *(v.unchanged for v in verdicts)])
    return Decided(
        flags=flags,
        ok=flags.all(),
        norm=norm,
        products=[m.product for m in measured if m.product is not None],
        kept=[m.kept for m in measured],
        moves=[partial(eager.move, *phases) for phases in work],
        engine="eager",
    )


def joined(flags: Sequence[Tensor]) -> Tensor:
    return torch.cat([flag.to(flags[0].device) for flag in flags] or [torch.ones(0, dtype=torch.bool)])
