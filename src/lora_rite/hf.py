"""LoRARite for a PEFT model and for transformers' Trainer. Needs torch alone."""

from typing import Any

from torch import Tensor, nn

from .errors import LoRARiteValueError
from .optimizer import LoRARite
from .pairs import param_groups


def create_lora_rite(model: nn.Module, lr: float | Tensor = 2e-4, **options: Any) -> LoRARite:
    """LoRARite for the trainable parameters of a model with LoRA layers (PEFT's, or others with the same names).

    Unlike ``LoRARite(model.named_parameters())``, it also recognises layers whose factors are no plain pairs (stacked
    experts, grouped convolutions) and gives those to AdamW.

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
    return LoRARite(param_groups(model), lr=lr, **options)


class LoRARiteFactory:
    """For ``Trainer(optimizer_cls_and_kwargs=(LoRARiteFactory, {"lr": …}))``: the Trainer calls ``LoRARiteFactory()``
    and the result with the model and the keyword arguments, those of :func:`create_lora_rite`.

    Trainers that also pass their training arguments (axolotl) give ``training_args.learning_rate`` where ``lr`` is not
    among the keyword arguments.
    """

    def __call__(self, model: nn.Module, training_args: Any = None, **kwargs: Any) -> LoRARite:
        if "lr" not in kwargs:
            if training_args is None:
                raise LoRARiteValueError(
                    'no lr: a Trainer passes none to an optimizer factory, write (LoRARiteFactory, {"lr": …})'
                )
            kwargs["lr"] = training_args.learning_rate
        return create_lora_rite(model, **kwargs)


def unwrap(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
