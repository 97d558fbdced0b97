"""A study as a YAML file says it: its tasks, its optimizers, and what all runs share."""

import inspect
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError
from ..finetune.checks import DEFAULT_STEPS
from ..finetune.optimizers import check_arguments
from ..finetune.records import read_text
from ..finetune.schedules import check_schedule
from ..finetune.tasks import find_task
from ..finetune.train import train
from ..finetune.untrusted import forbid_imports, read_config
from ..finetune.wording import did_you_mean, in_words
from ..inputs import resolve
from ..run.settings import ALLOW_CHANGED, RESUME

#: The name of the task whose text every installation has.
HEADERS = "torch-headers"
SPLITS = ("train", "validation", "test")
#: Options of a run that the study gives, and those that it decides: a task is among the data that it gives.
GIVEN = {"data", "validation", "optimizer", "optimizer_args", "lr", "rank", "seed", "out"}
#: And what would make its runs different ones: a choice by the split that judges them, other data, other steps.
DECIDED = GIVEN | {
    "task", "data_dir", "adapter", "epochs", "limit", "early_stopping", "keep_best", "preview", "push_to_hub",
}  # fmt: skip
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
        budgets: numbers of steps; with each of them, every optimizer is run again, at its best learning rate, with all
            seeds and a schedule of that length, to find the shortest run that reaches AdamW's loss.
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
    budgets: list[int] = field(default_factory=list)
    function: str | None = None
    notes: str = ""


def load_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file, its options checked as those of ``lora-rite train`` are.

    Raises:
        LoRARiteValueError: a key or value that cannot be, by its name; more than plain YAML (see read_config).
        ImportError: a package that an optimizer needs is missing.
    """
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    config = read_config(path)  # which may come from a stranger
    forbid_imports(Data, Contender)
    known = [f.name for f in fields(Recipe)]
    if unknown := [key for key in config if key not in known]:
        raise LoRARiteValueError(f"{path}: no key {unknown[0]}{did_you_mean(unknown[0], known)}")
    for key, kind in (("tasks", Data), ("optimizers", Contender)):
        _check_parts(config.get(key) or {}, kind, f"{path}: {key}")
    parser, options = ArgumentParser(exit_on_error=False), ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, as_group=False)
    try:
        recipe = Recipe(**vars(parser.instantiate(parser.parse_string(read_text(path)))))
    except ArgumentError as error:
        raise LoRARiteValueError(f"{path}: {in_words(str(error))}") from None
    options.add_function_arguments(run_function(recipe.function), as_group=False, fail_untyped=False)
    for prefix, part in (("", recipe), *((f"tasks.{name}.", task) for name, task in recipe.tasks.items())):
        _read_options(part, recipe, options, f"{path}: {prefix}train")
    _check_values(path, recipe)
    if recipe.budgets and "steps" not in _names(options):
        raise LoRARiteValueError(f"{path}: budgets: function {recipe.function} takes no steps")
    _check_schedules(path, recipe, options)
    return recipe


def _names(parser: Any) -> list[str]:
    return [action.dest for action in parser._actions]


def _read_options(part: Recipe | Data, recipe: Recipe, parser: Any, where: str) -> None:
    """Reads and checks the options of ``lora-rite train`` of a task, or those that all share; ``parser`` has them."""
    from argparse import ArgumentError

    if decided := DECIDED & set(part.train):
        raise LoRARiteValueError(f"{where}.{min(decided)}: the study decides it")
    if unknown := [key for key in part.train if key not in _names(parser)]:
        trainer = recipe.function or "lora-rite train"
        raise LoRARiteValueError(
            f"{where}.{unknown[0]}: {trainer} has no such option{did_you_mean(unknown[0], _names(parser))}"
        )
    stand_ins = {"out": ".", "data": ".", "validation": ".", "optimizer": "adamw", "lr": 1.0}
    try:
        parsed = parser.parse_object({**stand_ins, **recipe.train, **part.train})
    except ArgumentError as error:
        raise LoRARiteValueError(in_words(str(error), lambda key: f"{where}.{key}")) from None
    part.train = {key: parsed[key] for key in part.train}
    if part.train.get("trust_remote_code"):
        raise LoRARiteValueError(f"{where}.trust_remote_code: not by a file, see lora-rite train")


def _check_values(path: Path, recipe: Recipe) -> None:
    """Checks what the types of a recipe's fields do not say."""
    for key in ("tasks", "optimizers", "ranks", "seeds", "sweep_seeds"):
        if not getattr(recipe, key):
            raise LoRARiteValueError(f"{path}: {key} is empty")
    for key, least in (("ranks", 1), ("seeds", 0), ("sweep_seeds", 0), ("budgets", 1)):
        values = getattr(recipe, key)
        if len(set(values)) < len(values) or min(values, default=least) < least:
            raise LoRARiteValueError(f"{path}: {key}: each once, none below {least}")
    if recipe.budgets and tuned_adamw({name: c.optimizer for name, c in recipe.optimizers.items()}) is None:
        raise LoRARiteValueError(f"{path}: budgets: no optimizer is adamw, whose loss they are to reach")
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
        try:
            check_arguments(contender.optimizer, contender.optimizer_args)
        except LoRARiteValueError as error:
            words = re.sub("^optimizer_args", f"optimizers.{name}.optimizer_args", in_words_of_a_study(str(error)))
            raise LoRARiteValueError(f"{path}: {words}") from error


