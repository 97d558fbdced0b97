"""``lora-rite train``: LoRA fine-tuning of a language model on transformers' Trainer."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from ..errors import LoRARiteValueError
from ..optim.modes import evaluating
from ..run import checkpoints, digest, processes
from ..run.console import bars
from ..run.files import locked
from ..run.processes import gather, is_main, on_main, together
from ..run.run import Run, crash_safe
from ..run.shards import unshard_trained
from ..run.versions import versions
from .checks import check_options, finished_result, raised_steps
from .header import announce, describe, show
from .outcome import outcome
from .plans import adapter_digest
from .prepare import attach, load
from .preview import show_examples
from .publish import check_push, export, push
from .reading import Examples, read, say
from .trainer import add_callbacks, held_out_loss, log_entries, make_trainer
from .windows import IGNORED, Windows


def train(
    out: Path,
    data: Path | None = None, task: str | None = None, data_dir: Path | None = None, validation: Path | None = None,
    holdout: float = 0.1, limit: int | None = None, eval_limit: int = 256, skip_bad_lines: bool = False,
    model: str = "tiny", trust_remote_code: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None, bf16: bool = False,
    load_in_4bit: bool = False, load_in_8bit: bool = False,
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None,
    gradient_checkpointing: bool = False, torch_compile: Literal["default", "reduce-overhead"] | None = None,
    adapter: Path | None = None, rank: int = 16, alpha: float | None = None,
    target_modules: str | list[str] = "all-linear", modules_to_save: str | list[str] | None = None,
    dropout: float = 0.0, dora: bool = False, rslora: bool = False,
    optimizer: str = "lora-rite", lr: float | None = None, optimizer_args: dict[str, Any] | None = None,
    weight_decay: float = 0.0, max_grad_norm: float | None = None,
    steps: int | None = None, epochs: float | None = None, batch_size: int = 8, accumulation: int = 1,
    max_length: int = 256, packing: bool = False, chat_template: Path | None = None, preview: int = 0,
    group_by_length: bool = False,
    warmup: float = 0.1, scheduler: str = "cosine", scheduler_args: dict[str, Any] | None = None, seed: int = 0,
    log_every: int = 1, eval_every: int = 0, early_stopping: int = 0, keep_best: bool = False,
    save_every: int = 0, layers_every: int = 0, report_to: str = "none", push_to_hub: str | None = None,
    resume: bool = False, allow_changed: list[str] | None = None, progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tunes a LoRA adapter and writes it, with the figures of the run, into a folder.

    Into OUT go ``adapter/`` (for ``PeftModel.from_pretrained``; with its tokenizer and model card), ``result.json``
    (settings, versions, losses, times), ``settings.json`` and, while the run goes on, ``checkpoints/``.

    Args:
        out: folder for the results; must be new or empty, except with --resume.
        data: training text: a .jsonl, .json, .csv, .tsv or .parquet file (or .gz of one) of conversations ("messages",
            "conversations"), of "prompt" and "completion", of "instruction", "input" and "output", or of "text", with
            loss on what the assistant says, or the completion; a data set as NAME:SPLIT, by its hub id or folder; or
            any other text file.
        task: instead of data, the training split of a task by its name, in lm_eval's format, loss on the answer alone:
            hellaswag, arc_challenge, arc_easy, openbookqa, gsm8k, natural_instructions or natural_instructions:TASK.
        data_dir: folder with the task's rows as local files; without it, they come from the hub.
        validation: held-out text in the formats of data; without it, the task's validation split is held out, and
            where there is none, a share of the data.
        holdout: share of the data to hold out where no validation file is given.
        limit: train on the first so many examples alone (what is held out stays the same): to try it out.
        eval_limit: measure the held-out loss on so many windows, drawn at random once for all seeds; 0 takes all.
        skip_bad_lines: leave out lines of .jsonl files that cannot be used, and say how many.
        model: hub id, local folder or GGUF file (.gguf, dequantised) of a causal or an encoder-decoder language model;
            "tiny" is the causal one inside this package.
        trust_remote_code: allow the model's own code to run.
        dtype: of the model's weights and products: float32, bfloat16, float16 (on a GPU) or auto, the checkpoint's; by
            default float32, and auto where the model is quantised. The adapter is trained in float32.
        bf16: the same as --dtype bfloat16.
        load_in_4bit: quantise the linear maps to NF4 with bitsandbytes.
        load_in_8bit: quantise them to 8 bits (LLM.int8).
        attn_implementation: transformers' name of the attention: eager, sdpa or flash_attention_2; by default the
            model's own.
        gradient_checkpointing: keep each layer's input alone and compute the rest again for the gradient: less memory,
            about a third more time, the same result.
        torch_compile: have torch.compile make kernels of the training pass: default, or reduce-overhead, which on a GPU
            captures them in CUDA graphs. The first step waits for that, and so does the first batch of another length,
            so that it is for long runs, best where all windows are full (text, packing). Losses stay the same up to
            rounding; held-out losses are measured without it.
        adapter: folder of a PEFT adapter to go on from, instead of a new one; it has its own rank and modules.
        rank: rank of the adapter.
        alpha: LoRA's alpha (the adapter is scaled by alpha/rank); by default the rank.
        target_modules: layers that get an adapter: all-linear, names with commas between them or as a list, or a
            regular expression for the whole path.
        modules_to_save: names of modules that are trained as a whole and saved with the adapter, as lm_head; by
            lora-rite with AdamW, at lr 2e-4 or --optimizer_args.adamw_lr.
        dropout: dropout on the adapter's input.
        dora: DoRA: a trained magnitude for each output of a layer, as modules_to_save by AdamW.
        rslora: scale the adapter by alpha/√rank.
        optimizer: lora-rite, lora-rite-published, adamw, lora-plus, riemannian, muon, lamb, soap, shampoo, polora,
            lora-muon, or the import path package.module:attribute of an optimizer class, or of a factory that is called
            with the model.
        lr: peak learning rate; by default 5e-4 for lora-rite and 2e-4 for adamw.
        optimizer_args: further keyword arguments of the optimizer.
        weight_decay: decoupled weight decay.
        max_grad_norm: clip the norm of all gradients to this, 0 does not; by default 1, and for lora-rite, which clips
            by itself, 0.
        steps: optimizer steps; by default 200.
        epochs: instead of steps, how often to go through the data.
        batch_size: windows in a batch of each process; a step takes so many times the processes and the accumulation.
        accumulation: batches in a step.
        max_length: tokens in a window, at most the model's positions; for an encoder-decoder model, of a prompt and of
            a completion, each.
        packing: put several prompts with their completions into a window, each seeing itself alone: saves the padding
            where they are much shorter than max_length; a batch then has more of them.
        chat_template: file with the chat template (Jinja) for conversations; by default the model's own.
        preview: print so many windows of the training text as the model sees them, with « » around what carries loss,
            and stop.
        group_by_length: make batches of windows of about the same length, in training and where the held-out loss is
            measured: saves padding (each batch is padded to its longest window), and changes which come together.
        warmup: share of the steps in which lr rises linearly.
        scheduler: transformers' name of the schedule after the warm-up (cosine, linear, constant_with_warmup, …).
        scheduler_args: further arguments of the schedule, as min_lr_rate of cosine_with_min_lr.
        seed: of the adapter's initialisation, the split and the order of batches.
        log_every: steps between logged training losses; each is the mean of so many steps.
        eval_every: steps between measurements of the held-out loss; 0 measures before and after training alone.
        early_stopping: stop after so many measurements in a row without a new lowest held-out loss, and write the
            adapter of the lowest; 0 never stops.
        keep_best: write the adapter of the lowest held-out loss that was measured, instead of the last one.
        save_every: steps between checkpoints; 0 saves none, except where a signal ends the run. The last two are kept.
        layers_every: steps between figures of each layer in OUT/layers.jsonl (see docs/tuning.md); 0 writes none.
        report_to: transformers' name of a reporter: none, tensorboard (into OUT/tensorboard), trackio, wandb, …
        push_to_hub: then upload the adapter to this repository of the hub (a new one is private), as lora-rite push.
        resume: go on from the newest checkpoint in OUT that verifies, with the same settings, bitwise; a finished run
            goes on where steps or epochs are more.
        allow_changed: names of settings, or of what else a refused --resume has listed (tokens, torch, threads, …),
            that may differ from the interrupted run.
        progress: say what is run, show bars (a line each tenth of the steps where stderr is no terminal), and print
            held-out losses as they come.
    """
    options = SimpleNamespace(**locals())
    processes.check_several()
    with processes.quiet():
        processes.join()
        return _train_and_push(options)


