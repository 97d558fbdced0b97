"""Training the embedded model with any optimizer, as `lora-rite demo` does, without the Trainer."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..finetune.data import read_examples
from ..finetune.load import attach_adapter, load_model
from ..finetune.trainer import held_out_loss
from ..finetune.windows import IGNORED, windows
from ..plan.pairs import find_pairs
from ..study.demo import write_data

LENGTH = 128  # tokens in a window


@functools.cache
def _texts() -> tuple[Any, list[dict[str, list[int]]], list[dict[str, list[int]]]]:
    """The tokenizer, and windows to train on and to validate on: the demo's C++ headers, its validation split."""
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        train, validation = (read_examples(Path(folder) / f"{name}.jsonl") for name in ("train", "validation"))
    tokenizer = load_model("tiny")[1]
    return tokenizer, windows(train, tokenizer, LENGTH).rows, windows(validation, tokenizer, LENGTH).rows


@functools.cache
def _answers(length: int) -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
    """The same texts as prompts of 64 tokens with ``length`` tokens of answer, which alone carry loss."""
    _, train, validation = _texts()
    cut = lambda rows: [
        {"input_ids": row["input_ids"][: 64 + length], "attention_mask": [1] * (64 + length),
         "labels": [IGNORED] * 64 + row["input_ids"][64 : 64 + length]}
        for row in rows
        if len(row["input_ids"]) >= 64 + length
    ]  # fmt: skip
    return cut(train), cut(validation)


def train_embedded(
    make: Callable[[Any], torch.optim.Optimizer],
    *,
    steps: int,
    rank: int = 16,
    batch_size: int = 8,
    warmup: float = 0.1,
    schedule: str = "cosine",
    answer: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    clip: float | None = None,
    watch: Callable[[int, Any], None] | None = None,
) -> dict[str, Any]:
    """Trains LoRA on all linear maps of the embedded model.

    Args:
        make: the optimizer of the model's adapter.
        steps: of ``batch_size`` windows of 128 tokens.
        rank: of the adapter.
        batch_size: windows a step.
        warmup: share of the steps.
        schedule: transformers' name of the schedule after it.
        answer: only so many tokens carry loss, after a prompt of 64.
        dtype: of the adapter.
        seed: of the adapter and the order of windows.
        clip: norm of the raw gradient to clip to (for AdamW).
        watch: called with the step and the model after each step.

    Returns:
        ``validation_loss`` (inf where it is not finite), and ``losses`` of each step.
    """
    from transformers import DataCollatorForSeq2Seq, get_scheduler

    tokenizer, train, validation = _texts()
    if answer:
        train, validation = _answers(answer)
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    torch.manual_seed(seed)
    model = attach_adapter(load_model("tiny")[0], rank=rank).train()
    for pair in find_pairs(model).pairs:
        pair.a.data, pair.b.data = pair.a.data.to(dtype), pair.b.data.to(dtype)
    optimizer = make(model)
    scheduler = get_scheduler(schedule, optimizer, round(warmup * steps), steps)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    losses = []
    for step in range(steps):
        rows = [train[order[i % len(order)]] for i in range(step * batch_size, (step + 1) * batch_size)]
        loss = model(**collator([dict(row) for row in rows])).loss
        optimizer.zero_grad()
        loss.backward()
        if not loss.isfinite():
            return {"validation_loss": float("inf"), "losses": losses}
        if clip:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
        if watch:
            watch(step + 1, model)
    value = held_out_loss(model, validation, collator, 16)
    return {"validation_loss": value if value == value else float("inf"), "losses": losses}


def pair_parameters(model: Any) -> list[torch.Tensor]:
    """A, B, A, B, …"""
    return [p for pair in find_pairs(model).pairs for p in (pair.a, pair.b)]