def tuned_adamw(optimizers: Mapping[str, str]) -> str | None:
    """The name of the contender whose loss the others are to reach: the first whose optimizer is ``adamw``."""
    return next((name for name, optimizer in optimizers.items() if optimizer == "adamw"), None)


def _check_schedules(path: Path, recipe: Recipe, parser: Any) -> None:
    """Checks the schedule of each task's runs, at the learning rates of all optimizers; ``parser`` has the options."""
    if not {"scheduler", "scheduler_args"} <= set(_names(parser)):
        return  # a function with other options
    default = {key: parser.get_default(key) for key in ("scheduler", "scheduler_args", "steps", "warmup")}
    for name, task in recipe.tasks.items():
        key = "train" if "scheduler" not in task.train and "scheduler_args" not in task.train else f"tasks.{name}.train"
        given = {**default, **recipe.train, **task.train}
        rates = {lr for contender in recipe.optimizers.values() for lr in contender.lr}
        for lr, steps in itertools.product(rates, (given["steps"], *recipe.budgets)):
            try:
                check_schedule(given["scheduler"], given["scheduler_args"], lr, steps or DEFAULT_STEPS, given["warmup"])
            except LoRARiteValueError as error:
                words = in_words_of_a_study(str(error))
                raise LoRARiteValueError(f"{path}: {key}.scheduler {given['scheduler']}: {words}") from error


def _check_parts(parts: Any, kind: type, where: str) -> None:
    """Checks that tasks or optimizers are mappings by name, with the keys of ``kind`` alone and values of their types:
    errors of jsonargparse about the recipe as a whole do not say of which."""
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, as_group=False)
    known = [f.name for f in fields(kind)]
    keys = ", ".join(known)
    if not isinstance(parts, dict):
        raise LoRARiteValueError(f"{where}: expected lines of “NAME: {{{keys}}}”")
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise LoRARiteValueError(f"{where}.{name}: expected a mapping, with some of {keys}; got {part!r}")
        if unknown := [key for key in part if key not in known]:
            raise LoRARiteValueError(f"{where}.{name}.{unknown[0]}: there are {keys}")
        try:
            parser.parse_object(part)
        except ArgumentError as error:
            raise LoRARiteValueError(in_words(str(error), lambda key, name=name: f"{where}.{name}.{key}")) from None


def run_function(name: str | None) -> Callable[..., dict[str, Any]]:
    """What trains a run."""
    if name is None:
        return train
    function = resolve(name)
    if missing := GIVEN - set(inspect.signature(function).parameters):
        raise LoRARiteValueError(f"function {name} must take {', '.join(sorted(missing))}")
    return function


def in_words_of_a_study(message: str) -> str:
    """A message of ``lora-rite train``, whose options are keys of a recipe."""
    message = message.replace(RESUME, "the same command goes on").replace(ALLOW_CHANGED, "choose another --out")
    return re.sub(r"(?<!\S)--(?!out\b|data_dir\b)(?=\w)", "", message)
