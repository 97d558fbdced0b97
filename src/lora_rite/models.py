"""A path of before: where models are found is in :mod:`lora_rite.finetune.models`."""

from .finetune.models import TINY

__all__ = ["TINY"]
