"""The ways in which a step can be computed, and the one place where tests choose among them: fixture ``engine`` for
what holds by all of them, ``eager_engine`` for what the kernels leave to the eager engine."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from interpreter import use_interpreter

from lora_rite import LoRARite, kernels
from lora_rite.optim import engines
from lora_rite.plan.plan import Limits


@dataclass(frozen=True)
class Engine:
    """``kernels``: by those of Triton, on a CPU, where a step of a pair takes 0.2 s; else by the eager engine."""

    limits: Limits
    kernels: bool = False

    def choose(self, eager: Any, kernels: Any) -> Any:
        """What a test takes by the one or by the other: the kernels take no float64, and should make few steps."""
        return kernels if self.kernels else eager


ENGINES = {
    "stacked": Engine(Limits(direct_elements=10**9, iterate=False)),  # factors in one tensor, multiplied together
    "as_they_lie": Engine(Limits(direct_elements=0, iterate=False)),  # each multiplied as it lies
    "iterative": Engine(Limits(direct_elements=10**9, iterate=True)),  # r×r matrices by iterations instead of LAPACK
    "triton": Engine(Limits(), kernels=True),
}
EAGER = [name for name, engine in ENGINES.items() if not engine.kernels]

#: Steps that the kernels have made since a test began.
made: Counter[str] = Counter()
_measure, _measure_by_kernels = engines.measure, kernels.measure


def use(patch: pytest.MonkeyPatch, engine: Engine, *, alone: bool = True, **limits: Any) -> None:
    """All optimizers step by this engine until ``patch`` is undone, with further ``limits``. Where the kernels are to
    step, it is an error that the eager engine does, but for what they do not take where they are not ``alone``."""
    patch.setattr(LoRARite, "_limits", replace(engine.limits, **limits))
    if not engine.kernels:
        return
    use_interpreter()

    def eager(plan: Any, others: Any) -> Any:
        if plan.buckets:
            assert not alone, f"the eager engine stepped: {kernels.supports(plan)}"
            assert kernels.supports(plan)
        return _measure(plan, others)

    def by_kernels(*args: Any) -> Any:
        made["triton"] += 1
        return _measure_by_kernels(*args)

    patch.setattr(kernels, "PASSED", "Triton's interpreter")
    patch.setattr(engines, "measure", eager)
    patch.setattr(kernels, "measure", by_kernels)


def select(items: Iterable[pytest.Item]) -> Iterator[pytest.Item]:
    """Of the cases of a test by the kernels those that they take; the first is fast, the others are slow."""
    fast = set()
    for item in items:
        given = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        if given.pop("engine", None) == "triton":
            if _left_to_eager(list(given.values())):
                continue
            test = item.nodeid.partition("[")[0]
            if test in fast:
                item.add_marker(pytest.mark.slow)
            fast.add(test)
        yield item


def _left_to_eager(value: Any) -> bool:
    """Whether a test's parameters have float64 or options in them that the kernels do not take."""
    if isinstance(value, dict):
        return any(value.get(option) for option in kernels.EAGER_OPTIONS)
    if isinstance(value, list | tuple):
        return any(map(_left_to_eager, value))
    return value is torch.float64
