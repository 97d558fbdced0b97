"""What goes out: the adapter's folder with its card and tokenizer, the commands that come next, and the hub."""

import functools
import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

from ..errors import LoRARiteError, LoRARiteValueError, warn
from ..inputs import blame, one_line, suffix
from ..run.files import read_json
from ..run.settings import RESULT
from .checks import weights_of
from .models import ADAPTER_CONFIG, locate
from .sources import Source, find_folder, is_hub_id
from .untrusted import find_adapter

CARD = "README.md"
#: What of a folder goes to the hub: no pickle, no state of an optimizer, no code.
PUBLISHED = (".json", ".safetensors", ".model", ".txt", ".jinja", ".md")
#: The end of a card that nobody has edited: the digest of what stands above it.
MARK = "<!-- by lora-rite, which writes it anew as long as nobody has edited it: {} -->\n"
PACKAGES = ("lora-rite", "torch", "transformers", "peft")


def export(folder: Path, network: Any, tokenizer: Any, result: dict[str, Any]) -> None:
    """Writes the adapter of a run with its tokenizer, chat template and card.

    Args:
        folder: a new one, for them.
        network: the model with the adapter.
        tokenizer: as it was trained with.
        result: what ``result.json`` says.
    """
    from transformers import AutoTokenizer

    settings = result["settings"]
    place, gguf = locate(settings["model"])
    if gguf:  # transformers knows the name of the folder alone
        network.peft_config["default"].base_model_name_or_path = settings["model"]
    network.save_pretrained(str(folder), safe_serialization=True)
    # a new one: in training it pads on the right, and what it pads with may be no choice of the model's
    own = AutoTokenizer.from_pretrained(place, **gguf, trust_remote_code=settings["trust_remote_code"])
    own.chat_template = tokenizer.chat_template
    own.save_pretrained(str(folder))
    write_card(folder, adapter_card(result, find_adapter(folder)[0]))


def next_commands(result: dict[str, Any]) -> str:
    """The commands that a user wants after a run, with its paths."""
    settings = result["settings"]
    out = Path(settings["out"])
    held_out = settings["task"] or settings["validation"] or "HELD_OUT.jsonl"
    dtype, bits = weights_of(settings)
    more = [] if bits is None else [f"--load_in_{bits}bit"]
    more += ["--trust_remote_code"] * settings["trust_remote_code"]
    own = [] if dtype == weights_of({**settings, "dtype": None, "bf16": False})[0] else ["--dtype", dtype]
    evaluation = ["--tasks", held_out, "--model", settings["model"], "--adapter", str(out / "adapter"), *own]
    commands = [
        ["generate", str(out), "--prompt", "…", *more],
        ["eval", *evaluation, *more],
        ["merge", str(out), "--out", str(out / "merged")],
        ["report", str(out)],
    ]
    lines = [shlex.join(["lora-rite", *command]) for command in commands]
    return "next:\n" + "\n".join(f"  {line}" for line in lines)


# ---------------------------------------------------------------------------------------------------------- the card


