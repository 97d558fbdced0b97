"""One run of a study: trained, or gone on with, and evaluated."""

import gc
import inspect
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import LoRARiteError, LoRARiteValueError, NonFiniteError
from ..finetune.train import train
from ..run.files import read_json, write_json
from ..run.settings import changes, list_changes, read_settings
from ..run.versions import environment, versions
from .recipe import in_words_of_a_study, run_function


def run_one(function: str | None, options: dict[str, Any], evaluation: dict[str, Any]) -> tuple[float, float]:
    """Trains one run, or goes on with it, and evaluates its adapter. Returns its held-out loss (infinite where it
    diverged) and the seconds."""
    gc.collect()  # the model of the run before: Trainers are in cycles
    begin = time.perf_counter()
    loss = _train(options, evaluation) if function is None else _call(run_function(function), options)
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
            whole = {"eval_limit": 0, **options}  # a study's figures are those of all held-out rows
            loss = train(**whole, resume=resume, progress=False)["held_out"]["after"]
        if evaluation["tasks"]:
            from ..finetune.evaluate import evaluate

            evaluate(**evaluation, progress=False)
    except NonFiniteError as error:
        loss = math.inf
        settings = read_json(out / "settings.json")["settings"]
        result = {"settings": settings, "held_out": {"after": loss}, "diverged": str(error), "versions": versions()}
        write_json(out / "result.json", result)
    except LoRARiteError as error:
        raise type(error)(f"{out}: {in_words_of_a_study(str(error))}", *error.args[1:]) from error
    for folder in (out / "checkpoints").glob("checkpoint-*"):
        shutil.rmtree(folder)
    return loss


def _can_resume(out: Path) -> bool:
    """Whether a run that was stopped has saved a checkpoint, here and now to be gone on from bitwise."""
    if not any((out / "checkpoints").glob("checkpoint-*")):
        return False
    stored = read_settings(out)
    changed = changes(stored["environment"], environment(versions())) if stored else {}
    if changed:
        print(f"{out} starts from the beginning, since it cannot go on bitwise ({list_changes(changed)})", flush=True)
    return not changed
