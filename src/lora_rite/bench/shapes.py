"""The models and the adapters that are benched, with random weights."""

from typing import Any

import torch

from ..finetune.models import SHORT, configuration, fused_experts
from ..inputs import blame
from ..invariance.problems import Shapes
from ..plan.pairs import find_pairs


def shallow(model: str, layers: int | None = None) -> Any:
    """transformers' configuration of a model, whose short name will do; cut to so many layers (of encoder and decoder
    each)."""
    config = configuration(SHORT.get(model, model), "--models")
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if hasattr(text, "num_decoder_layers"):
            text.num_decoder_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    return config


def network(model: str, layers: int | None, rank: int, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights and a PEFT adapter on all linear maps."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = shallow(model, layers)
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device(device), blame(f"--models {model}"), fused_experts():
        base = kind.from_config(config, dtype=dtype)
        return get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))


def linear_maps(model: str, layers: int | None = None, rank: int = 1) -> Shapes:
    """The pairs of an adapter on all linear maps, those of experts in one; no weights are made. (PEFT gives parameters
    that two maps share twice the rank.)"""
    return [pair.shape for pair in find_pairs(network(model, layers, rank, "meta")).pairs]


def formula(shapes: Shapes) -> int:
    """Bytes of LoRARite's state for float32, bfloat16 and float16 factors: the first moment and a number a row, five
    r×r matrices a factor, and a few numbers."""
    return sum(blocks * (4 * (n + m) * (r + 1) + 40 * r**2 + 8 * r + 26) for n, m, r, blocks, _ in shapes)
