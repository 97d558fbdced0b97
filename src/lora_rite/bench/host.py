"""``lora-rite bench host``: what a step costs in Python, beside the arithmetic.

Times are processor time of the one thread that steps, which other processes disturb little.
"""

import cProfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from ..invariance.problems import Shapes
from ..optim.engines import check_engine
from ..plan.pairs import Shape
from .cases import check
from .contenders import BASELINE, WARM_UP, TimedOptimizer
from .pretended import pretended_card
from .watch import spread

FOREACH = "AdamW (foreach)"
#: What LoRARite does in each step before it looks at any factor → the methods that do it.
PARTS = {"plan": ("_current_plan",), "checks": ("_check",)}
#: LoRARite by each engine.
OURS = {"eager": "LoRARite", "triton": "LoRARite (triton)"}

Calls = dict[str, Callable[[], Any]]


def bench_host(pairs: list[int], width: int, rank: int, rounds: int, engine: str) -> dict[str, Any]:
    """LoRARite and AdamW, foreach and fused, on so many pairs of one shape, in one thread of a CPU, in float32. With
    the engine "triton", LoRARite prepares its launches for a GPU that is not there (:mod:`lora_rite.bench.pretended`).

    Returns:
        ``cases`` with ``pairs``, ``width``, ``rank`` and ``rows``: ``part``, ``seconds`` (median over rounds, and
        ``quartiles``) and ``calls`` of functions in Python. "plan" is that the plan of the last step is found to hold,
        "checks" are those of settings and gradients, and "bookkeeping" is what there is beside them in a step in which
        no factor has a gradient. Rows of whole steps have their ``ratio`` to foreach AdamW's (median of the ratios
        within rounds, and ``ratio_quartiles``).
    """
    check("cpu", rounds, pairs=pairs, width=width, rank=rank)
    check_engine(engine)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pretended_card() if engine == "triton" else nullcontext():
            shapes = {n: [Shape(width, width, rank)] * n for n in pairs}
            cases = [
                {"pairs": n, "width": width, "rank": rank, "rows": measure(shapes[n], rounds, engine)} for n in pairs
            ]
    finally:
        torch.set_num_threads(threads)
    return {"benchmark": "host", "device": "cpu", "rounds": rounds, "engine": engine, "cases": cases}


def measure(shapes: Shapes, rounds: int, engine: str) -> list[dict[str, Any]]:
    """The rows of :func:`bench_host`: parts of LoRARite's step that touch no factor, and whole steps."""
    torch.manual_seed(0)
    ours = OURS[engine]
    made = (TimedOptimizer(name, shapes, torch.float32, "cpu") for name in (ours, FOREACH, BASELINE, ours))
    rite, foreach, fused, idle = made
    for p in idle.params:
        p.grad = None
    work = {**_parts(rite.optimizer), ours: rite.step, FOREACH: foreach.step, BASELINE: fused.step}
    without = {**_parts(idle.optimizer), ours: idle.step}
    names = (*PARTS, "bookkeeping", ours, FOREACH, BASELINE)
    times: dict[str, list[float]] = {name: [] for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no parameter of this optimizer has had a gradient")
        for i in range(WARM_UP + rounds):
            for name, value in _each(processor_seconds, work, without, ours).items():
                times[name] += [value] if i >= WARM_UP else []
        calls = _each(python_calls, work, without, ours)
    rows = []
    for name in names:
        median, quartiles = spread(times[name])
        row = {"part": name, "seconds": median, "quartiles": quartiles, "calls": calls[name]}
        if name not in (*PARTS, "bookkeeping"):
            ratio = spread([a / b for a, b in zip(times[name], times[FOREACH], strict=True)])
            row["ratio"], row["ratio_quartiles"] = ratio
        rows.append(row)
    return rows


def _parts(optimizer: torch.optim.Optimizer) -> Calls:
    def calls(methods: tuple[str, ...]) -> Callable[[], Any]:
        bound = [getattr(optimizer, method) for method in methods]
        return lambda: [method() for method in bound]

    return {name: calls(methods) for name, methods in PARTS.items()}


def _each(measured: Callable[[Callable[[], Any]], float], work: Calls, without: Calls, ours: str) -> dict[str, float]:
    """A figure for each row: of what is in ``work``, and for bookkeeping the rest of a step ``without`` gradients."""
    without[ours]()  # so that the parts and the step find the caches alike
    of_idle = {name: measured(call) for name, call in without.items()}
    bookkeeping = of_idle.pop(ours) - sum(of_idle.values())
    return {**{name: measured(call) for name, call in work.items()}, "bookkeeping": bookkeeping}


def processor_seconds(call: Callable[[], Any]) -> float:
    """Of this thread, for one call."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def python_calls(call: Callable[[], Any]) -> int:
    """Calls of functions that are written in Python, in one call, itself left out."""
    profile = cProfile.Profile(builtins=False)
    profile.runcall(call)
    own = getattr(call, "__code__", None)
    return sum(e.callcount for e in profile.getstats() if not isinstance(e.code, str) and e.code is not own)
