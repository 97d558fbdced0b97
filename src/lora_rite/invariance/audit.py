"""``lora_rite.audit``: does an optimizer's step on W = BA depend on how W is factorised? Any optimizer, any LoRA model.

An optimizer is transformation invariant (Definition 1 of the paper) if training from (B, A) and from (BK, K⁻¹A) gives
the same W for every invertible K. The audit trains both ways, with the optimizer's moments, on the same batches, and
compares the changes of W after each step. Needs torch alone.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..errors import LoRARiteValueError
from ..inputs import resolve
from ..optim.optimizer import LoRARite
from ..plan.pairs import param_groups
from .problems import SYNTHETIC, Loss, problems_of
from .runs import CONDITIONS, TOLERANCE, CannotTrain, audit_one, transforms

Takes = Literal["params", "named", "model"]

#: Steps of a run on the synthetic problems, and on a model. On the embedded one, in float32, one rounding of the start
#: stays within TOLERANCE for 25 steps and comes to 6e-2 after 50, so that nothing could be told.
STEPS, MODEL_STEPS = 50, 10


def audit(
    optimizer: str | Callable[..., torch.optim.Optimizer],
    model: nn.Module | None = None,
    loss: Loss | None = None,
    *,
    options: dict[str, Any] | None = None,
    takes: Takes | None = None,
    dtypes: Sequence[str] | None = None,
    conditions: Sequence[float] = CONDITIONS,
    steps: int | None = None,
    tolerance: float | None = None,
    problems: Sequence[str] = SYNTHETIC,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures how far an optimizer's training of W = BA depends on the factorisation of W.

    From each start it trains the model as it is, and from (BK, K⁻¹A) for scalings, a rotation and random K, all on the
    same batches, and compares what training has written into W: ‖ΔW − ΔW'‖/‖ΔW‖ (Frobenius norms over all pairs of a
    kind of layer, ΔW against the own start, in float64), after every step.

    Args:
        optimizer: a class (``torch.optim.AdamW``), a function, or the import path of one (``"torch.optim:AdamW"``).
        model: any model with LoRA pairs that :func:`lora_rite.find_pairs` finds. It is copied, not changed; frozen
            parameters are not copied. Without a model, synthetic problems are used: linear maps, embeddings and
            convolutions, each from a zero and from a dense start.
        loss: ``loss(model, step)`` gives the scalar loss of step 1, 2, …, the same for the same step. Without it, a
            causal language model predicts random tokens.
        options: keyword arguments of the optimizer (``{"lr": 1e-3}``).
        takes: what the optimizer is called with: "params", the list of trainable parameters, A before B; "named", the
            pairs of name and parameter; or "model". By default a class gets "params" (LoRARite the groups of
            ``param_groups(model)``), and a function "model", unless its first parameter is called ``params``,
            ``parameters`` or ``named_parameters``.
        dtypes: names of torch dtypes to convert the model to, one audit each. By default float64 and float32 for the
            synthetic problems, and a model stays as it is.
        conditions: condition numbers of the random K.
        steps: optimizer steps of each run. By default 50 on the synthetic problems and 10 on a model, whose training by
            itself amplifies rounding over more.
        tolerance: the largest error that passes; by default 1e-4, 1e-2, 0.3 and 0.1 for float64, float32, bfloat16 and
            float16.
        problems: names in :data:`SYNTHETIC` to use where there is no model.
        seed: of the problems, of K, and (the same in every step of all runs) of torch, for dropout.

    Returns:
        ``rows``: a dict for each layer, start, dtype and transform, with ``errors`` of each step, ``worst`` (the
        largest of them), ``moved`` (‖ΔW‖ at the end), ``tolerance`` and ``verdict``:

        - "control": no K, but every element changed by one rounding of its dtype: what training itself makes of noise;
        - "passed": ``worst`` is within the tolerance;
        - "rounding": it is not, but within 10·condition(K) times the control's: this dtype cannot tell;
        - "failed": the step depends on the factorisation (also: W did not move, is not finite, or K alone raises).

        ``passed``: nothing failed, and for each layer, start and dtype something passed. ``failures``: problems
        that the optimizer cannot train, and why (they do not count). ``settings``.

    Raises:
        LoRARiteValueError: no pairs, no such optimizer, arguments out of range, or an optimizer that can train none of
            the problems.
    """
    steps = (STEPS if model is None else MODEL_STEPS) if steps is None else steps
    if steps < 1:
        raise LoRARiteValueError(f"steps must be at least 1, got {steps}")
    if not conditions or min(conditions) < 1:
        raise LoRARiteValueError(f"conditions must be numbers ≥ 1, got {list(conditions)}")
    if unknown := set(problems) - set(SYNTHETIC):
        raise LoRARiteValueError(f"unknown problem {sorted(unknown)[0]!r}: choose from {', '.join(SYNTHETIC)}")
    make = _maker(optimizer, options or {}, takes)
    kinds = [_dtype(name) for name in dtypes or (["float64", "float32"] if model is None else [])] or [None]
    rows, failures = [], []
    for start, problem, problem_loss in problems_of(model, loss, problems, seed):
        for dtype in kinds:
            subject = problem if dtype is None else copy.deepcopy(problem).to(dtype)
            try:
                rows += audit_one(make, subject, problem_loss, start, transforms(conditions), steps, tolerance, seed)
            except CannotTrain as error:
                failures.append({"start": start, "dtype": str(dtype or "as it is"), "reason": str(error)})
    if not rows:
        raise LoRARiteValueError(f"{_label(optimizer)} cannot train any of the problems: {failures[0]['reason']}")
    return {
        "optimizer": _label(optimizer),
        "settings": {"options": {k: _plain(v) for k, v in (options or {}).items()}, "steps": steps, "seed": seed,
                     "model": type(model).__name__ if model is not None else "synthetic"},
        "rows": rows,
        "failures": failures,
        "passed": _passed(rows),
    }  # fmt: skip


