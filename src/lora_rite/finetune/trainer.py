"""transformers' Trainer as all runs set it up, and the figures that it gives."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError, warn
from ..inputs import blame
from ..optim.modes import without_accelerate
from ..run.console import shows_bars
from ..run.processes import count, gather, rank, sharded, uses_cpu
from .optimizers import OptimizerFactory, option
from .windows import label_count

#: The norm to which optimizers other than LoRARite have their gradients clipped where no other is given.
MAX_GRAD_NORM = 1.0


def make_trainer(
    trainer_class: Any, network: Any, options: Any, collator: Callable[..., Any], rows: Any, **more: Any
) -> tuple[Any, bool]:
    """The Trainer of a run, with its optimizer, whose errors are blamed on --optimizer.

    Args:
        trainer_class: transformers' Trainer or one made of it.
        network: the model with its adapter.
        options: as ``lora-rite train`` takes them: ``out``, ``steps``, ``batch_size``, ``optimizer``, ``lr``,
            ``optimizer_args``, ``weight_decay``, ``warmup``, ``scheduler``, ``scheduler_args``, ``seed``,
            ``log_every`` and ``max_grad_norm``.
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
    if sharded() and not trainer.accelerator.is_fsdp2:
        raise LoRARiteValueError("accelerate shards a model by FSDP2 on GPUs alone: launch without FSDP")
    with blame(option(options.optimizer, options.optimizer_args)):
        is_lora_rite = isinstance(trainer.create_optimizer(), LoRARite)
    given = MAX_GRAD_NORM if options.max_grad_norm is None else options.max_grad_norm
    trainer.args.max_grad_norm = 0.0 if is_lora_rite else given  # LoRA-RITE clips by itself, invariantly
    return trainer, is_lora_rite


def _arguments(options: Any, more: dict[str, Any]) -> Any:
    import torch
    from transformers import TrainingArguments

    with blame("the Trainer's arguments"):  # what options are to blame for was found before
        arguments = TrainingArguments(
            output_dir=str(options.out / "checkpoints"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.lr,
            weight_decay=options.weight_decay,
            lr_scheduler_type=options.scheduler,
            lr_scheduler_kwargs=options.scheduler_args or {},
            warmup_steps=round(options.warmup * options.steps),
            use_cpu=uses_cpu(),
            seed=options.seed,
            data_seed=options.seed,
            # Experts without a token have no gradient in one process and one in another. (And DDP does not sort its
            # buckets anew after the first step then, with which sums may come in another order in a resumed run.)
            ddp_find_unused_parameters=True,
            logging_steps=options.log_every,
            logging_nan_inf_filter=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            **more,
        )
    ours = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "no"
    if arguments.mixed_precision != ours:
        warn(f"mixed_precision: {arguments.mixed_precision} of accelerate's config is not used: --dtype says what is")
        arguments.mixed_precision = ours
    if arguments.n_gpu > 1:  # else the Trainer would have DataParallel make batches so many times as large
        arguments._n_gpu = 1
    return arguments


def add_callbacks(
    trainer: Any,
    reporter: Any,
    progress: bool,
    measure: Callable[[], float],
    eval_every: int,
    keep_best: bool = False,
    early_stopping: int = 0,
) -> None:
    """The clock, the held-out loss, the progress and, in front of the reporters, LoRARite's figures. TensorBoard's
    files go beside the checkpoints, unless TENSORBOARD_LOGGING_DIR says where."""
    from transformers import PrinterCallback
    from transformers.integrations import TensorBoardCallback

    from .callbacks import Bar, Clock, HeldOut, Lines

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Clock())
    if eval_every:
        trainer.add_callback(HeldOut(trainer, measure, eval_every, keep_best or early_stopping > 0, early_stopping))
    if progress:
        trainer.add_callback(Bar() if shows_bars(progress) else Lines())
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(trainer.args.output_dir).with_name("tensorboard"))
    if reporter is not None:
        trainer.callback_handler.callbacks.insert(0, reporter)


def held_out_loss(
    model: Any, rows: list[dict[str, list[int]]], collator: Any, batch_size: int, *, progress: bool = False
) -> float:
    """Mean cross-entropy in nat over all tokens that carry loss (each token counts the same). Several processes share
    the batches, and all of them return the mean over all, added in the order in which one process adds it."""
    import torch
    from tqdm.auto import tqdm

    encoder_decoder = model.config.is_encoder_decoder
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    mine = batches[rank() :: count()]
    mine += batches[:1] * (len(batches[:: count()]) - len(mine))  # FSDP2 has all wait for all in each pass
    sums: list[tuple[float, int]] = []
    training = model.training
    model.eval()
    # The Trainer leaves its autocast on a model that it has trained: without ours, one that it has not trained yet, or
    # that is evaluated alone, would give another loss (by 5e-4 of it on the embedded model in bfloat16).
    low = model.dtype in (torch.bfloat16, torch.float16)
    cast = torch.autocast(model.device.type, model.dtype if low else None, enabled=low)
    with torch.no_grad(), cast:  # FSDP2 cannot train on with what it has gathered in inference mode
        for part in tqdm(mine, desc="measuring the held-out loss", leave=False, disable=not progress):
            batch = collator([dict(row) for row in part]).to(model.device)
            tokens = label_count(part, encoder_decoder)
            sums.append((float(model(**batch).loss) * tokens, tokens))
    model.train(training)
    in_order = list(chain.from_iterable(zip(*gather(sums), strict=True)))[: len(batches)]
    return sum(loss for loss, _ in in_order) / sum(tokens for _, tokens in in_order)


def seconds(state: Any) -> dict[str, float | None]:
    """From the Trainer's state: seconds of training up to the end of the last step, medians over the steps, and the
    optimizer's share. Steps before a checkpoint that came without times are not among them; None where there are no
    others. On a GPU, kernels run on after the host goes on: there the share is the host's."""
    from .callbacks import CLOCK

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
