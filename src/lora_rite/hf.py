"""LoRARite for a PEFT model and for transformers' Trainer. Needs torch alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoRARiteValueError, warn
from .optimizer import LoRARite
from .pairs import NO_FACTOR, find_pairs, param_groups

#: Keys of ``report()`` that the callbacks log.
FIGURES = ("damped_share", "sigma_over_delta", "clip_rate", "gradient_norm", "update_norm", "skipped")
RAW_CLIPPING = (
    "clips raw gradients, so that the step depends on the factorisation again; LoRARite has clip_unmagnified_grad"
)


def create_lora_rite(model: nn.Module, lr: float | Tensor = 2e-4, **options: Any) -> LoRARite:
    """LoRARite for the trainable parameters of a model with LoRA layers (PEFT's, or others with the same names).

    It recognises layers whose parameters hold several pairs (stacked experts, grouped convolutions, block-diagonal
    factors) by their classes; ``LoRARite(model.named_parameters())`` by the shapes of the frozen weights alone, see
    :func:`lora_rite.find_pairs`.

    Args:
        model: the model, after ``get_peft_model``.
        lr: the learning rate of the pairs.
        options: keyword arguments of :class:`LoRARite`; ``adamw_lr`` where other parameters are trainable.

    Raises:
        LoRARiteValueError: as LoRARite does.

    Example::

        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
        optimizer = create_lora_rite(model, lr=5e-4)
    """
    groups = param_groups(model)
    if not any(group["kind"] == "lora" for group in groups):
        raise LoRARiteValueError(f"no LoRA pairs: {_found_instead(model)}")
    return LoRARite(groups, lr=lr, **options)


def _found_instead(model: nn.Module) -> str:
    pairing = find_pairs(model)
    if reasons := dict.fromkeys(o.reason for o in pairing.left_out if o.reason != NO_FACTOR):
        return f"{'; '.join(reasons)}. Train this model with AdamW"
    if pairing.frozen:
        return f"all factors are frozen ({pairing.frozen[0]}, …); load the adapter with is_trainable=True"
    return f"none of {len(pairing.left_out)} trainable parameters is a factor; attach an adapter (peft.get_peft_model)"


class LoRARiteFactory:
    """For ``Trainer(optimizer_cls_and_kwargs=(LoRARiteFactory, {"lr": …}))``: the Trainer calls ``LoRARiteFactory()``
    and the result with the model and the keyword arguments, those of :func:`create_lora_rite`.

    Trainers that also pass their training arguments (axolotl) give ``training_args.learning_rate`` where ``lr`` is not
    among the keyword arguments; those arguments are then checked for ``max_grad_norm`` as :class:`LoRARiteCallback`
    does.
    """

    def __call__(self, model: nn.Module, training_args: Any = None, **kwargs: Any) -> LoRARite:
        if "lr" not in kwargs:
            if training_args is None:
                raise LoRARiteValueError(
                    'no lr: a Trainer passes none to an optimizer factory, write (LoRARiteFactory, {"lr": …})'
                )
            kwargs["lr"] = training_args.learning_rate
        if clip := getattr(training_args, "max_grad_norm", None):
            warn(f"max_grad_norm={clip} {RAW_CLIPPING}: set max_grad_norm=0")
        return create_lora_rite(model, **kwargs)


def unwrap(optimizer: Any) -> Any:
    """The optimizer inside all wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


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
