"""``lora-rite train``: LoRA fine-tuning of a causal language model on transformers' Trainer."""

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from ..errors import LoRARiteValueError
from .data import IGNORED, read_examples, split, windows

TINY = Path(__file__).parent / "tiny"
#: Learning rates to start from where none is given, at the widths of real models (see the README).
DEFAULT_LR = {"lora-rite": 5e-4, "adamw": 2e-4}


def train(
    data: Path,
    out: Path,
    model: str = "tiny",
    validation: Path | None = None,
    optimizer: Literal["lora-rite", "adamw"] = "lora-rite",
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
    warmup: float = 0.1,
    scheduler: str = "cosine",
    weight_decay: float = 0.0,
    holdout: float = 0.1,
    seed: int = 0,
    bf16: bool = False,
    eval_every: int = 0,
    save_every: int = 0,
    layers_every: int = 0,
    report_to: str = "none",
    resume: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Fine-tunes a LoRA adapter and writes it, with the figures of the run, into a folder.

    Into OUT go ``adapter/`` (for ``PeftModel.from_pretrained``), ``result.json`` (settings, versions, losses, times),
    ``settings.json`` and, while the run goes on, ``checkpoints/``.

    Args:
        data: training text: a .jsonl file with {"text": …} or {"prompt": …, "completion": …} a line (loss on the
            completion alone), or any other text file.
        out: folder for the results; must be new or empty, except with --resume.
        model: hub id or local folder of a causal language model; "tiny" is the one inside this package.
        validation: held-out text in the same formats; without it, a share of the data is held out.
        optimizer: lora-rite or adamw.
        lr: peak learning rate; by default 5e-4 for lora-rite and 2e-4 for adamw.
        optimizer_args: further keyword arguments of LoRARite or torch.optim.AdamW.
        rank: rank of the adapter.
        alpha: LoRA's alpha (the adapter is scaled by alpha/rank); by default the rank.
        target_modules: layers that get an adapter: all-linear, a list of names, or a regular expression.
        dropout: dropout on the adapter's input.
        steps: optimizer steps.
        batch_size: windows in a batch, on each device.
        accumulation: batches in a step.
        max_length: tokens in a window.
        warmup: share of the steps in which lr rises linearly.
        scheduler: transformers' name of the schedule after the warm-up (cosine, linear, constant_with_warmup, …).
        weight_decay: decoupled weight decay.
        holdout: share of the data to hold out where no validation file is given.
        seed: of the adapter's initialisation, the split and the order of batches.
        bf16: load and run the model in bfloat16 (the adapter stays float32).
        eval_every: steps between measurements of the held-out loss; 0 measures before and after training alone.
        save_every: steps between checkpoints; 0 saves none.
        layers_every: steps between figures of each layer in OUT/layers.jsonl (see docs/tuning.md); 0 writes none.
        report_to: transformers' name of a reporter: none, tensorboard, trackio, wandb, …
        resume: go on from the last checkpoint in OUT with the same settings.
        trust_remote_code: allow the model's own code to run.
        progress: show a progress bar.
    """
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in locals().items()}
    for key in ("resume", "progress"):
        settings.pop(key)
    _check(settings)
    settings["lr"] = lr = DEFAULT_LR[optimizer] if lr is None else lr
    settings["alpha"] = alpha = rank if alpha is None else alpha
    examples = read_examples(data)
    parts = (examples, read_examples(validation)) if validation else split(examples, holdout, seed)
    if (finished := _check_folder(out, settings, resume)) is not None:
        return finished

    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    from .. import LoRARiteCallback, LoRARiteFactory

    network, tokenizer = load_model(model, bf16=bf16, trust_remote_code=trust_remote_code)
    train_rows, held_out_rows = (windows(part, tokenizer, max_length) for part in parts)
    set_seed(seed)
    network = attach_adapter(network, rank=rank, alpha=alpha, target_modules=target_modules, dropout=dropout)
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    with _blame(f"--scheduler {scheduler}"):
        arguments = TrainingArguments(
            output_dir=str(out / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            learning_rate=lr,
            lr_scheduler_type=scheduler,
            warmup_steps=round(warmup * steps),
            weight_decay=weight_decay,
            max_grad_norm=0.0 if optimizer == "lora-rite" else 1.0,  # LoRA-RITE clips by itself, invariantly
            bf16=bf16,
            use_cpu=not torch.accelerator.is_available(),
            seed=seed,
            logging_steps=1,
            logging_nan_inf_filter=False,
            include_num_input_tokens_seen="non_padding",
            save_strategy="steps" if save_every else "no",
            save_steps=save_every or 500,
            save_total_limit=2,
            report_to=report_to,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
        )
    optimizer_class = LoRARiteFactory if optimizer == "lora-rite" else torch.optim.AdamW
    optimizer_kwargs = {"lr": lr, "weight_decay": weight_decay, **(optimizer_args or {})}
    with _blame(f"--report_to {report_to}"):
        trainer = Trainer(
            network,
            arguments,
            data_collator=collator,
            train_dataset=train_rows,  # type: ignore[arg-type]
            optimizer_cls_and_kwargs=(optimizer_class, optimizer_kwargs),  # type: ignore[arg-type]
        )
    with _blame(f"--optimizer_args {optimizer_args}"):
        trainer.create_optimizer()
    measure = lambda: held_out_loss(network, held_out_rows, collator, batch_size)
    reporter = LoRARiteCallback(out / "layers.jsonl" if layers_every else None, layers_every or 1)
    clock = _add_callbacks(trainer, reporter if optimizer == "lora-rite" else None, progress, measure, eval_every)
    checkpoint = get_last_checkpoint(str(out / "checkpoints")) if resume else None
    if resume and checkpoint is None:
        raise LoRARiteValueError(f"no checkpoint in {out / 'checkpoints'} to resume from; train without --resume")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "settings.json", settings)
    before = measure()
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - begin
    after = measure()
    if not math.isfinite(after):
        raise LoRARiteValueError(f"the loss is {after} after training: lower --lr. No adapter was written")
    network.save_pretrained(str(out / "adapter"), safe_serialization=True)
    result = {
        "settings": settings,
        "held_out": {"before": before, "after": after, "tokens": _label_count(held_out_rows)},
        "perplexity": {"before": math.exp(before), "after": math.exp(after)},
        "losses": _entries(trainer.state.log_history, "loss", "learning_rate"),
        "held_out_losses": _entries(trainer.state.log_history, "held_out_loss"),
        "log": trainer.state.log_history,
        "seconds": {"training": seconds, **clock.seconds()},
        "optimizer": describe_optimizer(trainer.optimizer),
        "windows": {"train": len(train_rows), "held_out": len(held_out_rows)},
        "versions": versions(),
    }
    write_json(out / "result.json", result)
    return result


def load_model(name: str, *, bf16: bool = False, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, from a hub id, a local folder, or "tiny"."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = str(TINY) if name == "tiny" else name
    with _blame(f"cannot load --model {name}"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        network = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
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
        if not (adapter / "adapter_config.json").is_file():
            raise LoRARiteValueError(f"--adapter {adapter} has no adapter_config.json")
        with _blame(f"--adapter {adapter}"):
            return PeftModel.from_pretrained(network, str(adapter), is_trainable=True)
    with _blame(f"--target_modules {target_modules}"):
        config = LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
            lora_dropout=dropout,
            target_modules=target_modules,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(network, config)


def summary(result: dict[str, Any]) -> str:
    """What a run of :func:`train` came to, in a few lines."""
    loss, perplexity, seconds = result["held_out"], result["perplexity"], result["seconds"]
    return (
        f"held-out loss {loss['before']:.4f} → {loss['after']:.4f} nat a token, "
        f"perplexity {perplexity['before']:.2f} → {perplexity['after']:.2f} ({loss['tokens']} tokens)\n"
        f"{seconds['training']:.0f} s of training, {seconds['optimizer_share']:.1%} of a step in the optimizer\n"
        f"adapter and result.json in {result['settings']['out']}"
    )


def held_out_loss(model: Any, rows: list[dict[str, list[int]]], collator: Any, batch_size: int) -> float:
    """Mean cross-entropy in nat over all tokens that carry loss (each token counts the same)."""
    import torch

    total, tokens = 0.0, 0
    training = model.training
    model.eval()
    with torch.inference_mode():
        for i in range(0, len(rows), batch_size):
            batch = collator([dict(row) for row in rows[i : i + batch_size]]).to(model.device)
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(model(**batch).loss) * count
            tokens += count
    model.train(training)
    return total / tokens


def describe_optimizer(optimizer: Any) -> dict[str, Any]:
    """Name, settings of the first group, bytes of state, and LoRARite's report."""
    from ..hf import unwrap
    from ..optimizer import LoRARite, state_bytes

    optimizer = unwrap(optimizer)
    options = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "param_names")}
    return {
        "name": type(optimizer).__name__,
        "options": {k: v for k, v in options.items() if isinstance(v, (int, float, str, bool, list, tuple))},
        "state_bytes": state_bytes(optimizer),
        **({"report": optimizer.report()} if isinstance(optimizer, LoRARite) else {}),
    }


