"""The callback for Lightning, see :mod:`lora_rite.integrations.lightning`."""

from .integrations.lightning import LoRARiteCallback

__all__ = ["LoRARiteCallback"]
