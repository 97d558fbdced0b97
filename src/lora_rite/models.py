"""Models that are known without a network: the one inside this package, and the configurations of the paper's."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .inputs import blame

#: The folder of the embedded model.
TINY = Path(__file__).parent / "finetune" / "tiny"
#: transformers' model type and settings by hub id, from the public configurations: Gemma's needs a licence on the hub.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "google/gemma-2b": (
        "gemma",
        {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
         "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000},
    ),
    "google/gemma-7b": (
        "gemma",
        {"hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
         "num_key_value_heads": 16, "head_dim": 256, "vocab_size": 256000},
    ),
    "google/mt5-xxl": (
        "mt5",
        {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 64,
         "feed_forward_proj": "gated-gelu", "vocab_size": 250112},
    ),
    "sentence-transformers/all-MiniLM-L6-v2": (
        "bert",
        {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 30522},
    ),
}  # fmt: skip
CONFIGS["google/gemma-7b-it"] = CONFIGS["google/gemma-7b"]
#: What ``lora-rite bench`` calls them.
SHORT = {name.rpartition("/")[2]: name for name in CONFIGS}


def configuration(model: str, option: str, trust_remote_code: bool = False) -> Any:
    """transformers' configuration of a name in :data:`CONFIGS`, of "tiny" (the embedded model), or of a config.json, a
    folder with one or a hub id. An error names the option."""
    from transformers import AutoConfig

    with blame(f"{option} {model}"):
        if model in CONFIGS:
            kind, sizes = CONFIGS[model]
            return AutoConfig.for_model(kind, **sizes)
        return AutoConfig.from_pretrained(TINY if model == "tiny" else model, trust_remote_code=trust_remote_code)


@contextmanager
def fused_experts() -> Iterator[None]:
    """Where PEFT attaches an adapter: it gives experts' maps that share a parameter a rank pattern of its own, follows
    it, and warns that it matches no module."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
        yield
