"""``lora-rite compare``: optimizers × learning rates × seeds of a recipe, paired, each at its best learning rate.

A *case* is a task at a rank. In each case every optimizer first tries its grid of learning rates on the validation
split; the best ones are tried with further seeds, and where the best lies on an edge, the grid is extended. Then it is
run with the recipe's seeds and judged on the test split. All runs of a seed have the same initial adapter and the same
batches. Which runs are due follows from the results that there are (:meth:`Study.due`), so that a study goes on from
wherever it stopped.
"""

import gc
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LoRARiteError, LoRARiteValueError, NonFiniteError, warn
from ..inputs import resolve
from ..output import tolerate
from .checkpoint import (
    ALLOW_CHANGED,
    LOCK,
    RESUME,
    changes,
    environment,
    list_changes,
    read_json,
    read_settings,
    write_folder,
    write_json,
)
from .data import Example, read_examples, read_text, split
from .optimizers import check_optimizer, find_optimizer
from .schedules import check_schedule
from .tasks import examples, find_task, read_rows, read_task
from .train import check_processes, load_model, train, versions
from .untrusted import forbid_imports, read_config

#: Learning rates tried beyond the recipe's grid where the best lies on its edge.
MAX_EXTENSIONS = 4
#: So many of the best rates are tried with all of the sweep's seeds.
FINALISTS = 2
#: The name of the task whose text every installation has.
HEADERS = "torch-headers"
SPLITS = ("train", "validation", "test")
RECIPE = "recipe.json"
#: Options of a run that the study gives, and those that it decides: a task is among the data that it gives.
GIVEN = {"data", "validation", "optimizer", "optimizer_args", "lr", "rank", "seed", "out"}
DECIDED = GIVEN | {"task", "data_dir"}
_WORD = re.compile(r"[\w.+][\w.+ -]*")


@dataclass
class Data:
    """Where a task's text comes from: a task by name, or files.

    Attributes:
        task: a name as ``lora-rite train --task`` takes it, or ``torch-headers``, the C++ headers that torch installs.
        data: instead of a task, a file to train on, in the formats of ``lora-rite train --data``; like the other files,
            seen from where the command runs.
        validation: file for the choice of the learning rate; without it, a tenth of the training text.
        test: file for the result; without it, a further tenth.
        limit: largest number of examples of each split (train, validation, test); a sample where there are more.
        train: options of ``lora-rite train`` for this task, over those that all runs share.
        evaluate: tasks of ``lora-rite eval`` on which the final adapters are judged too.
    """

    task: str | None = None
    data: Path | None = None
    validation: Path | None = None
    test: Path | None = None
    limit: dict[str, int] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    evaluate: list[str] = field(default_factory=list)


@dataclass
class Contender:
    """An optimizer and the learning rates to try, in a grid; of one alone, nothing is tried.

    Attributes:
        optimizer: as ``lora-rite train --optimizer`` takes it: a name, or ``package.module:attribute``.
        lr: learning rates.
        optimizer_args: further keyword arguments of the optimizer.
    """

    optimizer: str
    lr: list[float]
    optimizer_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class Recipe:
    """A study.

    Attributes:
        title: of the report.
        tasks: by the name that the report shows.
        optimizers: by the name that the report shows; the first is the one that the others are compared with.
        train: options of ``lora-rite train`` that all runs share.
        ranks: of the adapter.
        seeds: of the runs at the best learning rate.
        sweep_seeds: of the runs that choose it: the first tries all rates, the others the best two.
        function: ``package.module:function`` that trains a run in place of ``lora-rite train``: its keywords are the
            options, those that the study decides among them, and it returns what a result.json has
            (:func:`lora_rite.finetune.choices.train_choices` is one).
        notes: what the report says at its beginning.
    """

    title: str
    tasks: dict[str, Data]
    optimizers: dict[str, Contender]
    train: dict[str, Any] = field(default_factory=dict)
    ranks: list[int] = field(default_factory=lambda: [16])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    sweep_seeds: list[int] = field(default_factory=lambda: [100, 101])
    function: str | None = None
    notes: str = ""


