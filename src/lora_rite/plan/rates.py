"""Learning rates by name: which expression of ``lr_by_name`` a parameter has its own from."""

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from ..errors import LoRARiteTypeError, LoRARiteValueError
from ..options import check


def expressions_of(lr_by_name: Mapping[str, Any], together: Sequence[tuple[str, ...]]) -> list[str | None]:
    """Of each tuple of plain names (both factors of a pair, or one other parameter), the expression that is found in
    one of them or in the name of a module that holds it; None where there is none.

    Raises:
        LoRARiteTypeError: ``lr_by_name`` is no mapping.
        LoRARiteValueError: an expression is none, is found nowhere, has no learning rate, or is not the only one.
    """
    if not isinstance(lr_by_name, Mapping):
        raise LoRARiteTypeError(f"lr_by_name must map expressions to learning rates, got {lr_by_name!r}")
    compiled = {expression: _compiled(expression, lr) for expression, lr in lr_by_name.items()}
    found: list[str | None] = []
    for names in together:
        held_by = {prefix for name in names for prefix in accumulate(name.split("."), "{}.{}".format)}
        matching = [key for key, expression in compiled.items() if any(map(expression.search, held_by))]
        if len(matching) > 1:
            raise LoRARiteValueError(
                f"lr_by_name: {matching[0]!r} and {matching[1]!r} both match {' with '.join(names)}: only one may"
            )
        found.append(matching[0] if matching else None)
    if unused := [expression for expression in compiled if expression not in found]:
        there = f"; they are named like {together[0][0]}" if together else ""
        raise LoRARiteValueError(f"lr_by_name: {unused[0]!r} matches no trainable parameter{there}")
    return found


def _compiled(expression: Any, lr: Any) -> re.Pattern[str]:
    try:
        compiled = re.compile(expression)
    except (re.error, TypeError) as error:
        raise LoRARiteValueError(f"lr_by_name: {expression!r} is no regular expression: {error}") from None
    if not isinstance(lr, Tensor):  # (of which the optimizer looks at the value)
        try:
            check({"lr": lr})
        except LoRARiteValueError as error:
            raise LoRARiteValueError(f"lr_by_name[{expression!r}]: {error}") from None
    return compiled