def adapter_card(result: dict[str, Any], config: dict[str, Any]) -> str:
    """The model card of a run's adapter: base, data, settings, losses and versions. No times, so that equal runs have
    equal cards, and no folders of this machine.

    Args:
        result: what ``result.json`` says.
        config: what ``adapter_config.json`` says.
    """
    settings, loss, data, examples = (result[key] for key in ("settings", "held_out", "data", "examples"))
    causal = config.get("task_type") != "SEQ_2_SEQ_LM"
    options = "".join(f", {key}={value}" for key, value in (settings["optimizer_args"] or {}).items())
    places = {place: Path(place).name for key in ("data", "validation", "data_dir") if (place := settings[key])}
    local = lambda text: functools.reduce(lambda found, place: found.replace(place, places[place]), places, text)
    windows = settings["batch_size"] * settings["accumulation"]
    rows = {
        "base model": _base_name(settings["model"]),
        "training data": f"{local(data['train'])}, {examples['train']} examples",
        "held-out data": f"{local(data['held_out'])}, {examples['held_out']} examples",
        "optimizer": f"{settings['optimizer']}{options}, weight decay {settings['weight_decay']:g}",
        "learning rate": f"{settings['lr']:g}, {settings['scheduler']}, warm-up {settings['warmup']:g} of the steps",
        "steps": f"{settings['steps']}, each of {windows} windows of at most {settings['max_length']} tokens",
        "LoRA": f"rank {settings['rank']}, alpha {settings['alpha']:g}, dropout {settings['dropout']:g}, "
        f"on {settings['target_modules']}",
        "held-out loss": f"{loss['before']:.4f} before, {loss['after']:.4f} after (nat a token, of {loss['tokens']})",
        "perplexity": "{before:.2f} before, {after:.2f} after".format(**result["perplexity"]),
        "seed": settings["seed"],
        "versions": ", ".join(f"{package} {result['versions'][package]}" for package in PACKAGES),
    }
    name = settings["model"]
    base = json.dumps(name) if is_hub_id(name) else f'"…"  # {_plain(_base_name(name))}'
    kind = f"AutoModelFor{'Causal' if causal else 'Seq2Seq'}LM"
    text = f"""
A LoRA adapter, trained with [LoRA-RITE](https://arxiv.org/abs/2410.20625)'s `lora-rite train`.

{_table(rows)}

```python
from peft import PeftModel
from transformers import {kind}, AutoTokenizer

base = {base}
adapter = "…"  # this folder, or its id on the hub
model = PeftModel.from_pretrained({kind}.from_pretrained(base), adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter)
```
"""
    return _card(settings["model"], text, "peft", causal)


def merged_card(found: Source, dtype: str, difference: float) -> str:
    """The model card of a merged model."""
    assert found.adapter is not None
    config, _ = find_adapter(found.adapter)
    own = found.adapter.parent if found.adapter.name == "adapter" else found.adapter
    rows = {"base model": _base_name(found.model), "adapter": own.name, "weights": dtype}
    text = f"""
A base model with a LoRA adapter in its weights, by `lora-rite merge`. On random tokens its logits differ by
{difference:.1e} of their size from those of base and adapter.

{_table(rows)}
"""
    return _card(found.model, text, "transformers", config.get("task_type") != "SEQ_2_SEQ_LM")


def write_card(folder: Path, text: str) -> None:
    (folder / CARD).write_text(text, encoding="utf-8")


def _card(base: str, text: str, library: str, causal: bool) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base if is_hub_id(base) else None,  # the hub refuses a card that names a folder
        library_name=library,
        pipeline_tag="text-generation" if causal else None,
        tags=["lora", "lora-rite"],
    )
    title = f"# {_plain(_base_name(base))}, fine-tuned"
    return _marked(f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n{title}\n{text}")


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_plain(value)} |" for key, value in rows.items())])


def _plain(value: Any) -> str:
    """A value on one line, as text that is no Markdown or HTML."""
    return re.sub(r"([\\`*|<>\[\]])", r"\\\1", " ".join(str(value).split()))


def _base_name(model: str) -> str:
    """A model's name, without the folders of this machine that it is in."""
    path = Path(model)
    return path.resolve().name if path.is_absolute() or path.exists() else model


def _marked(text: str) -> str:
    text = text.rstrip("\n") + "\n\n"
    return text + MARK.format(hashlib.sha256(text.encode()).hexdigest())


def _unedited(text: str) -> bool:
    """Whether a card is as we wrote it."""
    head, found, _ = text.rpartition(MARK.partition("{")[0])
    return bool(found) and text == _marked(head)


# ----------------------------------------------------------------------------------------------------------- the hub