class Run(NamedTuple):
    """One run: trained on the task's training split, judged on ``split``."""

    task: str
    rank: int
    optimizer: str
    lr: float
    seed: int
    split: str

    @property
    def folder(self) -> str:
        return f"runs/{self.task}/r{self.rank}/{self.optimizer}/lr{self.lr:g}-seed{self.seed}-{self.split}"

    def __str__(self) -> str:
        return f"{self.task}, rank {self.rank}, {self.optimizer}, lr {self.lr:g}, seed {self.seed}"


class Line(NamedTuple):
    """One optimizer in one case."""

    task: str
    rank: int
    optimizer: str


Losses = dict[Run, float]


class Search(NamedTuple):
    """The choice of a learning rate: the rates to try, the mean validation losses that there are, the runs that are
    due, and the chosen rate once none is."""

    grid: list[float]
    scores: dict[float, float]
    due: list[Run]
    best: float | None


def load_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file, its options checked as those of ``lora-rite train`` are.

    Raises:
        LoRARiteValueError: a key or value that cannot be, by its name; more than plain YAML (see read_config).
        ImportError: a package that an optimizer needs is missing.
    """
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    config = read_config(path)  # which may come from a stranger
    forbid_imports()
    for key, kind in (("tasks", Data), ("optimizers", Contender)):
        _check_parts(config.get(key) or {}, kind, f"{path}: {key}")
    parser, options = ArgumentParser(exit_on_error=False), ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, as_group=False)
    try:
        recipe = Recipe(**vars(parser.instantiate(parser.parse_string(read_text(path)))))
        options.add_function_arguments(_function(recipe.function), as_group=False, fail_untyped=False)
        for prefix, part in (("", recipe), *((f"tasks.{name}.", task) for name, task in recipe.tasks.items())):
            if decided := DECIDED & set(part.train):
                raise LoRARiteValueError(f"{path}: {prefix}train.{min(decided)}: the study decides it")
            stand_ins = {"out": ".", "data": ".", "validation": ".", "optimizer": "adamw", "lr": 1.0}
            parsed = options.parse_object({**stand_ins, **recipe.train, **part.train})
            part.train = {key: parsed[key] for key in part.train}
            if part.train.get("trust_remote_code"):
                raise LoRARiteValueError(f"{path}: {prefix}train.trust_remote_code: not by a file, see lora-rite train")
    except ArgumentError as error:
        message = re.sub(r"Problem with given class_path '[\w.]+': ", "", " ".join(str(error).split()))
        raise LoRARiteValueError(f"{path}: {message}") from None
    for key in ("tasks", "optimizers", "ranks", "seeds", "sweep_seeds"):
        if not getattr(recipe, key):
            raise LoRARiteValueError(f"{path}: {key} is empty")
    for key in ("ranks", "seeds", "sweep_seeds"):
        if len(set(getattr(recipe, key))) < len(getattr(recipe, key)) or min(getattr(recipe, key)) < (key == "ranks"):
            raise LoRARiteValueError(f"{path}: {key}: each once, none below {int(key == 'ranks')}")
    for name in (*recipe.tasks, *recipe.optimizers):
        if not _WORD.fullmatch(name):
            raise LoRARiteValueError(f"{path}: {name!r} names a folder: letters, digits, spaces and . + - _ alone")
    for name, task in recipe.tasks.items():
        if (task.task is None) == (task.data is None):
            raise LoRARiteValueError(f"{path}: tasks.{name}: give either task or data")
        if task.task not in (None, HEADERS):
            find_task(task.task)
        for split_name, limit in task.limit.items():
            if split_name not in SPLITS:
                raise LoRARiteValueError(f"{path}: tasks.{name}.limit.{split_name}: there are {', '.join(SPLITS)}")
            if limit < 1:
                raise LoRARiteValueError(f"{path}: tasks.{name}.limit.{split_name} must be at least 1, got {limit}")
        if task.evaluate and recipe.function:
            raise LoRARiteValueError(f"{path}: tasks.{name}.evaluate: there is no adapter where a function trains")
    for name, contender in recipe.optimizers.items():
        grid = contender.lr
        if not grid or len(set(grid)) < len(grid) or not all(0 < lr < math.inf for lr in grid):
            raise LoRARiteValueError(f"{path}: optimizers.{name}.lr: at least one, each once, positive")
        find_optimizer(contender.optimizer)
    _check_schedules(path, recipe, options)
    return recipe


def _check_schedules(path: Path, recipe: Recipe, parser: Any) -> None:
    """Checks the schedule of each task's runs, at the learning rates of all optimizers; ``parser`` has the options."""
    if not {"scheduler", "scheduler_args"} <= {action.dest for action in parser._actions}:
        return  # a function with other options
    default = {key: parser.get_default(key) for key in ("scheduler", "scheduler_args", "steps", "warmup")}
    for name, task in recipe.tasks.items():
        key = "train" if "scheduler" not in task.train and "scheduler_args" not in task.train else f"tasks.{name}.train"
        given = {**default, **recipe.train, **task.train}
        for lr in {lr for contender in recipe.optimizers.values() for lr in contender.lr}:
            try:
                check_schedule(given["scheduler"], given["scheduler_args"], lr, given["steps"], given["warmup"])
            except LoRARiteValueError as error:
                words = _in_words_of_a_study(str(error))
                raise LoRARiteValueError(f"{path}: {key}.scheduler {given['scheduler']}: {words}") from error


