"""What is said of a step that cannot be made as it was asked for: skipped steps, pairs that were changed from outside,
parameters without gradients.
"""

from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor

from ..errors import NonFiniteError, warn
from ..plan.state import FactorPair
from .checks import all_finite, names_by_position
from .selection import one_sided

#: Non-finite gradients in so many steps in a row are an error.
MAX_SKIPPED_IN_A_ROW = 3
#: So many steps in a row in which no parameter has a gradient are worth a warning.
MAX_IDLE_IN_A_ROW = 10

Group = dict[str, Any]


@dataclass
class Guard:
    """What is counted, and has been said, since an optimizer was made or loaded."""

    skipped_in_a_row: int = 0
    idle_in_a_row: int = 0
    said_idle: bool = False
    said_one_sided: bool = False
    said_eager: bool = False

    def say_why_eager(self, reason: str) -> None:
        """Warns, once, that the engine that was asked for does not make the step."""
        if not self.said_eager:
            self.said_eager = True
            warn(f'engine="triton" does not step {reason}: the eager engine does. This is said once')

    def look_for_idleness(self, groups: list[Group]) -> None:
        """Warns, once, of parameters that nothing computes gradients for any more."""
        idle = all(p.grad is None for group in groups for p in group["params"])
        self.idle_in_a_row = self.idle_in_a_row + 1 if idle else 0
        if self.idle_in_a_row >= MAX_IDLE_IN_A_ROW and not self.said_idle:
            self.said_idle = True
            warn(
                f"no parameter of this optimizer has had a gradient in {MAX_IDLE_IN_A_ROW} steps in a row: either none "
                "was computed, or they are no longer the model's (after merge_and_unload, delete_adapter or an "
                "exchange of its layers make a new optimizer). This is said once"
            )

    def look_for_one_sided_pairs(self, groups: list[Group]) -> None:
        """Warns, once, of pairs that are passed over because one factor alone has a gradient."""
        if self.said_one_sided:
            return
        if found := one_sided(groups):
            self.said_one_sided = True
            warn(
                f"{names_by_position(groups)[found[0]]} and its partner: one has a gradient and the other none, so "
                f"neither is moved ({len(found)} such pairs; this is said once)"
            )


def read_flags(pairs: list[FactorPair], flags: Tensor) -> tuple[list[bool], list[FactorPair]]:
    """What is finite, pair by pair and then AdamW group by group, and the pairs that were changed from outside."""
    values = flags.tolist()
    n = len(values) - len(pairs)
    return values[:n], [pair for pair, same in zip(pairs, values[n:], strict=True) if not same]


def warn_of_change(groups: list[Group], changed: list[FactorPair], fresh: set[Tensor]) -> None:
    """Says that pairs were changed since the last step, or raises NonFiniteError where a new state (``fresh``: made in
    this step) would not help."""
    names = names_by_position(groups)
    for pair in changed:
        for p, name in zip(pair[:2], names[pair.position :], strict=False):
            if not all_finite(p):
                raise NonFiniteError(f"parameter {name} contains NaN or Inf: restore a checkpoint")
            if pair.a in fresh or pair.b in fresh:  # a state that was made in this step
                raise NonFiniteError(f"parameter {name} is too large: sums of its values overflow")
    first = names[changed[0].position]
    warn(
        f"{len(changed)} pairs were changed from outside since the last step "
        f"({first}{', …' * (len(changed) > 1)}): their moments start anew. Load the optimizer's state "
        "together with the weights to keep them"
    )


def count_skipped(groups: list[Group], steps: int) -> None:
    for group in groups:
        group["skipped"] += steps


def complain(groups: list[Group], pairs: list[FactorPair], finite: list[bool], in_a_row: int) -> None:
    """Names the parameters that made a step be skipped: a warning, or an error where it were too many in a row."""
    names = names_by_position(groups)
    suspects = [p for pair, ok in zip(pairs, finite, strict=False) if not ok for p in pair[:2]]
    suspects += [p for group in groups if group["kind"] == "adamw" for p in group["params"]]
    suspects = [p for p in suspects if p.grad is not None]
    bad = [p for p in suspects if not all_finite(p.grad)]  # type: ignore[arg-type]
    what = "non-finite gradient" if bad else "overflow from the gradient"
    bad = bad or suspects
    positions = {p: i for i, p in enumerate(chain.from_iterable(g["params"] for g in groups))}
    name = names[positions[bad[0]]]
    message = f"{what} of {name}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}"
    if in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise NonFiniteError(
            f"{message}, {in_a_row} steps in a row: lower the learning rate, or look for the first "
            "non-finite loss. Parameters and state are those of the last good step"
        )
    warn(f"{message}: step skipped ({groups[0]['skipped']} so far)")
