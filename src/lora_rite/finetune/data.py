"""Training text: the examples of a file or a data set, in the formats that are in use, and how they are split."""

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LoRARiteValueError, warn
from ..inputs import parse_json
from .records import KEYS, read_values, to_record
from .wording import did_you_mean

#: Names of roles elsewhere, and those of chat templates.
ROLES = {"human": "user", "observation": "tool"}
ROLES.update(dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"))
#: The prompt of Alpaca, with an input and without.
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n",
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_LISTS = {"shorter": "prompts", "others": "completions"}


class Example(NamedTuple):
    """A text (``prompt`` empty; all of it carries loss), or a prompt and the completion that carries it.

    ``shorter`` has prompts to take instead, in this order, where the whole does not fit into a window; ``others`` the
    wrong completions of a multiple-choice question.
    """

    prompt: str
    completion: str
    shorter: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


class Chat(NamedTuple):
    """A conversation, for the model's chat template: the assistant's turns carry loss.

    Attributes:
        messages: JSON of a list of messages, {"role", "content", …}.
        start: the messages before this one carry no loss (they are a prompt).
        tools: JSON of the tools that the template gets; empty for none.
        alpaca: instruction, input and output of which it is made; a model without a chat template gets Alpaca's text.
    """

    messages: str
    start: int = 0
    tools: str = ""
    alpaca: tuple[str, ...] = ()

    def plain(self) -> Example | None:
        """The example for a model without a chat template, where there is one."""
        if not self.alpaca:
            return None
        instruction, more, output = self.alpaca
        return Example(ALPACA[0].format(instruction, more) if more else ALPACA[1].format(instruction), output)


Sample = Example | Chat


class Split(NamedTuple):
    train: Sequence[Sample]
    held_out: Sequence[Sample]


class Read(NamedTuple):
    """What :func:`read_data` has found.

    Attributes:
        examples: those to use.
        kinds: how many there are of each format, by its name.
        empty: how many have nothing to learn, and are left out.
        bad: how many lines cannot be used, and are left out.
        passed_over: keys of records that are not looked at.
    """

    examples: list[Sample]
    kinds: dict[str, int]
    empty: int
    bad: int
    passed_over: list[str]

    def summary(self, source: str) -> str:
        """One line for the user."""
        if "plain text" in self.kinds:
            return f"{source}: one plain text of {len(self.examples[0].completion):,} characters"  # type: ignore[union-attr]
        kinds = ", ".join(f"{count:,} of {kind}" if len(self.kinds) > 1 else kind for kind, count in self.kinds.items())
        left_out = [f"{self.empty:,} empty"] * bool(self.empty) + [f"{self.bad:,} bad"] * bool(self.bad)
        return (
            f"{source}: {counted(len(self.examples), 'example')} ({kinds})"
            + (f"; left out: {', '.join(left_out)}" if left_out else "")
            + (f"; keys passed over: {', '.join(self.passed_over)}" if self.passed_over else "")
        )


def counted(number: int, noun: str) -> str:
    """``1 window``, ``1,200 windows``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


class _EmptyExample(Exception):
    """There is nothing to learn in a record."""


def read_examples(path: Path, skip_bad_lines: bool = False) -> list[Sample]:
    """The examples of :func:`read_data`."""
    return read_data(path, skip_bad_lines).examples


def read_data(path: Path, skip_bad_lines: bool = False) -> Read:
    """Examples from a file of records, a data set of the hub, or any other text file (one example).

    A record is a conversation (``messages`` with role and content, or ``conversations`` with from and value; ``tools``
    beside them), ``prompt`` and ``completion`` (strings or messages; beside them, ``shorter`` may list prompts for
    where it does not fit, and ``others`` wrong completions), ``instruction``, ``input`` and ``output``, or ``text``.
    The first of these that is there is taken; a prompt beside a text is an error. A key whose value is null counts as
    not given (parquet files have all columns in each record); keys of other names are passed over.

    Args:
        path: as :func:`~lora_rite.finetune.records.read_values` takes it.
        skip_bad_lines: leave out bad records, with one warning that counts them. (Empty ones always are.)

    Raises:
        LoRARiteValueError: no such file, not UTF-8, a bad record, named as file:number, or no example.
    """
    values = read_values(path)
    if isinstance(values, str):
        if not values.strip():
            raise LoRARiteValueError(f"{path} has no text")
        return Read([Example("", values)], {"plain text": 1}, 0, 0, [])
    found: list[Sample] = []
    kinds: Counter[str] = Counter()
    bad, empty, keys = [], [], set()
    for n, value in values:
        where = f"{path}:{n}"
        try:
            record = to_record(value, where)
            kind, example = _example({key: v for key, v in record.items() if v is not None}, record, where)
        except _EmptyExample:
            empty.append(where)
            continue
        except LoRARiteValueError as error:
            if not skip_bad_lines:
                raise
            bad.append(error)
            continue
        found.append(example)
        kinds[kind] += 1
        keys |= record.keys() - _TAKEN[kind]
    if bad:
        warn(f"{len(bad)} lines are left out, {len(found)} are used; the first: {bad[0]}")
    if not found:
        raise LoRARiteValueError(f"{path} has no text" + (f": {len(empty)} empty examples alone" if empty else ""))
    if empty:
        warn(f"{path}: empty examples are left out: {len(empty)}, the first: {empty[0]}")
    return Read(found, dict(kinds), len(empty), len(bad), sorted(keys))


#: The formats by their names, with the keys that are looked at.
_TAKEN = {
    "conversations": {"messages", "conversations", "tools"},
    "prompts with completions": {"prompt", "completion", "tools", *_LISTS},
    "instructions": {"instruction", "input", "output"},
    "texts": {"text"},
}


def as_record(example: Sample) -> dict[str, Any]:
    """The record that :func:`read_data` reads as the example."""
    if isinstance(example, Example):
        if not example.prompt:
            return {"text": example.completion}
        return {key: value for key, value in example._asdict().items() if value}
    if example.alpaca:
        return dict(zip(("instruction", "input", "output"), example.alpaca, strict=True))
    messages, tools = json.loads(example.messages), {"tools": json.loads(example.tools)} if example.tools else {}
    if example.start:
        return {"prompt": messages[: example.start], "completion": messages[example.start :], **tools}
    return {"messages": messages, **tools}


# ------------------------------------------------------------------------------------------------------ the formats


def _example(given: dict[str, Any], record: dict[str, Any], where: str) -> tuple[str, Sample]:
    """The format of a record, and the example: ``given`` is the record without keys of no value."""
    for key in ("messages", "conversations"):
        if key in given:
            messages = _messages(given[key], where, key)
            return "conversations", _chat(messages, 0, given.get("tools"), where)
    prompt, completion = given.get("prompt"), given.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        parts = [
            _messages([{"role": role, "content": part}] if isinstance(part, str) else part, where, key)
            for key, role, part in (("prompt", "user", prompt), ("completion", "assistant", completion))
        ]
        return "prompts with completions", _chat([*parts[0], *parts[1]], len(parts[0]), given.get("tools"), where)
    if {"instruction", "output"} <= given.keys() and not {"prompt", "completion"} & given.keys():
        return "instructions", _instruction(given, where)
    return "prompts with completions" if "completion" in given else "texts", _strings(given, record, where)


def _strings(given: dict[str, Any], record: dict[str, Any], where: str) -> Example:
    alone = "text" in given or ("text" in record and "completion" not in given)
    keys = ("text",) if alone else ("prompt", "completion")
    if alone and (others := [key for key in ("prompt", "completion", *_LISTS) if key in given]):
        raise LoRARiteValueError(f'{where}: "text" and "{others[0]}" in one record: give a text, or a prompt')
    for key in keys:
        if key not in record:
            meant = (did_you_mean(other, KEYS) for other in sorted(record) if other not in KEYS)
            raise LoRARiteValueError(
                f'{where}: expected "messages", "conversations", "prompt" and "completion", "instruction" and '
                f'"output", or "text"; got {sorted(record)}{next(filter(None, meant), "")}'
            )
        _check_text(record[key], f'{where}: "{key}"')
    if not given[keys[-1]].strip():
        raise _EmptyExample
    lists = {}
    for key in _LISTS:
        lists[key] = given.get(key, [])
        if not isinstance(lists[key], list) or not all(isinstance(text, str) for text in lists[key]):
            raise LoRARiteValueError(f'{where}: "{key}" must be a list of {_LISTS[key]}')
        lists[key] = tuple(lists[key])
    return Example("" if alone else given["prompt"], given[keys[-1]], **lists)


def _instruction(given: dict[str, Any], where: str) -> Chat:
    parts = tuple(given.get(key, "") for key in ("instruction", "input", "output"))
    for key, part in zip(("instruction", "input", "output"), parts, strict=True):
        _check_text(part, f'{where}: "{key}"')
    instruction, more, output = parts
    if not output.strip():
        raise _EmptyExample
    question = f"{instruction}\n\n{more}" if more.strip() else instruction
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return Chat(json.dumps(messages), alpaca=(instruction, more if more.strip() else "", output))


def _messages(value: Any, where: str, key: str) -> list[dict[str, Any]]:
    """Messages with role and content, from a list of them, of ShareGPT's from and value, or the JSON of either."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = parse_json(value)
    if not isinstance(value, list) or not value:
        raise LoRARiteValueError(f'{where}: "{key}" must be a list of messages')
    found = []
    for message in value:
        if not isinstance(message, dict):
            raise LoRARiteValueError(f'{where}: "{key}" must have objects with "role" and "content"')
        given = {name: v for name, v in message.items() if v is not None}
        role, content = given.pop("from", None), given.pop("value", None)
        role, content = given.pop("role", role), given.pop("content", content)
        if content is None and "tool_calls" in given:
            content = ""
        if not isinstance(role, str) or not isinstance(content, (str, list)):
            raise LoRARiteValueError(f'{where}: a message of "{key}" needs "role" and "content"; got {sorted(message)}')
        found.append({"role": ROLES.get(role, role), "content": content, **given})
    return found


def _chat(messages: list[dict[str, Any]], start: int, tools: Any, where: str) -> Chat:
    answers = [message for message in messages[start:] if message["role"] == "assistant"]
    if not answers:
        roles = ", ".join(sorted({message["role"] for message in messages[start:]}))
        raise LoRARiteValueError(f"{where}: no message of the assistant to learn from; the roles are {roles}")
    if isinstance(tools, str):
        with suppress(ValueError, RecursionError):
            tools = parse_json(tools)
    if tools is not None and not isinstance(tools, list):
        raise LoRARiteValueError(f'{where}: "tools" must be a list')
    try:
        text, tool_text = json.dumps(messages, ensure_ascii=False), json.dumps(tools, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise LoRARiteValueError(f"{where}: a message has what is no JSON ({error})") from None
    _check_text(text + tool_text, f"{where}: a message")
    if not any(_has_content(answer) for answer in answers):
        raise _EmptyExample
    return Chat(text, start, tool_text if tools else "")


def _has_content(message: dict[str, Any]) -> bool:
    content = message["content"]
    return bool(message.get("tool_calls") or (content.strip() if isinstance(content, str) else content))


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise LoRARiteValueError(f"{what} must be a string, got a {type(value).__name__}")
    if _SURROGATE.search(value):
        raise LoRARiteValueError(f"{what} is not Unicode text: it has half of a surrogate pair")


# -------------------------------------------------------------------------------------------------------- the split


def split(examples: Sequence[Sample], share: float, seed: int) -> Split:
    """Holds out a share of the examples at random; of a single text, its end. Exact duplicates stay on one side."""
    if len(examples) == 1:
        (example,) = examples
        text = "" if isinstance(example, Chat) or example.prompt else example.completion
        cut = text.rfind("\n", 0, round(len(text) * (1 - share)))
        if cut <= 0:
            raise LoRARiteValueError("one example is too little to hold some out; give --validation a file of its own")
        return Split([Example("", text[:cut])], [Example("", text[cut:])])
    unique = sorted(set(examples), key=lambda e: (e[0], e[1]) if isinstance(e, Example) else (e.messages, str(e.start)))
    random.Random(seed).shuffle(unique)
    held_out = set(unique[: max(1, round(len(unique) * share))])
    if len(held_out) == len(unique):
        raise LoRARiteValueError(
            f"--holdout {share:g} of {counted(len(unique), 'different example')} leaves none to train on; give "
            "--validation a file of its own"
        )
    return Split([e for e in examples if e not in held_out], [e for e in examples if e in held_out])
