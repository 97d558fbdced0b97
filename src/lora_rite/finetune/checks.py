"""What is wrong with a run's options, its folder or its processes, before anything is written."""

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import LoRARiteValueError
from ..inputs import blame
from ..run.files import LOCK, read_json
from ..run.settings import PLACES, RESULT, changes, read_settings, refuse_changes
from .optimizers import find_optimizer
from .records import read_text
from .schedules import check_schedule

#: Learning rates to start from where none is given, at the widths of real models (see the README).
DEFAULT_LR = {"lora-rite": 5e-4, "adamw": 2e-4}
#: Options of a run on which its outcome does not depend.
NO_SETTINGS = ("resume", "progress", "allow_changed", "preview", "push_to_hub")


def check_options(options: SimpleNamespace) -> dict[str, Any]:
    """Checks the options of ``lora-rite train``, and gives lr and alpha their values where they have none.

    Returns:
        The run's settings: the options without those that say how it is watched or gone on with.
    """
    _check_ranges(vars(options))
    if options.lr is None and options.optimizer not in DEFAULT_LR:
        raise LoRARiteValueError(f"--lr is needed for --optimizer {options.optimizer}")
    options.lr = DEFAULT_LR[options.optimizer] if options.lr is None else options.lr
    options.alpha = options.rank if options.alpha is None else options.alpha
    with blame(f"--scheduler {options.scheduler}"):
        check_schedule(options.scheduler, options.scheduler_args, options.lr, options.steps, options.warmup)
    _check_reporter(options.report_to)
    if options.chat_template is not None:  # whether it can be used is seen with the model's tokenizer
        with blame(f"--chat_template {options.chat_template}"):
            read_text(options.chat_template)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    return {key: value for key, value in settings.items() if key not in NO_SETTINGS}


def check_processes() -> None:
    """Raises LoRARiteValueError where the environment says that this process is one of several, as accelerate (so the
    Trainer) reads it, or says so by halves."""
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # torchrun, mpirun, srun
    for key in sizes:
        if (processes := os.environ.get(key, "1")) != "1":
            raise LoRARiteValueError(
                f"lora-rite train is one process, and there are {processes} ({key}, as a launcher sets it): on several "
                "GPUs use a script of the Trainer or of Accelerate (docs/scaling.md), or compare --devices, a run on "
                "each"
            )
    missing = [key for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
    if (rank := os.environ.get("LOCAL_RANK", "-1")) != "-1" and missing:
        raise LoRARiteValueError(
            f"LOCAL_RANK={rank} is set, as a launcher of several processes sets it, without {', '.join(missing)}: "
            "unset it, lora-rite train is one process"
        )


def _check_reporter(report_to: str) -> None:
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    names = {"none": [], "all": get_available_reporting_integrations()}.get(report_to, [report_to])
    with blame(f"--report_to {report_to}"):
        for callback in get_reporting_integration_callbacks(names):
            callback()  # raises where its package is missing


def _check_ranges(settings: dict[str, Any]) -> None:
    check_processes()
    least = {
        "rank": 1,
        "steps": 1,
        "batch_size": 1,
        "accumulation": 1,
        "max_length": 2,
        "log_every": 1,
        "eval_every": 0,
        "save_every": 0,
        "layers_every": 0,
        "preview": 0,
    }
    for key, value in least.items():
        if settings[key] < value:
            raise LoRARiteValueError(f"--{key} must be at least {value}, got {settings[key]}")
    if settings["lr"] is not None and not 0 <= settings["lr"] < math.inf:
        raise LoRARiteValueError(f"--lr must be a finite number ≥ 0, got {settings['lr']}")
    for key in ("warmup", "dropout"):
        if not 0 <= settings[key] <= 1:
            raise LoRARiteValueError(f"--{key} must be between 0 and 1, got {settings[key]}")
    if not 0 < settings["holdout"] < 1:
        raise LoRARiteValueError(f"--holdout must be between 0 and 1, got {settings['holdout']}")
    if not 0 <= settings["seed"] < 2**32:
        raise LoRARiteValueError(f"--seed must be from 0 to 2³² − 1, got {settings['seed']}")
    find_optimizer(settings["optimizer"])
    if "://" in settings["model"]:  # not repeated: it may hold a password
        raise LoRARiteValueError("--model must be a hub id or a local folder, not a URL")
    if "lr" in (settings["optimizer_args"] or {}):
        raise LoRARiteValueError("--optimizer_args.lr: give the learning rate by --lr")


def finished_result(
    out: Path, settings: dict[str, Any], resume: bool, allow_changed: list[str] | None
) -> dict[str, Any] | None:
    """Checks that OUT has nothing in it, or the run to resume. Returns the result where that run is finished."""
    if not resume:
        files = (p for p in out.rglob("*") if p != out / LOCK)
        if out.is_file() or any(p.is_symlink() or not p.is_dir() for p in files):
            raise LoRARiteValueError(f"{out} is not an empty folder; choose another --out, or --resume the run in it")
        return None
    if (stored := read_settings(out)) is None:
        return None
    if unknown := sorted({*(allow_changed or [])} - {*settings, *stored["inputs"], *stored["environment"]}):
        raise LoRARiteValueError(f"--allow_changed {unknown[0]}: no such setting, input or version")
    finished = out / RESULT
    same = ("out",) if finished.is_file() else PLACES  # what is there, Run.begin compares
    changed = {k: v for k, v in changes(stored["settings"], settings).items() if k not in same}
    refuse_changes(out, changed, allow_changed)
    return read_json(finished, "settings", "held_out") if finished.is_file() else None