def _train_and_push(options: SimpleNamespace) -> dict[str, Any]:
    """:func:`train` with its options in one place, in one of the processes of a run."""
    if not is_main():
        from transformers.utils import logging

        options.progress = False
        logging.set_verbosity_error()
    with bars(options.progress):
        if options.push_to_hub is not None:
            on_main(lambda: check_push("--push_to_hub", options.push_to_hub))
        result = _train(options)
        if options.push_to_hub is not None and not options.preview:
            print(on_main(lambda: push(options.out, options.push_to_hub)))
    return result


def _train(options: SimpleNamespace) -> dict[str, Any]:
    with together():
        settings = check_options(options)
        if options.progress and not options.preview:
            announce(options)
        examples = read(options)
    if options.preview:
        where = options.model, options.max_length, options.chat_template, options.trust_remote_code
        on_main(lambda: show_examples(options.preview, examples.parts.train, *where))
        return {}
    finished = lambda: on_main(lambda: finished_result(options.out, settings, options.resume, options.allow_changed))
    if (result := finished()) is not None:
        return result
    with together():
        prepared = _prepare(options, examples)
    if len({tuple(inputs.items()) for inputs in gather(prepared.inputs)}) > 1:
        message = "the processes have read different data or weights: the files must be the same on all machines"
        raise processes.everywhere(LoRARiteValueError(message))
    with locked(options.out):
        if (result := finished()) is not None:
            return result  # by the process that had the lock before
        return _run(options, settings, examples, prepared)


