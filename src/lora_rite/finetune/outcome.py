"""What a run came to, for its result.json."""

import math
from typing import Any

from .memory import peak
from .reading import Examples
from .trainer import describe_optimizer, log_entries, seconds
from .windows import Windows, label_count


def outcome(
    trainer: Any,
    train: Windows,
    held_out: Windows,
    examples: Examples,
    run: dict[str, Any],
    before: float,
    after: float,
) -> dict[str, Any]:
    """The figures of a finished run.

    Args:
        trainer: has trained.
        train, held_out: the windows.
        examples: of which they were made.
        run: what the run is (:func:`~lora_rite.finetune.header.describe`).
        before, after: the held-out losses, nat a token.
    """
    state = trainer.state
    cut = {"train": train.cut, "held_out": held_out.cut}
    dropped = {"train": train.dropped, "held_out": held_out.dropped}
    return {
        "run": {**run, "memory": {**run["memory"], "peak": peak()}, "steps_done": state.global_step},
        "data": examples.sources,
        "held_out": {
            "before": before,
            "after": after,
            "tokens": label_count(held_out.rows, trainer.model.config.is_encoder_decoder),
            "examples_in_training_data": examples.contaminated,
        },
        "perplexity": {"before": _perplexity(before), "after": _perplexity(after)},
        "losses": log_entries(state.log_history, "loss", "learning_rate"),
        "held_out_losses": log_entries(state.log_history, "held_out_loss"),
        "log": state.log_history,
        "seconds": seconds(state),
        "optimizer": describe_optimizer(trainer.optimizer),
        "windows": run["windows"],
        "examples": {**run["examples"], "cut": cut, "dropped": dropped},
    }


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # beyond the largest float
