"""The tasks by name: where their rows are, what text a model learns from a row, and how it is judged.

A row is what the task's data set on the Hugging Face hub has, also where it comes from a local file. The text of a
row is that of lm_eval without examples (0-shot), so that training and evaluation see the same prompt; Super-Natural
Instructions has the text of Tk-Instruct (definition and two positive examples).
"""

import random
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..errors import LoRARiteValueError
from ..inputs import suffix
from .data import Example
from .records import load_data_set, read_records, read_text

Row = dict[str, Any]
SplitName = Literal["train", "validation", "test"]
#: The first so many instances of a file of Super-Natural Instructions are its test instances.
TEST_INSTANCES = 100
#: Training instances that Tk-Instruct takes of each task.
TRAIN_INSTANCES = 100
INSTRUCTIONS = "natural_instructions"


class Task(NamedTuple):
    """What a name of :data:`TASKS` stands for.

    Attributes:
        example: the text that is learnt from a row; the completion alone carries loss.
        dataset: hub id of the data set and the name of its configuration; None where the hub does not have the rows.
        splits: the data set's own names of its splits; "test" is the one that lm_eval judges.
        folders: names that the task's folder in DATA_DIR may have.
        evaluation: ``choices`` (lm_eval, log-likelihood of the choices), ``generation`` (lm_eval, generated answers) or
            ``instructions`` (generated answers, ROUGE-L and exact match by category).
    """

    example: Callable[[Row], Example]
    dataset: tuple[str, str | None] | None
    splits: dict[SplitName, str]
    folders: tuple[str, ...]
    evaluation: Literal["choices", "generation", "instructions"]


class Rows(NamedTuple):
    """Rows of one split of a task, and where they come from (a file, or a hub data set)."""

    rows: list[Row]
    source: str


def find_task(name: str) -> Task:
    """The task of that name; ``natural_instructions:task1234`` is that task of Super-Natural Instructions alone.

    Raises:
        LoRARiteValueError: there is none, with the names that there are.
    """
    task = TASKS.get(name.partition(":")[0])
    if task is None or (":" in name and task.evaluation != "instructions") or name.endswith(":"):
        raise LoRARiteValueError(f"no task {name}; there are {', '.join(TASKS)} and {INSTRUCTIONS}:TASK")
    return task


def read_rows(
    name: str, split: SplitName, data_dir: Path | None = None, *, limit: int | None = None, progress: bool = False
) -> Rows | None:
    """The rows of a split of a task, or None where the task, or the folder, has no such split.

    With ``data_dir`` nothing is fetched: the rows come from ``DATA_DIR/FOLDER/SPLIT.jsonl``, ``.json`` or
    ``.parquet``, or ``…/SPLIT-*.parquet`` as the hub stores it, with the data set's own layout and name of the split.
    ARC and OpenBookQA are also read from ``DATA_DIR/commonsense/NAME.SPLIT.json``, records of LLM-Adapters.
    For Super-Natural Instructions it is a clone of github.com/allenai/natural-instructions, or the folder it is in.

    Args:
        name: as :func:`find_task` takes it.
        split: train, validation or test.
        data_dir: folder of local files; without it, the hub data set is loaded.
        limit: the first so many rows (of each task of Super-Natural Instructions) alone.
        progress: show a progress bar while the files of Super-Natural Instructions are read.

    Raises:
        LoRARiteValueError: no such task; no file or not one of its layout; the data set cannot be loaded.
        ImportError: ``datasets`` or ``pyarrow`` is needed and missing.
    """
    task = find_task(name)
    if task.evaluation == "instructions":
        return _read_instructions(name, split, data_dir, limit, progress)
    if split not in task.splits:
        return None
    if data_dir is None:
        assert task.dataset is not None
        place = (*task.dataset, task.splits[split])
        found = Rows(_load(*place), " ".join(word for word in place if word is not None))
    else:
        files = _files(task, split, data_dir)
        if not files:
            return None
        records = [record for file in files for record in read_records(file)]
        found = Rows([_row(record, where) for where, record in records], ", ".join(map(str, files)))
    return Rows(found.rows[:limit], found.source)


def require_rows(
    name: str, split: SplitName, data_dir: Path | None = None, *, limit: int | None = None, progress: bool = False
) -> Rows:
    """:func:`read_rows`, where that there is no such split is an error, which lists the files that were looked for."""
    found = read_rows(name, split, data_dir, limit=limit, progress=progress)
    if found is None:
        raise LoRARiteValueError(f"task {name} has no {split} split{_looked_for(find_task(name), split, data_dir)}")
    return found


