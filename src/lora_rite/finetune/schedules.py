"""The schedules of transformers that ``lora-rite train`` and ``compare`` take, with their arguments."""

import inspect
import math
import re
import warnings
from typing import Any

from ..errors import LoRARiteValueError
from .wording import did_you_mean

#: What the run gives a schedule: by --steps and --warmup.
GIVEN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


def check_schedule(name: str, args: dict[str, Any] | None, lr: float, steps: int, warmup: float) -> None:
    """Checks that transformers can make a schedule, and that its learning rates are numbers, none below 0.

    Args:
        name: transformers' name of it.
        args: its further arguments.
        lr, steps, warmup: as ``lora-rite train`` takes them.

    Raises:
        LoRARiteValueError: what is wrong, in words that follow the name of the option.
    """
    from transformers import SchedulerType, get_scheduler
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    known = {kind.value: TYPE_TO_SCHEDULER_FUNCTION[kind] for kind in SchedulerType}
    if name not in known:
        fixed = [kind for kind, function in known.items() if not _follows_a_metric(function)]
        hint = did_you_mean(name, fixed) or f"; there are {', '.join(fixed)}"
        raise LoRARiteValueError(f"no such schedule{hint}")
    if _follows_a_metric(known[name]):
        raise LoRARiteValueError("it follows a metric of the Trainer's own evaluations, and there are none here")
    parameters = {key: p for key, p in inspect.signature(known[name]).parameters.items() if key not in GIVEN}
    takes = f"it takes {', '.join(parameters) or 'none'}"
    for key in args or {}:
        if key in GIVEN:
            raise LoRARiteValueError(f"--scheduler_args.{key}: the run decides it (--steps, --warmup)")
        if key not in parameters:
            hint = did_you_mean(key, parameters) or f"; {takes}"
            raise LoRARiteValueError(f"--scheduler_args.{key}: no such argument{hint}")
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in (args or {})]
    if missing:
        raise LoRARiteValueError(f"it needs --scheduler_args.{', --scheduler_args.'.join(missing)}; {takes}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself says it
            schedule: Any = get_scheduler(name, _optimizer(lr), round(warmup * steps), steps, args or {})
            some = sorted({*range(0, steps, max(1, steps // 1000)), steps})
            rates = [(step, lr * factor(step)) for step in some for factor in schedule.lr_lambdas]
    except Exception as error:
        reason = re.sub("`?lr_scheduler_kwargs`?", "--scheduler_args", " ".join(str(error).split()))
        kind = type(error).__name__
        raise LoRARiteValueError(f"{kind}: {reason} (--scheduler_args {args or {}}; {takes})") from error
    for step, rate in rates:
        if not 0 <= rate < math.inf:
            raise LoRARiteValueError(f"lr would be {rate:g} at step {step} (--scheduler_args {args or {}})")


def _follows_a_metric(function: Any) -> bool:
    """Whether what a function of transformers makes is stepped by a metric. Those hand on any keyword."""
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
        return False
    return "metrics" in inspect.signature(function(_optimizer(1.0)).step).parameters


def _optimizer(lr: float) -> Any:
    import torch

    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=lr)
