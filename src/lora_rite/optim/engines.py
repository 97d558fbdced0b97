"""Which engine makes a step."""

from typing import Any

from .. import kernels
from ..errors import LoRARiteValueError
from ..execute.engine import Decided, measure
from ..plan.plan import Plan
from .adamw import finite_gradients
from .guard import Guard
from .statistics import Statistics

ENGINES = ("eager", "triton")


def check_engine(engine: Any) -> None:
    """Raises LoRARiteValueError where an engine does not exist here."""
    if engine not in (None, *ENGINES):
        raise LoRARiteValueError(f'engine must be "eager", "triton" or None, got {engine!r}')
    if engine == "triton" and not kernels.installed():
        raise LoRARiteValueError('engine="triton" needs the package triton: pip install "lora-rite[kernels]"')


def measure_by(
    engine: str | None, plan: Plan, groups: list[dict[str, Any]], statistics: Statistics, guard: Guard
) -> Decided:
    """The first half of a step, by the engine that is asked for, or, where that is None, that suits the plan."""
    others = [finite_gradients(group) for group in groups if group["kind"] == "adamw"]
    wanted = engine or ("triton" if kernels.PASSED else "eager")
    if wanted == "eager" or not plan.buckets:
        return measure(plan, others)
    if reason := kernels.supports(plan):
        if engine:
            guard.say_why_eager(reason)
        return measure(plan, others)
    counts = statistics.counts_on(plan.buckets[0].device)
    return kernels.measure(plan, others, counts, groups[0]["capturable"])
