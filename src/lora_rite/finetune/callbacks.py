"""What transformers' Trainer calls while it trains: the clock, the progress and the held-out loss."""

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from ..optim.modes import evaluating
from ..run.digest import trained, whole

#: The times of the steps in the Trainer's ``state.stateful_callbacks``.
CLOCK = "Clock"
#: There, the held-out ``loss`` before the first step, where it could be measured in training alone.
BEFORE = "Before"
#: There, the lowest held-out loss: its ``step``, the ``loss``, and how many were measured ``since``.
LOWEST = "Lowest"


class Clock(TrainerCallback):
    """Times the training, whole steps and the optimizer's part of them. In the Trainer's state, which checkpoints
    have too, so that a resumed run has the times of all its steps."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin = time.perf_counter()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.begin_optimizer = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.optimizer = time.perf_counter() - self.begin_optimizer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        times = state.stateful_callbacks.setdefault(CLOCK, {"training": 0.0, "steps": [], "optimizer": []})
        times["training"] += now - self.last
        times["steps"].append(now - self.begin)
        times["optimizer"].append(self.optimizer)
        self.last = now


class Bar(ProgressCallback):
    """One line that says how the run goes, instead of a line a step; and a line for each held-out loss."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        if "held_out_loss" in logs:
            tqdm.write(_held_out(state, logs), file=sys.stderr)
        if "loss" in logs:
            self.training_bar.set_postfix_str(_figures(logs))


class Lines(TrainerCallback):
    """What :class:`Bar` says, where there are no bars: a line where a further tenth of the steps is done, and one for
    each held-out loss."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin, self.first = time.perf_counter(), state.global_step
        self.tenths = 10 * self.first // state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        step, steps = state.global_step, state.max_steps
        if "held_out_loss" in (logs or {}):
            print(_held_out(state, logs), file=sys.stderr, flush=True)
        if "loss" in (logs or {}) and 10 * step // steps > self.tenths:
            self.tenths = 10 * step // steps
            left = (time.perf_counter() - self.begin) / (step - self.first) * (steps - step)
            line = f"step {step} of {steps}: {_figures(logs)}, about {tqdm.format_interval(left)} left"
            print(line, file=sys.stderr, flush=True)


def _held_out(state: Any, logs: Any) -> str:
    lowest = state.stateful_callbacks[LOWEST]
    here = lowest["step"] == state.global_step
    which = "the lowest so far" if here else f"{lowest['loss']:.4f} at step {lowest['step']}"
    return f"step {state.global_step}: held-out loss {logs['held_out_loss']:.4f} ({which})"


def _figures(logs: Any) -> str:
    speed = next((v for k, v in logs.items() if "tokens_per_second" in k), 0.0)
    return f"loss {logs['loss']:.3f}, lr {logs['learning_rate']:.1e}, {speed:,.0f} tokens/s"


class HeldOut(TrainerCallback):
    """Measures the held-out loss at intervals, and has the Trainer log it.

    Args:
        trainer: the Trainer.
        measure: gives the loss.
        every: steps between two measurements.
        keep: keep a copy of the trained parameters at the lowest loss, in the Trainer's ``run``.
        patience: stop after so many measurements in a row without a lower loss; 0 never stops.
    """

    def __init__(self, trainer: Any, measure: Callable[[], float], every: int, keep: bool = False, patience: int = 0):
        self.trainer, self.measure, self.every, self.keep, self.patience = trainer, measure, every, keep, patience

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        loss = self.measure()
        lowest = state.stateful_callbacks.get(LOWEST)
        if lowest is None or loss < lowest["loss"]:
            lowest = {"step": state.global_step, "loss": loss, "since": 0}
            if self.keep:
                with evaluating(self.trainer.optimizer):
                    self.trainer.run.best = copies(self.trainer.model)
        else:
            lowest["since"] += 1
        state.stateful_callbacks[LOWEST] = lowest
        due = control.should_log
        self.trainer.log({"held_out_loss": loss})
        control.should_log = due  # logging has cleared it, and the training loss is still to come
        if has_stopped(state, self.patience):
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy == "steps"  # as after the last step


def has_stopped(state: Any, patience: int) -> bool:
    """Whether the held-out loss of a Trainer's state has not become lower in ``patience`` measurements (0: never)."""
    return 0 < patience <= state.stateful_callbacks.get(LOWEST, {"since": 0})["since"]


def copies(model: Any) -> dict[str, Any]:
    """Copies of the trained parameters on the CPU, by name."""
    return {name: whole(p).detach().cpu().contiguous().clone() for name, p in trained(model)}
