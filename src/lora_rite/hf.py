"""For PEFT models and transformers' Trainer, see :mod:`lora_rite.integrations.peft`."""

from .integrations.peft import LoRARiteFactory, create_lora_rite, unwrap

__all__ = ["LoRARiteFactory", "create_lora_rite", "unwrap"]
