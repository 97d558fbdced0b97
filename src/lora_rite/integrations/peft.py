"""LoRARite for a PEFT model and for transformers' Trainer. Needs torch alone."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import LoRARiteValueError, warn
from ..optim.optimizer import LoRARite
from ..options import LR
from ..plan.factors import NO_FACTOR
from ..plan.pairs import find_pairs, param_groups
from .deepspeed import ZeroLoRARite, whole_factors, zero_by_accelerate

#: Keys of ``report()`` that the callbacks log.
FIGURES = ("damped_share", "sigma_over_delta", "clip_rate", "gradient_norm", "update_norm", "skipped")
#: Training arguments of axolotl that are about learning rates by name.
LRS_BY_NAME = ("loraplus_lr_ratio", "embedding_lr", "embedding_lr_scale", "lr_groups")
RAW_CLIPPING = (
    "clips raw gradients, so that the step depends on the factorisation again; LoRARite has clip_unmagnified_grad"
)


def create_lora_rite(
    model: nn.Module,
    lr: float | Tensor = LR,
    *,
    lr_by_name: Mapping[str, float | Tensor] | None = None,
    **options: Any,
) -> LoRARite:
    """LoRARite for the trainable parameters of a model with LoRA layers (PEFT's, or others with the same names).

    It recognises layers whose parameters hold several pairs (stacked experts, grouped convolutions, block-diagonal
    factors) by their classes; ``LoRARite(model.named_parameters())`` by the shapes of the frozen weights alone, see
    :func:`lora_rite.find_pairs`.

    Args:
        model: the model, after ``get_peft_model``.
        lr: the learning rate of the pairs: that of W = W₀ + scaling·B·A, with the scaling (alpha/r; rsLoRA: alpha/√r)
            of the model's layers, at rank 16; at rank r it counts √(16/r) times. So one lr suits every alpha and,
            nearly, every rank. ``scaling=None`` makes it that of B·A as it is.
        lr_by_name: as :func:`lora_rite.param_groups` takes it, ``{"embed_tokens": 1e-4, …}``: the lr of what has a name
            in which the regular expression is found, of pairs (both factors) and of other parameters (AdamW's).
        options: keyword arguments of :class:`LoRARite`; ``adamw_lr`` where other parameters are trainable.

    Raises:
        LoRARiteValueError, LoRARiteTypeError: as LoRARite and :func:`lora_rite.param_groups` do.

    Example::

        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
        optimizer = create_lora_rite(model, lr=5e-4)
    """
    scaling = {"scaling": options.pop("scaling")} if "scaling" in options else {}
    groups = param_groups(model, lr_by_name=lr_by_name, **scaling)
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
    does, and learning rates by name that they have (``embedding_lr``, ``lr_groups``, …), which would not be used, are a
    LoRARiteValueError: ``lr_by_name`` gives them here.

    Where Accelerate is set to DeepSpeed's ZeRO, the optimizer is a :class:`lora_rite.ZeroLoRARite`.
    """

    def __call__(self, model: nn.Module, training_args: Any = None, **kwargs: Any) -> LoRARite | ZeroLoRARite:
        if "lr" not in kwargs:
            if training_args is None:
                raise LoRARiteValueError(
                    f'no lr: a Trainer passes none to an optimizer factory, write (LoRARiteFactory, {{"lr": {LR}}})'
                )
            kwargs["lr"] = training_args.learning_rate
        if unused := [key for key in LRS_BY_NAME if getattr(training_args, key, None)]:
            raise LoRARiteValueError(
                f"{unused[0]} of the training arguments is not used by LoRARite: leave it out, and pass the factory "
                'lr_by_name={"embed_tokens": …}'
            )
        if clip := getattr(training_args, "max_grad_norm", None):
            warn(f"max_grad_norm={clip} {RAW_CLIPPING}: set max_grad_norm=0")
        if (clip := zero_by_accelerate()) is None:
            return create_lora_rite(model, **kwargs)
        if clip:
            warn(f"DeepSpeed's gradient_clipping={clip} {RAW_CLIPPING}: set it, and max_grad_norm, to 0")
        with whole_factors(model):
            return ZeroLoRARite(create_lora_rite(model, **kwargs))


def unwrap(optimizer: Any) -> Any:
    """The optimizer inside all wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
