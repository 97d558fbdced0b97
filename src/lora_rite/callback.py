"""A callback for transformers' Trainer."""

import warnings
from typing import Any

try:
    from transformers import TrainerCallback
except ImportError as error:  # pragma: no cover
    raise ImportError('LoRARiteCallback needs transformers: pip install "lora-rite[finetune]"') from error

from .hf import unwrap
from .optimizer import LoRARite

_FIGURES = ("damped_share", "sigma_over_delta", "clip_rate", "gradient_norm", "update_norm", "skipped")


class LoRARiteCallback(TrainerCallback):
    """Warns at the start where the Trainer is not set up for LoRARite, and logs what tuning needs.

    Warnings: another optimizer than LoRARite; ``max_grad_norm`` above 0 (it clips raw gradients, which undoes the
    invariance; LoRARite clips by itself); ``learning_rate`` of the arguments ignored for the ``lr`` of the factory.

    Logs, at each logging step: ``lora_rite/damped_share``, ``…/sigma_over_delta``, ``…/clip_rate``,
    ``…/gradient_norm``, ``…/update_norm``, ``…/skipped`` (see :meth:`LoRARite.report`). With ``callbacks=[…]`` they go
    to the Trainer's log history and to its console output; a Trainer calls its reporters (TensorBoard, W&B, …) before
    the callbacks of the user, so for those write
    ``trainer.callback_handler.callbacks.insert(0, LoRARiteCallback())``.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = unwrap(kwargs.get("optimizer"))
        if not isinstance(optimizer, LoRARite):
            self._warn(f"the optimizer is {type(optimizer).__name__}, not LoRARite")
            return
        if args.max_grad_norm:
            self._warn(
                f"max_grad_norm={args.max_grad_norm} clips raw gradients, so that the step depends on the "
                "factorisation again; set max_grad_norm=0, LoRARite has clip_unmagnified_grad"
            )
        group = next(group for group in optimizer.param_groups if group["kind"] == "lora")
        lr = float(group.get("initial_lr", group["lr"]))
        if lr != args.learning_rate:
            self._warn(
                f"learning_rate={args.learning_rate} of the training arguments is not used: the optimizer has lr={lr}. "
                "Give both the same value"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        optimizer = unwrap(kwargs.get("optimizer"))
        if logs is None or "loss" not in logs or not isinstance(optimizer, LoRARite):
            return
        report = optimizer.report()
        figures = {f"lora_rite/{key}": report[key] for key in _FIGURES if report[key] is not None}
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    @staticmethod
    def _warn(message: str) -> None:
        warnings.warn(f"LoRARiteCallback: {message}", stacklevel=3)
