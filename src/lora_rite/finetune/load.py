"""A model with its tokenizer, and an adapter on it."""

import copy
import importlib.util
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError
from ..inputs import blame
from ..run.processes import sharded
from .gguf import load_gguf
from .models import (
    folder_meant,
    fused_experts,
    is_path_like,
    locate,
    network_of_shapes,
    reading_gguf,
    refuse_adapter,
)
from .untrusted import check_adapter
from .wording import did_you_mean

#: Attention that runs on a CPU too, where a model is tried; of the others the model gets what it has been tried with
#: until :func:`set_attention` exchanges it.
TRIED_ATTENTION = (None, "eager", "sdpa")


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The tokenizer of a model, and its configuration; no weights are read.

    Args:
        name: as :func:`load_model` takes it.
        trust_remote_code: allow the model's own code to run.

    Raises:
        LoRARiteValueError: they cannot be loaded, by ``--model``.
    """
    from transformers import AutoConfig, AutoTokenizer

    with _blame(name):
        place, file = locate(name)
        if not file:
            refuse_adapter(place)
        with reading_gguf() if file else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(place, **file, trust_remote_code=trust_remote_code)
            config = AutoConfig.from_pretrained(place, **file, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:  # what it is does not matter: it is neither attended to nor learnt
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"  # on the left (Gemma), padding would be what predicts a window's first token
    return tokenizer, config


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    bits: int | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
    check: Callable[[Any, Any], None] = lambda tokenizer, config: None,
) -> tuple[Any, Any]:
    """A language model (encoder–decoder where its config says so) and its tokenizer, on the CPU.

    Args:
        name: hub id, local folder, GGUF file (whose weights are dequantised, with a warning that says so), or "tiny".
        dtype: of the weights: float32, bfloat16, float16, or auto, the checkpoint's (float32 for a GGUF file).
        bits: 4 (NF4, its constants quantised too) or 8 (LLM.int8) quantises the linear maps by bitsandbytes; the dtype
            is then that of what is left, and of the products.
        attn_implementation: transformers' name of one of :data:`TRIED_ATTENTION`; others are left out.
        trust_remote_code: allow the model's own code to run.
        progress: show bars while weights are fetched and loaded.
        check: called with the tokenizer and the configuration before the weights are loaded, which may take minutes.

    Raises:
        LoRARiteValueError: it cannot be loaded, by ``--model``.
        ImportError: bitsandbytes is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging

    (logging.enable_progress_bar if progress else logging.disable_progress_bar)()
    if bits is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"--load_in_{bits}bit needs bitsandbytes: pip install bitsandbytes")
    given = dtype if dtype == "auto" else getattr(torch, dtype)
    tokenizer, config = load_tokenizer(name, trust_remote_code=trust_remote_code)
    with _blame(name):
        place, file = locate(name)
        if file and bits is not None:
            raise LoRARiteValueError(f"a GGUF file is dequantised, so that --load_in_{bits}bit is not for it")
        more = {} if bits is None else _quantised(bits, given, config)
    check(tokenizer, config)
    with _blame(name):
        if file:
            network = load_gguf(name, config, torch.float32 if dtype == "auto" else given)
        else:
            kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            if attn_implementation is not None and attn_implementation in TRIED_ATTENTION:
                more["attn_implementation"] = attn_implementation
            network = kind.from_pretrained(
                place, dtype=given, trust_remote_code=trust_remote_code, use_safetensors=True, **more
            )
    module: Any
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # After a pass without gradients, bitsandbytes would keep 4-bit weights in a layout whose products have no
            # gradient, and nothing below the last layer would be trained.
            module.support_avx512bf16_for_cpu = False
    return network, tokenizer


def _blame(name: str) -> AbstractContextManager[None]:
    return blame(f"cannot load --model {name}{'' if name == 'tiny' or Path(name).exists() else _nowhere(name)}")


def find_device(device: str | None) -> str:
    """Where to run, by ``--device``: the accelerator if there is one, else the CPU, where None is given.

    Raises:
        LoRARiteValueError: there is no such device.
    """
    import torch

    if device is None:
        accelerator = torch.accelerator.current_accelerator()
        return "cpu" if accelerator is None else accelerator.type
    with blame(f"--device {device}"):
        torch.empty(1, device=device)
    return device


def _nowhere(name: str) -> str:
    """What a name is that is none of a folder, and the folder that may have been meant."""
    return "" if is_path_like(name) else f" (a hub id: there is no such folder{folder_meant(name)})"