def _passed(rows: list[dict[str, Any]]) -> bool:
    """Nothing failed, and each layer, start and dtype has something that passed: where the control itself is large,
    rounding explains every error, and shows nothing."""
    problem = lambda row: (row["layer"], row["start"], row["dtype"])
    shown = {problem(row) for row in rows if row["verdict"] == "passed"}
    return all(row["verdict"] != "failed" and problem(row) in shown for row in rows)


def _maker(
    optimizer: str | Callable[..., torch.optim.Optimizer], options: dict[str, Any], takes: Takes | None
) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """What makes the optimizer of a model."""
    target: Any = resolve(optimizer) if isinstance(optimizer, str) else optimizer
    if not callable(target):
        raise LoRARiteValueError(f"optimizer must be a class, a function or an import path, got {target!r}")
    if takes is None and isinstance(target, type) and issubclass(target, LoRARite):
        return lambda model: target(param_groups(model), **options)
    if takes is None:
        takes = _what_it_takes(target)

    def make(model: nn.Module) -> Any:
        if takes == "model":
            return target(model, **options)
        if takes == "named":
            return target(list(model.named_parameters()), **options)
        return target([p for p in model.parameters() if p.requires_grad], **options)

    return make


def _what_it_takes(target: Any) -> Takes:
    if isinstance(target, type):
        return "params"
    first = next(iter(inspect.signature(target).parameters), "")
    if first == "named_parameters":
        return "named"
    return "params" if first in ("params", "parameters") else "model"


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if dtype not in TOLERANCE:
        known = ", ".join(str(d).removeprefix("torch.") for d in TOLERANCE)
        raise LoRARiteValueError(f"unknown dtype {name!r}: choose from {known}")
    return dtype


def _label(optimizer: Any) -> str:
    return optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", type(optimizer).__name__)


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it."""
    return value if isinstance(value, (int, float, str, bool, list, tuple, dict, type(None))) else _label(value)
