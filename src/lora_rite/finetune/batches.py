"""Batches that several processes share: as if one had a batch of all their windows."""

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch.utils.data import Sampler

from ..run.processes import count
from .windows import IGNORED, Row


class Rows(list[Row]):
    """Rows to train on. Behind the last one there is one more, without loss, that completes a batch."""

    def __getitem__(self, index: Any) -> Any:
        if index != len(self):
            return super().__getitem__(index)
        shortest = min(self, key=lambda row: len(row["input_ids"]))
        if "position_ids" not in shortest:  # packed windows are all of one length
            shortest = {key: values[:2] for key, values in shortest.items()}
        return {**shortest, "labels": [IGNORED] * len(shortest["labels"])}


class Completed(Sampler[int]):
    """The order of another sampler, and then indices of the row without loss until its length is a ``multiple``. (By
    itself, accelerate completes the last batches of an epoch with rows that were in it before.)

    Args:
        sampler: of all rows.
        multiple: windows in a batch of all processes; 1 of one, whose last batch is a smaller one.
        seed: of a sampler that draws from torch's generator, which dropout leaves in another state in each process, and
            which a resumed run does not have as it was at the beginning of the epoch.
    """

    def __init__(self, sampler: Any, multiple: int, seed: int):
        self.sampler, self.multiple, self.seed = sampler, multiple, seed

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from repeat(len(self.sampler), len(self) - len(self.sampler))

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.multiple) * self.multiple

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        else:
            self.sampler.generator = torch.Generator().manual_seed(self.seed + epoch)


def shared_batches(trainer_class: type) -> type:
    """A class of transformers' Trainer whose processes train on one batch together, in the order of one process."""

    class SharedBatches(trainer_class):  # type: ignore[misc, valid-type]
        def get_train_dataloader(self) -> Any:
            loader = super().get_train_dataloader()
            outer: Any = loader.batch_sampler
            batches = getattr(outer, "batch_sampler", outer)  # inside accelerate's shard
            sampler = batches.sampler
            if self.args.train_sampling_strategy == "group_by_length":
                sampler.batch_size *= count()
            multiple = self.args.train_batch_size * count() if count() > 1 else 1
            loader.set_sampler(Completed(sampler, multiple, self.args.seed))
            return loader

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            """The loss of a model that gives the mean over its own tokens counts by their share of all tokens."""
            if count() == 1 or self.model_accepts_loss_kwargs:
                return super().compute_loss(model, inputs, return_outputs, **kwargs)
            labels = inputs["labels"]
            mine = labels[..., int(self._loss_shifts_labels) :].ne(IGNORED).sum()
            if not mine:
                labels[0, -1] = 0  # the mean over no tokens is NaN, and this one counts 0 times
            loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
            loss = loss * mine * count() / self.accelerator.reduce(mine, "sum")
            return (loss, outputs) if return_outputs else loss

    return SharedBatches


def divides_by_items(network: Any, row: Row) -> bool:
    """Whether a model's loss is the sum over tokens, divided by the ``num_items_in_batch`` that it is given. (T5 takes
    it and gives the mean all the same, so that the Trainer would add up means over accumulated batches and processes.)
    Tried on two tokens of the row.
    """
    encoder_decoder = network.config.is_encoder_decoder
    learnt = [label for label in row["labels"] if label != IGNORED]
    labels = [learnt[0], learnt[-1]]
    ids = row["input_ids"][:2] if encoder_decoder else labels
    values = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
    batch = {key: torch.tensor([value], device=network.device) for key, value in values.items()}
    tokens = 2 if encoder_decoder else 1
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            mean = network(**batch).loss
            half = network(**batch, num_items_in_batch=torch.tensor(2 * tokens, device=mean.device)).loss
    except TypeError:  # it takes none
        return False
    finally:
        network.train(training)
    return bool(half < 0.75 * mean)
