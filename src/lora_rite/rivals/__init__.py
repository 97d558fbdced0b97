"""Optimizers for LoRA that LoRARite is measured against, transcribed from their papers: for studies, audits and
benchmarks. Each takes a model or its ``named_parameters()``, of which LoRA pairs alone may be trainable."""

from .lora_muon import LoRAMuon
from .polora import PoLoRA
from .shampoo import Shampoo

__all__ = ["LoRAMuon", "PoLoRA", "Shampoo"]
