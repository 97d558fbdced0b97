"""A model with its tokenizer, and an adapter on it."""

import warnings
from pathlib import Path
from typing import Any

from ..inputs import blame
from .gguf import load_gguf
from .models import fused_experts, locate, refuse_adapter
from .untrusted import check_adapter


def load_model(name: str, *, bf16: bool = False, dtype: Any = None, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A language model (encoder–decoder where its config says so) and its tokenizer, from a hub id, a local folder, a
    GGUF file (whose weights are dequantised, with a warning that says so), or "tiny". A ``dtype`` that is given (of
    torch, or "auto" for the checkpoint's, not for GGUF files) is taken instead of what ``bf16`` says."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = dtype or (torch.bfloat16 if bf16 else torch.float32)
    nowhere = "" if name == "tiny" or Path(name).exists() else " (a hub id: there is no such folder)"
    with blame(f"cannot load --model {name}{nowhere}"):
        place, options = locate(name)
        if options:
            network, tokenizer = load_gguf(name, dtype)
        else:
            refuse_adapter(place)
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
            config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
            kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            network = kind.from_pretrained(
                place, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
            )
    if tokenizer.pad_token is None:  # what it is does not matter: it is neither attended to nor learnt
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"  # on the left (Gemma), padding would be what predicts a window's first token
    return network, tokenizer


def attach_adapter(
    network: Any,
    *,
    adapter: Path | None = None,
    rank: int = 16,
    alpha: float | None = None,
    target_modules: str | list[str] = "all-linear",
    dropout: float = 0.0,
) -> Any:
    """The network with a trainable PEFT adapter: the one in the folder ``adapter``, or a new one of LoRA."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter is not None:
        with blame(f"--adapter {adapter}"), fused_experts():
            check_adapter(adapter, network)
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(network, str(adapter), is_trainable=True)
    kind = "SEQ_2_SEQ_LM" if network.config.is_encoder_decoder else "CAUSAL_LM"
    if not network.can_generate():
        kind = "FEATURE_EXTRACTION"
    with blame(f"--target_modules {target_modules}"), fused_experts():
        config = LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
            lora_dropout=dropout,
            target_modules=target_modules,
            task_type=kind,
        )
        return get_peft_model(network, config)