class _Prepared(NamedTuple):
    """What a run needs: the Trainer with its network, the tokenizer, the windows to train on and those held out,
    digests of what goes in, the measurement of the held-out loss, and what the run is
    (:func:`~lora_rite.finetune.header.describe`)."""

    trainer: Any
    tokenizer: Any
    train: Windows
    held_out: Windows
    inputs: dict[str, str]
    measure: Callable[[], float]
    run: dict[str, Any]


def _prepare(options: SimpleNamespace, examples: Examples) -> _Prepared:
    """Loads the model, makes windows of the examples and the Trainer, which is the first to write into the folder."""
    import torch
    from tqdm.auto import tqdm
    from transformers import DataCollatorForSeq2Seq, Trainer

    from .. import LoRARiteCallback
    from .batches import Rows, divides_by_items, shared_batches

    network, tokenizer, train, held_out, there = load(options, examples)
    dtype = network.dtype
    weights = tqdm(
        sorted(network.state_dict().items()), "checking the weights", leave=False, disable=not options.progress
    )
    inputs = {
        "base_weights": digest.digest_tensors(weights),
        "tokens": digest.digest_rows(train.rows, held_out.rows),
        **({} if options.adapter is None else {"adapter": adapter_digest(options.adapter)}),
    }
    network = attach(options, network)
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    with locked(options.out):
        pass  # the Trainer makes folders: from here on, the folder is known as one of ours
    trainer, is_lora_rite = make_trainer(
        crash_safe(shared_batches(Trainer)),
        network,
        options,
        collator,
        Rows(train.rows),
        gradient_accumulation_steps=options.accumulation,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or 500,
        save_total_limit=None,  # rotation is ours: it counts checkpoints that verify
        report_to=options.report_to,
        train_sampling_strategy="group_by_length" if options.group_by_length else "random",
        **({} if options.torch_compile is None else {"torch_compile_mode": options.torch_compile, "tf32": False}),
    )

    if trainer.model_accepts_loss_kwargs:
        trainer.model_accepts_loss_kwargs = divides_by_items(network, train.rows[0])
    if not is_main():  # each process drops other inputs of its layers
        torch.manual_seed(options.seed + processes.rank())

    def measure() -> float:
        with evaluating(trainer.optimizer):
            return held_out_loss(network, held_out.rows, collator, options.batch_size, progress=options.progress)

    every = options.layers_every
    reporter = LoRARiteCallback(options.out / "layers.jsonl" if every else None, every or 1) if is_lora_rite else None
    add_callbacks(
        trainer, reporter, options.progress, measure, options.eval_every, options.keep_best, options.early_stopping
    )
    run = describe(options, network, dtype, train, held_out, examples)
    run["max_grad_norm"] = trainer.args.max_grad_norm
    if options.progress:
        show(run, options, there)
    return _Prepared(trainer, tokenizer, train, held_out, inputs, measure, run)


