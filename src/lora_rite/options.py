"""The hyperparameters of LoRA-RITE, once for torch (:class:`lora_rite.LoRARite`) and JAX (:mod:`lora_rite.optax`):
their names, defaults, ranges and texts. Neither torch nor JAX is imported here.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple

from .errors import LoRARiteValueError


class Option(NamedTuple):
    """``range`` is a key of :data:`RANGES`, ``text`` what both docstrings say, to which each may add."""

    default: Any
    range: str
    text: str


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _are_betas(value: Any) -> bool:
    pair = isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_number, value))
    return pair and 0 <= value[0] < 1 and 0 <= value[1] <= 1


_NOT_NEGATIVE, _POSITIVE, _BELOW_ONE = "a finite number ≥ 0", "a finite number > 0", "a number in [0, 1)"
_BETAS, _SWITCH = "a number in [0, 1) and one in [0, 1]", "True or False"
_SCALING, _DTYPE, _SINGLE = "None or a finite number > 0", 'None or "bfloat16"', 'None or "float32"'
#: What an error says of a range → whether a value is in it.
RANGES: dict[str, Callable[[Any], bool]] = {
    _NOT_NEGATIVE: lambda value: _is_number(value) and 0 <= value < math.inf,
    _POSITIVE: lambda value: _is_number(value) and 0 < value < math.inf,
    _BELOW_ONE: lambda value: _is_number(value) and 0 <= value < 1,
    _BETAS: _are_betas,
    _SWITCH: lambda value: isinstance(value, bool),
    _SCALING: lambda value: value is None or (_is_number(value) and 0 < value < math.inf),
    _DTYPE: lambda value: value is None or (isinstance(value, str) and value == "bfloat16"),
    _SINGLE: lambda value: value is None or (isinstance(value, str) and value == "float32"),
}
#: Stands for a number that is not known before the step, as an array's under tracing: it is in all ranges of numbers.
KNOWN_LATER = 0.5

#: The learning rate where none is given: of W = W₀ + scaling·B·A, or of B·A itself without ``scaling``.
LR = 5e-4

OPTIONS = {
    "lr": Option(LR, _NOT_NEGATIVE, "the learning rate, a"),
    "scaling": Option(
        None,
        _SCALING,
        "what the model multiplies B·A by (alpha/r; rsLoRA: alpha/√r). lr, clipping and eps are then those of W, lr at "
        "rank 16: one value suits every alpha and, nearly, every rank. None: they are those of B·A as it is.",
    ),
    "betas": Option((0.9, 0.999), _BETAS, "decays of the first and the second moment."),
    "eps": Option(1e-6, _POSITIVE, "added to the root of the eigenvalues of V."),
    "weight_decay": Option(0.0, _NOT_NEGATIVE, "decoupled, on both factors."),
    "damping": Option(
        20.0,
        _NOT_NEGATIVE,
        "how many steps' worth of W must lie along a direction of B·A before the factor opposite to the zero one "
        "follows it. 0 is the published step.",
    ),
    "row_equilibration": Option(
        True,
        _SWITCH,
        "divide each row of the preconditioned gradient by its running root mean square, to which a hundredth of that "
        "of all rows is added, so that rows of rounding noise do not become as large as the others.",
    ),
    "row_beta": Option(0.99, _BELOW_ONE, "decay of that mean square."),
    "relative_eps": Option(
        1e-3, _NOT_NEGATIVE, "eps in units of √λ_max(V): makes the step independent of the gradient's scale."
    ),
    "clip_unmagnified_grad": Option(
        1.0, _NOT_NEGATIVE, "largest norm of the unmagnified gradients of all pairs together; 0 is off."
    ),
    "update_skipping": Option(
        0.0,
        _NOT_NEGATIVE,
        "drop a factor's gradient in this step where its unmagnified root mean square exceeds this; 0 is off.",
    ),
    "update_capping": Option(0.0, _NOT_NEGATIVE, "largest root mean square of M in the update; 0 is off."),
    "apply_escape": Option(
        False, _SWITCH, "add the mass of V that the new basis does not see (ρ of Algorithm 1) to its eigenvalues."
    ),
    "balance_param": Option(False, _SWITCH, "rescale both factors to equal Frobenius norms after each step."),
    "maximize": Option(False, _SWITCH, "ascend instead of descend."),
    "capturable": Option(False, _SWITCH, "never let the host wait for the device in a step"),
    "algebra_dtype": Option(
        None,
        _SINGLE,
        'the dtype of r×r matrices while a step computes with them: "float32" is for devices whose float64 is slow; '
        "None is float64, where there is one.",
    ),
    "first_moment_dtype": Option(
        None,
        _DTYPE,
        'the dtype of M in the state: "bfloat16" halves its memory, rounded stochastically after each step; None is '
        "that of the arithmetic.",
    ),
}

#: Other names of options → ours: too far from them to be seen as misspelt. JAX's own name of lr is the first.
OTHER_NAMES = {
    "learning_rate": "lr", "epsilon": "eps", "wd": "weight_decay", "mu_dtype": "first_moment_dtype",
    "exp_avg_dtype": "first_moment_dtype",
}  # fmt: skip


def meant_option(key: str, options: list[str]) -> str | None:
    """The option that somebody meant who wrote ``key``; None where it is a name of its own, as ``lr_scale`` is."""
    words = key.strip("_").lower()
    if any(f"_{option}_" in f"_{words}_" and option != words for option in options):
        return None
    close = difflib.get_close_matches(words, options, n=1, cutoff=0.8)
    return OTHER_NAMES.get(words, close[0] if close else None)


#: Keyword arguments with the settings of the authors' PyTorch code: its step wherever the factors have full rank.
#: Directions without rank, which that code inverts, are cut (for the deviations see :class:`lora_rite.LoRARite`).
PUBLISHED = {"scaling": None, "damping": 0.0, "row_equilibration": False, "update_skipping": 1.0, "relative_eps": 0.0}


#: With ``scaling``, lr is that of this rank; at others, lr·(RANK/r)^EXPONENT.
RANK, EXPONENT = 16, 0.5


def product_scale(scaling: Any) -> Any:
    """What the model multiplies B·A by: ``scaling``, or 1 where it is None."""
    return 1.0 if scaling is None else scaling


def lr_scale(scaling: float | None, rank: int) -> float:
    """What lr is multiplied by to give that of B·A: (16/r)^½/scaling, or 1 where ``scaling`` is None."""
    return 1.0 if scaling is None else (RANK / rank) ** EXPONENT / scaling


def check(values: Mapping[str, Any], number: Callable[[str, Any], Any] = lambda name, value: value) -> None:
    """Looks whether the options among ``values`` are in their ranges.

    Args:
        values: by name; what is no option is not looked at.
        number: of a name and a value that may be an array, a plain number (:data:`KNOWN_LATER`), or what is to be
            refused. Called for each of the ``betas``.

    Raises:
        LoRARiteValueError: names the option, its range and the value.
    """
    for name, value in values.items():
        option = OPTIONS.get(OTHER_NAMES.get(name, name))
        if option is None:
            continue
        several = isinstance(value, (tuple, list))
        plain = [number(name, part) for part in value] if several else number(name, value)
        if not RANGES[option.range](plain):
            raise LoRARiteValueError(f"{name} must be {option.range}, got {value!r}")
    if values.get("capturable") and values.get("apply_escape"):
        raise LoRARiteValueError("apply_escape needs eigenvalues, for which the host waits: not with capturable=True")
