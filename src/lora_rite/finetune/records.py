"""Records of files, by their suffix or else their content, and of data sets of the hub."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError
from ..inputs import DuplicateKeyError, one_line, parse_json, suffix, unique_keys

#: Files of records; each may be compressed (.gz).
RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
#: Keys that a first line is known by, where the file's suffix does not say what it is.
KNOWN = (
    {"text"},
    {"messages"},
    {"conversations"},
    {"prompt", "completion"},
    {"instruction", "output"},
)
#: What the first bytes of a compressed file and of a parquet file are.
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
_DATA_SET = re.compile(r"(?P<name>[^:]+):(?:(?P<config>[\w.-]+):)?(?P<split>[^:/\\][^/\\]*)")
Numbered = tuple[int, Any]


def read_values(path: Path) -> list[Numbered] | str:
    """What a file of records or a data set holds, numbered; the whole text of any other file.

    A value is an exception where a line cannot be read. (:func:`to_record` raises it.)

    Args:
        path: a file, or ``name:split`` or ``name:configuration:split`` of a data set, by its id on the hub or a folder
            that ``datasets`` can load.

    Raises:
        LoRARiteValueError: no such file or data set, a damaged file, or not UTF-8.
        ImportError: ``datasets`` or ``pyarrow`` is needed and missing.
    """
    if is_data_set(path) and (found := _DATA_SET.fullmatch(path.as_posix())):
        return list(enumerate(load_data_set(found["name"], found["config"], found["split"], KEYS), 1))
    data, end = _read(path), suffix(path)
    if data.startswith(GZIP) or end == ".gz":
        data, end = _decompress(data, path), suffix(path.stem if end == ".gz" else path)
    if data.startswith(PARQUET) or end == ".parquet":
        return _parquet(data, path)
    text = _decode(data, path)
    if end not in RECORDS:
        end = _kind(text)
    if end in (".csv", ".tsv"):
        return list(_table(text, path, end))
    return text if end is None else _json_values(text, end)


def is_data_set(path: Path) -> bool:
    """Whether it names no file, but a data set with its split."""
    try:
        there = path.exists()
    except (ValueError, OSError):  # a null byte in the name, or one that is too long
        return False
    return not there and _DATA_SET.fullmatch(path.as_posix()) is not None


def read_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The records of a file of records, each with its place as file:number.

    Raises:
        LoRARiteValueError: as :func:`read_values`; no records, or something else than an object.
    """
    values = read_values(path)
    if not values or isinstance(values, str):
        raise LoRARiteValueError(f"{path} has no {'records' if values else 'text'}")
    return [(f"{path}:{n}", to_record(value, f"{path}:{n}")) for n, value in values]


def read_text(path: Path, limit: int | None = None) -> str:
    """The text of a UTF-8 file of at most ``limit`` bytes, its lines ended by ``\\n``.

    Raises:
        LoRARiteValueError: no such file, a folder, a pipe or a device, too large, or not UTF-8.
    """
    return _decode(_read(path, limit), path)


def to_record(value: Any, where: str) -> dict[str, Any]:
    """The value of :func:`read_values`, if it is an object.

    Raises:
        LoRARiteValueError: it is not, by ``where``.
    """
    if isinstance(value, json.JSONDecodeError):
        raise LoRARiteValueError(f"{where}: not a JSON object on one line: {value.msg}")
    if isinstance(value, (DuplicateKeyError, LoRARiteValueError)):
        raise LoRARiteValueError(f"{where}: {value}")
    if isinstance(value, Exception):  # a number of thousands of digits, brackets in brackets without end
        raise LoRARiteValueError(f"{where}: not a JSON object that can be read")
    if not isinstance(value, dict):
        raise LoRARiteValueError(f"{where}: expected a JSON object, got a {type(value).__name__}")
    return value


