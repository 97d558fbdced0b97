"""Leaves out of a model the tokens that a recipe's data does not use: its study then takes less time.

    python tools/prune_vocabulary.py models/gemma3-270m models/gemma3-270m-cpp recipes/real/gemma3-270m-first.yaml

In a small model most parameters and half of the work are the table of words: 168 of Gemma 3 270M's 268 million. Kept
are the tokens of the recipe's texts, those that are put together on the way to them, single bytes and special tokens.
The texts are tokenised as before (which is checked), embeddings and logits of the kept tokens are the same numbers. The
loss is lower than the whole model's, since nothing is lost on tokens that never come: compare it within a study alone,
and do not take the model for anything else. OUT gets weights, tokenizer and the licence files of the model's folder.

A GGUF file, or a folder with one, stays quantised: OUT gets model.gguf, small enough to be carried to another machine,
with the blocks of before without the rows of the tokens that are left out, and its tokenizer inside.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from lora_rite.errors import LoRARiteError, LoRARiteValueError
from lora_rite.finetune.data import Chat, Sample
from lora_rite.finetune.load import load_model
from lora_rite.finetune.models import locate, reading_gguf
from lora_rite.inputs import blame
from lora_rite.run.files import check_empty, prepare_folder, write_folder
from lora_rite.study.data import read_data
from lora_rite.study.recipe import load_recipe

#: Files of a model's folder that say what its use is bound to.
PAPERS = ("LICENSE*", "NOTICE*", "*TERMS*", "README*")
#: Names of special tokens' ids in a model's configurations.
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "decoder_start_token_id")
#: The name of the file that a pruned GGUF file gets.
GGUF = "model.gguf"


def prune(model: str, out: Path, recipe: Path, data_dir: Path | None = None) -> tuple[int, int]:
    """Writes the model with the tokens that a recipe's data uses into the folder ``out``, which must be new or empty.

    Args:
        model: what --model takes.
        out: folder for weights, tokenizer and licences.
        recipe: the recipe of a study.
        data_dir: folder with the rows of its tasks as local files.

    Returns:
        The number of tokens before and after.

    Raises:
        LoRARiteValueError: the folder is not empty, the tokenizer is no byte pair encoding, the data has conversations.
    """
    check_empty("OUT", out)
    file = _find_gguf(model)
    tasks = load_recipe(recipe).tasks.values()
    samples = [s for task in tasks for part in read_data(task, data_dir).values() for s in part]
    texts = {text for sample in samples for text in _texts(sample, recipe)}
    loaded: Any = load_model(model) if file is None else (None, _gguf_tokenizer(file))
    network, tokenizer = loaded
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    encoded = {text: _tokens(tokenizer, text) for text in sorted(texts)}  # minutes, of long texts
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    kept = _prune_tokenizer(definition, {i for ids in encoded.values() for i in ids}, set(special.values()))
    prepare_folder("OUT", out)

    def write(target: Path) -> None:
        target.mkdir(parents=True)
        if file is None:
            pruned = _write_tokenizer(definition, special, target)
            _prune_network(network, kept)
            network.save_pretrained(target)
        else:
            _write_gguf(file, target / GGUF, kept)
            pruned = _gguf_tokenizer(target / GGUF)
        _check(pruned, encoded, kept)
        folder = Path(model) if file is None else file.parent
        for pattern in PAPERS if folder.is_dir() else ():
            for paper in folder.glob(pattern):
                shutil.copy(paper, target)

    write_folder(out, write)
    return len(tokenizer), len(kept)


def _texts(sample: Sample, recipe: Path) -> Iterator[str]:
    """What windows are made of."""
    if isinstance(sample, Chat):
        raise LoRARiteValueError(f"{recipe} has conversations, whose tokens come from a chat template")
    for prompt in (sample.prompt, *sample.shorter):
        yield prompt + sample.completion
        yield prompt


def _prune_tokenizer(definition: dict[str, Any], used: set[int], special: set[str]) -> list[int]:
    """Changes the definition of a tokenizer (tokenizer.json) so that it has the used and the special tokens alone.
    Returns the ids before of those that it has now, in order."""
    model, after = definition["model"], definition["post_processor"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise LoRARiteValueError("the model's tokenizer is no byte pair encoding without prefixes and suffixes")
    if after is not None and after["type"] not in ("TemplateProcessing", "ByteLevel"):
        raise LoRARiteValueError(f"the model's tokenizer has a {after['type']}, whose tokens cannot be renumbered")
    vocabulary, added = model["vocab"], {token["content"]: token["id"] for token in definition["added_tokens"]}
    names = {i: name for name, i in {**vocabulary, **added}.items()}
    single = {name for name in vocabulary if len(name) == 1 and "ByteLevel" in json.dumps(definition["pre_tokenizer"])}
    byte = {name for name in vocabulary if name.startswith("<0x")}
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    tokens, merges = {names[i] for i in used} | special | single | byte, set()
    for name in [name for name in tokens if name in vocabulary]:
        for pair in _merges(name, ranks):
            merges.add(pair)
            tokens |= {*pair, "".join(pair)}
    kept = sorted({**vocabulary, **added}[name] for name in tokens if name in vocabulary or name in added)
    new = {names[i]: place for place, i in enumerate(kept)}
    model["vocab"] = {name: new[name] for name in vocabulary if name in new}
    model["merges"] = [pair for pair in model["merges"] if tuple(pair) in merges]
    definition["added_tokens"] = [
        {**t, "id": new[t["content"]]} for t in definition["added_tokens"] if t["content"] in new
    ]
    if after is not None and after["type"] == "TemplateProcessing":
        for token in after["special_tokens"].values():
            token["ids"] = [new[name] for name in token["tokens"]]
    return kept


def _merges(token: str, ranks: dict[tuple[str, ...], int]) -> Iterator[tuple[str, str]]:
    """The merges by which a token is put together from its characters: of all pairs, that of the lowest rank first."""
    parts = list(token)
    while len(parts) > 1:
        rank, place = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(parts)))
        if rank == len(ranks):
            return  # not a token that merges lead to, such as <s>
        yield parts[place], parts[place + 1]
        parts[place : place + 2] = ["".join(parts[place : place + 2])]


def _write_tokenizer(definition: dict[str, Any], special: dict[str, str], folder: Path) -> Any:
    """Writes a tokenizer of this definition and these special tokens, and returns it."""
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    file.write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _check(pruned: Any, encoded: dict[str, list[int]], kept: list[int]) -> None:
    """Checks that texts have the same tokens as before."""
    for text, ids in encoded.items():
        if ids != [kept[i] for i in _tokens(pruned, text)]:
            raise LoRARiteValueError(f"the pruned tokenizer has other tokens for {text[:80]!r}: this model stays whole")


def _prune_network(network: Any, kept: list[int]) -> None:
    """Keeps these rows of the embeddings and of the head, and renumbers the special tokens of the configurations."""
    tables = [network.get_input_embeddings(), network.get_output_embeddings()]
    if getattr(tables[1], "bias", None) is not None:
        raise LoRARiteValueError("the model's head has a bias, which is not pruned")
    rows = [table.weight.detach()[kept].clone() for table in tables]
    network.resize_token_embeddings(len(kept), mean_resizing=False)
    for table, values in zip([network.get_input_embeddings(), network.get_output_embeddings()], rows, strict=True):
        table.weight.data.copy_(values)
    new = {i: place for place, i in enumerate(kept)}
    for config in (network.config, network.generation_config):
        for name in IDS:
            value = getattr(config, name, None)
            if value is not None:
                found = [new[i] for i in ([value] if isinstance(value, int) else value) if i in new]
                setattr(config, name, None if not found else found[0] if isinstance(value, int) else found)


def _find_gguf(model: str) -> Path | None:
    """The GGUF file that a model is, or that its folder holds; None of any other model."""
    from transformers.utils import cached_file

    with blame(model):
        place, options = locate(model)
        file: Any = cached_file(place, options["gguf_file"]) if options else None
        return file and Path(file)


def _gguf_tokenizer(file: Path) -> Any:
    from transformers import AutoTokenizer

    with blame(str(file)), reading_gguf():
        return AutoTokenizer.from_pretrained(file.parent.as_posix(), gguf_file=file.name)


def _write_gguf(source: Path, target: Path, kept: list[int]) -> None:
    """Copies a GGUF file with these rows of the tables of tokens, as they are quantised, and these tokens."""
    import gguf
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata, get_field_data

    reader = gguf.GGUFReader(source)
    architecture, keys = get_field_data(reader, gguf.Keys.General.ARCHITECTURE), gguf.Keys.Tokenizer
    tokens = get_field_data(reader, keys.LIST)
    kept = [i for i in kept if i < len(tokens)]  # transformers adds special tokens that the file has not
    new: dict[Any, int] = {i: place for place, i in enumerate(kept)}
    names = {tokens[i] for i in kept}
    changed, removed = {}, []
    for name, field in reader.fields.items():
        value: Any = field.contents()
        if name == gguf.Keys.LLM.VOCAB_SIZE.format(arch=architecture):
            value = len(kept)
        elif name == keys.MERGES:
            value = [pair for pair in value if {*pair.split(" "), pair.replace(" ", "")} <= names]
        elif name.startswith("tokenizer.") and isinstance(value, list) and len(value) == len(tokens):
            value = [value[i] for i in kept]
        elif name.startswith("tokenizer.") and name.endswith("_token_id"):
            value = new.get(value)
        else:
            continue
        if value is None:
            removed.append(name)
        else:
            changed[name] = MetadataDetails(field.types[0], value, sub_type=field.types[-1])
    tables = {
        f"{gguf.TENSOR_NAMES[table]}.{part}"
        for table in (gguf.MODEL_TENSOR.TOKEN_EMBD, gguf.MODEL_TENSOR.OUTPUT, gguf.MODEL_TENSOR.PER_LAYER_TOKEN_EMBD)
        for part in ("weight", "bias")
    }
    rows = lambda tensor: tensor.data[kept] if tensor.name in tables else tensor.data
    cut = [(tensor, rows(tensor)) for tensor in reader.tensors]
    reader.tensors = [tensor._replace(data=data, n_bytes=data.nbytes) for tensor, data in cut]
    writer = gguf.GGUFWriter(target, architecture, endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    copy_with_new_metadata(reader, writer, changed, removed)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what --model takes")
    parser.add_argument("out", type=Path, help="new or empty folder")
    parser.add_argument("recipe", type=Path, help="the study whose tokens stay")
    parser.add_argument("--data_dir", type=Path, help="folder with the tasks' rows as local files")
    options = parser.parse_args(words)
    try:
        before, after = prune(options.model, options.out, options.recipe, options.data_dir)
    except (LoRARiteError, OSError) as error:
        print(f"prune_vocabulary: error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {after:,} of {before:,} tokens; take it as train.model of {options.recipe}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
