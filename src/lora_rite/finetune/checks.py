"""What is wrong with a run's options or its folder, before anything is written."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import LoRARiteValueError, warn
from ..inputs import blame, suffix
from ..options import LR
from ..run.checkpoints import checkpoints
from ..run.files import LOCK, read_json
from ..run.processes import sharded, uses_cpu
from ..run.settings import PLACES, RESULT, changes, read_settings, refuse_changes
from .load import find_device, module_names
from .optimizers import check_arguments, check_optimizer
from .records import read_text
from .schedules import check_schedule
from .untrusted import find_adapter

#: Learning rates to start from where none is given, at the widths of real models (see the README).
DEFAULT_LR = {"lora-rite": LR, "adamw": 2e-4}
#: Steps where neither --steps nor --epochs is given.
DEFAULT_STEPS = 200
#: Optimizers that are LoRARite by their name.
OURS = ("lora-rite", "lora-rite-published")
#: What makes a new adapter: options, what they are where they are not given, and PEFT's names.
NEW_ADAPTER = {
    "rank": (16, "r"), "alpha": (None, "lora_alpha"), "target_modules": ("all-linear", "target_modules"),
    "dropout": (0.0, "lora_dropout"), "dora": (False, "use_dora"), "rslora": (False, "use_rslora"),
    "modules_to_save": (None, "modules_to_save"),
}  # fmt: skip
#: Options of a run on which its outcome does not depend.
NO_SETTINGS = ("resume", "progress", "allow_changed", "preview", "push_to_hub")


def check_options(options: SimpleNamespace) -> dict[str, Any]:
    """Checks the options of ``lora-rite train``, and gives lr and alpha their values where they have none.

    Returns:
        The run's settings: the options without those that say how it is watched or gone on with.
    """
    _check_ranges(vars(options))
    _check_together(options)
    if options.lr is None and options.optimizer not in DEFAULT_LR:
        raise LoRARiteValueError(f"--lr is needed for --optimizer {options.optimizer}")
    options.lr = DEFAULT_LR[options.optimizer] if options.lr is None else options.lr
    check_optimizer(None, options.optimizer, options.lr, options.weight_decay, options.optimizer_args)
    options.alpha = options.rank if options.alpha is None else options.alpha
    options.dtype, _ = weights_of(vars(options))
    if options.epochs is None:
        options.steps = DEFAULT_STEPS if options.steps is None else options.steps
    check_steps(options, options.steps or DEFAULT_STEPS)  # of epochs, they are not known yet
    _check_reporter(options.report_to)
    if options.torch_compile is not None:
        _check_compiler(f"--torch_compile {options.torch_compile}")
    if options.chat_template is not None:  # whether it can be used is seen with the model's tokenizer
        with blame(f"--chat_template {options.chat_template}"):
            read_text(options.chat_template)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    return {key: value for key, value in settings.items() if key not in NO_SETTINGS}


def check_steps(options: SimpleNamespace, steps: int) -> None:
    """Checks the schedule of a run over so many steps."""
    with blame(f"--scheduler {options.scheduler}"):
        check_schedule(options.scheduler, options.scheduler_args, options.lr, steps, options.warmup)


def weights_of(options: Mapping[str, Any]) -> tuple[str, int | None]:
    """The dtype of a model's weights by the options of ``lora-rite train``, and the bits of those that are quantised.

    Raises:
        LoRARiteValueError: options that contradict each other.
    """
    four, eight, dtype = (options.get(key) for key in ("load_in_4bit", "load_in_8bit", "dtype"))
    if four and eight:
        raise LoRARiteValueError("give either --load_in_4bit or --load_in_8bit")
    if options.get("bf16"):
        if dtype not in (None, "bfloat16"):
            raise LoRARiteValueError(f"--bf16 is --dtype bfloat16, and --dtype is {dtype}: leave one of them out")
        dtype = "bfloat16"
    bits = 4 if four else 8 if eight else None
    return dtype or ("float32" if bits is None else "auto"), bits


def _check_together(options: SimpleNamespace) -> None:
    """Checks what options say of each other."""
    import torch

    if options.steps is not None and options.epochs is not None:
        raise LoRARiteValueError("give either --steps or --epochs")
    dtype, bits = weights_of(vars(options))
    if dtype == "float16" and not torch.accelerator.is_available():
        raise LoRARiteValueError("--dtype float16 trains on a GPU alone; a CPU has float32 and bfloat16")
    if bits is not None and suffix(options.model) == ".gguf":
        raise LoRARiteValueError(f"--load_in_{bits}bit: a GGUF file is dequantised as it is loaded")
    if bits is not None and sharded():
        raise LoRARiteValueError(f"--load_in_{bits}bit: FSDP2 does not share out quantised weights; train them by DDP")
    if options.torch_compile is not None and sharded():
        raise LoRARiteValueError(
            "--torch_compile: FSDP2's parameters would get other names; train by DDP, or leave it out"
        )
    if options.packing and options.attn_implementation == "flash_attention_2":
        raise LoRARiteValueError(
            "--packing keeps examples apart by a mask, which flash_attention_2 does not take: --attn_implementation "
            "sdpa or eager"
        )
    for key in ("early_stopping", "keep_best"):
        if getattr(options, key) and not options.eval_every:
            raise LoRARiteValueError(f"--{key} needs the held-out loss of some steps: give --eval_every")
    if options.optimizer in OURS:
        refuse_clipping(options.max_grad_norm)
    if options.adapter is not None:
        _check_adapter(options)


def refuse_clipping(max_grad_norm: float | None) -> None:
    """Raises LoRARiteValueError where gradients would be clipped in front of LoRARite."""
    from ..integrations.peft import RAW_CLIPPING

    if max_grad_norm:
        raise LoRARiteValueError(
            f"--max_grad_norm {max_grad_norm:g} {RAW_CLIPPING} (--optimizer_args.clip_unmagnified_grad): leave it out"
        )


def _check_adapter(options: SimpleNamespace) -> None:
    """Checks that the options of a new adapter are not given beside an adapter to go on from, or are its own; they are
    those of the adapter then."""
    with blame(f"--adapter {options.adapter}"):
        config, _ = find_adapter(options.adapter)
    for key, (default, name) in NEW_ADAPTER.items():
        given, own = getattr(options, key), config.get(name)
        if given != default and _in_order(given) != _in_order(own):
            raise LoRARiteValueError(
                f"--{key} {given}: --adapter {options.adapter} has {own}, and is gone on with: leave it out"
            )
    options.rank, options.alpha = config.get("r") or options.rank, config.get("lora_alpha")


def _in_order(value: Any) -> Any:
    """The names of modules sorted, as a list, since an adapter's have no order; other values as they are."""
    names = module_names(value)
    return sorted(names) if isinstance(names, list) else names


