"""Training text: reads it and splits it."""

import json
import random
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LoRARiteValueError, warn
from ..inputs import DuplicateKeyError, one_line, parse_json, suffix, unique_keys

RECORDS = (".jsonl", ".json", ".parquet")  # files of records


class Example(NamedTuple):
    """A text (``prompt`` empty; all of it carries loss), or a prompt and the completion that carries it.

    ``shorter`` has prompts to take instead, in this order, where the whole does not fit into a window; ``others`` the
    wrong completions of a multiple-choice question.
    """

    prompt: str
    completion: str
    shorter: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


class Split(NamedTuple):
    train: list[Example]
    held_out: list[Example]


def read_examples(path: Path, skip_bad_lines: bool = False) -> list[Example]:
    """Examples from the records of a ``.jsonl``, ``.json`` or ``.parquet`` file, or from any other text file (one
    example). The case of the suffix does not matter.

    A record is ``{"text": …}`` or ``{"prompt": …, "completion": …}``, never both; beside a prompt, ``"shorter"`` may
    list prompts for where it does not fit, and ``"others"`` wrong completions. A key whose value is null counts as not
    given (parquet files have all columns in each record); keys of other names are passed over.

    Args:
        path: the file.
        skip_bad_lines: leave out bad records, with one warning that counts them.

    Raises:
        LoRARiteValueError: no such file, not UTF-8, a bad record, named as file:number, or records in a file whose
            suffix does not say so.
    """
    if suffix(path) not in RECORDS:
        text = read_text(path)
        if not text.strip():
            raise LoRARiteValueError(f"{path} has no text")
        if _begins_with_a_record(text):
            raise LoRARiteValueError(
                f"{path} has records of JSON, which a file of this name would be read as one text with: rename it to "
                f"{path.stem}.jsonl"
            )
        return [Example("", text)]
    found, bad = [], []
    for n, value in _values(path):
        try:
            found.append(_example(_object(value, f"{path}:{n}"), f"{path}:{n}"))
        except LoRARiteValueError as error:
            if not skip_bad_lines:
                raise
            bad.append(error)
    if bad:
        warn(f"{len(bad)} lines are left out, {len(found)} are used; the first: {bad[0]}")
    if not found:
        raise LoRARiteValueError(f"{path} has no text")
    return found


def read_text(path: Path, limit: int | None = None) -> str:
    """The text of a UTF-8 file of at most ``limit`` bytes, its lines ended by ``\\n``.

    Raises:
        LoRARiteValueError: no such file, a folder, a pipe or a device, too large, or not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError(None, "it is not a file (what is resumed is read again)")
        with path.open("rb") as file:
            data = file.read(-1 if limit is None else limit + 1)
        if limit is not None and len(data) > limit:
            raise LoRARiteValueError(f"{path} has more than {limit} bytes")
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise LoRARiteValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LoRARiteValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except LoRARiteValueError:
        raise
    except ValueError as error:  # a null byte in the name
        raise LoRARiteValueError(f"cannot read {str(path)!r}: {error}") from None


def read_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The records of a ``.jsonl`` file (an object a line), a ``.json`` file (the same, one object, or an array of
    objects) or a ``.parquet`` file, each with its place as file:number.

    Raises:
        LoRARiteValueError: no such file, not UTF-8, no records, or something else than an object, named as file:number.
    """
    values = _values(path)
    if not values:
        raise LoRARiteValueError(f"{path} has no text")
    return [(f"{path}:{n}", _object(value, f"{path}:{n}")) for n, value in values]


def _values(path: Path) -> list[tuple[int, Any]]:
    """What a file of records holds, numbered; an exception where a line cannot be read."""
    return _parquet(path) if suffix(path) == ".parquet" else _json_values(read_text(path), path)


def _object(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, json.JSONDecodeError):
        raise LoRARiteValueError(f"{where}: not a JSON object on one line: {value.msg}")
    if isinstance(value, DuplicateKeyError):
        raise LoRARiteValueError(f"{where}: {value}")
    if isinstance(value, Exception):  # a number of thousands of digits, brackets in brackets without end
        raise LoRARiteValueError(f"{where}: not a JSON object that can be read")
    if not isinstance(value, dict):
        raise LoRARiteValueError(f"{where}: expected a JSON object, got a {type(value).__name__}")
    return value


