"""Training text: reads it, splits it, and makes token windows of it."""

import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LoRARiteValueError

IGNORED = -100  # the label of a token that carries no loss
RECORDS = (".jsonl", ".json", ".parquet")  # files of records


class Example(NamedTuple):
    """A text (``prompt`` empty; all of it carries loss), or a prompt and the completion that carries it.

    ``shorter`` has prompts to take instead, in this order, where the whole does not fit into a window.
    """

    prompt: str
    completion: str
    shorter: tuple[str, ...] = ()


class Split(NamedTuple):
    train: list[Example]
    held_out: list[Example]


def read_examples(path: Path) -> list[Example]:
    """Examples from the records of a ``.jsonl``, ``.json`` or ``.parquet`` file (``{"text": …}``, or
    ``{"prompt": …, "completion": …}``), or from any other text file (one example).

    Raises:
        LoRARiteValueError: no such file, not UTF-8, or a bad record, named as file:number.
    """
    if path.suffix in RECORDS:
        return [_example(record, where) for where, record in read_records(path)]
    text = read_text(path)
    if not text.strip():
        raise LoRARiteValueError(f"{path} has no text")
    return [Example("", text)]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with an error that names it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LoRARiteValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LoRARiteValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The records of a ``.jsonl`` file (an object a line), a ``.json`` file (the same, one object, or an array of
    objects) or a ``.parquet`` file, each with its place as file:number.

    Raises:
        LoRARiteValueError: no such file, not UTF-8, no records, or something else than an object, named as file:number.
    """
    values = _parquet(path) if path.suffix == ".parquet" else _json_values(read_text(path), path)
    if not values:
        raise LoRARiteValueError(f"{path} has no text")
    for n, value in values:
        if not isinstance(value, dict):
            raise LoRARiteValueError(f"{path}:{n}: expected a JSON object, got a {type(value).__name__}")
    return [(f"{path}:{n}", value) for n, value in values]


def _json_values(text: str, path: Path) -> list[tuple[int, Any]]:
    if path.suffix == ".json":
        with suppress(json.JSONDecodeError):
            whole = json.loads(text)
            return list(enumerate(whole if isinstance(whole, list) else [whole], 1))
    values = []
    for n, line in enumerate(text.split("\n"), 1):
        try:
            values += [(n, json.loads(line))] if line.strip() else []
        except json.JSONDecodeError as error:
            raise LoRARiteValueError(f"{path}:{n}: not a JSON object on one line: {error.msg}") from None
    return values


def _parquet(path: Path) -> list[tuple[int, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ImportError(f'{path}: parquet files need an extra: pip install "lora-rite[eval]"') from None
    try:
        return list(enumerate(parquet.read_table(path).to_pylist(), 1))
    except (OSError, ArrowException) as error:
        raise LoRARiteValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from None


def _example(record: dict[str, Any], where: str) -> Example:
    keys = ("text",) if "text" in record else ("prompt", "completion")
    for key in keys:
        if key not in record:
            raise LoRARiteValueError(f'{where}: expected "text", or "prompt" and "completion"; got {sorted(record)}')
        if not isinstance(record[key], str):
            raise LoRARiteValueError(f'{where}: "{key}" must be a string, got a {type(record[key]).__name__}')
    if not record[keys[-1]].strip():
        raise LoRARiteValueError(f'{where}: "{keys[-1]}" is empty')
    return Example(record.get("prompt", "") if len(keys) == 2 else "", record[keys[-1]])


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


def windows(examples: list[Example], tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    """Token windows of at most ``length`` tokens with their labels.

    Texts are put one after the other, between the tokenizer's begin and end tokens, and cut into windows. A prompt and
    its completion are a window of their own, cut at the end; the prompt's labels are ignored.
    """
    encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream: list[int] = []
    rows: list[dict[str, list[int]]] = []
    for prompt, completion, _ in examples:
        if prompt:
            question, answer = begin + encode(prompt), encode(completion) + end
            labels = [IGNORED] * len(question) + answer
            rows.append({"input_ids": (question + answer)[:length], "labels": labels[:length]})
        else:
            stream += begin + encode(completion) + end
    chunks = [stream[i : i + length] for i in range(0, len(stream), length)]
    rows += [{"input_ids": chunk, "labels": list(chunk)} for chunk in chunks]
    # the first token of a window is predicted from nothing: a window needs a label after it
    rows = [row for row in rows if any(label != IGNORED for label in row["labels"][1:])]
    if not rows:
        raise LoRARiteValueError(
            f"no token carries loss within {length} tokens: prompts are too long, see --max_length"
        )
    for row in rows:
        row["attention_mask"] = [1] * len(row["input_ids"])
    return rows
