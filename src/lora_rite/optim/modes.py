"""Optimizers inside wrappers, and the two modes that some have. Imports torch where it is used."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def without_accelerate(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrappers, which may wrap another one itself (Lookahead, …)."""
    while type(optimizer).__module__.startswith("accelerate."):
        optimizer = optimizer.optimizer
    return optimizer


def two_modes(optimizer: Any) -> Any:
    """The optimizer that has a mode to train in and one to evaluate in, ``train()`` and ``eval()``, which change the
    parameters (schedule-free ones train at one point and evaluate an average): this one, or the outermost inside it
    that has them; None where there is none."""
    optimizer = without_accelerate(optimizer)  # whose wrapper has both for any optimizer
    while optimizer is not None:
        if all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval")):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


@contextmanager
def evaluating(optimizer: Any) -> Iterator[None]:
    """Within, the parameters are those to evaluate, save and export, of an optimizer with two modes
    (:func:`two_modes`); afterwards it is in training, and they are bitwise what they were: its own way there and back
    rounds. Of any other optimizer, they stay as they are."""
    import torch

    inner = two_modes(optimizer)
    if inner is None or not any(inner.state.values()):  # before the first step there is no other mode
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    training = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        inner.eval()
    try:
        yield
    finally:
        with torch.no_grad():
            inner.train()
            for p, value in zip(parameters, training, strict=True):
                p.copy_(value)
