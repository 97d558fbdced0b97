"""Loads what a user has named: a model, and its adapter where there is one."""

from collections.abc import Callable
from typing import Any

from ..errors import LoRARiteValueError
from ..inputs import blame
from .load import attach_adapter, check_attaching, load_model
from .sources import Dtype, Source


def load_source(
    found: Source,
    dtype: Dtype | None,
    *,
    bits: int | None = None,
    trust_remote_code: bool = False,
    check: Callable[[Any, Any], None] = lambda tokenizer, config: None,
) -> tuple[Any, Any]:
    """The model, without its adapter, in evaluation mode, and the tokenizer, which is the adapter's where that has one.

    Args:
        found: by :func:`find_source`.
        dtype: of the weights; None is the checkpoint's own, and float32 for a GGUF file.
        bits: 4 or 8 quantises the linear maps, as :func:`~lora_rite.finetune.load.load_model` does.
        trust_remote_code: allow the model's own code to run.
        check: called with that tokenizer and the model's configuration before the weights are loaded.

    Raises:
        LoRARiteValueError: a model or tokenizer that cannot be loaded, or that do not fit each other.
    """
    from transformers import AutoTokenizer

    own = None
    if found.adapter is not None and (found.adapter / "tokenizer_config.json").is_file():
        with blame(f"cannot load the tokenizer in {found.adapter}"):
            own = AutoTokenizer.from_pretrained(found.adapter, trust_remote_code=trust_remote_code)

    def before(tokenizer: Any, config: Any) -> None:
        check(tokenizer if own is None else own, config)
        if found.adapter is not None:
            check_attaching(config, trust_remote_code, adapter=found.adapter)

    try:
        network, tokenizer = load_model(
            found.model,
            dtype=dtype or "auto",
            bits=bits,
            trust_remote_code=trust_remote_code,
            check=before,
        )
    except LoRARiteValueError as error:
        if not str(error).startswith("cannot load --model"):
            raise  # by the check
        said = str(error).replace("cannot load --model", "cannot load", 1)  # here that option is the adapter's base
        of = f" (the base model of {found.adapter}; --model gives another one)" if found.adapter else ""
        raise LoRARiteValueError(said + of) from error
    return network.eval(), tokenizer if own is None else own


def attach(network: Any, found: Source) -> Any:
    """The model of :func:`load_source` with the adapter, if there is one, in evaluation mode."""
    return network if found.adapter is None else attach_adapter(network, adapter=found.adapter).eval()