def _check_parts(parts: Any, kind: type, where: str) -> None:
    """Checks that tasks or optimizers are mappings by name, with the keys of ``kind`` alone: errors of jsonargparse are
    about classes."""
    known = [f.name for f in fields(kind)]
    keys = ", ".join(known)
    if not isinstance(parts, dict):
        raise LoRARiteValueError(f"{where}: expected lines of “NAME: {{{keys}}}”")
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise LoRARiteValueError(f"{where}.{name}: expected a mapping, with some of {keys}; got {part!r}")
        if unknown := [key for key in part if key not in known]:
            raise LoRARiteValueError(f"{where}.{name}.{unknown[0]}: there are {keys}")


def _function(name: str | None) -> Callable[..., dict[str, Any]]:
    """What trains a run."""
    if name is None:
        return train
    function = resolve(name)
    if missing := GIVEN - set(inspect.signature(function).parameters):
        raise LoRARiteValueError(f"function {name} must take {', '.join(sorted(missing))}")
    return function


class Study:
    """The runs of a recipe: which are due, given the losses that there are."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.lines = [
            Line(task, rank, optimizer)
            for task in recipe.tasks
            for rank in recipe.ranks
            for optimizer in recipe.optimizers
        ]

    def search(self, line: Line, losses: Losses) -> Search:
        """Where the choice of a line's learning rate stands.

        The first of the sweep's seeds tries the whole grid, the others the :data:`FINALISTS` best rates; the least mean
        is chosen. Where that lies on the edge of the grid, the grid is extended and the search goes on.
        """
        grid, seeds = sorted(self.recipe.optimizers[line.optimizer].lr), self.recipe.sweep_seeds
        if len(grid) == 1:
            return Search(grid, {}, [], grid[0])
        most = len(grid) + MAX_EXTENSIONS
        while True:
            sweep = {lr: [Run(*line, lr, seed, "validation") for seed in seeds] for lr in grid}
            found = {lr: [losses[run] for run in runs if run in losses] for lr, runs in sweep.items()}
            scores = {lr: statistics.fmean(values) for lr, values in found.items() if values}
            finalists = sorted(grid, key=lambda lr: scores.get(lr, math.inf))[:FINALISTS]
            due = [runs[0] for runs in sweep.values() if runs[0] not in losses]
            due = due or [run for lr in finalists for run in sweep[lr] if run not in losses]
            if due:
                return Search(grid, scores, due, None)
            best = finalists[0]
            if len(grid) == most or grid[0] < best < grid[-1]:
                return Search(grid, scores, [], best)
            if best == grid[0]:
                grid = [_round(best * best / grid[1]), *grid]
            else:
                grid = [*grid, _round(best * best / grid[-2])]

    def runs(self, line: Line, losses: Losses) -> list[Run]:
        """All runs of a line that are known by now, those that are done first."""
        search, seeds = self.search(line, losses), self.recipe.sweep_seeds
        done = [Run(*line, lr, seed, "validation") for seed in seeds for lr in search.scores]
        finals = [Run(*line, search.best, seed, "test") for seed in self.recipe.seeds if search.best is not None]
        return [run for run in done if run in losses] + search.due + finals

    def due(self, losses: Losses) -> list[Run]:
        """The runs to do, in this order: in each case first those that choose the learning rates, then the final ones
        seed by seed, so that a study that is stopped has as many seeds of each optimizer."""
        cases, seeds = [line[:2] for line in self.lines], self.recipe.seeds
        runs = [run for line in self.lines for run in self.runs(line, losses) if run not in losses]
        return sorted(runs, key=lambda r: (cases.index(r[:2]), r.split == "test" and 1 + seeds.index(r.seed)))

    def planned(self, losses: Losses, task: str | None = None) -> int:
        """Number of runs in all, or of a task, as far as they are known: the final ones count before their lr is
        chosen."""
        finals, lines = len(self.recipe.seeds), [line for line in self.lines if task in (None, line.task)]
        return sum(len(self.runs(n, losses)) + finals * (self.search(n, losses).best is None) for n in lines)

    def train_options(self, task: str) -> dict[str, Any]:
        """The recipe's options of ``lora-rite train`` for a task: those that all runs share, and its own over them."""
        return {**self.recipe.train, **self.recipe.tasks[task].train}

    def steps(self) -> dict[str, int]:
        """The steps of a run, by task."""
        return {task: self.train_options(task).get("steps", 200) for task in self.recipe.tasks}

    def steps_text(self) -> str:
        """The steps of a run, as in "200 steps" or "210 to 2500 steps"."""
        steps = self.steps().values()
        return f"{min(steps)} steps" if len(set(steps)) == 1 else f"{min(steps)} to {max(steps)} steps"

    def options(self, run: Run, out: Path) -> dict[str, Any]:
        """The options of ``lora-rite train`` for a run."""
        contender, data = self.recipe.optimizers[run.optimizer], out / "data" / run.task
        return {
            **self.train_options(run.task),
            "data": data / "train.jsonl",
            "validation": data / f"{run.split}.jsonl",
            "optimizer": contender.optimizer,
            "optimizer_args": contender.optimizer_args or None,
            "lr": run.lr,
            "rank": run.rank,
            "seed": run.seed,
            "out": out / run.folder,
        }

    def evaluation(self, run: Run, out: Path, data_dir: Path | None) -> dict[str, Any]:
        """The options of ``lora-rite eval`` for a final run."""
        options = self.options(run, out)
        shared = ("model", "batch_size", "max_length", "bf16", "trust_remote_code")
        return {
            "tasks": self.recipe.tasks[run.task].evaluate if run.split == "test" else [],
            "adapter": out / run.folder / "adapter",
            "data_dir": data_dir,
            "out": out / run.folder / "evaluation",
            **{key: options[key] for key in shared if key in options},
        }


