"""The errors of lora-rite: all are :class:`LoRARiteError`, and also the built-in error that a caller would expect.
And how it warns."""

import sys
import warnings

#: Packages that call the optimizer or a callback on behalf of somebody: a warning is not about their lines.
_BETWEEN = (
    "lora_rite", "torch", "accelerate", "transformers", "trl", "peft", "lightning", "lightning_fabric",
    "pytorch_lightning", "deepspeed", "pytorch_optimizer", "contextlib", "functools", "threading", "concurrent",
)  # fmt: skip


class LoRARiteError(Exception):
    """Base of all errors that lora-rite raises on purpose. ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class LoRARiteValueError(LoRARiteError, ValueError):
    """A parameter, hyperparameter or state that cannot be used as given."""

    exit_code = 2


class LoRARiteTypeError(LoRARiteError, TypeError):
    """An argument of the wrong kind."""

    exit_code = 2


class NonFiniteError(LoRARiteError, RuntimeError):
    """NaN or Inf in a parameter, in the loss, or in the gradients of several steps in a row."""

    exit_code = 3


class WriteError(LoRARiteError, OSError):
    """A file of the run cannot be written: no space left, no permission, an error of the device."""

    exit_code = 4


class FolderInUseError(LoRARiteError, RuntimeError):
    """Another process has the lock of the run's folder."""

    exit_code = 5


class CheckpointError(LoRARiteError, RuntimeError):
    """No checkpoint of the run can be trusted."""

    exit_code = 6


class InterruptedRunError(LoRARiteError, RuntimeError):
    """A signal has ended the run, after a step and a checkpoint."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message, signal_number)  # both, so that it can be pickled: it may end a worker
        self.exit_code = 128 + signal_number

    def __str__(self) -> str:
        return self.args[0]


def warn(message: str) -> None:
    """A UserWarning at the user's line: the innermost one outside of this package, torch and what trains by them; the
    outermost line where there is no other (so in a thread of theirs). A stack level would count frames, and of torch's
    there are more where a scheduler or a scaler has wrapped ``step``."""
    frame = sys._getframe(1)
    while str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    where = frame.f_code.co_filename, frame.f_lineno
    warnings.warn_explicit(message, UserWarning, *where, frame.f_globals.get("__name__"), registry)
