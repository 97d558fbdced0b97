"""One learning rate for every rank: the loss over lr at ranks 4 to 64, on the embedded model (of width 192)."""

import math
import statistics
from typing import Any

from .embedded import pair_parameters, train_embedded
from .problems import adamw, slope
from .transfer import minimum

EXPECTED = """A step of lr writes lr·√(rows·r) into B·A in Frobenius norm. With ``scaling`` it writes lr·√(rows·16) into
W at every rank (lr counts (16/r)^½ times): if the norm of W's step decides, the best lr is the same at every rank;
if its largest singular value decides, lr should count 1 times, and the best lr rises here as r^½. AdamW's best lr at
constant alpha/r falls with the rank."""

NAMES = ("LoRARite", "AdamW")


def run(
    ranks: tuple[int, ...] = (4, 16, 64),
    lrs: tuple[float, ...] = (5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
    adamw_lrs: tuple[float, ...] = (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2),
    steps: int = 100,
    batch_size: int = 4,
    answer: int | None = None,
    seeds: int = 1,
) -> dict[str, Any]:
    """Validation loss at every rank and lr, alpha = rank; the best lr by a parabola through the best three in log lr,
    and its exponent over the rank by least squares. ``answer``: only so many tokens of a window carry loss."""
    from ..integrations.peft import create_lora_rite

    makers: dict[str, Any] = {
        "LoRARite": lambda model, lr: create_lora_rite(model, lr=lr),
        "AdamW": lambda model, lr: adamw(pair_parameters(model), lr),
    }
    rows = []
    for name, make in makers.items():
        for rank in ranks:
            rates = lrs if name == "LoRARite" else adamw_lrs
            losses = [
                statistics.mean(
                    train_embedded(
                        lambda model, make=make, lr=lr: make(model, lr),
                        steps=steps, rank=rank, batch_size=batch_size, answer=answer, seed=seed,
                        clip=1.0 if name == "AdamW" else None,
                    )["validation_loss"]
                    for seed in range(seeds)
                )
                for lr in rates
            ]  # fmt: skip
            rows.append({"optimizer": name, "rank": rank, "lrs": rates, "losses": losses,
                         "best_lr": minimum(rates, losses), "best_loss": min(losses)})  # fmt: skip
            print(name, rank, [(lr, round(loss, 4)) for lr, loss in zip(rates, losses, strict=True)], flush=True)
    return {
        "settings": {"steps": steps, "batch_size": batch_size, "answer": answer, "seeds": seeds},
        "rows": rows,
        "exponents": {name: _exponent([row for row in rows if row["optimizer"] == name]) for name in NAMES},
    }


def _exponent(rows: list[dict[str, Any]]) -> float:
    """e of lr* ≈ c·rᵉ."""
    return slope(*([row[key] for row in rows] for key in ("rank", "best_lr"))) if len(rows) > 1 else math.nan


def found(result: dict[str, Any]) -> str:
    texts = []
    for name in NAMES:
        own = [row for row in result["rows"] if row["optimizer"] == name]
        best = ", ".join(f"{row['best_lr']:.2g} at rank {row['rank']} ({row['best_loss']:.3f})" for row in own)
        texts.append(f"{name}: best lr {best}, ∝ r^{result['exponents'][name]:.2f}")
    return "; ".join(texts) + "."


def plot(result: dict[str, Any], figure: Any) -> None:
    top = max(row["best_loss"] for row in result["rows"])
    low = min(row["best_loss"] for row in result["rows"])
    for axis, name in zip(figure.subplots(1, 2, sharey=True), NAMES, strict=True):
        own = [row for row in result["rows"] if row["optimizer"] == name]
        for i, row in enumerate(own):
            axis.semilogx(row["lrs"], row["losses"], "o-", ms=4, color=f"C{i}", label=f"rank {row['rank']}")
            axis.axvline(row["best_lr"], color=f"C{i}", lw=0.8, ls=":")
        axis.set(title=f"{name}: best lr ∝ r^{result['exponents'][name]:.2f}", xlabel="lr")
        axis.set_ylim(low - 0.1 * (top - low) - 0.01, top + 1.5 * (top - low) + 0.05)
        axis.grid(alpha=0.3)
        axis.set_xticks(own[0]["lrs"], [f"{lr:g}" for lr in own[0]["lrs"]])
        axis.minorticks_off()
    figure.axes[0].set_ylabel("validation loss")
    figure.axes[0].legend(fontsize="small")
