"""A path of before: the callback for transformers' Trainer is in :mod:`lora_rite.integrations.transformers`."""

from .integrations.transformers import LoRARiteCallback

__all__ = ["LoRARiteCallback"]
