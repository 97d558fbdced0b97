"""Factory for the LoRA-RITE optimizer."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BaseOptimizerFactory
from axolotl.utils.logging import get_logger

if TYPE_CHECKING:
    from torch.optim import Optimizer

LOG = get_logger(__name__)

_INSTALL_HINT = (
    "optimizer: lora_rite requires the `lora-rite` package, which is not installed. "
    "Install via:\n"
    "    pip install lora-rite"
)


def _as_bool(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("1", "true", "yes", "on")
    return bool(value)


def _lr_by_name(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise ValueError(
            f"lr_by_name needs optim_args as a mapping, {{name: lr, ...}}, got {value!r}"
        )
    return {name: float(lr) for name, lr in value.items()}


# optim_args may arrive as strings from the "key=value" form.
_LORA_RITE_ARGS: dict[str, Any] = {
    "beta1": float,
    "beta2": float,
    "eps": float,
    "relative_eps": float,
    "damping": float,
    "row_equilibration": _as_bool,
    "row_beta": float,
    "clip_unmagnified_grad": float,
    "update_skipping": float,
    "update_capping": float,
    "apply_escape": _as_bool,
    "balance_param": _as_bool,
    "lr_by_name": _lr_by_name,
    "adamw_lr": float,
    "adamw_eps": float,
    "adamw_weight_decay": float,
    "capturable": _as_bool,
    "algebra_dtype": str,
    "first_moment_dtype": str,
    "engine": str,
}
_DEFAULT_BETAS = (0.9, 0.999)


class LoraRiteOptimizerFactory(BaseOptimizerFactory):
    """Builds a :class:`lora_rite.LoRARite` over the model's trainable parameters.

    LoRA pairs are found by name. What else is trained (DoRA's magnitudes,
    ``lora_modules_to_save``, new tokens) is updated by AdamW inside the same optimizer,
    at ``adamw_lr`` of ``optim_args``; without it such parameters are an error that
    names them.
    """

    def __call__(
        self, opt_model, training_args=None, **optimizer_kwargs
    ) -> "Optimizer":
        if importlib.util.find_spec("lora_rite") is None:
            raise ImportError(_INSTALL_HINT)
        from lora_rite import create_lora_rite

        options: dict[str, Any] = {
            key: optimizer_kwargs.pop(key) for key in ("lr", "weight_decay")
        }
        unknown = sorted(optimizer_kwargs.keys() - _LORA_RITE_ARGS.keys())
        if unknown:
            raise ValueError(
                f"Unsupported optim_args for lora_rite: {unknown}. "
                f"Supported: {sorted(_LORA_RITE_ARGS)}."
            )
        for key, value in optimizer_kwargs.items():
            options[key] = _LORA_RITE_ARGS[key](value)
        options["betas"] = tuple(
            options.pop(key, default)
            for key, default in zip(("beta1", "beta2"), _DEFAULT_BETAS, strict=True)
        )

        optimizer = create_lora_rite(opt_model, **options)
        pairs = [g for g in optimizer.param_groups if g["kind"] == "lora"]
        LOG.info(
            f"lora_rite: optimizing {sum(len(g['params']) for g in pairs)} factors."
        )
        return optimizer
