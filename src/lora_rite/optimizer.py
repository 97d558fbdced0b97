"""The path of ``LoRARite`` in pickles and imports of before: it is in :mod:`lora_rite.optim.optimizer`."""

from .optim.optimizer import LoRARite, state_bytes

__all__ = ["LoRARite", "state_bytes"]
