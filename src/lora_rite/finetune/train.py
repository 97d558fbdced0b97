"""``lora-rite train``: LoRA fine-tuning of a language model on transformers' Trainer."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from ..errors import LoRARiteValueError, warn
from ..optim.modes import evaluating
from ..run import checkpoints, digest
from ..run.files import locked
from ..run.run import Run, crash_safe
from ..run.versions import versions
from .chats import set_chat_template
from .checks import check_options, finished_result
from .data import Chat, Sample, Split, read_data, split
from .labelled import predict_labelled
from .load import attach_adapter, load_model
from .optimizers import check_optimizer
from .preview import describe_windows, show_examples
from .publish import check_push, export, next_commands, push
from .tasks import examples, read_rows, read_task
from .trainer import add_callbacks, describe_optimizer, held_out_loss, log_entries, make_trainer, seconds
from .windows import IGNORED, Windows, label_count


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
    chat_template: Path | None = None,
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
    preview: int = 0,
    trust_remote_code: bool = False,
    push_to_hub: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
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
        chat_template: file with the chat template (Jinja) for conversations; by default the model's own.
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
        preview: print so many windows of the training text as the model sees them, with « » around what carries loss,
            and stop.
        trust_remote_code: allow the model's own code to run.
        push_to_hub: then upload the adapter to this repository of the hub (a new one is private), as lora-rite push.
        progress: show a progress bar.
    """
    options = SimpleNamespace(**locals())
    if push_to_hub is not None:
        check_push("--push_to_hub", push_to_hub)
    result = _train(options)
    if push_to_hub is not None and not preview:
        print(push(out, push_to_hub))
    return result


def _train(options: SimpleNamespace) -> dict[str, Any]:
    """:func:`train` with its options in one place."""
    settings = check_options(options)
    examples = _read(options)
    if options.preview:
        where = options.model, options.max_length, options.chat_template, options.trust_remote_code
        show_examples(options.preview, examples.parts.train, *where)
        return {}
    if (finished := finished_result(options.out, settings, options.resume, options.allow_changed)) is not None:
        return finished
    prepared = _prepare(options, examples)
    with locked(options.out):
        if (finished := finished_result(options.out, settings, options.resume, options.allow_changed)) is not None:
            return finished  # by the process that had the lock before
        return _run(options, settings, examples, prepared)


class _Examples(NamedTuple):
    """The examples to train on and those held out, where they come from, and how many of the latter are among the
    former."""

    parts: Split
    sources: dict[str, str]
    contaminated: int


class _Prepared(NamedTuple):
    """What a run needs: the Trainer with its network, the tokenizer, the windows to train on and those held out,
    digests of what goes in, and the measurement of the held-out loss."""

    trainer: Any
    tokenizer: Any
    train: Windows
    held_out: Windows
    inputs: dict[str, str]
    measure: Callable[[], float]


def _read(options: SimpleNamespace) -> _Examples:
    """Reads the examples, and warns of held-out ones that are in the training data too."""
    parts, sources = _parts(options)
    if options.chat_template is not None and not any(isinstance(e, Chat) for part in parts for e in part):
        raise LoRARiteValueError("--chat_template: no example is a conversation that it could be for")
    contaminated = len(set(parts.train) & set(parts.held_out))
    if contaminated:
        warn(f"{contaminated} held-out examples are in the training data too: the held-out loss is too good")
    return _Examples(parts, sources, contaminated)


def _say(options: SimpleNamespace, line: str) -> None:
    if options.progress:
        print(line)


def _parts(options: SimpleNamespace) -> tuple[Split, dict[str, str]]:
    data, task, data_dir, validation = options.data, options.task, options.data_dir, options.validation

    def read(path: Path) -> list[Sample]:
        found = read_data(path, options.skip_bad_lines)
        _say(options, found.summary(str(path)))
        return found.examples

    if data is not None and task is None:
        found, source = read(data), str(data)
    elif task is not None and data is None:
        found, source = read_task(task, "train", data_dir, progress=options.progress)
    else:
        raise LoRARiteValueError("give either --data or --task")
    if validation is not None:
        return Split(found, read(validation)), {"train": source, "held_out": str(validation)}
    if task is not None and (rows := read_rows(task, "validation", data_dir)) is not None:
        return Split(found, examples(task, rows)), {"train": source, "held_out": rows.source}
    sources = {"train": source, "held_out": f"{options.holdout:g} of {source}"}
    return split(found, options.holdout, options.seed), sources


