"""What jsonargparse says of names and values that it refuses, in words that need no knowledge of Python's types."""

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches

#: Names that other trainers have for our options.
SYNONYMS = {
    "learning_rate": "lr",
    "output_dir": "out",
    "max_steps": "steps",
    "num_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "max_seq_length": "max_length",
    "warmup_ratio": "warmup",
    "lr_scheduler_type": "scheduler",
    "model_name_or_path": "model",
    "dataset": "data",
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "optim": "optimizer",
    "resume_from_checkpoint": "resume",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "num_train_epochs": "epochs",
    "fp16": "dtype",
    "torch_dtype": "dtype",
    "lora_target": "target_modules",
    "cutoff_len": "max_length",
    "max_samples": "limit",
    "val_size": "holdout",
    "use_dora": "dora",
    "use_rslora": "rslora",
    "adapter_path": "adapter",
    "adapter_name_or_path": "adapter",
    "iters": "steps",
    "steps_per_eval": "eval_every",
    "grad_checkpoint": "gradient_checkpointing",
    "torch_compile_mode": "torch_compile",
    "compile": "torch_compile",
    "max_tokens": "max_new_tokens",
}
_KINDS = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "Path": "a path",
          "list": "a list", "dict": "a mapping", "NoneType": "null"}  # fmt: skip
_PLURALS = {"int": "whole numbers", "float": "numbers", "str": "words"}


def did_you_mean(name: str, known: Iterable[str], before: str = "") -> str:
    """``, did you mean X?`` with the known name that was most likely meant; nothing where none is near.

    Args:
        name: as it was written.
        known: the names that there are.
        before: what is put before X.
    """
    meant = {key: key for key in known}
    meant |= {other: ours for other, ours in SYNONYMS.items() if ours in meant and other not in meant}
    near = [name] if name in meant else get_close_matches(name, sorted(meant), 1)
    return f", did you mean {before}{meant[near[0]]}?" if near else ""


def in_words(message: str, name: Callable[[str], str] = str) -> str:
    """A message of jsonargparse on one line, as in "rank must be a whole number, got 8.5".

    Args:
        message: of an ArgumentError.
        name: what the option or key of that name is called.
    """
    message = " ".join(message.split())
    if missing := re.fullmatch(r"the following arguments are required: (.*)", message):
        names = [name(key.rpartition(".")[2]) for key in missing[1].split(", ")]
        return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing"
    if not (keys := re.match(r'(?:Parser key "[\w.]+": )+', message)):
        return message
    key, rest = name(".".join(re.findall(r'"([\w.]+)"', keys[0]))), message[keys.end() :]
    union = re.match(r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: ", rest)
    single = re.match(r"Expected (?:an? )?(.*?)\. Got value: ", rest)
    value = re.search(r"(?:Got|Given) value: (.*)", rest)
    if value is None or (types := union or single) is None:
        return f"{key}: {rest}"
    kinds = [_kind(text) for text in re.split(r", (?![^\[]*\])", types[1])]
    kinds = [kind for kind in kinds if kind != _KINDS["NoneType"] or len(kinds) == 1]
    return f"{key} must be {' or '.join(kinds)}, got {value[1]}"


def _kind(text: str) -> str:
    """A type as Python writes it, in words."""
    if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", text):
        return f"one of {choices[1].replace(chr(39), '')}"
    plain = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)
    kind, _, inner = plain.partition("[")
    of = f" of {_PLURALS[inner[:-1]]}" if kind == "list" and inner[:-1] in _PLURALS else ""
    return _KINDS.get(kind, plain) + of
