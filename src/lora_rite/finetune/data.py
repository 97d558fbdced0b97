"""Training text: reads it, splits it, and makes token windows of it."""

import json
import random
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LoRARiteValueError

IGNORED = -100  # the label of a token that carries no loss


class Example(NamedTuple):
    """A text (``prompt`` empty; all of it carries loss), or a prompt and the completion that carries it."""

    prompt: str
    completion: str


class Split(NamedTuple):
    train: list[Example]
    held_out: list[Example]


def read_examples(path: Path, skip_bad_lines: bool = False) -> list[Example]:
    """Examples from a ``.jsonl`` file (an object a line: ``{"text": …}``, or ``{"prompt": …, "completion": …}``) or
    from any other text file (one example).

    Args:
        path: the file.
        skip_bad_lines: leave out bad lines of a ``.jsonl`` file, with one warning that counts them.

    Raises:
        LoRARiteValueError: no such file, not UTF-8, or a bad line, named as file:line.
    """
    text = read_text(path)
    if path.suffix not in (".jsonl", ".json"):
        examples = [Example("", text)] if text.strip() else []
    else:
        examples, bad = [], []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                examples += [_example(line, f"{path}:{number}")] if line.strip() else []
            except LoRARiteValueError as error:
                if not skip_bad_lines:
                    raise
                bad.append(error)
        if bad:
            warnings.warn(f"{len(bad)} lines are left out, {len(examples)} are used; the first: {bad[0]}", stacklevel=3)
    if not examples:
        raise LoRARiteValueError(f"{path} has no text")
    return examples


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


def _example(line: str, where: str) -> Example:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise LoRARiteValueError(f"{where}: not a JSON object on one line: {error.msg}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets in brackets without end
        raise LoRARiteValueError(f"{where}: not a JSON object that can be read") from None
    if not isinstance(record, dict):
        raise LoRARiteValueError(f"{where}: expected a JSON object, got a {type(record).__name__}")
    keys = ("text",) if "text" in record else ("prompt", "completion")
    for key in keys:
        if key not in record:
            raise LoRARiteValueError(f'{where}: expected "text", or "prompt" and "completion"; got {sorted(record)}')
        if not isinstance(record[key], str):
            raise LoRARiteValueError(f'{where}: "{key}" must be a string, got a {type(record[key]).__name__}')
        if any("\ud800" <= c <= "\udfff" for c in record[key]):
            raise LoRARiteValueError(f'{where}: "{key}" is not Unicode text: it has half of a surrogate pair')
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
    for prompt, completion in examples:
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