def _begin_and_train(
    options: SimpleNamespace, settings: dict[str, Any], prepared: _Prepared
) -> tuple[Run, float, float]:
    """Begins or resumes the run and trains. Returns it with the held-out losses before and after."""
    from .callbacks import BEFORE, has_stopped

    trainer, measure = prepared.trainer, prepared.measure
    if options.save_every:
        on_main(lambda: checkpoints.check_space(options.out, trainer.model))
    allowed = [*(options.allow_changed or []), *on_main(lambda: raised_steps(options.out, settings))]
    run = Run(options.out, settings, prepared.inputs, versions(), allowed)
    run.begin(options.resume)
    if run.last_saved is not None:
        say(options, f"going on after step {run.last_saved}, the newest checkpoint that verifies")
    if processes.sharded():  # before it is shared out, the model may not fit
        trainer.on_prepared = lambda: trainer.state.stateful_callbacks.update({BEFORE: {"loss": measure()}})
    before = None if processes.sharded() else measure()
    run.train(trainer, options.steps, lambda state: has_stopped(state, options.early_stopping))
    before = trainer.state.stateful_callbacks[BEFORE]["loss"] if before is None else before
    measured = log_entries(trainer.state.log_history, "held_out_loss")[-1:]
    there = measured and measured[0]["step"] == trainer.state.global_step
    after = measured[0]["held_out_loss"] if there else measure()
    if not math.isfinite(after):
        run.fail(f"the held-out loss is {after} after training: lower --lr", trainer.state.global_step)
    return run, before, after


def _run(options: SimpleNamespace, settings: dict[str, Any], examples: Examples, prepared: _Prepared) -> dict[str, Any]:
    """Trains, and writes adapter and result, which it returns."""
    from .callbacks import LOWEST

    run, before, last = _begin_and_train(options, settings, prepared)
    trainer = prepared.trainer
    network, state = trainer.model, trainer.state
    best = None
    if run.best is not None:
        lowest = state.stateful_callbacks[LOWEST]
        if last < lowest["loss"]:
            run.best, lowest = None, {"loss": last, "step": state.global_step}
        best = {"step": lowest["step"], "held_out_loss": lowest["loss"], "last": last, "last_step": state.global_step}
    after = last if best is None else best["held_out_loss"]
    result = {
        "settings": {**settings, "steps": options.steps},
        "inputs": prepared.inputs,
        "changes": run.record["changes"],
        **outcome(trainer, prepared.train, prepared.held_out, examples, prepared.run, before, after),
        **({} if best is None else {"best": best}),
        "versions": versions(),
    }
    with evaluating(trainer.optimizer):
        unshard_trained(network)
        run.restore_best(network)
        run.finish(lambda folder: export(folder, network, prepared.tokenizer, result), result)
    return result