def load_data_set(name: str, config: str | None, split: str, keys: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Rows of a data set that ``datasets`` loads; only the columns ``keys`` of it where it has any of them.

    Raises:
        LoRARiteValueError: it cannot be loaded.
        ImportError: ``datasets`` is missing.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError('loading a hub data set needs an extra: pip install "lora-rite[finetune]"') from None
    try:
        found = datasets.load_dataset(name, config, split=split)
        columns = [column for column in found.column_names or () if column in keys]
        return (found.select_columns(columns) if columns else found).to_list()
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        where = name if Path(name).exists() else f"{name} from the hub"
        raise LoRARiteValueError(f"cannot load {where}: {one_line(error)}") from None


#: The keys of :mod:`.data`, all that is taken of a data set (others may be images).
KEYS = (
    *("messages", "conversations", "tools", "prompt", "completion", "shorter", "others"),
    *("instruction", "input", "output", "text"),
)


def _read(path: Path, limit: int | None = None) -> bytes:
    try:
        if path.is_dir():
            raise OSError(None, f"it is a folder (a data set: NAME:SPLIT, as {path}:train)")
        if path.exists() and not path.is_file():
            raise OSError(None, "it is not a file (what is resumed is read again)")
        with path.open("rb") as file:
            data = file.read(-1 if limit is None else limit + 1)
    except OSError as error:
        raise LoRARiteValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # a null byte in the name
        raise LoRARiteValueError(f"cannot read {str(path)!r}: {error}") from None
    if limit is not None and len(data) > limit:
        raise LoRARiteValueError(f"{path} has more than {limit} bytes")
    return data


def _decompress(data: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise LoRARiteValueError(f"cannot read {path}: not a whole gzip file ({one_line(error)})") from None


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise LoRARiteValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _kind(text: str) -> str | None:
    """The suffix for a text that begins with a record: of JSON, or below a heading of at least two known columns."""
    line = text.strip().split("\n", 1)[0]
    for part, kind in ((line, ".jsonl"), (text, ".json")):
        with suppress(ValueError, RecursionError):
            found = json.loads(part)
            first = found[0] if isinstance(found, list) and found else found
            known = isinstance(first, dict) and any(keys <= first.keys() for keys in KNOWN)
            return (".json" if isinstance(found, list) else kind) if known else None
    columns = {name.strip().strip('"') for name in line.split(_delimiter(line, ""))}
    return ".csv" if any(keys <= columns for keys in KNOWN if len(keys) > 1) else None


def _json_values(text: str, kind: str) -> list[Numbered]:
    if kind == ".json":
        with suppress(ValueError, RecursionError):
            return list(enumerate(_items(text), 1))
    values: list[Numbered] = []
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


def _delimiter(line: str, kind: str) -> str:
    return "\t" if kind == ".tsv" else max(",;\t", key=line.count)


def _table(text: str, path: Path, kind: str) -> Iterator[Numbered]:
    """The rows below the heading, numbered by their last lines."""
    import csv

    csv.field_size_limit(2**31 - 1)  # without it, a cell of more than 128 KiB is an error
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text.split("\n", 1)[0], kind), strict=True)
    heading: list[str] | None = None
    try:
        for cells in reader:
            if not cells:
                continue
            if heading is None:
                heading = [cell.strip() for cell in cells]
                if twice := [name for name in heading if heading.count(name) > 1]:
                    raise LoRARiteValueError(f"{path}:1: the column {twice[0]!r} is there twice")
            elif len(cells) != len(heading):
                message = f"it has {len(cells)} cells, and the heading {len(heading)}"
                yield reader.line_num, LoRARiteValueError(message)
            else:
                yield reader.line_num, dict(zip(heading, cells, strict=True))
    except csv.Error as error:
        raise LoRARiteValueError(f"{path}:{reader.line_num}: {error}") from None


def _parquet(data: bytes, path: Path) -> list[Numbered]:
    try:
        from pyarrow import ArrowException, BufferReader, parquet
    except ImportError:
        raise ImportError(f'{path}: parquet files need an extra: pip install "lora-rite[finetune]"') from None
    try:
        return list(enumerate(parquet.read_table(BufferReader(data)).to_pylist(), 1))
    except (OSError, ArrowException) as error:
        raise LoRARiteValueError(f"cannot read {path}: {one_line(error)}") from None