def check_push(option: str, repo: str) -> None:
    """Checks that the user may write to a repository of the hub, before the work begins; nothing is made there.

    Raises:
        LoRARiteValueError: no such name can be, no token that may write, or a name of somebody else.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with blame(f"{option} {repo}"):
        validate_repo_id(repo)
        user = HfApi().whoami()
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise LoRARiteValueError(
            f"{option} {repo}: the token in use may only read: hf auth login with one that may write"
        )
    names = [user["name"], *(group["name"] for group in user.get("orgs", []))]
    if "/" in repo and repo.partition("/")[0] not in names:
        raise LoRARiteValueError(f"{option} {repo}: you are {names[0]}, and can write to {', '.join(names)} alone")


def push(folder: Path, repo: str, *, model: str | None = None, public: bool = False) -> str:
    """Uploads a finished adapter or model in one commit: safetensors, configs, tokenizer, card.

    A card that was edited, in the folder or in the repository, is not written over by ours.

    Args:
        folder: of a run, of an adapter, or of a model.
        repo: name of the repository, which is made where there is none.
        model: hub id of the base model, to name in place of the one that the adapter records.
        public: make a new repository a public one.

    Returns:
        What was uploaded, and its address.

    Raises:
        LoRARiteValueError: nothing to upload, or no right to.
        LoRARiteError: the upload has failed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = find_folder(folder)
    files = _contents(folder, model)
    check_push("the repository", repo)
    api = HfApi()
    try:
        repo = api.create_repo(repo, private=not public, exist_ok=True).repo_id
        if CARD in files and api.file_exists(repo, CARD):
            there = Path(api.hf_hub_download(repo, CARD)).read_text(encoding="utf-8")
            if not _unedited(there) and there.encode() != files[CARD]:
                warn(f"{repo} has a {CARD} that somebody has written: it is left as it is")
                del files[CARD]
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(repo, operations, commit_message="Upload by lora-rite")
    except Exception as error:
        again = shlex.join(["lora-rite", "push", str(folder), repo])
        raise LoRARiteError(
            f"cannot upload to {repo}: {one_line(error)}; {folder} is whole, try again: {again}"
        ) from error
    return f"{', '.join(files)}\nare at {commit.repo_url}"


def _contents(folder: Path, model: str | None) -> dict[str, Any]:
    """What to upload: the path of a file by its name, or its content where that is another there."""
    if not any((folder / name).is_file() for name in (ADAPTER_CONFIG, "config.json")):
        with blame(str(folder)):
            find_adapter(folder)  # says what the folder is instead
    found = [p for p in sorted(folder.iterdir()) if suffix(p) in PUBLISHED and p.is_file() and p.name[0] != "."]
    files: dict[str, Any] = {p.name: str(p) for p in found}
    config: dict[str, Any] | None = None
    if ADAPTER_CONFIG in files:
        config, _ = find_adapter(folder)
        base = str(config.get("base_model_name_or_path"))
        if model is None and not is_hub_id(base):
            model_there = Path(base).name  # whose folder it is in is nobody's business
            warn(f"the base model is {base}, which the hub does not know; there it is {model_there}: --model names it")
        else:
            model_there = model or base
        if model_there != base:
            config = {**config, "base_model_name_or_path": model_there}
            files[ADAPTER_CONFIG] = json.dumps(config, indent=2, sort_keys=True).encode()
    elif not any(suffix(p) == ".safetensors" for p in found):
        raise LoRARiteValueError(f"{folder} has no weights in safetensors")
    if (text := _card_text(folder, config, model)) is not None:
        files[CARD] = text.encode()
    return files


def _card_text(folder: Path, config: dict[str, Any] | None, model: str | None) -> str | None:
    """The folder's card, with the base model's name on the hub where nobody has edited it; that of the run where the
    folder has none; None where there is neither."""
    from huggingface_hub import ModelCard

    if (folder / CARD).is_file():
        text = (folder / CARD).read_text(encoding="utf-8")
    elif config is not None and (folder.parent / RESULT).is_file():
        text = adapter_card(read_json(folder.parent / RESULT, "settings", "held_out"), config)
    else:
        return None
    if model is None or not _unedited(text):
        return text
    card = ModelCard(text.rpartition(MARK.partition("{")[0])[0])
    card.data["base_model"] = model
    return _marked(card.content)