def versions() -> dict[str, Any]:
    """Versions, machine and the commit of this package's source (None outside a checkout, "+" after local changes)."""
    import torch

    packages = ("lora-rite", "torch", "transformers", "peft", "accelerate")
    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is either whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def _blame(option: str) -> Iterator[None]:
    """Turns an error of a library inside into one that names the option it comes from, with its first line."""
    try:
        yield
    except LoRARiteValueError as error:
        raise LoRARiteValueError(f"{option}: {error}") from error
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise LoRARiteValueError(f"{option}: {lines[0]}") from error


def _check(settings: dict[str, Any]) -> None:
    least = {
        "rank": 1,
        "steps": 1,
        "batch_size": 1,
        "accumulation": 1,
        "max_length": 2,
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
    if "lr" in (settings["optimizer_args"] or {}):
        raise LoRARiteValueError("--optimizer_args.lr: give the learning rate by --lr")


def _check_folder(out: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """Checks that OUT has nothing in it, or the run to resume. Returns the result where that run is finished."""
    stored = out / "settings.json"
    if not resume:
        if out.is_file() or any(not p.is_dir() for p in out.rglob("*")):
            raise LoRARiteValueError(f"{out} is not an empty folder; choose another --out, or --resume the run in it")
        return None
    if not stored.is_file():
        raise LoRARiteValueError(f"{out} holds no run to resume (no settings.json)")
    before, now = json.loads(stored.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    changed = [
        f"{k}: {before.get(k)!r} → {now.get(k)!r}" for k in sorted({*before, *now}) if before.get(k) != now.get(k)
    ]
    changed = [line for line in changed if not line.startswith("out: ")]
    if changed:
        raise LoRARiteValueError(f"cannot resume {out} with other settings ({'; '.join(changed)})")
    finished = out / "result.json"
    return json.loads(finished.read_text(encoding="utf-8")) if finished.is_file() else None


def _add_callbacks(trainer: Any, reporter: Any, progress: bool, measure: Callable[[], float], eval_every: int) -> Any:
    """The clock, the held-out loss, the progress bar and, in front of the reporters, LoRARite's figures. Returns the
    clock."""
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    class Clock(TrainerCallback):
        """Times whole steps and the optimizer's part of them."""

        def __init__(self) -> None:
            self.steps, self.optimizer = [], []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begin = time.perf_counter()

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.begin_optimizer = time.perf_counter()

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.optimizer.append(time.perf_counter() - self.begin_optimizer)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.steps.append(time.perf_counter() - self.begin)

        def seconds(self) -> dict[str, float]:
            """Medians, in seconds, and the optimizer's share. On a GPU, kernels run on after the host goes on: there
            the share is the host's."""
            median = lambda values: sorted(values)[len(values) // 2] if values else 0.0
            step, optimizer = median(self.steps), median(self.optimizer)
            return {"step": step, "optimizer_step": optimizer, "optimizer_share": optimizer / step if step else 0.0}

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

    clock = Clock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    if eval_every:
        trainer.add_callback(HeldOut())
    if progress:
        trainer.add_callback(Bar())
    if reporter is not None:
        trainer.callback_handler.callbacks.insert(0, reporter)
    return clock


def _entries(log: list[dict[str, float]], *keys: str) -> list[dict[str, float]]:
    """Those entries of the Trainer's log that have all the keys, with them and the step alone."""
    return [{key: entry[key] for key in ("step", *keys)} for entry in log if all(key in entry for key in keys)]


def _label_count(rows: list[dict[str, list[int]]]) -> int:
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


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
