"""What the report says of numbers over seeds, by scipy: means with their intervals, and paired differences."""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

CONFIDENCE = 0.95
#: Fewer seeds decide nothing, whatever the test says of them.
LEAST_SEEDS = 3


class Difference(NamedTuple):
    """Mean of paired differences a − b over seeds, half the width of its 95% interval, and p of the paired t-test."""

    mean: float
    half_width: float
    p: float
    seeds: int

    @property
    def verdict(self) -> str:
        """Whether a is "better" (a loss: lower) or "worse", or the difference is "not significant"."""
        if self.seeds < LEAST_SEEDS or not self.p < 1 - CONFIDENCE:
            return "not significant"
        return "better" if self.mean < 0 else "worse"


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% interval by Student's t (NaN for one value)."""
    from scipy import stats

    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return mean, math.nan
    return mean, float(stats.sem(values) * stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))


def difference(a: dict[int, float], b: dict[int, float]) -> Difference:
    """The paired t-test of two optimizers' losses by seed, over the seeds that both have."""
    from scipy import stats

    seeds = sorted(set(a) & set(b))
    first, second = [a[s] for s in seeds], [b[s] for s in seeds]
    if len(seeds) < 2 or not all(map(math.isfinite, first + second)):
        mean = statistics.fmean(first) - statistics.fmean(second) if seeds else math.nan
        return Difference(mean, math.nan, math.nan, len(seeds))
    mean, half_width = mean_interval([x - y for x, y in zip(first, second, strict=True)])
    spread = len({round(x - y, 12) for x, y in zip(first, second, strict=True)}) > 1
    p = float(stats.ttest_rel(first, second).pvalue) if spread else float(mean == 0)  # type: ignore[attr-defined]
    return Difference(mean, half_width, p, len(seeds))


def smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The non-increasing curve next to these losses over steps, by scipy's isotonic regression (least squares): a rise
    is taken for noise and averaged with what is before it. It ends no higher than the points do."""
    from scipy.optimize import isotonic_regression

    fit = isotonic_regression([loss for _, loss in points], increasing=False)
    return [(step, float(loss)) for (step, _), loss in zip(points, fit.x, strict=True)]


def step_at(points: list[tuple[int, float]], loss: float) -> float | None:
    """The step at which a curve first reaches ``loss``, interpolated between two points; None where it does not."""
    if points[0][1] <= loss:
        return 0.0
    for (step, value), (next_step, next_value) in pairwise(points):
        if next_value <= loss:
            return step + (next_step - step) * (value - loss) / (value - next_value)
    return None


def curve(result: dict[str, Any]) -> list[tuple[int, float]]:
    """(step, held-out loss) of a run, from before training to after it."""
    points = [(0, result["held_out"]["before"])]
    points += [(entry["step"], entry["held_out_loss"]) for entry in result["held_out_losses"]]
    end = result.get("run", {}).get("steps_done", result["settings"]["steps"])
    return points if points[-1][0] == end else [*points, (end, result["held_out"]["after"])]


def plus_minus(value: float, half_width: float = math.nan, digits: int = 3) -> str:
    if not math.isfinite(value):
        return "diverged"
    text = f"{value:.{digits}f}" + ("" if math.isnan(half_width) else f" ± {half_width:.{digits}f}")
    return text.replace("-", "−")
