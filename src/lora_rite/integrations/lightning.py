"""A callback for Lightning."""

from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:  # pragma: no cover
    raise ImportError('lora_rite.lightning needs Lightning: pip install "lora-rite[trainers]"') from error

from ..errors import warn
from ..optim.optimizer import LoRARite
from .peft import FIGURES, RAW_CLIPPING, unwrap


class LoRARiteCallback(Callback):
    """Warns at the start where the Trainer is not set up for LoRARite, and logs what tuning needs.

    Warnings: no LoRARite among the optimizers; ``gradient_clip_val`` above 0.

    Logs, every ``log_every_n_steps`` (0: never): the figures of :class:`lora_rite.LoRARiteCallback`, by the module's
    ``log``. Where several optimizers are LoRARite, they are numbered: ``lora_rite/0/update_norm``, ``lora_rite/1/…``.
    """

    _reported = 0  # the step of the last report

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reported = trainer.global_step
        if not _optimizers(trainer):
            names = ", ".join(type(o).__name__ for o in trainer.optimizers)
            warn(f"LoRARiteCallback: the optimizer is {names}, not LoRARite")
        elif trainer.gradient_clip_val:
            warn(f"LoRARiteCallback: gradient_clip_val={trainer.gradient_clip_val} {RAW_CLIPPING}; leave it out")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or step % every or step == self._reported:  # (between two steps gradients are accumulated)
            return
        self._reported = step
        optimizers = _optimizers(trainer)
        for i, optimizer in enumerate(optimizers):
            prefix = "lora_rite" if len(optimizers) == 1 else f"lora_rite/{i}"
            report = optimizer.report()
            pl_module.log_dict({f"{prefix}/{key}": float(report[key]) for key in FIGURES if report[key] is not None})


def _optimizers(trainer: Trainer) -> list[LoRARite]:
    return [o for o in map(unwrap, trainer.optimizers) if isinstance(o, LoRARite)]
