"""The text of a study's tasks: read, split, and kept in the study's folder."""

import hashlib
import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..finetune.data import Sample, as_record, read_examples, split
from ..finetune.records import is_data_set
from ..finetune.tasks import examples, read_rows, read_task
from ..run.files import write_folder
from .recipe import HEADERS, SPLITS, Data, Recipe


def read_data(task: Data, data_dir: Path | None) -> dict[str, Sequence[Sample]]:
    """The examples of the three splits. What has no validation or test split gives a tenth of the training text each
    (drawn with seed 0); more than ``limit`` are sampled."""
    found: dict[str, Sequence[Sample]]
    if task.task == HEADERS:
        from .demo import read_headers

        found = dict(read_headers())
    elif task.task is not None:
        found = {"train": read_task(task.task, "train", data_dir)[0]}
        for name in SPLITS[1:]:
            if (rows := read_rows(task.task, name, data_dir)) is not None:  # type: ignore[arg-type]
                found[name] = examples(task.task, rows)
    else:
        found = {n: read_examples(p) for n, p in zip(SPLITS, (task.data, task.validation, task.test), strict=True) if p}
    for name in ("test", "validation"):
        if name not in found:
            found["train"], found[name] = split(found["train"], 0.1, seed=0)
    for name, limit in task.limit.items():
        if len(found[name]) > limit:
            found[name] = random.Random(0).sample(found[name], limit)
    return found


def read_new_data(recipe: Recipe, folder: Path, data_dir: Path | None) -> dict[str, dict[str, Sequence[Sample]]]:
    """:func:`read_data` of each task that the study's folder of data does not have yet."""
    return {name: read_data(task, data_dir) for name, task in recipe.tasks.items() if not (folder / name).is_dir()}


def missing_files(recipe: Recipe, folder: Path) -> list[tuple[str, Path]]:
    """Files of new tasks that are not there, with their keys in the recipe."""
    files = [
        (f"tasks.{name}.{key}", path)
        for name, task in recipe.tasks.items()
        if not (folder / name).is_dir()
        for key, path in (("data", task.data), ("validation", task.validation), ("test", task.test))
    ]
    return [(key, path) for key, path in files if path is not None and not path.is_file() and not is_data_set(path)]


def write_data(recipe: Recipe, folder: Path, found: dict[str, dict[str, Sequence[Sample]]]) -> dict[str, Any]:
    """Writes the splits of new tasks as TASK/SPLIT.jsonl, and returns number of examples and sha256 of all."""

    def write(target: Path, parts: dict[str, Sequence[Sample]]) -> None:
        target.mkdir(parents=True)
        for part, content in parts.items():
            lines = [json.dumps(as_record(example), ensure_ascii=False) for example in content]
            (target / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    for name, parts in found.items():
        write_folder(folder / name, partial(write, parts=parts))
    files = {name: {part: (folder / name / f"{part}.jsonl").read_bytes() for part in SPLITS} for name in recipe.tasks}
    return {
        name: {
            part: {"examples": content.count(b"\n"), "sha256": hashlib.sha256(content).hexdigest()}
            for part, content in parts.items()
        }
        for name, parts in files.items()
    }
