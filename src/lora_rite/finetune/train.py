"""``lora-rite train``: LoRA fine-tuning of a causal language model on transformers' Trainer."""

import math
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError, warn
from ..inputs import blame
from ..optim.modes import evaluating, without_accelerate
from ..run import checkpoints
from .data import IGNORED, Split, label_count, read_examples, split
from .gguf import load_gguf
from .labelled import predict_labelled
from .models import fused_experts, locate, refuse_adapter
from .optimizers import OptimizerFactory, check_optimizer, find_optimizer, option
from .publish import check_push, export, next_commands, push
from .schedules import check_schedule
from .tasks import examples, read_rows, read_task
from .untrusted import check_adapter

#: Learning rates to start from where none is given, at the widths of real models (see the README).
DEFAULT_LR = {"lora-rite": 5e-4, "adamw": 2e-4}
#: The times of the steps in the Trainer's ``state.stateful_callbacks``.
CLOCK = "Clock"


def train(
    out: Path,
    data: Path | None = None,
    task: str | None = None,
    data_dir: Path | None = None,
    model: str = "tiny",
    validation: Path | None = None,
    optimizer: str = "lora-rite",
    lr: float | None = None,
    optimizer_args: dict[str, Any] | None = None,
    rank: int = 16,
    alpha: float | None = None,
    target_modules: str | list[str] = "all-linear",
    dropout: float = 0.0,
    steps: int = 200,
    batch_size: int = 8,
    accumulation: int = 1,
    max_length: int = 256,
    packing: bool = False,
    group_by_length: bool = False,
    warmup: float = 0.1,
    scheduler: str = "cosine",
    scheduler_args: dict[str, Any] | None = None,
    weight_decay: float = 0.0,
    holdout: float = 0.1,
    seed: int = 0,
    bf16: bool = False,
    log_every: int = 1,
    eval_every: int = 0,
    save_every: int = 0,
    layers_every: int = 0,
    report_to: str = "none",
    resume: bool = False,
    allow_changed: list[str] | None = None,
    skip_bad_lines: bool = False,
    trust_remote_code: bool = False,
    push_to_hub: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Fine-tunes a LoRA adapter and writes it, with the figures of the run, into a folder.

    Into OUT go ``adapter/`` (for ``PeftModel.from_pretrained``; with its tokenizer and model card), ``result.json``
    (settings, versions, losses, times), ``settings.json`` and, while the run goes on, ``checkpoints/``.

    Args:
        out: folder for the results; must be new or empty, except with --resume.
        data: training text: a .jsonl file with {"text": …} or {"prompt": …, "completion": …} a line (loss on the
            completion alone; not both), a .json or .parquet file with such records, or any other text file.
        task: instead of data, the training split of a task by its name, in lm_eval's format, loss on the answer alone:
            hellaswag, arc_challenge, arc_easy, openbookqa, gsm8k, natural_instructions or natural_instructions:TASK.
        data_dir: folder with the task's rows as local files; without it, they come from the hub.
        model: hub id, local folder or GGUF file (.gguf, dequantised) of a causal or an encoder-decoder language model;
            "tiny" is the causal one inside this package.
        validation: held-out text in the formats of data; without it, the task's validation split is held out, and
            where there is none, a share of the data.
        optimizer: lora-rite, lora-rite-published, adamw, lora-plus, riemannian, muon, lamb, soap, shampoo, polora,
            lora-muon, or the import path package.module:attribute of an optimizer class, or of a factory that is called
            with the model.
        lr: peak learning rate; by default 5e-4 for lora-rite and 2e-4 for adamw.
        optimizer_args: further keyword arguments of the optimizer.
        rank: rank of the adapter.
        alpha: LoRA's alpha (the adapter is scaled by alpha/rank); by default the rank.
        target_modules: layers that get an adapter: all-linear, a list of names, or a regular expression.
        dropout: dropout on the adapter's input.
        steps: optimizer steps.
        batch_size: windows in a batch, on each device.
        accumulation: batches in a step.
        max_length: tokens in a window, at most the model's positions; for an encoder-decoder model, of a prompt and of
            a completion, each.
        packing: put several prompts with their completions into a window, each seeing itself alone: saves the padding
            where they are much shorter than max_length; a batch then has more of them.
        group_by_length: make batches of windows of about the same length, in training and where the held-out loss is
            measured: saves padding (each batch is padded to its longest window), and changes which come together.
        warmup: share of the steps in which lr rises linearly.
        scheduler: transformers' name of the schedule after the warm-up (cosine, linear, constant_with_warmup, …).
        scheduler_args: further arguments of the schedule, as min_lr_rate of cosine_with_min_lr.
        weight_decay: decoupled weight decay.
        holdout: share of the data to hold out where no validation file is given.
        seed: of the adapter's initialisation, the split and the order of batches.
        bf16: load and run the model in bfloat16 (the adapter stays float32).
        log_every: steps between logged training losses; each is the mean of so many steps.
        eval_every: steps between measurements of the held-out loss; 0 measures before and after training alone.
        save_every: steps between checkpoints; 0 saves none, except where a signal ends the run. The last two are kept.
        layers_every: steps between figures of each layer in OUT/layers.jsonl (see docs/tuning.md); 0 writes none.
        report_to: transformers' name of a reporter: none, tensorboard, trackio, wandb, …
        resume: go on from the newest checkpoint in OUT that verifies, with the same settings, bitwise.
        allow_changed: names of settings, or of what else a refused --resume has listed (tokens, torch, threads, …),
            that may differ from the interrupted run.
        skip_bad_lines: leave out lines of .jsonl files that cannot be used, and say how many.
        trust_remote_code: allow the model's own code to run.
        push_to_hub: then upload the adapter to this repository of the hub (a new one is private), as lora-rite push.
        progress: show a progress bar.
    """
    if push_to_hub is not None:
        options = {**locals(), "push_to_hub": None}
        check_push("--push_to_hub", push_to_hub)
        result = train(**options)
        print(push(out, push_to_hub))
        return result
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in locals().items()}
    for key in ("resume", "progress", "allow_changed", "push_to_hub"):
        settings.pop(key)
    _check(settings)
    if lr is None and optimizer not in DEFAULT_LR:
        raise LoRARiteValueError(f"--lr is needed for --optimizer {optimizer}")
    settings["lr"] = lr = DEFAULT_LR[optimizer] if lr is None else lr
    settings["alpha"] = alpha = rank if alpha is None else alpha
    with blame(f"--scheduler {scheduler}"):
        check_schedule(scheduler, scheduler_args, lr, steps, warmup)
    _check_reporter(report_to)
    parts, sources = _read(data, task, data_dir, validation, holdout, seed, progress, skip_bad_lines)
    contaminated = len(set(parts[0]) & set(parts[1]))
    if contaminated:
        warn(f"{contaminated} held-out examples are in the training data too: the held-out loss is too good")
    if (finished := _check_folder(out, settings, resume, allow_changed)) is not None:
        return finished

    from transformers import DataCollatorForSeq2Seq, Trainer, set_seed

    from .. import LoRARiteCallback
    from .limits import prepare_windows

    network, tokenizer = load_model(model, bf16=bf16, trust_remote_code=trust_remote_code)
    encoder_decoder = network.config.is_encoder_decoder
    (train_rows, train_cut), (held_out_rows, held_out_cut) = prepare_windows(
        parts, network, tokenizer, model, max_length, packing=packing
    )
    if group_by_length:
        held_out_rows.sort(key=lambda row: len(row["input_ids"]))
    inputs = {
        "base_weights": checkpoints.digest_tensors(sorted(network.state_dict().items())),
        "tokens": checkpoints.digest_rows(train_rows, held_out_rows),
    }
    set_seed(seed)
    network = attach_adapter(network, rank=rank, alpha=alpha, target_modules=target_modules, dropout=dropout)
    optimizer_kwargs = {"name": optimizer, "lr": lr, "weight_decay": weight_decay, "options": optimizer_args}
    check_optimizer(network, **optimizer_kwargs)
    predict_labelled(network)
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    with checkpoints.locked(out):
        pass  # the Trainer makes folders: from here on, the folder is known as one of ours
    arguments = training_arguments(
        out,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        warmup=warmup,
        scheduler=scheduler,
        scheduler_args=scheduler_args,
        seed=seed,
        log_every=log_every,
        gradient_accumulation_steps=accumulation,
        weight_decay=weight_decay,
        bf16=bf16,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or 500,
        save_total_limit=None,  # rotation is ours: it counts checkpoints that verify
        report_to=report_to,
        train_sampling_strategy="group_by_length" if group_by_length else "random",
    )
    trainer = checkpoints.crash_safe(Trainer)(
        network,
        arguments,
        data_collator=collator,
        train_dataset=train_rows,  # type: ignore[arg-type]
        optimizer_cls_and_kwargs=(OptimizerFactory, optimizer_kwargs),  # type: ignore[arg-type]
    )
    is_lora_rite = create_optimizer(trainer, option(optimizer, optimizer_args))

    def measure() -> float:
        with evaluating(trainer.optimizer):
            return held_out_loss(network, held_out_rows, collator, batch_size)

    reporter = LoRARiteCallback(out / "layers.jsonl" if layers_every else None, layers_every or 1)
    add_callbacks(trainer, reporter if is_lora_rite else None, progress, measure, eval_every)
    with checkpoints.locked(out):
        if (finished := _check_folder(out, settings, resume, allow_changed)) is not None:
            return finished  # by the process that had the lock before
        if save_every:
            checkpoints.check_space(out, network)
        run = checkpoints.Run(out, settings, inputs, versions(), allow_changed)
        run.begin(resume)
        before = measure()
        run.train(trainer, steps)
        after = measure()
        if not math.isfinite(after):
            run.fail(f"the held-out loss is {after} after training: lower --lr", steps)
        result = {
            "settings": settings,
            "data": sources,
            "inputs": inputs,
            "changes": run.record["changes"],
            "held_out": {
                "before": before,
                "after": after,
                "tokens": label_count(held_out_rows, encoder_decoder),
                "examples_in_training_data": contaminated,
            },
            "perplexity": {"before": _perplexity(before), "after": _perplexity(after)},
            "losses": log_entries(trainer.state.log_history, "loss", "learning_rate"),
            "held_out_losses": log_entries(trainer.state.log_history, "held_out_loss"),
            "log": trainer.state.log_history,
            "seconds": seconds(trainer.state),
            "optimizer": describe_optimizer(trainer.optimizer),
            "windows": {"train": len(train_rows), "held_out": len(held_out_rows)},
            "examples": {
                "train": len(parts[0]),
                "held_out": len(parts[1]),
                "cut": {"train": train_cut, "held_out": held_out_cut},
            },
            "versions": versions(),
        }
        with evaluating(trainer.optimizer):
            run.finish(lambda folder: export(folder, network, tokenizer, result), result)
    return result


def training_arguments(
    out: Path,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    warmup: float,
    scheduler: str,
    scheduler_args: dict[str, Any] | None,
    seed: int,
    log_every: int,
    **more: Any,
) -> Any:
    """The Trainer's arguments that all runs share, by the names of ``lora-rite train``, and ``more`` by its own."""
    import torch
    from transformers import TrainingArguments

    with blame("the Trainer's arguments"):  # what options are to blame for was found before
        return TrainingArguments(
            output_dir=str(out / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=lr,
            lr_scheduler_type=scheduler,
            lr_scheduler_kwargs=scheduler_args or {},
            warmup_steps=round(warmup * steps),
            use_cpu=not torch.accelerator.is_available(),
            seed=seed,
            logging_steps=log_every,
            logging_nan_inf_filter=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            **more,
        )


def create_optimizer(trainer: Any, what: str) -> bool:
    """Has the Trainer make its optimizer, an error blamed on ``what``, and sets its clipping. Returns whether it is
    LoRARite."""
    from .. import LoRARite

    with blame(what):
        is_lora_rite = isinstance(trainer.create_optimizer(), LoRARite)
    trainer.args.max_grad_norm = 0.0 if is_lora_rite else 1.0  # LoRA-RITE clips by itself, invariantly
    return is_lora_rite


def _read(
    data: Path | None,
    task: str | None,
    data_dir: Path | None,
    validation: Path | None,
    holdout: float,
    seed: int,
    progress: bool,
    skip_bad_lines: bool,
) -> tuple[Split, dict[str, str]]:
    """The examples to train on and those held out, and where they come from."""
    if data is not None and task is None:
        found, source = read_examples(data, skip_bad_lines), str(data)
    elif task is not None and data is None:
        found, source = read_task(task, "train", data_dir, progress=progress)
    else:
        raise LoRARiteValueError("give either --data or --task")
    if validation is not None:
        return Split(found, read_examples(validation, skip_bad_lines)), {"train": source, "held_out": str(validation)}
    if task is not None and (rows := read_rows(task, "validation", data_dir)) is not None:
        return Split(found, examples(task, rows)), {"train": source, "held_out": rows.source}
    return split(found, holdout, seed), {"train": source, "held_out": f"{holdout:g} of {source}"}


def load_model(name: str, *, bf16: bool = False, dtype: Any = None, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A language model (encoder–decoder where its config says so) and its tokenizer, from a hub id, a local folder, a
    GGUF file (whose weights are dequantised, with a warning that says so), or "tiny". A ``dtype`` that is given (of
    torch, or "auto" for the checkpoint's, not for GGUF files) is taken instead of what ``bf16`` says."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = dtype or (torch.bfloat16 if bf16 else torch.float32)
    nowhere = "" if name == "tiny" or Path(name).exists() else " (a hub id: there is no such folder)"
    with blame(f"cannot load --model {name}{nowhere}"):
        place, options = locate(name)
        if options:
            network, tokenizer = load_gguf(name, dtype)
        else:
            refuse_adapter(place)
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
            config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
            kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            network = kind.from_pretrained(
                place, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
            )
    if tokenizer.pad_token is None:  # what it is does not matter: it is neither attended to nor learnt
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"  # on the left (Gemma), padding would be what predicts a window's first token
    return network, tokenizer


def attach_adapter(
    network: Any,
    *,
    adapter: Path | None = None,
    rank: int = 16,
    alpha: float | None = None,
    target_modules: str | list[str] = "all-linear",
    dropout: float = 0.0,
) -> Any:
    """The network with a trainable PEFT adapter: the one in the folder ``adapter``, or a new one of LoRA."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter is not None:
        with blame(f"--adapter {adapter}"), fused_experts():
            check_adapter(adapter, network)
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(network, str(adapter), is_trainable=True)
    kind = "SEQ_2_SEQ_LM" if network.config.is_encoder_decoder else "CAUSAL_LM"
    if not network.can_generate():
        kind = "FEATURE_EXTRACTION"
    with blame(f"--target_modules {target_modules}"), fused_experts():
        config = LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
            lora_dropout=dropout,
            target_modules=target_modules,
            task_type=kind,
        )
        return get_peft_model(network, config)


def summary(result: dict[str, Any]) -> str:
    """What a run of :func:`train` came to, in a few lines."""
    loss, perplexity, took = result["held_out"], result["perplexity"], result["seconds"]
    cut = sum(result["examples"]["cut"].values())
    spent = "{training:.0f} s of training, {optimizer_share:.1%} of a step in the optimizer\n" if took["step"] else ""
    return (
        f"held-out loss {loss['before']:.4f} → {loss['after']:.4f} nat a token, "
        f"perplexity {perplexity['before']:.2f} → {perplexity['after']:.2f} ({loss['tokens']} tokens)\n"
        + spent.format(**took)
        + (f"{cut} examples are longer than --max_length and were cut\n" if cut else "")
        + f"adapter and result.json in {result['settings']['out']}\n"
        + next_commands(result)
    )


def held_out_loss(
    model: Any, rows: list[dict[str, list[int]]], collator: Any, batch_size: int, *, progress: bool = False
) -> float:
    """Mean cross-entropy in nat over all tokens that carry loss (each token counts the same)."""
    import torch
    from tqdm.auto import tqdm

    total, tokens = 0.0, 0
    encoder_decoder = model.config.is_encoder_decoder
    training = model.training
    model.eval()
    with torch.inference_mode():
        for i in tqdm(range(0, len(rows), batch_size), desc="measuring the loss", disable=not progress):
            part = rows[i : i + batch_size]
            batch = collator([dict(row) for row in part]).to(model.device)
            count = label_count(part, encoder_decoder)
            total += float(model(**batch).loss) * count
            tokens += count
    model.train(training)
    return total / tokens


def describe_optimizer(optimizer: Any) -> dict[str, Any]:
    """Name, settings of the first group, bytes of state, and LoRARite's report."""
    from ..optim.optimizer import LoRARite, state_bytes

    optimizer = without_accelerate(optimizer)
    options = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "param_names")}
    return {
        "name": type(optimizer).__name__,
        "options": {k: v for k, v in options.items() if isinstance(v, (int, float, str, bool, list, tuple))},
        "state_bytes": state_bytes(optimizer),
        **({"report": optimizer.report()} if isinstance(optimizer, LoRARite) else {}),
    }


def versions(*more: str) -> dict[str, Any]:
    """Versions (of ``more`` packages too), machine and the commit of this package's source (None outside a checkout,
    "+" after local changes)."""
    import torch

    packages = ("lora-rite", "torch", "transformers", "peft", "accelerate", *more)
    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


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


def _check(settings: dict[str, Any]) -> None:
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


def _check_folder(
    out: Path, settings: dict[str, Any], resume: bool, allow_changed: list[str] | None
) -> dict[str, Any] | None:
    """Checks that OUT has nothing in it, or the run to resume. Returns the result where that run is finished."""
    if not resume:
        files = (p for p in out.rglob("*") if p != out / checkpoints.LOCK)
        if out.is_file() or any(p.is_symlink() or not p.is_dir() for p in files):
            raise LoRARiteValueError(f"{out} is not an empty folder; choose another --out, or --resume the run in it")
        return None
    if (stored := checkpoints.read_settings(out)) is None:
        return None
    if unknown := sorted({*(allow_changed or [])} - {*settings, *stored["inputs"], *stored["environment"]}):
        raise LoRARiteValueError(f"--allow_changed {unknown[0]}: no such setting, input or version")
    finished = out / checkpoints.RESULT
    same = ("out",) if finished.is_file() else checkpoints.PLACES  # what is there, Run.begin compares
    changed = {k: v for k, v in checkpoints.changes(stored["settings"], settings).items() if k not in same}
    checkpoints.refuse_changes(out, changed, allow_changed)
    return checkpoints.read_json(finished, "settings", "held_out") if finished.is_file() else None


def add_callbacks(trainer: Any, reporter: Any, progress: bool, measure: Callable[[], float], eval_every: int) -> None:
    """The clock, the held-out loss, the progress bar and, in front of the reporters, LoRARite's figures."""
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    class Clock(TrainerCallback):
        """Times the training, whole steps and the optimizer's part of them. In the Trainer's state, which checkpoints
        have too, so that a resumed run has the times of all its steps."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.last = time.perf_counter()

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begin = time.perf_counter()

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.begin_optimizer = time.perf_counter()

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.optimizer = time.perf_counter() - self.begin_optimizer

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            times = state.stateful_callbacks.setdefault(CLOCK, {"training": 0.0, "steps": [], "optimizer": []})
            times["training"] += now - self.last
            times["steps"].append(now - self.begin)
            times["optimizer"].append(self.optimizer)
            self.last = now

    class Bar(ProgressCallback):
        """One line that says how the run goes, instead of a line a step."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self.training_bar is not None and logs and "loss" in logs:
                speed = next((v for k, v in logs.items() if "tokens_per_second" in k), 0.0)
                self.training_bar.set_postfix_str(
                    f"loss {logs['loss']:.3f}, lr {logs['learning_rate']:.1e}, {speed:,.0f} tokens/s"
                )

    class HeldOut(TrainerCallback):
        """Measures the held-out loss at intervals, and has the Trainer log it."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % eval_every == 0:
                due = control.should_log
                trainer.log({"held_out_loss": measure()})
                control.should_log = due  # logging has cleared it, and the training loss is still to come

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Clock())
    if eval_every:
        trainer.add_callback(HeldOut())
    if progress:
        trainer.add_callback(Bar())
    if reporter is not None:
        trainer.callback_handler.callbacks.insert(0, reporter)


def seconds(state: Any) -> dict[str, float | None]:
    """From the Trainer's state: seconds of training up to the end of the last step, medians over the steps, and the
    optimizer's share. Steps before a checkpoint that came without times are not among them; None where there are no
    others. On a GPU, kernels run on after the host goes on: there the share is the host's."""
    times = state.stateful_callbacks.get(CLOCK)
    if times is None:
        return dict.fromkeys(("training", "step", "optimizer_step", "optimizer_share"))
    step, optimizer = (sorted(values)[len(values) // 2] for values in (times["steps"], times["optimizer"]))
    return {
        "training": times["training"],
        "step": step,
        "optimizer_step": optimizer,
        "optimizer_share": optimizer / step,
    }


def log_entries(log: list[dict[str, float]], *keys: str) -> list[dict[str, float]]:
    """Those entries of the Trainer's log that have all the keys, with them and the step alone."""
    return [{key: entry[key] for key in ("step", *keys)} for entry in log if all(key in entry for key in keys)]


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # beyond the largest float


def _git_commit() -> str | None:
    package = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        run = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() / "src" / "lora_rite" != package:
            return None  # installed somewhere inside another project's checkout
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return None
