"""``lora-rite compare``: optimizers × learning rates × seeds of a recipe, paired, each at its best learning rate.

A *case* is a task at a rank. In each case every optimizer first tries its grid of learning rates on the validation
split; the best ones are tried with further seeds, and where the best lies on an edge, the grid is extended. Then it is
run with the recipe's seeds and judged on the test split. All runs of a seed have the same initial adapter and the same
batches. Which runs are due follows from the results that there are (:meth:`Study.due`), so that a study goes on from
wherever it stopped.
"""

import inspect
import itertools
import statistics
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError
from ..finetune.chats import set_chat_template
from ..finetune.checks import weights_of
from ..finetune.data import Sample
from ..finetune.load import load_model
from ..finetune.optimizers import check_optimizer
from ..finetune.train import train
from ..finetune.windows import Windows, make_windows
from ..run.console import shows_bars
from ..run.files import LOCK, read_json, write_json
from ..run.processes import check_one
from .data import missing_files, read_new_data, write_data
from .plan import duration, print_plan
from .recipe import SPLITS, Recipe, in_words_of_a_study, load_recipe
from .report import report, require_packages
from .results import finished, plain, warn_of_other_versions, write_study
from .runner import run_one
from .search import Study, Trial
from .workers import check_devices, executor

RECIPE = "recipe.json"


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
        print_plan(study, finished(study, out, {}) if out.is_dir() else {}, out)
        for key, path in missing_files(study.recipe, out / "data"):
            print(f"missing: {key} is {path}, and there is no such file")
    if check or dry_run:
        return None
    _check_before(study, recipe, data_dir, devices)
    _check_folder(out, study.recipe)  # nothing is written into a folder that is not ours
    found = read_new_data(study.recipe, out / "data", data_dir)
    _check_models(study, found)
    from filelock import FileLock, Timeout

    try:
        with FileLock(out / LOCK, timeout=0):
            _check_folder(out, study.recipe)
            found = {name: parts for name, parts in found.items() if not (out / "data" / name).is_dir()}
            write_json(out / RECIPE, plain(asdict(study.recipe)))  # from here on, the folder is this study's
            data = write_data(study.recipe, out / "data", found)
            result = _run_all(study, out, data, data_dir, max(jobs, len(devices or ())), devices, progress)
    except Timeout:
        raise LoRARiteValueError(f"another compare is at work in {out}") from None
    print(f"Report: {report(out)}")
    return result


def _check_before(study: Study, recipe: Path, data_dir: Path | None, devices: list[int] | None) -> None:
    """Checks packages, devices, optimizers and evaluations: what is missing must not be found out after hours."""
    require_packages()
    check_one("lora-rite compare")
    check_devices(devices or [])
    decay = max(study.train_options(task).get("weight_decay", 0.0) for task in study.recipe.tasks)
    for name, contender in study.recipe.optimizers.items():
        try:
            check_optimizer(None, contender.optimizer, min(contender.lr), decay, contender.optimizer_args)
        except LoRARiteValueError as error:
            raise LoRARiteValueError(f"{recipe}: optimizers.{name}: {in_words_of_a_study(str(error))}") from error
    for task in study.recipe.tasks.values():
        if task.evaluate:
            from ..finetune.evaluate import evaluate

            evaluate(task.evaluate, data_dir=data_dir, dry_run=True, progress=False)


def _check_folder(out: Path, recipe: Recipe) -> None:
    """Checks that OUT has nothing in it, or a study that differs in what may be added alone."""
    stored, now = out / RECIPE, plain(asdict(recipe))
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


def _check_models(study: Study, found: dict[str, dict[str, Sequence[Sample]]]) -> None:
    """Loads the models of new tasks, and checks them and the tasks' texts as ``lora-rite train`` does, one model at a
    time. Where a recipe's function trains, it is the one that knows what it takes."""
    if study.recipe.function is not None:
        return
    defaults = {name: p.default for name, p in inspect.signature(train).parameters.items()}
    options = {name: {**defaults, **study.train_options(name)} for name in found}
    choices = lambda name: (options[name]["model"], weights_of(options[name]), options[name]["trust_remote_code"])
    for (model, weights, code), names in itertools.groupby(sorted(found, key=lambda n: str(choices(n))), choices):
        tasks = [([found[name][part] for part in SPLITS], options[name]) for name in names]
        try:
            _check_model(model, weights, code, tasks)
        except LoRARiteValueError as error:
            raise LoRARiteValueError(f"train: {in_words_of_a_study(str(error))}") from error


def _check_model(
    model: str,
    weights: tuple[str, int | None],
    trusted: bool,
    tasks: list[tuple[list[Sequence[Sample]], dict[str, Any]]],
) -> None:
    """Checks a model and the texts of the tasks that train it, which are made tokens before the weights are loaded."""
    from ..finetune.limits import check_windows

    made: list[list[Windows]] = []

    def check(tokenizer: Any, config: Any) -> None:
        own = getattr(tokenizer, "chat_template", None)
        for parts, options in tasks:
            tokenizer.chat_template = own
            if options["chat_template"] is not None:
                set_chat_template(tokenizer, options["chat_template"])
            how = {"encoder_decoder": config.is_encoder_decoder, "packing": options["packing"]}
            made.append(make_windows(parts, tokenizer, model, options["max_length"], **how))

    dtype, bits = weights
    network, tokenizer = load_model(model, dtype=dtype, bits=bits, trust_remote_code=trusted, check=check)
    for found, (_, options) in zip(made, tasks, strict=True):
        check_windows(found, network, tokenizer, model, packing=options["packing"])


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

    losses = finished(study, out, {})
    warn_of_other_versions(study, out, losses)
    seconds: list[float] = []
    working: dict[Future, Trial] = {}
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with executor(jobs, devices) as pool, Progress(*columns, disable=not shows_bars(progress, on_stdout=True)) as bar:
        shown = bar.add_task("", total=study.planned(losses), completed=len(losses))
        while due := study.due(losses):
            for run in [run for run in due if run not in working.values()][: jobs - len(working)]:
                print(f"[{len(losses) + len(working) + 1}] {run}: begins", flush=True)
                work = study.options(run, out), study.evaluation(run, out, data_dir)
                working[pool.submit(run_one, study.recipe.function, *work)] = run
            done, _ = wait(working, return_when=FIRST_COMPLETED)
            for future in done:
                run = working.pop(future)
                losses[run], took = future.result()
                seconds.append(took)
                planned = study.planned(losses)
                left = statistics.fmean(seconds) * (planned - len(losses)) / jobs
                bar.update(shown, total=planned, completed=len(losses), description=f"about {duration(left)} left")
                print(
                    f"[{len(losses)}/{planned}] {run}: {run.split} loss {losses[run]:.4f} "
                    f"({took:.0f} s; about {duration(left)} left)",
                    flush=True,
                )
                write_study(study, out, data, losses)
            losses = finished(study, out, losses)
    return write_study(study, out, data, losses)