def _json_values(text: str, path: Path) -> list[tuple[int, Any]]:
    if suffix(path) == ".json":
        with suppress(ValueError, RecursionError):
            return list(enumerate(_items(text), 1))
    values: list[tuple[int, Any]] = []
    for n, line in enumerate(text.split("\n"), 1):
        try:
            values += [(n, parse_json(line))] if line.strip() else []
        except (ValueError, RecursionError) as error:
            values.append((n, error))
    return values


def _items(text: str) -> list[Any]:
    """What an array has, or the value itself; in place of one that has a key twice, the error."""
    whole = json.loads(text)
    try:
        found = parse_json(text)
        return found if isinstance(found, list) else [found]
    except DuplicateKeyError:
        text, count = (text, len(whole)) if isinstance(whole, list) else (f"[{text}]", 1)
    items: list[Any] = []
    place, plain, strict = text.index("[") + 1, json.JSONDecoder(), json.JSONDecoder(object_pairs_hook=unique_keys)
    for _ in range(count):
        place = re.compile(r"[\s,]*").match(text, place).end()  # type: ignore[union-attr]
        try:
            items.append(strict.raw_decode(text, place)[0])
        except DuplicateKeyError as error:
            items.append(error)
        place = plain.raw_decode(text, place)[1]
    return items


def _parquet(path: Path) -> list[tuple[int, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ImportError(f'{path}: parquet files need an extra: pip install "lora-rite[eval]"') from None
    try:
        return list(enumerate(parquet.read_table(path).to_pylist(), 1))
    except (OSError, ArrowException) as error:
        raise LoRARiteValueError(f"cannot read {path}: {one_line(error)}") from None


def _begins_with_a_record(text: str) -> bool:
    """Whether the first line, or the whole, is an object or an array of objects with the keys of an example."""
    for part in (text.strip().split("\n", 1)[0], text):
        with suppress(ValueError, RecursionError):
            found = json.loads(part)
            first = found[0] if isinstance(found, list) and found else found
            return isinstance(first, dict) and ("text" in first or {"prompt", "completion"} <= first.keys())
    return False


def _example(record: dict[str, Any], where: str) -> Example:
    given = {key: value for key, value in record.items() if value is not None}
    alone = "text" in given or ("text" in record and "completion" not in given)
    keys = ("text",) if alone else ("prompt", "completion")
    if alone and (others := [key for key in ("prompt", "completion", *_LISTS) if key in given]):
        raise LoRARiteValueError(f'{where}: "text" and "{others[0]}" in one record: give a text, or a prompt')
    for key in keys:
        if key not in record:
            raise LoRARiteValueError(f'{where}: expected "text", or "prompt" and "completion"; got {sorted(record)}')
        if not isinstance(record[key], str):
            raise LoRARiteValueError(f'{where}: "{key}" must be a string, got a {type(record[key]).__name__}')
        if any("\ud800" <= c <= "\udfff" for c in given[key]):
            raise LoRARiteValueError(f'{where}: "{key}" is not Unicode text: it has half of a surrogate pair')
    if not given[keys[-1]].strip():
        raise LoRARiteValueError(f'{where}: "{keys[-1]}" is empty')
    lists = {}
    for key in _LISTS:
        lists[key] = given.get(key, [])
        if not isinstance(lists[key], list) or not all(isinstance(text, str) for text in lists[key]):
            raise LoRARiteValueError(f'{where}: "{key}" must be a list of {_LISTS[key]}')
        lists[key] = tuple(lists[key])
    return Example("" if alone else given["prompt"], given[keys[-1]], **lists)


_LISTS = {"shorter": "prompts", "others": "completions"}


def split(examples: list[Example], share: float, seed: int) -> Split:
    """Holds out a share of the examples at random; of a single text, its end. Exact duplicates stay on one side."""
    if len(examples) == 1:
        text = examples[0].completion
        cut = text.rfind("\n", 0, round(len(text) * (1 - share)))
        if examples[0].prompt or cut <= 0:
            raise LoRARiteValueError("one example is too little to hold some out; give --validation a file of its own")
        return Split([Example("", text[:cut])], [Example("", text[cut:])])
    unique = sorted(set(examples), key=lambda e: (e.prompt, e.completion))
    random.Random(seed).shuffle(unique)
    held_out = set(unique[: max(1, round(len(unique) * share))])
    return Split([e for e in examples if e not in held_out], [e for e in examples if e in held_out])