def _quantised(bits: int, dtype: Any, config: Any) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that quantise a model, and keep it on the CPU, where it is tried."""
    import torch
    from transformers import BitsAndBytesConfig

    if getattr(config, "quantization_config", None) is not None:
        raise LoRARiteValueError(f"it is quantised already: leave --load_in_{bits}bit out")
    if bits == 8:
        quantisation = BitsAndBytesConfig(load_in_8bit=True)
    else:
        products = (getattr(config, "dtype", None) or torch.float32) if dtype == "auto" else dtype
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=products,
        )
    return {"quantization_config": quantisation, "device_map": {"": "cpu"}}


def set_attention(network: Any, attn_implementation: str | None) -> None:
    """Exchanges the attention of a model for one that it could not be tried with on a CPU.

    Raises:
        LoRARiteValueError: the model has not that one, or its package or device is missing.
    """
    if attn_implementation not in TRIED_ATTENTION:
        with blame(f"--attn_implementation {attn_implementation}"):
            network.set_attn_implementation(attn_implementation)


def place_quantised(network: Any) -> None:
    """Moves a quantised model to the accelerator, if there is one: the Trainer leaves those where they are."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and getattr(network, "quantization_method", None) is not None:
        network.to(torch.device(device.type, torch.accelerator.current_device_index()))


def check_sharded(network: Any) -> None:
    """Raises LoRARiteValueError where ``accelerate launch`` asks for FSDP2, which cannot share out the model."""
    names: dict[int, list[str]] = {}
    for name, p in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    tied = [name for same in names.values() if len(same) > 1 for name in same if ".original_module." in name]
    if sharded() and tied:
        module = tied[0].partition(".original_module.")[0]
        raise LoRARiteValueError(f"--modules_to_save: FSDP2 takes no copy of {module}, which is tied; train by DDP")


def attach_adapter(
    network: Any,
    *,
    adapter: Path | None = None,
    rank: int = 16,
    alpha: float | None = None,
    target_modules: str | list[str] = "all-linear",
    dropout: float = 0.0,
    dora: bool = False,
    rslora: bool = False,
    modules_to_save: str | list[str] | None = None,
) -> Any:
    """The network with a trainable PEFT adapter: the one in the folder ``adapter``, or a new one of LoRA with the other
    options, which ``lora-rite train`` has too.

    Raises:
        LoRARiteValueError: a damaged or unsafe adapter, or modules that the network has not, by their option.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter is not None:
        with blame(f"--adapter {adapter}"), fused_experts():
            check_adapter(adapter, network)
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(network, str(adapter), is_trainable=True)
    kind = "SEQ_2_SEQ_LM" if network.config.is_encoder_decoder else "CAUSAL_LM"
    if not network.can_generate():
        kind = "FEATURE_EXTRACTION"
    targets, saved = module_names(target_modules), module_names(modules_to_save)
    for option, names in (("target_modules", targets), ("modules_to_save", saved)):
        if isinstance(names, list):
            _check_names(network, names, f"--{option}")
    if isinstance(saved, str):
        raise LoRARiteValueError(f"--modules_to_save {saved}: give names of modules, with commas between them")
    with blame(f"--target_modules {target_modules}"), fused_experts():
        config = LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
            lora_dropout=dropout,
            target_modules=targets,
            use_dora=dora,
            use_rslora=rslora,
            modules_to_save=saved,
            task_type=kind,
        )
        return get_peft_model(network, config)


def attach_shapes(network: Any, **options: Any) -> Any:
    """:func:`attach_adapter` to a network on the meta device."""
    import torch

    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # so it is meant
        return attach_adapter(network, **options)


def check_attaching(config: Any, trust_remote_code: bool, **options: Any) -> None:
    """Looks at the shapes of a model whether an adapter can be attached to it, before the weights are loaded.

    Args:
        config: of the model; one whose code makes no network on the meta device is not looked at.
        trust_remote_code: allow that code to run.
        options: of :func:`attach_adapter`, whose errors it has.
    """
    import torch

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where it is attached, it is said
        try:
            # (a copy: transformers writes dtype and attention into what it makes a network of)
            network = network_of_shapes(copy.deepcopy(config), trust_remote_code=trust_remote_code)
        except Exception:
            return
        attach_shapes(network, **options)


def module_names(given: str | list[str] | None) -> str | list[str] | None:
    """A list of names as it is, a name or several with commas between them as a list; "all-linear" and regular
    expressions stay strings."""
    if not isinstance(given, str) or given == "all-linear" or not re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*,?", given):
        return given
    return [name.strip() for name in given.split(",") if name.strip()]


def _check_names(network: Any, names: list[str], option: str) -> None:
    """Checks that each name is that of modules, as PEFT finds them, which passes over what none has."""
    there = [name for name, _ in network.named_modules()]
    for wanted in names:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in there):
            last = sorted({name.rpartition(".")[2] for name, m in network.named_modules() if not list(m.children())})
            known = [name for name in last if not name.isdigit()]
            hint = did_you_mean(wanted, known) or f"; there are {', '.join(known)}"
            raise LoRARiteValueError(f"{option} {wanted}: no module of the model is named so{hint}")
    if not names:
        raise LoRARiteValueError(f"{option}: no names")
