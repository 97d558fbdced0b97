"""Problems and fits that several experiments share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..optim.optimizer import LoRARite

#: Label → maker of the optimizer of the pair [A, B].
Makers = dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]]


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent p of y ∝ xᵖ, by least squares in logarithms."""
    import numpy as np

    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


class Regression:
    """A layer h = BAx of width n = m that learns y: both are linear in the same few hidden features, so that all
    entries of x and y are Θ(1) and the task is the same at every width.

    x = U·z, y = C·z, z (hidden) standard normal; ``rank`` of the adapter, ``task_rank`` of C.
    """

    def __init__(self, width: int, rank: int, seed: int = 0, *, hidden: int = 32, task_rank: int = 4, batch: int = 16):
        self.generator = torch.Generator().manual_seed(seed)
        self.hidden, self.batch = hidden, batch
        self.u = self._draw(width, hidden) / hidden**0.5
        self.c = self._draw(width, task_rank) @ self._draw(task_rank, hidden) / (hidden * task_rank) ** 0.5
        bound = (1 / width) ** 0.5  # torch's and PEFT's default for A
        self.a = torch.nn.Parameter((torch.rand(rank, width, generator=self.generator) * 2 - 1) * bound)
        self.b = torch.nn.Parameter(torch.zeros(width, rank))

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def data(self, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """x (batch, n) and y (batch, m)."""
        z = self._draw(batch or self.batch, self.hidden)
        return z @ self.u.mT, z @ self.c.mT

    @torch.no_grad()
    def gradients(self, x: Tensor, y: Tensor) -> None:
        """Of the mean over the batch of ‖BAx − y‖²/2, into ``a.grad`` and ``b.grad``."""
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        inner = x @ a.mT
        error = (inner @ b.mT - y) / len(x)
        self.b.grad, self.a.grad = (error.mT @ inner).to(self.b.dtype), ((error @ b).mT @ x).to(self.a.dtype)

    @torch.no_grad()
    def loss(self, x: Tensor, y: Tensor) -> float:
        """Mean square of the error, in units of that of y."""
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        return float((x @ a.mT @ b.mT - y).square().mean() / y.square().mean())


def loraplus(ratio: float) -> Any:
    return lambda pair, lr: torch.optim.AdamW(
        [{"params": pair[:1], "lr": lr}, {"params": pair[1:], "lr": ratio * lr}], weight_decay=0.0
    )


def rite(**options: Any) -> Any:
    # by name: of square factors, order alone would not tell A
    return lambda pair, lr: LoRARite(zip(("lora_A", "lora_B"), pair, strict=True), lr=lr, **options)


def adamw(pair: list[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(pair, lr=lr, weight_decay=0.0)