def read_task(
    name: str, split: SplitName, data_dir: Path | None = None, *, limit: int | None = None, progress: bool = False
) -> tuple[list[Example], str]:
    """The examples of a split of a task, and where they come from. Arguments and errors as :func:`require_rows`."""
    found = require_rows(name, split, data_dir, limit=limit, progress=progress)
    return examples(name, found), found.source


def examples(name: str, found: Rows) -> list[Example]:
    """The text that is learnt from each row.

    Raises:
        LoRARiteValueError: a row has not the layout of the task's data set.
    """
    task, result = find_task(name), []
    for n, row in enumerate(found.rows, 1):
        try:
            result.append(task.example(row))
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise LoRARiteValueError(
                f"{found.source}: row {n} has not the layout of {name} ({type(error).__name__}: {error})"
            ) from None
    return result


# ---------------------------------------------------------------------------------------------- training formats


def _gsm8k(row: Row) -> Example:
    return Example(f"Question: {row['question']}\nAnswer:", f" {row['answer']}")


def _arc(row: Row) -> Example:
    return _question(f"Question: {row['question']}\nAnswer:", row)


def _openbookqa(row: Row) -> Example:
    return _question(row["question_stem"], row)


def _question(prompt: str, row: Row) -> Example:
    texts = [f" {text}" for text in row["choices"]["text"]]
    right = row["choices"]["label"].index(row["answerKey"].strip())
    return Example(prompt, texts.pop(right), others=tuple(texts))


def _hellaswag(row: Row) -> Example:
    def clean(text: str) -> str:  # of WikiHow's markup, as lm_eval does
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    prompt = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    texts = [f" {clean(text)}" for text in row["endings"]]
    return Example(prompt, texts.pop(int(row["label"])), others=tuple(texts))


def _instruction(row: Row) -> Example:
    """Definition, positive examples and the input; two examples, or as many as fit, as in Tk-Instruct."""

    def line(label: str, text: str) -> str:
        whole = f"{label}: {text.strip()}"
        return whole if whole[-1] in string.punctuation else f"{whole}."

    definition = row["Definition"] if isinstance(row["Definition"], str) else row["Definition"][0]
    starts = [f"{line('Definition', definition)}\n\n"]
    for n, shown in enumerate(row["Positive Examples"][:2], 1):
        lines = (f" Positive Example {n} -", line("Input", shown["input"]), line(" Output", shown["output"]))
        starts.append(starts[-1] + "\n".join(lines) + "\n\n")
    question = f"Now complete the following example -\n{line('Input', row['Instance']['input'])}\nOutput:"
    prompt, *shorter = [start + question for start in reversed(starts)]
    return Example(prompt, f" {row['Instance']['output'][0].strip()}", tuple(shorter))


#: The tasks. A further one: here, or without code as a .jsonl file of prompts and completions; lm_eval's other tasks
#: are evaluated by their names.
TASKS: dict[str, Task] = {
    "hellaswag": Task(
        _hellaswag,
        ("Rowan/hellaswag", None),
        {"train": "train", "test": "validation"},  # the labels of its test split are not public
        ("hellaswag",),
        "choices",
    ),
    "arc_challenge": Task(
        _arc,
        ("allenai/ai2_arc", "ARC-Challenge"),
        {"train": "train", "validation": "validation", "test": "test"},
        ("arc_challenge", "ARC-Challenge"),
        "choices",
    ),
    "arc_easy": Task(
        _arc,
        ("allenai/ai2_arc", "ARC-Easy"),
        {"train": "train", "validation": "validation", "test": "test"},
        ("arc_easy", "ARC-Easy"),
        "choices",
    ),
    "openbookqa": Task(
        _openbookqa,
        ("allenai/openbookqa", "main"),
        {"train": "train", "validation": "validation", "test": "test"},
        ("openbookqa",),
        "choices",
    ),
    "gsm8k": Task(_gsm8k, ("openai/gsm8k", "main"), {"train": "train", "test": "test"}, ("gsm8k",), "generation"),
    INSTRUCTIONS: Task(
        _instruction, None, {"train": "train", "test": "test"}, ("natural-instructions", INSTRUCTIONS), "instructions"
    ),
}

# ------------------------------------------------------------------------------------------------- where rows are


def _load(path: str, config: str | None, split: str) -> list[Row]:
    try:
        return load_data_set(path, config, split)
    except LoRARiteValueError as error:
        raise LoRARiteValueError(f"{error} (local files: --data_dir)") from None


def _files(task: Task, split: SplitName, data_dir: Path) -> list[Path]:
    """The files of the split: the first pattern that has any."""
    if not data_dir.is_dir():
        raise LoRARiteValueError(f"--data_dir {data_dir} is not a folder")
    for pattern in _patterns(task, split):
        if files := _glob(data_dir, pattern):
            return files
    return []


