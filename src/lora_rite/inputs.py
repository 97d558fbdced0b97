"""What a user names: objects by their import path, files by their suffix, keys of JSON, and options that an error is
blamed on."""

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import LoRARiteError, LoRARiteValueError

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
#: Characters of a library's message that an error repeats.
MESSAGE = 600


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
        raise LoRARiteValueError(f"cannot import {path}: {one_line(error)}") from error
    return found


def resolve_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with what they name in place of those values that are import paths."""
    return {k: resolve(v) if is_path(v) else v for k, v in options.items()}


def is_path(value: Any) -> bool:
    """Whether a value is an import path, which :func:`resolve_values` imports."""
    return isinstance(value, str) and _PATH.fullmatch(value) is not None


def suffix(path: str | Path) -> str:
    """The end of a file's name that says what is in it, in lower case: ``.jsonl`` of ``data.JSONL`` too."""
    return Path(path).suffix.lower()


class DuplicateKeyError(ValueError):
    """A key that a JSON object has twice, of which Python's reader would take the last value."""


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        DuplicateKeyError: an object in it has a key twice.
        ValueError, RecursionError: as :func:`json.loads` raises them.
    """
    return json.loads(text, object_pairs_hook=unique_keys)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these keys and values; for ``object_pairs_hook`` of :mod:`json`."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DuplicateKeyError(f"{json.dumps(key)} is given twice")
        found[key] = value
    return found


def one_line(error: BaseException) -> str:
    """What the error says on one line, the first :data:`MESSAGE` characters of it where a library wrote more; its kind
    where it says nothing. (What is missing often stands behind a list that the first line announces.)"""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, LoRARiteError) or len(text) <= MESSAGE:
        return text
    return f"{text[:MESSAGE].rpartition(' ')[0]} …"


@contextmanager
def blame(option: str) -> Iterator[None]:
    """Turns an error of a library inside into one that names the option it comes from, on one line. Those of
    this package that are not about values (a run that diverges) stay what they are."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LoRARiteError) and not isinstance(error, LoRARiteValueError):
            raise
        terse = isinstance(error, (LookupError, AssertionError)) and bool(error.args)  # KeyError says the key alone
        kind = f"{type(error).__name__}: " if terse else ""
        raise LoRARiteValueError(f"{option}: {kind}{one_line(error)}") from error
