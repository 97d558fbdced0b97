"""What the report says of learning rates and of speed: the good range of the one, and when AdamW's loss is reached."""

import math
import statistics
from itertools import pairwise
from typing import Any, NamedTuple

from .statistics import mean_interval, plus_minus

#: A learning rate is good where its validation loss exceeds the optimizer's best by no more than this share.
GOOD = 0.01


class Rates(NamedTuple):
    """The learning rates that are good, around the best one: where the validation loss, linear in log(lr) between the
    rates tried, exceeds the least by no more than :data:`GOOD`. ``low_open``, ``high_open``: so it does at the last
    rate tried on that side, and the range may go on beyond it."""

    best: float
    low: float
    high: float
    low_open: bool
    high_open: bool

    @property
    def text(self) -> str:
        low, high = (f"{float(f'{lr:.2g}'):g}" for lr in (self.low, self.high))
        return f"{'≤ ' if self.low_open else ''}{low} to {'≥ ' if self.high_open else ''}{high}"

    @property
    def width(self) -> str:
        """The ratio of its ends."""
        return f"{'≥ ' if self.low_open or self.high_open else ''}{self.high / self.low:.1f} ×"


def good_rates(losses: dict[float, float]) -> Rates | None:
    """The good rates among those tried, by their validation losses; None where nothing was tried or all diverged."""
    tried = sorted(losses)
    best = min(tried, key=lambda lr: losses[lr], default=None)
    if best is None or not math.isfinite(losses[best]):
        return None
    limit, at = losses[best] + GOOD * abs(losses[best]), tried.index(best)

    def end(side: list[float]) -> tuple[float, bool]:
        """The last good rate on a side of the best, which is its first; and whether that is the last one tried."""
        for inner, outer in pairwise(side):
            if losses[outer] > limit:
                share = (limit - losses[inner]) / (losses[outer] - losses[inner])  # 0 where the outer one has diverged
                return inner * (outer / inner) ** share, False
        return side[-1], True

    (low, low_open), (high, high_open) = end(tried[at::-1]), end(tried[at:])
    return Rates(best, low, high, low_open, high_open)


class Reached(NamedTuple):
    """When the runs of an optimizer reach AdamW's final loss of the same seed, by seed; None where they do not."""

    when: dict[int, float | None]

    @property
    def known(self) -> list[float]:
        return [value for value in self.when.values() if value is not None]

    @property
    def median(self) -> float:
        """Over the seeds, infinite where half of them or more do not reach it."""
        return statistics.median(math.inf if value is None else value for value in self.when.values())

    def text(self, unit: str = "") -> str:
        """As in "83.1 ± 6.0", "120 (median; reached on 4 of 5 seeds)", "reached on 1 of 5 seeds", "not reached"."""
        of = f"reached on {len(self.known)} of {len(self.when)} seeds"
        if not self.known:
            return "not reached"
        if not math.isfinite(self.median):
            return of
        digits = 0 if max(self.known) >= 100 else 1
        if len(self.known) < len(self.when):
            return f"{plus_minus(self.median, digits=digits)}{unit} (median; {of})"
        return plus_minus(*mean_interval(self.known), digits=digits) + unit

    def times(self, factor: float) -> "Reached":
        """In another unit."""
        return Reached({seed: None if value is None else value * factor for seed, value in self.when.items()})

    def as_json(self) -> dict[str, Any]:
        complete = len(self.known) == len(self.when)
        mean, half_width = mean_interval(self.known) if complete else (None, None)
        return {"seeds": self.when, "mean": mean, "half_width": half_width, "median": self.median}
