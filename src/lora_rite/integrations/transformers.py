"""A callback for transformers' Trainer."""

import json
import math
import os
from pathlib import Path
from typing import Any

try:
    from transformers import TrainerCallback
except ImportError as error:  # pragma: no cover
    raise ImportError('LoRARiteCallback needs transformers: pip install "lora-rite[finetune]"') from error

from ..errors import LoRARiteValueError, warn
from ..optim.optimizer import LoRARite
from ..optim.report import layer_report
from .peft import FIGURES, RAW_CLIPPING, unwrap


class LoRARiteCallback(TrainerCallback):
    """Warns at the start where the Trainer is not set up for LoRARite, and logs what tuning needs.

    Warnings: another optimizer than LoRARite; ``max_grad_norm`` above 0 (it clips raw gradients, which undoes the
    invariance; LoRARite clips by itself); ``learning_rate`` of the arguments ignored for the ``lr`` of the factory.

    Logs, at each logging step: ``lora_rite/damped_share``, ``…/sigma_over_delta``, ``…/clip_rate``,
    ``…/gradient_norm``, ``…/update_norm``, ``…/skipped`` (see :meth:`LoRARite.report`). With ``callbacks=[…]`` they go
    to the Trainer's log history and to its console output; a Trainer calls its reporters (TensorBoard, W&B, …) before
    the callbacks of the user, so for those write
    ``trainer.callback_handler.callbacks.insert(0, LoRARiteCallback())``.

    Args:
        layers: a file for the figures of each layer over time: a line ``{"step": …, "layers": [:func:`layer_report`]}``
            of JSON every ``layers_every`` steps. A resumed run goes on with it. None writes none.
        layers_every: steps between two lines.

    Raises:
        LoRARiteValueError: from ``on_train_begin``, ``layers`` has the figures of another run.
    """

    def __init__(self, layers: str | os.PathLike[str] | None = None, layers_every: int = 10):
        if layers_every < 1:
            raise LoRARiteValueError(f"layers_every must be at least 1, got {layers_every}")
        self.layers, self.layers_every = Path(layers) if layers is not None else None, layers_every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = unwrap(kwargs.get("optimizer"))
        if not isinstance(optimizer, LoRARite):
            self._warn(f"the optimizer is {type(optimizer).__name__}, not LoRARite")
            return
        if args.max_grad_norm:
            self._warn(f"max_grad_norm={args.max_grad_norm} {RAW_CLIPPING}: set max_grad_norm=0")
        group = next(group for group in optimizer.param_groups if group["kind"] == "lora")
        lr = float(group.get("initial_lr", group["lr"]))
        if not math.isclose(lr, args.learning_rate, rel_tol=1e-6):  # (a tensor's is rounded to float32)
            self._warn(
                f"learning_rate={args.learning_rate} of the training arguments is not used: the optimizer has lr={lr}. "
                "Give both the same value"
            )
        if self.layers is not None and state.is_world_process_zero:
            self._begin_layers(self.layers, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        optimizer = unwrap(kwargs.get("optimizer"))
        if logs is None or "loss" not in logs or not isinstance(optimizer, LoRARite):
            return
        report = optimizer.report()
        figures = {f"lora_rite/{key}": report[key] for key in FIGURES if report[key] is not None}
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = unwrap(kwargs.get("optimizer"))
        if self.layers is None or state.global_step % self.layers_every or not isinstance(optimizer, LoRARite):
            return
        report = layer_report(optimizer)
        if state.is_world_process_zero:
            with self.layers.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "layers": report}) + "\n")

    @staticmethod
    def _begin_layers(path: Path, step: int) -> None:
        """Makes the file, or, of a resumed run, drops what comes after ``step``: it is computed again."""
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        if lines and not step:
            raise LoRARiteValueError(f"layers={path} has the figures of another run: remove it, or choose another file")
        # a line that a kill has cut is of a step that is computed again
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)

    @staticmethod
    def _warn(message: str) -> None:
        warn(f"LoRARiteCallback: {message}")
