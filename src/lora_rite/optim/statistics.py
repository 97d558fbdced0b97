"""What the optimizer reports."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..execute import eager
from ..execute.engine import Decided
from ..plan.layout import rank_of
from ..plan.plan import Bucket, Plan
from ..plan.sharding import local
from ..plan.state import FactorPair

#: Gradients dropped by ``update_skipping`` in so many steps in a row are worth a warning.
MAX_DROPPED_IN_A_ROW = 10


class Statistics:
    """Figures of the last step and counts since the start, on the device until somebody asks."""

    def __init__(self) -> None:
        zero = torch.zeros((), dtype=torch.float32)  # (whatever the default dtype)
        self.pairs, self.norm = 0, zero
        self.counts = zero.repeat(4)  # steps, those that were clipped; with capturable: skipped in a row, not yet told
        self.products: list[tuple[Tensor, Tensor]] = []
        self.dropped, self.asked = zero.clone(), 0
        self.flags: tuple[list[FactorPair], Tensor] | None = None
        self.engine: str | None = None

    def counts_on(self, device: torch.device) -> Tensor:
        self.counts = self.counts.to(device)
        return self.counts

    def add(self, buckets: list[Bucket], decided: Decided) -> None:
        self.pairs = sum(bucket.count for bucket in buckets)
        if not buckets:
            return
        if not decided.counted:
            clips = [bucket.group["clip_unmagnified_grad"] for bucket in buckets]
            smallest = min((clip for clip in clips if clip), default=math.inf)
            counts = self.counts_on(decided.norm.device)
            counts[:2] += torch.stack([decided.ok, decided.ok & (decided.norm > smallest)])
        self.norm, self.products, self.engine = decided.norm, list(decided.products), decided.engine

    def dropped_in_a_row(self, buckets: list[Bucket], kept: Sequence[Tensor]) -> int:
        """Steps in a row in which ``update_skipping`` dropped gradients; asked of the device at each tenth step alone,
        and 0 between them."""
        flags = [k.all() for bucket, k in zip(buckets, kept, strict=True) if bucket.group["update_skipping"]]
        if not flags:
            return 0
        device = flags[0].device
        all_kept = torch.stack([flag.to(device) for flag in flags]).all()
        self.dropped = (self.dropped.to(device) + 1) * ~all_kept
        self.asked = (self.asked + 1) % MAX_DROPPED_IN_A_ROW
        return 0 if self.asked else int(self.dropped)

    def skip(self, pairs: list[FactorPair], decided: Decided) -> None:
        """Counts a step that the device did not take."""
        self.flags = pairs, decided.flags
        if not decided.counted:
            self.counts[2] = (self.counts[2] + 1) * ~decided.ok
            self.counts[3] += ~decided.ok

    def summary(self) -> dict[str, Any]:
        singular = [torch.linalg.svdvals(s.cpu()) / delta[..., 0].cpu() for s, delta in self.products]
        ratios = torch.cat([r.flatten() for r in singular]) if singular else None
        if ratios is not None:
            ratios = ratios.nan_to_num(0.0, posinf=torch.inf)  # 0/0: a zero factor at lr 0
        return {
            "pairs_preconditioned": self.pairs,
            "engine": self.engine,
            "gradient_norm": float(self.norm),
            "clip_rate": float(self.counts[1] / self.counts[0].clamp_min(1)),
            "damped_share": float((ratios < 1).double().mean()) if ratios is not None else 0.0,
            "sigma_over_delta": float(ratios.median()) if ratios is not None else None,
        }


def report(optimizer: torch.optim.Optimizer, plans: Iterable[Plan], statistics: Statistics) -> dict[str, Any]:
    """What ``LoRARite.report()`` returns. ``plans`` are about all pairs that have a state."""
    groups = optimizer.param_groups
    lora = [group for group in groups if group["kind"] == "lora"]
    ranks = [
        rank_of(group, group["params"][k])
        for group in lora
        for k in range(0, len(group["params"]), 2)
        for _ in range(group.get("blocks", 1))
    ]
    states = [state for state in optimizer.state.values() if "matrices" in state]
    square, dead_pairs = 0.0, 0
    for plan in plans:
        for bucket, workspace in zip(plan.buckets, plan.workspaces(), strict=True):
            square += float(eager.update_squares(bucket, workspace)[0].sum())
            dead_pairs += sum(eager.dead(bucket))
    return {
        "pairs": len(ranks),
        "ranks": {rank: ranks.count(rank) for rank in sorted(set(ranks))},
        "other_parameters": sum(len(g["params"]) for g in groups if g["kind"] == "adamw"),
        "state_bytes": state_bytes(optimizer),
        "steps": max((int(state["step"].max()) for state in states), default=0),
        "skipped": groups[0]["skipped"],
        "dead_pairs": dead_pairs,
        "update_norm": square**0.5,
        **statistics.summary(),
    }


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors of an optimizer in this process, also of those in lists and dictionaries."""
    tensors = [local(t) for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
