"""What a user names to go on with: the folder of a run or of an adapter, an adapter on the hub, or a model."""

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..errors import LoRARiteValueError
from ..inputs import blame
from .models import ADAPTER_CONFIG, TINY
from .untrusted import find_adapter

#: What the weights of a model may be loaded or written in.
Dtype = Literal["float32", "bfloat16", "float16"]
#: Of an adapter's repository on the hub, what is fetched: no pickle, and no code.
ADAPTER_FILES = [ADAPTER_CONFIG, "adapter_model.safetensors", "tokenizer*", "special_tokens_map.json", "*.jinja"]


class Source(NamedTuple):
    """Attributes: ``model``, as ``load_model`` takes it; ``adapter``, its folder, None where the model is alone."""

    model: str
    adapter: Path | None


def find_source(name: str, model: str | None = None) -> Source:
    """What a name stands for; no weights are read.

    Args:
        name: the folder of a run of ``lora-rite train`` or of an adapter, the hub id of an adapter, or a model.
        model: the base model of the adapter, where it is not the one that the adapter records.

    Raises:
        LoRARiteValueError: the adapter cannot be used, or records no base model that is here; a base for a model.
    """
    if "://" in name or "://" in (model or ""):  # not repeated: it may hold a password
        raise LoRARiteValueError("a model or an adapter is a hub id or a local path, not a URL")
    folder = find_folder(Path(name))
    if is_hub_id(name):
        folder = _fetch_adapter(name) or folder
    if not (folder / ADAPTER_CONFIG).is_file():
        if model is not None:
            raise LoRARiteValueError(f"--model {model} is for an adapter, and {name} is none (no {ADAPTER_CONFIG})")
        return Source(name, None)
    config, _ = find_adapter(folder)
    return Source(_recorded_base(folder, config) if model is None else model, folder)


def find_folder(folder: Path) -> Path:
    """The adapter's folder where it is a run's that is given; else the folder itself."""
    adapter = folder / "adapter"
    bare = not any((folder / file).is_file() for file in (ADAPTER_CONFIG, "config.json"))
    if bare and (adapter / ADAPTER_CONFIG).is_file():
        return adapter
    if bare and (folder / "settings.json").is_file() and (folder / "checkpoints").is_dir():
        raise LoRARiteValueError(
            f"{folder} is of a run that has not finished, which has no adapter yet: go on with lora-rite train "
            f"--resume, or give a checkpoint in {folder / 'checkpoints'}"
        )
    return folder


def _fetch_adapter(name: str) -> Path | None:
    """The local copy of an adapter on the hub; None where there is none of this name, or the hub cannot be reached and
    its cache has none."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    with blame(f"cannot load {name} from the hub"):
        try:
            hf_hub_download(name, ADAPTER_CONFIG)
        except (EntryNotFoundError, GatedRepoError, RepositoryNotFoundError):
            return None  # what there is besides, the model's loading says
        return Path(snapshot_download(name, allow_patterns=ADAPTER_FILES))


def _recorded_base(folder: Path, config: dict[str, Any]) -> str:
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip() or not base.isprintable() or "://" in base:
        raise LoRARiteValueError(f"{folder / ADAPTER_CONFIG} names no base model: give it by --model")
    if Path(base).parts[-3:] == TINY.parts[-3:]:
        return "tiny"  # of another installation of this package, maybe
    return base


def is_hub_id(model: str) -> bool:
    """Whether a model's name is that of a repository on the hub, as far as its form and the local files tell."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", model) is not None and not Path(model).exists()
