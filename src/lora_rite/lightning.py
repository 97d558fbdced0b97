"""A callback for Lightning."""

import warnings
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:  # pragma: no cover
    raise ImportError('lora_rite.lightning needs Lightning: pip install "lora-rite[trainers]"') from error

from .hf import FIGURES, RAW_CLIPPING, unwrap
from .optimizer import LoRARite


class LoRARiteCallback(Callback):
    """Warns at the start where the Trainer is not set up for LoRARite, and logs what tuning needs.

    Warnings: no LoRARite among the optimizers; ``gradient_clip_val`` above 0.

    Logs, every ``log_every_n_steps``: the figures of :class:`lora_rite.LoRARiteCallback`, by the module's ``log``.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _optimizers(trainer):
            names = ", ".join(type(o).__name__ for o in trainer.optimizers)
            warnings.warn(f"LoRARiteCallback: the optimizer is {names}, not LoRARite", stacklevel=2)
        elif trainer.gradient_clip_val:
            warnings.warn(
                f"LoRARiteCallback: gradient_clip_val={trainer.gradient_clip_val} {RAW_CLIPPING}; leave it out",
                stacklevel=2,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for optimizer in _optimizers(trainer):
                report = optimizer.report()
                figures = {f"lora_rite/{key}": float(report[key]) for key in FIGURES if report[key] is not None}
                pl_module.log_dict(figures)


def _optimizers(trainer: Trainer) -> list[LoRARite]:
    return [o for o in map(unwrap, trainer.optimizers) if isinstance(o, LoRARite)]
