"""What ``lora-rite train`` says on the terminal: what it is about to do, and what came of it."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import warn
from ..run.console import number
from ..run.processes import count, sharded
from ..run.versions import chip
from .memory import count_text, estimate, size_text
from .publish import next_commands
from .windows import Row, Windows, label_count


def _console() -> Any:
    from rich.console import Console

    width = None if sys.stderr.isatty() else 160
    return Console(file=sys.stderr, width=width, highlight=False)  # stdout has what came of it alone


def announce(options: Any) -> None:
    """The first line of a run, before anything is loaded."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    where = f"on {'cpu' if device is None else device.type} ({chip()})"
    if count() > 1:
        where = f"in {count()} processes{' by FSDP2' if sharded() else ''} {where}"
    elif torch.cuda.device_count() > 1:
        gpus = torch.cuda.device_count()
        warn(f"one of {gpus} GPUs is used: torchrun --nproc_per_node {gpus} -m lora_rite train … uses all")
    _console().print(f"lora-rite train: {options.model} {where}, into {options.out}", markup=False)


@contextmanager
def busy(what: str, progress: bool) -> Iterator[None]:
    """Says on a terminal what is being done, with a spinner."""
    if not progress:
        yield
        return
    with _console().status(what):
        yield


def describe(
    options: Any, network: Any, dtype: Any, train: Windows, held_out: Windows, examples: Any
) -> dict[str, Any]:
    """What a run is, for its result.json and :func:`show`.

    Args:
        options: those of ``lora-rite train``, with its steps.
        network: the model with its adapter.
        dtype: torch's, of what the model computes in.
        train, held_out: the windows.
        examples: ``parts`` with the examples of both.
    """
    import torch

    from .. import find_pairs

    device = torch.accelerator.current_accelerator(check_available=True)
    parameters = list(network.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    whole = network.num_parameters() if hasattr(network, "num_parameters") else sum(p.numel() for p in parameters)
    longest = max(len(row["input_ids"]) for row in train.rows)
    pairing = find_pairs(network)
    of_a_step = options.batch_size * options.accumulation * count()
    return {
        "device": "cpu" if device is None else device.type,
        "chip": chip(),
        "dtype": str(dtype).removeprefix("torch."),
        "quantised_bits": options.bits,
        "attention": network.config._attn_implementation,
        "processes": count(),
        "sharded": sharded(),
        "steps": options.steps,
        "windows_per_step": of_a_step,
        "epochs": options.steps * of_a_step / len(train.rows),
        "examples": {name: len(part) for name, part in examples.parts._asdict().items()},
        "windows": {"train": len(train.rows), "held_out": len(held_out.rows)},
        "tokens": {"train": _tokens(train.rows), "held_out": _tokens(held_out.rows)},
        "tokens_with_loss": {
            name: label_count(part.rows, network.config.is_encoder_decoder)
            for name, part in (("train", train), ("held_out", held_out))
        },
        "parameters": whole,
        "trained": trained,
        "trained_share": trained / whole,
        "pairs": pairing.count,
        "trained_outside_pairs": sum(left.parameter.numel() for left in pairing.left_out),
        "memory": estimate(network, options, longest, dtype.itemsize),
    }


def _tokens(rows: list[Row]) -> int:
    """Tokens of rows, those of a packed window's padding too."""
    return sum(len(row["input_ids"]) for row in rows)


def show(run: dict[str, Any], options: Any, held_out: int) -> None:
    """Prints what :func:`describe` has found.

    Args:
        run: from there.
        options: those of ``lora-rite train``.
        held_out: windows that there are to measure the held-out loss on, before ``eval_limit``.
    """
    from rich.markup import escape
    from rich.table import Table

    tokens, loss, windows, memory = run["tokens"], run["tokens_with_loss"], run["windows"], run["memory"]
    grid = Table.grid("", "", padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    bits = f", linear maps in {run['quantised_bits']} bits" if run["quantised_bits"] else ""
    grid.add_row(
        "model", f"{count_text(run['parameters'])} parameters in {run['dtype']}{bits}, {run['attention']} attention"
    )
    some = f" of {held_out} (--eval_limit)" if windows["held_out"] < held_out else ""
    grid.add_row(
        "data",
        f"{number(run['examples']['train'], 'example')}, {tokens['train']:,} tokens, {loss['train']:,} with loss; "
        f"held out: {number(windows['held_out'], 'window')}{some}, {loss['held_out']:,} tokens with loss",
    )
    by_name = (options.optimizer_args or {}).get("lr_by_name") or {}
    rates = "".join(f", {escape(str(name))} {lr}" for name, lr in by_name.items())
    clip = "" if run["max_grad_norm"] == 0 else f", gradients clipped to norm {run['max_grad_norm']:g}"
    accumulated = f" × {options.accumulation}" if options.accumulation > 1 else ""
    shares = f", {run['processes']} processes × {options.batch_size}{accumulated}" if run["processes"] > 1 else ""
    grid.add_row(
        "training",
        f"{number(options.steps, 'step')} of {number(run['windows_per_step'], 'window')}{shares} "
        f"({run['epochs']:.2f} epochs) by {options.optimizer}, lr {options.lr:g}{rates}{clip}",
    )
    outside = run["trained_outside_pairs"]
    rate = (options.optimizer_args or {}).get("adamw_lr")
    by = f" by AdamW, lr {rate:g}{' or by name' if by_name else ''}" if rate is not None else ""
    others = f", {outside:,} of them in no pair{by}" if outside else ""
    trained = f"{run['trained']:,} trained parameters ({run['trained_share']:.2%})"
    grid.add_row("adapter", f"{trained} in {number(run['pairs'], 'pair')}{others}")
    known = (f"{key} {size_text(size)}" for key, size in memory.items() if key != "estimated" and size is not None)
    each = " in each process" if run["processes"] > 1 else ""
    grid.add_row("memory", f"about {size_text(memory['estimated'])}{each}: {', '.join(known)}")
    _console().print(grid)


def summary(result: dict[str, Any]) -> str:
    """What a run of :func:`~lora_rite.finetune.train.train` came to, in a few lines."""
    loss, perplexity, took = result["held_out"], result["perplexity"], result["seconds"]
    cut = sum(result["examples"]["cut"].values())
    lines = [
        f"held-out loss {loss['before']:.4f} → {loss['after']:.4f} nat a token, "
        f"perplexity {perplexity['before']:.2f} → {perplexity['after']:.2f} ({number(loss['tokens'], 'token')})"
    ]
    lines += advice(result)
    if took["step"]:
        lines.append("{training:.0f} s of training, {optimizer_share:.1%} of a step in the optimizer".format(**took))
    if peak := result.get("run", {}).get("memory", {}).get("peak"):
        whole = ", Python and its libraries among it" if result["run"]["device"] == "cpu" else ""
        lines[-1] += f", at most {size_text(peak)} of memory{whole}"
    if cut:
        lines.append(f"{number(cut, 'example')} {'is' if cut == 1 else 'are'} longer than --max_length and cut")
    lines.append(f"adapter and result.json in {result['settings']['out']}")
    return "\n".join([*lines, next_commands(result)])


def advice(result: dict[str, Any]) -> list[str]:
    """What the held-out losses say: that they rose, and what to try; which adapter was kept."""
    loss, settings = result["held_out"], result["settings"]
    measured = result["held_out_losses"]
    if best := result.get("best"):
        why = (
            f" (the last, {best['last']:.4f}, at step {best['last_step']})" if best["step"] < best["last_step"] else ""
        )
        return [f"the adapter is that of step {best['step']}, the lowest held-out loss{why}", *_rose(loss, settings)]
    if rose := _rose(loss, settings):
        return rose
    lowest = min(measured, key=lambda entry: entry["held_out_loss"], default=None)
    if lowest is not None and lowest["held_out_loss"] < loss["after"]:
        return [
            f"it was lower at step {lowest['step']}, {lowest['held_out_loss']:.4f}: try fewer steps, a lower --lr, or "
            "--keep_best"
        ]
    return []


def _rose(loss: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    if not math.isfinite(loss["after"]) or loss["after"] >= loss["before"]:
        return [
            f"the held-out loss did not fall: try a third of --lr {settings['lr']:g}, or fewer steps; and see whether "
            "what is held out is of the same kind as the data"
        ]
    return []