def _glob(folder: Path, pattern: str) -> list[Path]:
    """The files of a pattern, in which the suffix may be of either case."""
    return sorted(p for p in folder.glob(f"{pattern.rpartition('.')[0]}.*") if suffix(p) == suffix(pattern))


def _patterns(task: Task, split: SplitName) -> list[str]:
    assert task.dataset is not None
    name, config = task.splits.get(split, split), task.dataset[1] or "data"  # the hub's folder of a configuration
    ends = (f"{name}.jsonl", f"{name}.json", f"{name}.parquet", f"{name}-*.parquet", f"{config}/{name}-*.parquet")
    return [f"{folder}/{end}" for folder in task.folders for end in ends] + [
        f"commonsense/{folder}.{name}.json" for folder in task.folders
    ]


def _looked_for(task: Task, split: SplitName, data_dir: Path | None) -> str:
    if data_dir is None or task.evaluation == "instructions":
        return ""
    return f": none of {', '.join(_patterns(task, split))} in --data_dir {data_dir}"


def _row(record: Row, where: str) -> Row:
    """The record, or the hub's row for it where it is one of LLM-Adapters' multiple-choice instructions."""
    if "instruction" not in record:
        return record
    parts = re.fullmatch(
        r"Please choose the correct answer to the question: (.*)\n\nAnswer1: (.*)\n\nAnswer format: (answer1/\S+)",
        record["instruction"],
        re.DOTALL,
    )
    texts = re.split(r" ?Answer\d: ", parts[2]) if parts else []
    labels = parts[3].split("/") if parts else []
    if not parts or len(texts) != len(labels) or record.get("answer") not in labels:
        raise LoRARiteValueError(f"{where}: not a multiple-choice record of LLM-Adapters")
    letters = list(string.ascii_uppercase[: len(texts)])
    answer = letters[labels.index(record["answer"])]
    return {
        "question": parts[1],
        "question_stem": parts[1],
        "choices": {"text": texts, "label": letters},
        "answerKey": answer,
    }


def _read_instructions(
    name: str, split: SplitName, data_dir: Path | None, limit: int | None, progress: bool
) -> Rows | None:
    """Instances of the tasks of a split of Super-Natural Instructions, or of one task.

    The default (English) split: the tasks of ``splits/default/train_tasks.txt``, :data:`TRAIN_INSTANCES` of each drawn
    by the task's name, or of ``test_tasks.txt``, the first :data:`TEST_INSTANCES` of each. One task: its first
    :data:`TEST_INSTANCES` are for testing, the others for training.
    """
    if split == "validation":
        return None
    if data_dir is None:
        raise LoRARiteValueError(
            f"--task {name} needs --data_dir with a clone of https://github.com/allenai/natural-instructions"
        )
    roots = [data_dir, *(data_dir / folder for folder in TASKS[INSTRUCTIONS].folders)]
    root = next((folder for folder in roots if (folder / "tasks").is_dir()), None)
    if root is None:
        raise LoRARiteValueError(f"--data_dir {data_dir}: no clone of allenai/natural-instructions (no folder tasks/)")
    _, _, single = name.partition(":")
    if single:
        files = sorted({*_glob(root, f"tasks/{single}.json"), *_glob(root, f"tasks/{single}_*.json")})
        if len(files) != 1:
            raise LoRARiteValueError(f"{name}: {len(files) or 'no'} files {single}*.json in {root / 'tasks'}")
    else:
        listed = read_text(root / "splits" / "default" / f"{split}_tasks.txt").split()
        files = [root / "tasks" / f"{word}.json" for word in listed]
    from tqdm.auto import tqdm

    rows: list[Row] = []
    for file in tqdm(files, desc="reading tasks", disable=not progress):
        ((_, content),) = read_records(file)
        instances = content.pop("Instances", None)
        if not instances or "Definition" not in content:
            raise LoRARiteValueError(f"{file}: not a task of Super-Natural Instructions")
        content["Task"] = file.stem
        content["Outputs"] = sorted({output for instance in instances for output in instance["output"]})
        if split == "test":
            chosen = instances[:TEST_INSTANCES]
        elif single:
            chosen = instances[TEST_INSTANCES:]
        else:
            chosen = random.Random(file.stem).sample(instances, min(TRAIN_INSTANCES, len(instances)))
        rows += [{**content, "Instance": instance} for instance in chosen[:limit]]
    if not rows:
        raise LoRARiteValueError(f"{name}: {files[0]} has its {TEST_INSTANCES} test instances alone, none to train on")
    return Rows(rows, f"{root} {single or f'default/{split}'}")
