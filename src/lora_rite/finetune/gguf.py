"""Models from GGUF files, which llama.cpp and its kin run: the weights are dequantised as they are read."""

from typing import Any

from ..errors import LoRARiteValueError, warn
from .models import locate, reading_gguf


def load_gguf(model: str, config: Any, dtype: Any) -> Any:
    """The language model in a GGUF file, its weights dequantised to ``dtype``. No code of the file's runs: its
    configuration, vocabulary and tensors are read, and the classes are transformers'.

    Args:
        model: path of the file, or ``owner/name/file.gguf`` on the hub.
        config: of :func:`~lora_rite.finetune.load.load_tokenizer`.
        dtype: torch's dtype of the weights.

    Raises:
        LoRARiteValueError: no GGUF file, a damaged one, or one without all of the model's weights.
        ValueError: the architecture is none that transformers reads from GGUF files.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    place, file = locate(model)
    unpacked: dict[str, Any] = {}
    if (quantization := getattr(transformers, "GgufConfig", None)) is not None:  # without it, all are dequantised
        unpacked["quantization_config"] = quantization(dequantize=True)
    with reading_gguf():
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        loaded: Any = kind.from_pretrained(
            place, **file, **unpacked, config=config, dtype=dtype, output_loading_info=True
        )
    network, found = loaded
    lacking = sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
    if lacking:  # they would be random
        raise LoRARiteValueError(
            f"the file has not all of the model's weights: {len(lacking)} lack, {lacking[0]} first"
        )
    warn(f"{model}: the weights of the GGUF file are dequantised to {str(dtype)[6:]}")
    return network
