"""Output that no terminal and no pipe can stop: what an encoding lacks is written in ASCII."""

import codecs
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NAME = "lora_rite"
#: What our messages and tables have beyond ASCII and Latin-1.
_ASCII = {
    "→": "->", "–": "-", "—": "-", "−": "-", "…": "~", "±": "+-", "×": "x", "·": "*", "≥": ">=", "≤": "<=", "≈": "~",
    "‖": "||", "√": "sqrt ", "“": '"', "”": '"', "’": "'", "✗": "x", "⁻": "-",
}  # fmt: skip


def _ascii(character: str) -> str:
    name = unicodedata.name(character, "")
    plain = character
    if name.startswith("BOX DRAWINGS"):
        plain = "-" if name.endswith(" HORIZONTAL") else "|" if name.endswith(" VERTICAL") else "+"
    elif name.startswith("GREEK"):
        plain = name.rpartition(" ")[2].lower()
    elif unicodedata.decomposition(character).startswith(("<super>", "<sub>")):
        plain = unicodedata.normalize("NFKD", character)
    # any other letter may be of a file's name: spelled out, it is still that name
    return _ASCII.get(character, plain).encode("ascii", "backslashreplace").decode()


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_ascii, error.object[error.start : error.end])), error.end


codecs.register_error(_NAME, _replace)


def tolerate(stream: Any) -> str | None:
    """Has a text stream write what its encoding lacks in ASCII, lone surrogates (of file names that are not UTF-8) as
    ``\\udc..``, instead of raising. Returns how it did before; None where it is no such stream, or already does with
    those what its user has said (``PYTHONIOENCODING=ascii:replace``)."""
    before = getattr(stream, "errors", None)
    if before not in ("strict", "surrogateescape", "backslashreplace") or not hasattr(stream, "reconfigure"):
        return None
    stream.reconfigure(errors=_NAME)
    return before


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Within, stdout and stderr write whatever they are given (:func:`tolerate`)."""
    streams: tuple[Any, ...] = sys.stdout, sys.stderr
    before = [tolerate(stream) for stream in streams]
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            if errors is not None and not stream.closed:
                stream.reconfigure(errors=errors)


def flush(stream: Any, text: str = "") -> OSError | None:
    """Writes text to a stream and flushes it. Where that fails (its reader has gone, as in ``… | head -1``; the disk is
    full), the rest goes to the null device, so that the interpreter does not fail on it at its end; returns the error.
    """
    if stream is None:
        return None
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None
