"""Files that may come from strangers, looked at before any library reads them: YAML configs and PEFT adapters."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError
from ..inputs import DuplicateKeyError, is_path, one_line, parse_json, suffix
from .models import ADAPTER_CONFIG
from .records import read_text

MAX_CONFIG_BYTES = 2**20
MAX_DEPTH = 20
#: Options that may name code.
CODE = ("optimizer", "optimizer_args")
#: Kinds of adapters that are tensors and numbers alone. Others make PEFT load what their own config names (X-LoRA:
#: further adapters; prompt tuning: a tokenizer).
PEFT_TYPES = ("LORA", "ADALORA", "LOHA", "LOKR", "HIRA")


class Config(dict[str, Any]):
    """A mapping read from a YAML file; ``lines`` has ``file:line`` of each of its keys."""

    lines: dict[str, str]


def read_config(path: Path) -> Config:
    """The mapping in a YAML file of plain values.

    Tags, anchors and aliases are refused (no object is made, nothing expands), and so are keys given twice, more than
    one document, files over 1 MiB, and nesting deeper than 20. ``1e-4`` is a number.

    Raises:
        LoRARiteValueError: as file:line where the fault has a place.
    """
    import yaml

    text = _read_text(path)
    try:
        for event, depth in _events(text):
            where = f"{path}:{event.start_mark.line + 1}"
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise LoRARiteValueError(f"{where}: anchors (&) and aliases (*) are not supported, write the value out")
            if getattr(event, "tag", None):
                raise LoRARiteValueError(f"{where}: tags (!) are not supported: {event.tag}")
            if depth > MAX_DEPTH:
                raise LoRARiteValueError(f"{where}: nested deeper than {MAX_DEPTH}")
        loader = _loader()(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise LoRARiteValueError(f"{path}: expected a mapping, lines of “key: value”")
        config = Config(loader.construct_document(node))
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise LoRARiteValueError(f"{path}{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, LoRARiteValueError):
            raise
        raise LoRARiteValueError(f"{path}: {one_line(error)}") from None
    if not_text := [key for key in config if not isinstance(key, str)]:
        raise LoRARiteValueError(f"{path}: {not_text[0]!r} is no name of an option")
    config.lines = {key.value: f"{path}:{key.start_mark.line + 1}" for key, _ in node.value}
    return config


def names_code(value: Any) -> bool:
    """Whether the value of an option of :data:`CODE` has an import path (``package.module:attribute``) in it."""
    return any(map(is_path, value.values() if isinstance(value, dict) else [value]))


def forbid_imports(*but: type) -> None:
    """Keeps jsonargparse, for good, from importing what a value names: it makes objects of ``{class_path: …}``, also of
    one inside a string. Classes ``but`` are those that a file is read into."""
    from jsonargparse import set_parsing_settings

    ours = [f"{kind.__module__}.{kind.__qualname__}" for kind in but]
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=ours, instantiate_subclass_spec_in_any=False)


def _read_text(path: Path) -> str:
    text = read_text(path, MAX_CONFIG_BYTES)
    if bad := re.search(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", text):
        line = text.count("\n", 0, bad.start()) + 1
        raise LoRARiteValueError(f"{path}:{line}: the character {bad[0]!r} is not allowed")
    return text


def _events(text: str) -> Iterator[tuple[Any, int]]:
    """The events of YAML's parser with their depth: a stream, in which nothing is built or expanded yet."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        yield event, depth


def _loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML's safe loader, with numbers as 1e-4 and without duplicate keys."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                plain = isinstance(key, yaml.ScalarNode)
                if not plain or key.value in seen:
                    problem = f"{key.value} is given twice" if plain else "a key must be a word"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    # YAML 1.1, which PyYAML follows, wants a point and a signed exponent
    number = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader


def _what_else(folder: Path) -> str:
    """What a folder is that is no adapter."""
    if not folder.is_dir():
        return "it is a file, not a folder" if folder.exists() else "there is no such folder"
    if (folder / "adapter" / ADAPTER_CONFIG).is_file():
        return f"{folder} has no {ADAPTER_CONFIG}; its adapter is {folder / 'adapter'}"
    if (folder / "config.json").is_file():
        return f"{folder} is a model (config.json), not an adapter ({ADAPTER_CONFIG}): give it as --model"
    return f"{folder} has no {ADAPTER_CONFIG}"