def _prepare(options: SimpleNamespace, examples: _Examples) -> _Prepared:
    """Loads the model, makes windows of the examples and the Trainer, which is the first to write into the folder."""
    from transformers import DataCollatorForSeq2Seq, Trainer, set_seed

    from .. import LoRARiteCallback
    from .limits import prepare_windows

    network, tokenizer = load_model(options.model, bf16=options.bf16, trust_remote_code=options.trust_remote_code)
    if options.chat_template is not None:
        set_chat_template(tokenizer, options.chat_template)
    train, held_out = prepare_windows(
        examples.parts, network, tokenizer, options.model, options.max_length, packing=options.packing
    )
    for name, part, found in zip(("training", "held out"), examples.parts, (train, held_out), strict=True):
        _say(options, describe_windows(name, part, found, options.max_length, network.config.is_encoder_decoder))
    if options.group_by_length:
        held_out.rows.sort(key=lambda row: len(row["input_ids"]))
    inputs = {
        "base_weights": digest.digest_tensors(sorted(network.state_dict().items())),
        "tokens": digest.digest_rows(train.rows, held_out.rows),
    }
    set_seed(options.seed)
    network = attach_adapter(
        network,
        rank=options.rank,
        alpha=options.alpha,
        target_modules=options.target_modules,
        dropout=options.dropout,
    )
    check_optimizer(network, options.optimizer, options.lr, options.weight_decay, options.optimizer_args)
    predict_labelled(network)
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    with locked(options.out):
        pass  # the Trainer makes folders: from here on, the folder is known as one of ours
    trainer, is_lora_rite = make_trainer(
        crash_safe(Trainer),
        network,
        options,
        collator,
        train.rows,
        gradient_accumulation_steps=options.accumulation,
        bf16=options.bf16,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or 500,
        save_total_limit=None,  # rotation is ours: it counts checkpoints that verify
        report_to=options.report_to,
        train_sampling_strategy="group_by_length" if options.group_by_length else "random",
    )

    def measure() -> float:
        with evaluating(trainer.optimizer):
            return held_out_loss(network, held_out.rows, collator, options.batch_size)

    every = options.layers_every
    reporter = LoRARiteCallback(options.out / "layers.jsonl" if every else None, every or 1) if is_lora_rite else None
    add_callbacks(trainer, reporter, options.progress, measure, options.eval_every)
    return _Prepared(trainer, tokenizer, train, held_out, inputs, measure)


def _run(
    options: SimpleNamespace, settings: dict[str, Any], examples: _Examples, prepared: _Prepared
) -> dict[str, Any]:
    """Begins or resumes the run, trains, and writes adapter and result, which it returns."""
    trainer, _, train, held_out, inputs, measure = prepared
    network = trainer.model
    if options.save_every:
        checkpoints.check_space(options.out, network)
    run = Run(options.out, settings, inputs, versions(), options.allow_changed)
    run.begin(options.resume)
    before = measure()
    run.train(trainer, options.steps)
    after = measure()
    if not math.isfinite(after):
        run.fail(f"the held-out loss is {after} after training: lower --lr", options.steps)
    result = {
        "settings": settings,
        "data": examples.sources,
        "inputs": inputs,
        "changes": run.record["changes"],
        "held_out": {
            "before": before,
            "after": after,
            "tokens": label_count(held_out.rows, network.config.is_encoder_decoder),
            "examples_in_training_data": examples.contaminated,
        },
        "perplexity": {"before": _perplexity(before), "after": _perplexity(after)},
        "losses": log_entries(trainer.state.log_history, "loss", "learning_rate"),
        "held_out_losses": log_entries(trainer.state.log_history, "held_out_loss"),
        "log": trainer.state.log_history,
        "seconds": seconds(trainer.state),
        "optimizer": describe_optimizer(trainer.optimizer),
        "windows": {"train": len(train.rows), "held_out": len(held_out.rows)},
        "examples": {
            "train": len(examples.parts.train),
            "held_out": len(examples.parts.held_out),
            "cut": {"train": train.cut, "held_out": held_out.cut},
            "dropped": {"train": train.dropped, "held_out": held_out.dropped},
        },
        "versions": versions(),
    }
    with evaluating(trainer.optimizer):
        run.finish(lambda folder: export(folder, network, prepared.tokenizer, result), result)
    return result


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


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # beyond the largest float
