"""The examples of a run of ``lora-rite train``, by its options."""

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from ..errors import LoRARiteValueError, warn
from .data import Chat, Sample, Split, read_data, split
from .tasks import examples, read_rows, read_task


class Examples(NamedTuple):
    """The examples to train on and those held out, where they come from, and how many of the latter are among the
    former."""

    parts: Split
    sources: dict[str, str]
    contaminated: int


def read(options: SimpleNamespace) -> Examples:
    """Reads the examples, and warns of held-out ones that are in the training data too."""
    parts, sources = _parts(options)
    parts = parts._replace(train=parts.train[: options.limit])
    if options.chat_template is not None and not any(isinstance(e, Chat) for part in parts for e in part):
        raise LoRARiteValueError("--chat_template: no example is a conversation that it could be for")
    contaminated = len(set(parts.train) & set(parts.held_out))
    if contaminated:
        warn(f"{contaminated} held-out examples are in the training data too: the held-out loss is too good")
    return Examples(parts, sources, contaminated)


def say(options: SimpleNamespace, line: str) -> None:
    """Prints a line, where progress is to be seen."""
    if options.progress:
        print(line)


def _parts(options: SimpleNamespace) -> tuple[Split, dict[str, str]]:
    data, task, data_dir, validation = options.data, options.task, options.data_dir, options.validation

    def read_file(path: Path) -> list[Sample]:
        found = read_data(path, options.skip_bad_lines)
        say(options, found.summary(str(path)))
        return found.examples

    if data is not None and task is None:
        found, source = read_file(data), str(data)
    elif task is not None and data is None:
        found, source = read_task(task, "train", data_dir, progress=options.progress)
    else:
        raise LoRARiteValueError("give either --data or --task")
    if validation is not None:
        return Split(found, read_file(validation)), {"train": source, "held_out": str(validation)}
    if task is not None and (rows := read_rows(task, "validation", data_dir)) is not None:
        return Split(found, examples(task, rows)), {"train": source, "held_out": rows.source}
    sources = {"train": source, "held_out": f"{options.holdout:g} of {source}"}
    return split(found, options.holdout, options.seed), sources
