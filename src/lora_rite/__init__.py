"""LoRA-RITE: an optimizer for low-rank adapters whose step does not depend on how the adapter is factorised."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .errors import LoRARiteError, LoRARiteTypeError, LoRARiteValueError, NonFiniteError
    from .integrations.deepspeed import ZeroLoRARite
    from .integrations.peft import LoRARiteFactory, create_lora_rite
    from .integrations.transformers import LoRARiteCallback
    from .invariance.audit import audit
    from .optim.optimizer import LoRARite
    from .optim.report import layer_report
    from .options import PUBLISHED
    from .plan.pairs import find_pairs, param_groups

#: Public name → module. Nothing is imported, torch included, before a name is used.
_HOME = {
    "LoRARite": "optim.optimizer",
    "PUBLISHED": "options",
    "find_pairs": "plan.pairs",
    "param_groups": "plan.pairs",
    "create_lora_rite": "integrations.peft",
    "LoRARiteFactory": "integrations.peft",
    "ZeroLoRARite": "integrations.deepspeed",
    "layer_report": "optim.report",
    "LoRARiteCallback": "integrations.transformers",
    "audit": "invariance.audit",
    "LoRARiteError": "errors",
    "LoRARiteTypeError": "errors",
    "LoRARiteValueError": "errors",
    "NonFiniteError": "errors",
}

__all__ = [
    "PUBLISHED",
    "LoRARite",
    "LoRARiteCallback",
    "LoRARiteError",
    "LoRARiteFactory",
    "LoRARiteTypeError",
    "LoRARiteValueError",
    "NonFiniteError",
    "ZeroLoRARite",
    "audit",
    "create_lora_rite",
    "find_pairs",
    "layer_report",
    "param_groups",
]


def __getattr__(name: str) -> Any:
    if name == "optax":  # lora_rite.optax, for JAX
        return importlib.import_module(".optax", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
