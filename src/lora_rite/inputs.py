"""What a user names: objects by their import path, and options that an error is blamed on."""

import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .errors import LoRARiteError, LoRARiteValueError

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def resolve(path: str) -> Any:
    """The object at an import path ``package.module:name``.

    Raises:
        LoRARiteValueError: no import path, or no such module or name.
    """
    if not _PATH.fullmatch(path):
        raise LoRARiteValueError(f"{path!r} is not an import path like torch.optim:AdamW")
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise LoRARiteValueError(f"cannot import {path}: {first_line(error)}") from error
    return found


def resolve_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with what they name in place of those values that are import paths."""
    return {k: resolve(v) if is_path(v) else v for k, v in options.items()}


def is_path(value: Any) -> bool:
    """Whether a value is an import path, which :func:`resolve_values` imports."""
    return isinstance(value, str) and _PATH.fullmatch(value) is not None


def first_line(error: BaseException) -> str:
    """Of what the error says; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def blame(option: str) -> Iterator[None]:
    """Turns an error of a library inside into one that names the option it comes from, with its first line. Those of
    this package that are not about values (a run that diverges) stay what they are."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LoRARiteError) and not isinstance(error, LoRARiteValueError):
            raise
        terse = isinstance(error, (LookupError, AssertionError)) and bool(error.args)  # KeyError says the key alone
        kind = f"{type(error).__name__}: " if terse else ""
        raise LoRARiteValueError(f"{option}: {kind}{first_line(error)}") from error