def find_adapter(folder: Path) -> tuple[dict[str, Any], Path]:
    """The configuration of a PEFT adapter and its file of tensors, which is not read.

    Raises:
        LoRARiteValueError: what the folder is instead, or has that is damaged or not supported.
    """
    config_path, path = folder / ADAPTER_CONFIG, folder / "adapter_model.safetensors"
    if not config_path.is_file():
        raise LoRARiteValueError(_what_else(folder))
    try:
        config = parse_json(_read_text(config_path))
        kind, megatron = config.get("peft_type"), config.get("megatron_config")
        pattern = config.get("rank_pattern") or {}
    except (ValueError, AttributeError, RecursionError) as error:
        told = isinstance(error, (LoRARiteValueError, DuplicateKeyError))
        reason = str(error) if told else "not a JSON object"
        raise LoRARiteValueError(f"{config_path} is damaged: {reason}") from None
    if kind not in PEFT_TYPES:
        raise LoRARiteValueError(f"{config_path}: peft_type {kind!r} is not supported (only {', '.join(PEFT_TYPES)})")
    if not isinstance(pattern, dict):
        raise LoRARiteValueError(f"{config_path}: rank_pattern must be a mapping of names to ranks, got {pattern!r}")
    if megatron:  # PEFT would import the module that megatron_core names
        raise LoRARiteValueError(f"{config_path}: megatron_config is not supported")
    if not path.is_file():
        pickles = sorted(p.name for p in folder.glob("*") if suffix(p) in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
        why = f" ({pickles[0]} is a pickle, which can run code: convert it where you trust it)" if pickles else ""
        raise LoRARiteValueError(f"{folder} has no adapter_model.safetensors{why}")
    return config, path


def check_adapter(folder: Path, network: Any) -> None:
    """Looks at a PEFT adapter before PEFT does: tensors in safetensors alone, whole, finite, of the rank it claims.

    Args:
        folder: of the adapter.
        network: the model that it is for. A factor of PEFT's for experts holds so many of the rank as the model's layer
            has experts.

    Raises:
        LoRARiteValueError: what is wrong; nothing was loaded, run, imported or downloaded.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    config, path = find_adapter(folder)
    kind, rank, pattern = config.get("peft_type"), config.get("r"), config.get("rank_pattern") or {}
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:
        raise LoRARiteValueError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    if not tensors:
        raise LoRARiteValueError(f"{path} has no tensors")
    ranks = [r for r in (rank, *pattern.values()) if isinstance(r, int)]
    weights: dict[str, list[Any]] = {}
    for name, p in network.named_parameters():
        weights.setdefault(name.rpartition(".")[0], []).append(p)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise LoRARiteValueError(f"{path}: {name} is of {tensor.dtype}, factors are floating-point numbers")
        if not torch.isfinite(tensor).all():
            raise LoRARiteValueError(f"{path}: {name} contains NaN or Inf")
        if kind == "LORA" and name.endswith("lora_A.weight"):
            experts = _experts(name, tensors, weights)
            if tensor.shape[0] not in [r * experts for r in ranks]:
                of = f"{tensor.shape[0]} rows for {experts} experts" if experts > 1 else f"rank {tensor.shape[0]}"
                raise LoRARiteValueError(f"{path}: {name} has {of}, adapter_config.json has r={rank}")


def _experts(name: str, tensors: dict[str, Any], weights: dict[str, list[Any]]) -> int:
    """How many experts an adapter's factor A holds, as the model's weights tell, by layer; 1 where it is none's."""
    from ..plan.pairs import layout_by_shapes

    layer = name.removesuffix(".lora_A.weight").replace(".base_layer", "").removeprefix("base_model.model.")
    partner = tensors.get(name.removesuffix("lora_A.weight") + "lora_B.weight")
    found = None if partner is None else layout_by_shapes(tensors[name], partner, weights.get(layer, ()))
    return found[0] if found is not None and found[1] == "interleaved" else 1
