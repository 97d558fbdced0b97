"""Gradients that lack rank, as they occur: answers of few tokens, and experts that see few tokens."""

import math
import statistics
from typing import Any

import torch

from .damping import optimizers
from .embedded import pair_parameters, train_embedded
from .problems import adamw

EXPECTED = """The same as in the experiment on damping, where it occurs: in fine-tuning on answers alone, the gradient
of W has at most as many directions as there are tokens with a loss, and an expert of a mixture has one for each token
that it got. The published step should be worse than AdamW or blow up there, the damped one should not."""

KEPT = ("published (pytorch_optimizer)", "published, noise is null (ours)", "damping 0", "damping 20")


def run(
    answer: int = 1,
    batch_size: int = 2,
    rank: int = 16,
    steps: int = 100,
    lrs: tuple[float, ...] = (2e-3, 5e-3, 2e-2),
    seeds: int = 1,
    expert_steps: int = 200,
    expert_lrs: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1),
    expert_seeds: int = 5,
) -> dict[str, Any]:
    """``answers``: the embedded model on windows whose last ``answer`` tokens alone carry loss; validation loss of the
    same kind of windows. ``experts``: eight linear experts of width 32 with an adapter of rank 8 each, 12 tokens a
    step, each to one expert at random (with unequal odds; some get none); the mean relative loss over experts."""
    makers = {name: make for name, make in optimizers().items() if name in KEPT} | {"AdamW": adamw}
    rows = []
    for name, make in makers.items():
        for lr in lrs:
            losses = [
                train_embedded(
                    lambda model, make=make, lr=lr: make(pair_parameters(model), lr),
                    steps=steps, rank=rank, batch_size=batch_size, answer=answer, seed=seed,
                    clip=1.0 if name == "AdamW" else None,
                )["validation_loss"]
                for seed in range(seeds)
            ]  # fmt: skip
            rows.append({"problem": "answers", "optimizer": name, "lr": lr, "losses": losses})
        for lr in expert_lrs:
            losses = [_experts(make, lr, expert_steps, seed) for seed in range(expert_seeds)]
            rows.append({"problem": "experts", "optimizer": name, "lr": lr, "losses": losses})
        print(name, [(r["lr"], statistics.mean(r["losses"])) for r in rows if r["optimizer"] == name], flush=True)
    settings = {"answer": answer, "batch_size": batch_size, "rank": rank, "steps": steps, "seeds": seeds,
                "expert_steps": expert_steps, "expert_seeds": expert_seeds}  # fmt: skip
    return {"settings": settings, "rows": rows}


def _experts(make: Any, lr: float, steps: int, seed: int) -> float:
    experts, tokens, width, rank = 8, 12, 32, 8
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    targets = [draw(width, 4) @ draw(4, width) / (4 * width) ** 0.5 for _ in range(experts)]
    pairs = [(torch.nn.Parameter(draw(rank, width) * width**-0.5), torch.nn.Parameter(torch.zeros(width, rank)))
             for _ in range(experts)]  # fmt: skip
    optimizer = make([p for pair in pairs for p in pair], lr)
    odds = torch.linspace(1.0, 0.1, experts)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        home = torch.multinomial(odds, tokens, replacement=True, generator=generator)
        for i, ((a, b), target) in enumerate(zip(pairs, targets, strict=True)):
            x = draw(int((home == i).sum()), width)
            error = (x @ (b.detach() @ a.detach() - target).mT) / tokens
            # the authors' code needs a gradient; of no tokens it is zero, as a dense implementation gives it
            a.grad, b.grad = (b.detach().mT @ error.mT) @ x, error.mT @ (x @ a.detach().mT)
            if not all(p.grad is not None and p.grad.isfinite().all() for p in (a, b)):
                return math.inf
        optimizer.step()
    ratios = [
        ((b @ a).detach() - target).square().sum() / target.square().sum()
        for (a, b), target in zip(pairs, targets, strict=True)
    ]
    value = float(torch.stack(ratios).mean())
    return value if math.isfinite(value) else math.inf


def found(result: dict[str, Any]) -> str:
    parts = []
    for problem in ("answers", "experts"):
        names = list(dict.fromkeys(row["optimizer"] for row in result["rows"]))
        texts = []
        for name in names:
            own = [row for row in result["rows"] if (row["problem"], row["optimizer"]) == (problem, name)]
            texts.append(
                f"{name} " + ", ".join(f"{statistics.mean(row['losses']):.3g} at lr {row['lr']:g}" for row in own)
            )
        parts.append(f"{problem.capitalize()}: {'; '.join(texts)}.")
    return " ".join(parts)


def plot(result: dict[str, Any], figure: Any) -> None:
    for axis, problem in zip(figure.subplots(1, 2), ("answers", "experts"), strict=True):
        for i, name in enumerate(dict.fromkeys(row["optimizer"] for row in result["rows"])):
            own = [row for row in result["rows"] if (row["problem"], row["optimizer"]) == (problem, name)]
            means = [min(statistics.mean(row["losses"]), 1e3) for row in own]
            axis.loglog([row["lr"] for row in own], means, marker=".", color=f"C{i}", label=name)
        axis.set(title=problem, xlabel="lr", ylabel="loss")
        axis.tick_params(axis="x", which="minor", labelbottom=False)
        axis.grid(alpha=0.3, which="both")
    figure.axes[0].legend(fontsize="small")
