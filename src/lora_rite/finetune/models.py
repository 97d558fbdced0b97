"""Models that are known without a network: the one inside this package, and the configurations of the paper's."""

import importlib.util
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError
from ..inputs import blame, one_line, parse_json, suffix
from .wording import did_you_mean

#: The folder of the embedded model.
TINY = Path(__file__).parent / "tiny"
#: transformers' model type and settings by hub id, from the public configurations: Gemma's needs a licence on the hub.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "google/gemma-2b": (
        "gemma",
        {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
         "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000},
    ),
    "google/gemma-2-2b": (
        "gemma2",
        {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000},
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


def locate(model: str) -> tuple[str, dict[str, str]]:
    """Where transformers finds a model: the first argument of ``from_pretrained``, and further ones by name.

    "tiny" is the folder of the embedded model. A GGUF file, local or in a repository on the hub
    (``owner/name/file.gguf``), is its folder or repository and ``gguf_file``; so is a folder that holds one, and no
    config.json. Anything else is a hub id or a folder.

    Raises:
        LoRARiteValueError: no such file, it is not a GGUF file, or the folder holds several.
        ImportError: GGUF files need the extra.
    """
    path = Path(model)
    if model == "tiny":
        return str(TINY), {}
    if path.is_dir() and not (path / "config.json").is_file() and (files := sorted(path.glob("*.gguf"))):
        if len(files) > 1:
            raise LoRARiteValueError(f"the folder holds {len(files)} GGUF files: name one, as {files[0]}")
        path = files[0]
    named = suffix(path) == ".gguf" and not path.is_dir()
    if not named and not (path.is_file() and _is_gguf(path)):
        return model, {}
    on_hub = not path.is_absolute() and len(path.parts) == 3 and not path.parent.exists()
    if not on_hub and not path.is_file():
        raise LoRARiteValueError("no such file")
    if not on_hub and not _is_gguf(path):
        raise LoRARiteValueError("it is not a GGUF file")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('GGUF files need an extra: pip install "lora-rite[finetune]"')
    return path.parent.as_posix(), {"gguf_file": path.name}


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def configuration(model: str, option: str, trust_remote_code: bool = False) -> Any:
    """transformers' configuration of a name in :data:`CONFIGS`, of "tiny" (the embedded model), or of a config.json, a
    folder with one, a GGUF file or a hub id. An error names the option."""
    from transformers import AutoConfig

    with blame(f"{option} {model}"):
        if model in CONFIGS:
            kind, sizes = CONFIGS[model]
            return AutoConfig.for_model(kind, **sizes)
        place, options = locate(model)
        if options:
            with reading_gguf():
                return AutoConfig.from_pretrained(place, **options, trust_remote_code=trust_remote_code)
        refuse_adapter(place)
        return AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)


def network_of_shapes(config: Any, base: bool = False, trust_remote_code: bool = False) -> Any:
    """The language model of a transformers' configuration on the meta device, without what is put on top of it
    where ``base`` says so."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModel if base else AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config, trust_remote_code=trust_remote_code)


@contextmanager
def reading_gguf() -> Iterator[None]:
    """Turns what comes of a GGUF file that is not whole into an error that says so.

    Raises:
        LoRARiteValueError: the file is damaged.
        ValueError: transformers' own, of an architecture or a tokenizer that it does not read from GGUF files.
    """
    try:
        yield
    except (LookupError, OverflowError, ValueError, OSError, struct.error) as error:
        plain = isinstance(error, (ValueError, OSError)) and not isinstance(error, UnicodeDecodeError)
        # numpy says the one of a file that ends too soon, transformers the other of lengths that cannot be
        if plain and "reshape" not in str(error) and "not a valid JSON file" not in str(error):
            raise
        raise LoRARiteValueError(f"the file is damaged or not whole ({one_line(error)})") from error


#: The file that makes a folder one of PEFT.
ADAPTER_CONFIG = "adapter_config.json"


def is_path_like(model: str) -> bool:
    """Whether a name can be that of a folder alone, and none of the hub."""
    return Path(model).is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or "\\" in model


def folder_meant(name: str) -> str:
    """``, did you mean X?`` with the folder beside it that was most likely meant; nothing where none is near."""
    return did_you_mean(name, [str(path) for path in Path(name).parent.glob("*") if path.is_dir()])


def refuse_adapter(model: str) -> None:
    """Checks that a model's name is not that of a folder with an adapter, of which transformers would load the base
    model that the adapter names, nor of a folder that is not there or holds no model.

    Raises:
        LoRARiteValueError: what it is, and what to give instead.
    """
    folder = Path(model)
    if (folder / ADAPTER_CONFIG).is_file():
        raise LoRARiteValueError(
            f"it is an adapter ({ADAPTER_CONFIG}), not a model: give its base model{_base(folder)} as --model, and the "
            "folder as --adapter, or lora-rite merge makes a model of the two"
        )
    adapter = folder / "adapter"
    if (adapter / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        base = _base(adapter)
        raise LoRARiteValueError(f"it is the folder of a run, whose adapter is {adapter}: give the base model{base}")
    if is_path_like(model) and not folder.exists():
        raise LoRARiteValueError(f"there is no such folder{folder_meant(model)}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise LoRARiteValueError("the folder has no config.json, so that it is no model of transformers")


def _base(folder: Path) -> str:
    """The base model that an adapter names, in brackets; nothing where it names none that can be shown."""
    try:
        found = parse_json((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""
    return f" ({found})" if isinstance(found, str) and found and found.isprintable() else ""


@contextmanager
def fused_experts() -> Iterator[None]:
    """Where PEFT attaches an adapter: it gives experts' maps that share a parameter a rank pattern of its own, follows
    it, and warns that it matches no module."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
        yield