def _check_reporter(report_to: str) -> None:
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    names = {"none": [], "all": get_available_reporting_integrations()}.get(report_to, [report_to])
    with blame(f"--report_to {report_to}"):
        for callback in get_reporting_integration_callbacks(names):
            callback()  # raises where its package is missing


def _check_compiler(option: str) -> None:
    """Compiles a sum for the device of the run: without it, a missing compiler would be found in the first step."""
    import torch

    device = find_device("cpu" if uses_cpu() else None)
    with blame(f"{option}: torch.compile does not work here"):
        torch.compile(torch.add)(torch.ones(2, device=device), 1)


def _check_ranges(settings: dict[str, Any]) -> None:
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
        "limit": 1,
        "eval_limit": 0,
        "early_stopping": 0,
        "max_grad_norm": 0,
        "preview": 0,
    }
    for key, value in least.items():
        if settings[key] is not None and not value <= settings[key] < math.inf:
            raise LoRARiteValueError(f"--{key} must be at least {value}, got {settings[key]}")
    if settings["epochs"] is not None and not 0 < settings["epochs"] < math.inf:
        raise LoRARiteValueError(f"--epochs must be a finite number > 0, got {settings['epochs']}")
    if settings["lr"] is not None and not 0 <= settings["lr"] < math.inf:
        raise LoRARiteValueError(f"--lr must be a finite number ≥ 0, got {settings['lr']}")
    for key in ("warmup", "dropout"):
        if not 0 <= settings[key] <= 1:
            raise LoRARiteValueError(f"--{key} must be between 0 and 1, got {settings[key]}")
    if not 0 < settings["holdout"] < 1:
        raise LoRARiteValueError(f"--holdout must be between 0 and 1, got {settings['holdout']}")
    if not 0 <= settings["seed"] < 2**32:
        raise LoRARiteValueError(f"--seed must be from 0 to 2³² − 1, got {settings['seed']}")
    check_arguments(settings["optimizer"], settings["optimizer_args"])
    if "://" in settings["model"]:  # not repeated: it may hold a password
        raise LoRARiteValueError("--model must be a hub id or a local folder, not a URL")


def finished_result(
    out: Path, settings: dict[str, Any], resume: bool, allow_changed: list[str] | None
) -> dict[str, Any] | None:
    """Checks that OUT has nothing in it, or the run to resume. Returns the result where that run is finished, which is
    said, unless it is to go on to more steps."""
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
    raised = raised_steps(out, settings)
    same = ("out",) if finished.is_file() else PLACES  # what is there, Run.begin compares
    changed = {k: v for k, v in changes(stored["settings"], settings).items() if k not in same}
    refuse_changes(out, changed, [*(allow_changed or []), *raised])
    if not finished.is_file():
        return None
    result = read_json(finished, "settings", "held_out")
    if raised and not checkpoints(out / "checkpoints"):
        raise LoRARiteValueError(
            f"{out} is finished and has no checkpoint to go on from to more --{raised[0]} (--save_every 0): a new run "
            f"with --adapter {out / 'adapter'} begins with its adapter"
        )
    if raised:
        warn(
            f"{out} was finished, and goes on to --{raised[0]} {settings[raised[0]]}: with the schedule of so many, so "
            "that it is not the run that these would have been from the beginning"
        )
        return None
    warn(f"{out} is finished already: nothing was trained (more --steps or --epochs go on)")
    return result


def raised_steps(out: Path, settings: dict[str, Any]) -> list[str]:
    """Of a finished run in OUT, which of ``steps`` and ``epochs`` the settings have more of; none of another run."""
    if not (out / RESULT).is_file():
        return []
    before = read_json(out / RESULT, "settings")["settings"]
    return [k for k in ("epochs", "steps") if before.get(k) and settings.get(k) and settings[k] > before[k]]
