"""transformers' Trainer as all runs set it up, and the figures that it gives."""

import time
from collections.abc import Callable
from typing import Any

from ..inputs import blame
from ..optim.modes import without_accelerate
from .optimizers import OptimizerFactory, option
from .windows import label_count

#: The times of the steps in the Trainer's ``state.stateful_callbacks``.
CLOCK = "Clock"


def make_trainer(
    trainer_class: Any, network: Any, options: Any, collator: Callable[..., Any], rows: Any, **more: Any
) -> tuple[Any, bool]:
    """The Trainer of a run, with its optimizer, whose errors are blamed on --optimizer.

    Args:
        trainer_class: transformers' Trainer or one made of it.
        network: the model with its adapter.
        options: as ``lora-rite train`` takes them: ``out``, ``steps``, ``batch_size``, ``optimizer``, ``lr``,
            ``optimizer_args``, ``weight_decay``, ``warmup``, ``scheduler``, ``scheduler_args``, ``seed`` and
            ``log_every``.
        collator: makes a batch of rows.
        rows: the training data.
        more: further arguments, by the Trainer's names.

    Returns:
        The Trainer, and whether its optimizer is LoRARite.
    """
    from .. import LoRARite

    kwargs = {
        "name": options.optimizer,
        "lr": options.lr,
        "weight_decay": options.weight_decay,
        "options": options.optimizer_args,
    }
    trainer = trainer_class(
        network,
        _arguments(options, more),
        data_collator=collator,
        train_dataset=rows,
        optimizer_cls_and_kwargs=(OptimizerFactory, kwargs),
    )
    with blame(option(options.optimizer, options.optimizer_args)):
        is_lora_rite = isinstance(trainer.create_optimizer(), LoRARite)
    trainer.args.max_grad_norm = 0.0 if is_lora_rite else 1.0  # LoRA-RITE clips by itself, invariantly
    return trainer, is_lora_rite


def _arguments(options: Any, more: dict[str, Any]) -> Any:
    import torch
    from transformers import TrainingArguments

    with blame("the Trainer's arguments"):  # what options are to blame for was found before
        return TrainingArguments(
            output_dir=str(options.out / "checkpoints"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.lr,
            weight_decay=options.weight_decay,
            lr_scheduler_type=options.scheduler,
            lr_scheduler_kwargs=options.scheduler_args or {},
            warmup_steps=round(options.warmup * options.steps),
            use_cpu=not torch.accelerator.is_available(),
            seed=options.seed,
            logging_steps=options.log_every,
            logging_nan_inf_filter=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            **more,
        )


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
