"""Shampoo (Gupta, Koren, Singer 2018, arXiv:1802.09568) of each factor by itself."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.linalg import eigh
from ..algebra.step import bias_corrected_decay
from ..plan.state import State
from .base import PairOptimizer, Side


class Shampoo(PairOptimizer):
    """Shampoo of each LoRA factor by itself, the LoRA-RITE paper's baseline.

    For a factor's gradient G (rows, r), rows its layer's width::

        M ← β₁M + (1 − β₁)G,  L ← β₂L + (1 − β₂)GGᵀ,  R ← β₂R + (1 − β₂)GᵀG       bias-corrected, as Adam's
        X ← X − lr · L^-¼ M R^-¼,  or  X − lr · M R^-½  where rows > max_side

    The paper tells no settings of its Shampoo. Here the statistics are averaged, where the original adds them up (its
    steps then shrink as 1/√t), there is no grafting (a step is as large as Muon's: norm √r), and the roots are computed
    in every step. A square matrix of a wide layer's width would outgrow the layer, so beyond ``max_side`` the side of
    the rank alone is preconditioned, with the exponent that belongs to one side.

    Args:
        params: the model, or its ``named_parameters()``.
        lr: the size of a step, in spectral norm where the gradient is always the same.
        betas: of the momentum and of the statistics.
        damping: the share of their largest eigenvalue that is added to the statistics.
        weight_decay: decoupled, of both factors.
        max_side: the most rows for which L is kept.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        damping: float = 1e-6,
        weight_decay: float = 0.0,
        max_side: int = 1024,
    ):
        options = {"lr": lr, "betas": betas, "damping": damping, "weight_decay": weight_decay, "max_side": max_side}
        super().__init__(params, options)

    def new_state(self, x: Tensor) -> State:
        k, rows, r = x.shape
        state = {"step": x.new_zeros(k), "momentum": torch.zeros_like(x), "right": x.new_zeros(k, r, r)}
        return {**state, "left": x.new_zeros(k, rows, rows)} if rows <= self.defaults["max_side"] else state

    def update(self, sides: tuple[Side, Side], group: dict[str, Any]) -> list[Tensor]:
        moved = []
        for x, grad, state in sides:
            state["step"] = state["step"] + 1
            decays = [bias_corrected_decay(state["step"], x.new_tensor(beta))[:, None, None] for beta in group["betas"]]
            fresh = {"momentum": grad, "right": grad.mT @ grad, "left": grad @ grad.mT if "left" in state else None}
            for key, decay in zip(("momentum", "right", "left"), (decays[0], decays[1], decays[1]), strict=True):
                if key in state:
                    state[key] = decay * state[key] + (1 - decay) * fresh[key]  # type: ignore[operator]
            power = -1 / 4 if "left" in state else -1 / 2
            step = state["momentum"] @ _power(state["right"], power, group["damping"])
            if "left" in state:
                step = _power(state["left"], power, group["damping"]) @ step
            moved.append((1 - group["lr"] * group["weight_decay"]) * x - group["lr"] * step)
        return moved


def _power(s: Tensor, power: float, damping: float) -> Tensor:
    """(S + damping·λ_max)^power of positive semidefinite S (k, n, n); finite for zero."""
    values, vectors = eigh(s)
    values = values.clamp_min(0)
    values = (values + damping * values[:, -1:]).clamp_min(1e-30)
    return (vectors * values[:, None] ** power) @ vectors.mT