def compare(
    recipe: Path,
    out: Path | None = None,
    data_dir: Path | None = None,
    jobs: int = 1,
    devices: list[int] | None = None,
    dry_run: bool = False,
    check: bool = False,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Runs the study of a recipe: each optimizer at its best learning rate, paired, with a report.

    In each case (a task at a rank), every optimizer tries its learning rates on the validation split (the best two with
    all of sweep_seeds; the grid is extended where the best lies on its edge); the best is run with all seeds and judged
    on the test split. Runs of one seed share the initial adapter and the batches. A finished run is never run again, a
    stopped one goes on from its last checkpoint or starts anew: give the same command again. Where a task names
    evaluations, the final adapters are judged by ``lora-rite eval`` too. Into OUT go ``runs/…/result.json``, ``data/``,
    ``study.json``, ``report.html`` and ``report.md``.

    Args:
        recipe: YAML file with title, tasks, optimizers, train, ranks, seeds and sweep_seeds; see recipes/.
        out: folder for the study; by default runs/NAME of the recipe.
        data_dir: folder with the tasks' rows as local files; without it, they come from the hub.
        jobs: runs at the same time, each in a process.
        devices: numbers of the GPUs to use, one process on each.
        dry_run: print the plan and stop.
        check: validate optimizers, model shapes, pairs, memory and data, print what is needed and stop.
        progress: show a progress bar.

    Raises:
        LoRARiteValueError: a bad recipe, or OUT holds another study.
    """
    if jobs < 1:
        raise LoRARiteValueError(f"--jobs must be at least 1, got {jobs}")
    out = Path("runs") / recipe.stem if out is None else out
    study = Study(load_recipe(recipe))
    if check:
        from .check import check as run_check

        print(run_check(study, data_dir))
    if dry_run:
        print_plan(study, _finished(study, out, {}) if out.is_dir() else {}, out)
        for key, path in missing_files(study.recipe, out / "data"):
            print(f"missing: {key} is {path}, and there is no such file")
    if check or dry_run:
        return None

    from .report import report, require_packages

    require_packages()
    check_processes()
    _check_devices(devices or [])
    decay = max(study.train_options(task).get("weight_decay", 0.0) for task in study.recipe.tasks)
    for name, contender in study.recipe.optimizers.items():
        try:
            check_optimizer(None, contender.optimizer, min(contender.lr), decay, contender.optimizer_args)
        except LoRARiteValueError as error:
            raise LoRARiteValueError(f"{recipe}: optimizers.{name}: {_in_words_of_a_study(str(error))}") from error
    from filelock import FileLock, Timeout

    for task in study.recipe.tasks.values():
        if task.evaluate:  # what is missing for it must not be found out after hours of training
            from .evaluate import evaluate

            evaluate(task.evaluate, data_dir=data_dir, dry_run=True, progress=False)
    _check_folder(out, study.recipe)  # nothing is written into a folder that is not ours
    found = read_new_data(study.recipe, out / "data", data_dir)
    _check_models(study, found)
    try:
        with FileLock(out / LOCK, timeout=0):
            _check_folder(out, study.recipe)
            found = {name: parts for name, parts in found.items() if not (out / "data" / name).is_dir()}
            write_json(out / RECIPE, _plain(asdict(study.recipe)))  # from here on, the folder is this study's
            data = write_data(study.recipe, out / "data", found)
            result = _run_all(study, out, data, data_dir, max(jobs, len(devices or ())), devices, progress)
    except Timeout:
        raise LoRARiteValueError(f"another compare is at work in {out}") from None
    print(f"Report: {report(out)}")
    return result


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))


def _check_folder(out: Path, recipe: Recipe) -> None:
    """Checks that OUT has nothing in it, or a study that differs in what may be added alone."""
    stored, now = out / RECIPE, _plain(asdict(recipe))
    if stored.is_file():
        before = read_json(stored)
        changed = ["function"] * (before.get("function") != now["function"])
        changed += [
            f"train.{k}" for k in {*before["train"], *now["train"]} if before["train"].get(k) != now["train"].get(k)
        ]
        for group, key in (("tasks", None), ("optimizers", "lr")):
            for name in set(before[group]) & set(now[group]):
                old, new = ({k: v for k, v in r[group][name].items() if k != key} for r in (before, now))
                changed += [f"{group}.{name}"] * (old != new)
        if changed:
            raise LoRARiteValueError(
                f"{out} holds a study with another {', '.join(sorted(changed))}; choose another --out"
            )
    elif out.exists() and (not out.is_dir() or any(path.name != LOCK for path in out.iterdir())):
        raise LoRARiteValueError(f"{out} is not an empty folder or a study; choose another --out")


# ------------------------------------------------------------------------------------------------------------- data


def read_data(task: Data, data_dir: Path | None) -> dict[str, list[Example]]:
    """The examples of the three splits. What has no validation or test split gives a tenth of the training text each
    (drawn with seed 0); more than ``limit`` are sampled."""
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


def read_new_data(recipe: Recipe, folder: Path, data_dir: Path | None) -> dict[str, dict[str, list[Example]]]:
    """:func:`read_data` of each task that the study's folder of data does not have yet."""
    return {name: read_data(task, data_dir) for name, task in recipe.tasks.items() if not (folder / name).is_dir()}


def _check_models(study: Study, found: dict[str, dict[str, list[Example]]]) -> None:
    """Loads the models of new tasks, and checks them and the tasks' texts as ``lora-rite train`` does, one model at a
    time. Where a recipe's function trains, it is the one that knows what it takes."""
    from .limits import prepare_windows

    if study.recipe.function is not None:
        return
    defaults = {name: p.default for name, p in inspect.signature(train).parameters.items()}
    options = {name: {**defaults, **study.train_options(name)} for name in found}
    choices = lambda name: tuple(options[name][key] for key in ("model", "bf16", "trust_remote_code"))
    for (model, bf16, code), names in itertools.groupby(sorted(found, key=choices), choices):
        try:
            network, tokenizer = load_model(model, bf16=bf16, trust_remote_code=code)
            for name in names:
                length, packing = options[name]["max_length"], options[name]["packing"]
                parts = [found[name][part] for part in SPLITS]
                prepare_windows(parts, network, tokenizer, model, length, packing=packing)
        except LoRARiteValueError as error:
            raise LoRARiteValueError(f"train: {_in_words_of_a_study(str(error))}") from error


def missing_files(recipe: Recipe, folder: Path) -> list[tuple[str, Path]]:
    """Files of new tasks that are not there, with their keys in the recipe."""
    files = [
        (f"tasks.{name}.{key}", path)
        for name, task in recipe.tasks.items()
        if not (folder / name).is_dir()
        for key, path in (("data", task.data), ("validation", task.validation), ("test", task.test))
    ]
    return [(key, path) for key, path in files if path is not None and not path.is_file()]


def write_data(recipe: Recipe, folder: Path, found: dict[str, dict[str, list[Example]]]) -> dict[str, Any]:
    """Writes the splits of new tasks as TASK/SPLIT.jsonl, and returns number of examples and sha256 of all."""
    import hashlib

    def write(target: Path, parts: dict[str, list[Example]]) -> None:
        target.mkdir(parents=True)
        for part, content in parts.items():
            lines = [json.dumps(_record(example), ensure_ascii=False) for example in content]
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


def _record(example: Example) -> dict[str, Any]:
    if not example.prompt:
        return {"text": example.completion}
    return {k: v for k, v in example._asdict().items() if v}


# ------------------------------------------------------------------------------------------------------------- runs


def _run_all(
    study: Study,
    out: Path,
    data: dict[str, Any],
    data_dir: Path | None,
    jobs: int,
    devices: list[int] | None,
    progress: bool,
) -> dict[str, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    losses = _finished(study, out, {})
    _warn_of_other_versions(study, out, losses)
    seconds: list[float] = []
    working: dict[Future, Run] = {}
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with _executor(jobs, devices) as executor, Progress(*columns, disable=not progress) as bar:
        shown = bar.add_task("", total=study.planned(losses), completed=len(losses))
        while due := study.due(losses):
            for run in [run for run in due if run not in working.values()][: jobs - len(working)]:
                print(f"[{len(losses) + len(working) + 1}] {run}: begins", flush=True)
                work = study.options(run, out), study.evaluation(run, out, data_dir)
                working[executor.submit(_run, study.recipe.function, *work)] = run
            done, _ = wait(working, return_when=FIRST_COMPLETED)
            for future in done:
                run = working.pop(future)
                losses[run], took = future.result()
                seconds.append(took)
                planned = study.planned(losses)
                left = statistics.fmean(seconds) * (planned - len(losses)) / jobs
                bar.update(shown, total=planned, completed=len(losses), description=f"about {_duration(left)} left")
                print(
                    f"[{len(losses)}/{planned}] {run}: {run.split} loss {losses[run]:.4f} "
                    f"({took:.0f} s; about {_duration(left)} left)",
                    flush=True,
                )
                _write_study(study, out, data, losses)
            losses = _finished(study, out, losses)
    return _write_study(study, out, data, losses)


def _run(function: str | None, options: dict[str, Any], evaluation: dict[str, Any]) -> tuple[float, float]:
    """Trains one run, or goes on with it, and evaluates its adapter. Returns its held-out loss (infinite where it
    diverged) and the seconds."""
    gc.collect()  # the model of the run before: Trainers are in cycles
    begin = time.perf_counter()
    loss = _train(options, evaluation) if function is None else _call(_function(function), options)
    return loss, time.perf_counter() - begin


def _call(function: Callable[..., dict[str, Any]], options: dict[str, Any]) -> float:
    """Has a recipe's function train a run, from its beginning, and writes its result.json."""
    out = options["out"]
    if out.is_dir():
        shutil.rmtree(out)  # of a run that was stopped
    out.mkdir(parents=True)
    bound = inspect.signature(function).bind(**options)
    bound.apply_defaults()
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in bound.arguments.items()}
    try:
        result = function(**options)
    except LoRARiteValueError as error:
        raise LoRARiteValueError(f"{out}: {error}") from error
    except NonFiniteError as error:
        result = {"held_out": {"after": math.inf}, "diverged": str(error)}
    if not math.isfinite(loss := result["held_out"]["after"]):
        result.setdefault("diverged", f"the held-out loss is {loss} after training")
        result["held_out"]["after"] = loss = math.inf  # NaN compares with nothing
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    write_json(out / "result.json", {"settings": settings, **result, "versions": versions()})
    return loss


def _train(options: dict[str, Any], evaluation: dict[str, Any]) -> float:
    out = options["out"]
    try:
        if (out / "result.json").is_file():  # its evaluation is missing
            loss = read_json(out / "result.json")["held_out"]["after"]
        else:
            resume = _can_resume(out)
            if out.is_dir() and not resume:
                shutil.rmtree(out)
            loss = train(**options, resume=resume, progress=False)["held_out"]["after"]
        if evaluation["tasks"]:
            from .evaluate import evaluate

            evaluate(**evaluation, progress=False)
    except NonFiniteError as error:
        loss = math.inf
        settings = read_json(out / "settings.json")["settings"]
        result = {"settings": settings, "held_out": {"after": loss}, "diverged": str(error), "versions": versions()}
        write_json(out / "result.json", result)
    except LoRARiteError as error:
        raise type(error)(f"{out}: {_in_words_of_a_study(str(error))}", *error.args[1:]) from error
    for folder in (out / "checkpoints").glob("checkpoint-*"):
        shutil.rmtree(folder)
    return loss


def _in_words_of_a_study(message: str) -> str:
    """A message of ``lora-rite train``, whose options are keys of a recipe."""
    message = message.replace(RESUME, "the same command goes on").replace(ALLOW_CHANGED, "choose another --out")
    return re.sub(r"(?<!\S)--(?!out\b|data_dir\b)(?=\w)", "", message)


def _can_resume(out: Path) -> bool:
    """Whether a run that was stopped has saved a checkpoint, here and now to be gone on from bitwise."""
    if not any((out / "checkpoints").glob("checkpoint-*")):
        return False
    stored = read_settings(out)
    changed = changes(stored["environment"], environment(versions())) if stored else {}
    if changed:
        print(f"{out} starts from the beginning, since it cannot go on bitwise ({list_changes(changed)})", flush=True)
    return not changed


def _finished(study: Study, out: Path, losses: Losses) -> Losses:
    """The losses, and those of further runs that are due and are finished in the folder already."""
    losses, unfinished = dict(losses), set()
    while True:
        found = {run: out / run.folder / "result.json" for run in study.due(losses) if run not in unfinished}
        found = {run: path for run, path in found.items() if path.is_file()}
        if not found:
            return losses
        for run, path in found.items():
            result = read_json(path)
            expected = _plain(study.options(run, out))
            for key in set(expected) - {"out", "data", "validation"}:
                if result["settings"].get(key) != expected[key]:
                    raise LoRARiteValueError(
                        f"{path} is of a run with {key} {result['settings'].get(key)!r}, the recipe says "
                        f"{expected[key]!r}; choose another --out"
                    )
            wanted = len(study.evaluation(run, out, None)["tasks"])
            if "diverged" in result or len(list(path.parent.glob("evaluation/*.json"))) >= wanted:
                losses[run] = result["held_out"]["after"]
            else:
                unfinished.add(run)


def _warn_of_other_versions(study: Study, out: Path, losses: Losses) -> None:
    """Warns where the finished runs, and those to come, are not all of the same versions."""
    found = [read_json(out / run.folder / "result.json") for run in losses]
    known = [result.get("versions", {}) for result in found] + [versions()] * bool(study.due(losses))
    keys = set().union(*known) - {"date", "machine", "device", "threads"}
    if mixed := sorted(key for key in keys if len({str(part[key]) for part in known if key in part}) > 1):
        warn(f"runs of {out} are of different {', '.join(mixed)}, which may be what they differ by; the report has all")


def _write_study(study: Study, out: Path, data: dict[str, Any], losses: Losses) -> dict[str, Any]:
    """study.json: the recipe, the data, every run with its loss, and what each sweep chose."""
    result = {
        "recipe": _plain(asdict(study.recipe)),
        "data": data,
        "runs": [{**run._asdict(), "loss": loss, "path": f"{run.folder}/result.json"} for run, loss in losses.items()],
        "sweeps": [
            {
                **line._asdict(),
                "grid": search.grid,
                "best": search.best,
                "validation_loss": list(search.scores.items()),
            }
            for line in study.lines
            for search in [study.search(line, losses)]
        ],
        "complete": not study.due(losses),
        "versions": versions(),
    }
    write_json(out / "study.json", result)
    return result


class _Here(Executor):
    """Runs a call in this process, at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextmanager
def _executor(jobs: int, devices: list[int] | None) -> Iterator[Executor]:
    """This process for one job; else so many processes, each with its GPU or its share of the cores."""
    if jobs == 1 and not devices:
        yield _Here()
        return
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for device in itertools.islice(itertools.cycle(devices or [None]), jobs):
        queue.put(device)
    pool = ProcessPoolExecutor(jobs, context, _start_worker, (queue, max(1, (os.cpu_count() or 1) // jobs)))
    terminate = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield pool
    except BrokenProcessPool:
        raise LoRARiteError("a process died (out of memory?); the same command goes on") from None
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        signal.signal(signal.SIGTERM, terminate)
        pool.shutdown(cancel_futures=True)


def _check_devices(devices: list[int]) -> None:
    """Refuses GPUs that are not there: a process whose GPU is hidden trains on the CPU."""
    import torch

    count = torch.cuda.device_count()
    hidden = "CUDA_VISIBLE_DEVICES" in os.environ  # torch counts without these, and numbers are among all
    if missing := [device for device in devices if count == 0 or not (hidden or 0 <= device < count)]:
        raise LoRARiteValueError(f"--devices: no GPU {missing[0]}, torch sees {count} CUDA devices")


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _start_worker(queue: Any, threads: int) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C reaches the whole group: go without a traceback
    for stream in (sys.stdout, sys.stderr):
        tolerate(stream)
    device = queue.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", threads)))


# ------------------------------------------------------------------------------------------------------------- plan


def print_plan(study: Study, losses: Losses, out: Path) -> None:
    """The study's lines with the learning rates to try and the runs done and to do."""
    from rich.console import Console
    from rich.table import Table

    seeds = study.recipe.seeds
    table = Table(title=f"{study.recipe.title}: {study.steps_text()} a run", title_justify="left")
    for heading in ("task", "rank", "optimizer", "lr to try", "best lr", "done", "to do"):
        table.add_column(heading, justify="right" if heading in ("rank", "best lr", "done", "to do") else "left")
    for line in study.lines:
        runs, search = study.runs(line, losses), study.search(line, losses)
        best = search.best
        done = sum(run in losses for run in runs)
        known = len(runs) + len(seeds) * (best is None)
        grid = ", ".join(f"{lr:g}" for lr in search.grid)
        cells = (line.task, line.rank, line.optimizer, grid, "" if best is None else f"{best:g}", done, known - done)
        table.add_row(*map(str, cells))
    console = Console()
    console.print(table)
    console.print(
        f"{study.planned(losses)} runs, {len(losses)} of them finished in {out}; and in each line the best {FINALISTS} "
        f"rates with {len(study.recipe.sweep_seeds) - 1} more seeds, and up to {MAX_EXTENSIONS} more rates where the "
        "best lies on the edge of the grid",
        highlight=False,
        soft_wrap=True,
    )


def _round(lr: float) -> float:
    return float(f"{lr:.3g}")


def _duration(seconds: float) -> str:
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
