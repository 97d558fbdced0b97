"""Multiple choice for sentence encoders, as a recipe's ``function``: the answer whose embedding is next to the
question's.

The score of an answer is ``scale`` times the cosine between its embedding and the question's, an embedding the mean
over a text's tokens, as sentence-transformers trains such models (its default scale is 20). There is no head: nothing
but the adapter learns.
"""

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import LoRARiteValueError
from ..inputs import blame
from ..optim.modes import evaluating
from ..run.processes import check_one
from .data import Example, read_examples
from .load import attach_adapter
from .models import refuse_adapter
from .optimizers import check_arguments, check_optimizer
from .schedules import check_schedule
from .trainer import add_callbacks, describe_optimizer, log_entries, make_trainer, seconds


def train_choices(
    out: Path,
    data: Path,
    validation: Path,
    model: str,
    optimizer: str,
    lr: float,
    optimizer_args: dict[str, Any] | None = None,
    rank: int = 16,
    steps: int = 200,
    batch_size: int = 16,
    max_length: int = 64,
    warmup: float = 0.1,
    scheduler: str = "cosine",
    scheduler_args: dict[str, Any] | None = None,
    scale: float = 20.0,
    seed: int = 0,
    log_every: int = 1,
    eval_every: int = 0,
) -> dict[str, Any]:
    """Fine-tunes a LoRA adapter on all linear maps of a sentence encoder to choose among answers.

    Args:
        out: folder for what the Trainer writes.
        data: ``.jsonl`` file of questions, {"prompt", "completion", "others"}: the right answer, and the wrong ones.
        validation: held-out questions.
        model: hub id or local folder of the encoder.
        optimizer: as ``lora-rite train`` takes it.
        lr: peak learning rate.
        optimizer_args: further keyword arguments of the optimizer.
        rank: rank of the adapter; alpha is the same.
        steps: optimizer steps.
        batch_size: questions in a batch.
        max_length: tokens of a text; longer ones are cut.
        warmup: share of the steps in which lr rises linearly.
        scheduler: transformers' name of the schedule after it.
        scheduler_args: further arguments of the schedule.
        scale: the scores are so many times the cosine.
        seed: of the adapter's initialisation and the order of batches.
        log_every: steps between logged training losses.
        eval_every: steps between measurements of the held-out loss; 0 measures before and after alone.

    Returns:
        What a result.json has: ``held_out`` is the mean cross-entropy of a question in nat before and after,
        ``accuracy`` the share of questions whose right answer has the highest score, and the rest as in
        ``lora-rite train``.

    Raises:
        LoRARiteValueError: a question without wrong answers, a model that cannot be loaded, an optimizer or a schedule
            that cannot train it.
    """
    options = SimpleNamespace(**locals(), weight_decay=0.0, max_grad_norm=None)

    from transformers import Trainer, set_seed
    from transformers.utils import logging

    from .. import LoRARiteCallback

    logging.disable_progress_bar()
    check_one("train_choices")
    check_arguments(optimizer, optimizer_args)
    with blame(f"scheduler {scheduler}"):
        check_schedule(scheduler, scheduler_args, lr, steps, warmup)
    questions, held_out = (_questions(path) for path in (data, validation))
    encoder, tokenizer = _load(model)
    set_seed(seed)
    network = Chooser(attach_adapter(encoder, rank=rank), scale)
    collate = partial(_collate, tokenizer, max_length)
    check_optimizer(network, optimizer, lr, 0.0, optimizer_args)
    more = {"save_strategy": "no", "report_to": "none", "remove_unused_columns": False}
    trainer, is_lora_rite = make_trainer(Trainer, network, options, collate, questions, **more)
    measure = lambda: _measure(trainer, held_out, 4 * batch_size)
    add_callbacks(trainer, LoRARiteCallback() if is_lora_rite else None, False, lambda: measure()[0], eval_every)
    before = measure()
    trainer.train()
    after = measure()
    return {
        "held_out": {"before": before[0], "after": after[0]},
        "accuracy": {"before": before[1], "after": after[1], "questions": len(held_out)},
        "losses": log_entries(trainer.state.log_history, "loss", "learning_rate"),
        "held_out_losses": log_entries(trainer.state.log_history, "held_out_loss"),
        "seconds": seconds(trainer.state),
        "optimizer": describe_optimizer(trainer.optimizer),
    }


def _load(model: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    with blame(f"cannot load model {model}"):
        refuse_adapter(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
        return AutoModel.from_pretrained(model, dtype=torch.float32, use_safetensors=True), tokenizer


def _collate(tokenizer: Any, max_length: int, batch: list[Example]) -> dict[str, Any]:
    encode = lambda texts: dict(
        tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    )
    counts = torch.tensor([1 + len(question.others) for question in batch])
    answers = [text.strip() for question in batch for text in (question.completion, *question.others)]
    return {"questions": encode([q.prompt for q in batch]), "answers": encode(answers), "counts": counts}


def _measure(trainer: Any, questions: list[Example], batch_size: int) -> tuple[float, float]:
    """Mean cross-entropy of a question in nat, and the share of questions whose right answer has the highest score."""
    total, right = 0.0, 0
    network = trainer.model
    network.eval()
    with evaluating(trainer.optimizer), torch.inference_mode():
        for i in range(0, len(questions), batch_size):
            part = questions[i : i + batch_size]
            scores = network(**trainer._prepare_inputs(trainer.data_collator(part)))["scores"]
            total += float(_loss(scores)) * len(part)
            right += int((scores.argmax(-1) == 0).sum())
    network.train()
    return total / len(questions), right / len(questions)


class Chooser(torch.nn.Module):
    """Scores of answers. ``encoder`` gives ``last_hidden_state``, (texts, tokens, width)."""

    def __init__(self, encoder: torch.nn.Module, scale: float):
        super().__init__()
        self.encoder, self.scale = encoder, scale

    def forward(self, questions: dict[str, Tensor], answers: dict[str, Tensor], counts: Tensor) -> dict[str, Tensor]:
        """``loss``, mean over questions; and ``scores`` (questions, most answers), the right one first, −inf where a
        question has fewer (``counts``) answers."""
        asked, given = self._embed(questions), self._embed(answers)
        cosines = (asked.repeat_interleave(counts, 0) * given).sum(-1)
        places = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
        scores = torch.full(places.shape, -math.inf, device=cosines.device)
        scores = scores.masked_scatter(places, self.scale * cosines)
        return {"loss": _loss(scores), "scores": scores}

    def _embed(self, tokens: dict[str, Tensor]) -> Tensor:
        mask = tokens["attention_mask"][..., None]
        mean = (self.encoder(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)


def _loss(scores: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.long))


def _questions(path: Path) -> list[Example]:
    questions = []
    for n, question in enumerate(read_examples(path), 1):
        if not isinstance(question, Example) or not question.prompt or not question.others:
            raise LoRARiteValueError(f'{path}:{n}: a question needs "prompt", "completion" and "others", wrong answers')
        questions.append(question)
    return questions
