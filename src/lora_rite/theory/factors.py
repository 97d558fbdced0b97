"""Do both factors learn? Relative changes of A and of B over training."""

from typing import Any

import torch
from torch import Tensor

from ..optim.optimizer import LoRARite
from ..plan.pairs import find_pairs
from .embedded import train_embedded
from .problems import adamw

EXPECTED = """With Adam, A hardly learns: its entries start at n^-½ and move by lr like those of B, which start at 0;
what training writes into W comes through B (the argument of LoRA+). LoRA-RITE's step has the same size in W through
either factor, so both parts of the change of W are of the same size and A turns. With damping, A is held back until
BA holds some twenty steps' worth, and follows then."""


def run(steps: int = 200, rank: int = 16, seed: int = 0, every: int = 5) -> dict[str, Any]:
    """Embedded model, each optimizer at the demo's best lr (AdamW 1e-2, LoRARite 2e-2; 1e-2 without damping). Means
    over the 35 pairs."""
    optimizers: dict[str, Any] = {
        "AdamW": lambda model: adamw([p for p in model.parameters() if p.requires_grad], 1e-2),
        "LoRARite": lambda model: LoRARite(model.named_parameters(), lr=2e-2),
        "LoRARite, damping 0": lambda model: LoRARite(model.named_parameters(), lr=1e-2, damping=0.0),
    }
    curves = {}
    for name, make in optimizers.items():
        watch = _Watch(every)
        outcome = train_embedded(
            make, steps=steps, rank=rank, seed=seed, clip=1.0 if name == "AdamW" else None, watch=watch
        )
        curves[name] = {**watch.curves, "validation_loss": outcome["validation_loss"]}
    return {"settings": {"steps": steps, "rank": rank, "seed": seed, "every": every}, "curves": curves}


class _Watch:
    """Means over pairs, every so many steps: ``a_moved`` ‖A − A₀‖/‖A₀‖; ``a_turned`` the part of the row space of A
    that is not in that of A₀ (1 − ‖Q₀ᵀQ‖²/r); ``through_a`` the share of A in this step's change of W,
    ‖B·δA‖/(‖B·δA‖ + ‖δB·A‖); ``a_step`` and ``b_step``, ‖δA‖/‖A‖ and ‖δB‖/‖B‖."""

    def __init__(self, every: int):
        self.every, self.start, self.last = every, [], []
        self.curves: dict[str, list[float]] = {
            key: [] for key in ("step", "a_moved", "a_turned", "through_a", "a_step", "b_step")
        }

    def __call__(self, step: int, model: Any) -> None:
        now = [(pair.a.detach().clone(), pair.b.detach().clone()) for pair in find_pairs(model).pairs]
        if step == 1:
            self.start = [a for a, _ in now]  # A has not moved in the first step: B was zero
        if step > 1 and step % self.every == 0:
            rows = [self._pair(*values) for values in zip(self.start, self.last, now, strict=True)]
            self.curves["step"].append(step)
            for key in rows[0]:
                self.curves[key].append(sum(row[key] for row in rows) / len(rows))
        self.last = now

    @staticmethod
    def _pair(a_0: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> dict[str, float]:
        (a, b), (a_new, b_new) = old, new
        through_a, through_b = (b_new @ (a_new - a)).norm(), ((b_new - b) @ a).norm()
        q_0, q = torch.linalg.qr(a_0.mT)[0], torch.linalg.qr(a_new.mT)[0]
        return {
            "a_moved": float((a_new - a_0).norm() / a_0.norm()),
            "a_turned": float(1 - (q_0.mT @ q).square().sum() / q.shape[1]),
            "through_a": float(through_a / (through_a + through_b)),
            "a_step": float((a_new - a).norm() / a.norm()),
            "b_step": float((b_new - b).norm() / b.norm()),
        }


def found(result: dict[str, Any]) -> str:
    parts = []
    for name, curve in result["curves"].items():
        shares = curve["through_a"]
        parts.append(
            f"{name}: A's share of the change of W is {shares[1]:.2f} at step {curve['step'][1]} and "
            f"{sum(shares) / len(shares):.2f} on average; at the end A has moved by {curve['a_moved'][-1]:.2f} of its "
            f"start and {curve['a_turned'][-1]:.2f} of its row space is new; validation loss "
            f"{curve['validation_loss']:.3f}"
        )
    return ". ".join(parts) + "."


def plot(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots(1, 3)
    titles = {"through_a": "share of A in the change of W", "a_turned": "new part of A's row space",
              "a_step": "relative step of A (—) and of B (--)"}  # fmt: skip
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for i, (name, curve) in enumerate(result["curves"].items()):
            axis.plot(curve["step"], curve[key], color=f"C{i}", label=name)
            if key == "a_step":
                axis.semilogy(curve["step"], curve["b_step"], "--", color=f"C{i}")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1)
    axes[0].legend(fontsize="small")
