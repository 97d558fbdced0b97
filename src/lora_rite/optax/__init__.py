"""LoRA-RITE for JAX: ``lora_rite`` and ``scale_by_lora_rite``, gradient transformations of optax. Needs no
torch."""

try:
    import jax  # noqa: F401
    import numpy  # noqa: F401
    import optax  # noqa: F401
except ImportError as error:
    raise ImportError(f'lora_rite.optax needs {error.name}: pip install "lora-rite[jax]"') from error

from ..options import PUBLISHED
from .layouts import LAYOUTS, NNX, PEFT, Layout, labels
from .phases import FactorState
from .transformation import LoRARiteState, lora_rite, scale_by_lora_rite

__all__ = [
    "LAYOUTS",
    "NNX",
    "PEFT",
    "PUBLISHED",
    "FactorState",
    "Layout",
    "LoRARiteState",
    "labels",
    "lora_rite",
    "scale_by_lora_rite",
]
