"""All verbs of the command line: a line each."""

from collections.abc import Callable
from typing import NamedTuple

from . import after, benches, verbs


class Verb(NamedTuple):
    """A verb.

    Attributes:
        run: is called with the options by keyword; what it returns is the exit code, None for 0.
        signature: import path of the function whose signature and docstring are the options and their texts; by default
            those of ``run``.
        positional: options without a default are words without their names.
    """

    run: Callable[..., int | None]
    signature: str | None = None
    positional: bool = False


#: By name, a group's before the verb's own, in the order of ``--help``.
VERBS = {
    "demo": Verb(verbs.demo),
    "train": Verb(verbs.train, "lora_rite.finetune.train:train"),
    "eval": Verb(verbs.evaluate, "lora_rite.finetune.evaluate:evaluate"),
    "generate": Verb(after.generate, positional=True),
    "chat": Verb(after.chat, positional=True),
    "merge": Verb(after.merge, positional=True),
    "push": Verb(after.push, positional=True),
    "compare": Verb(verbs.compare, "lora_rite.study.compare:compare", positional=True),
    "report": Verb(verbs.report, positional=True),
    "pairs": Verb(verbs.pairs),
    "bench step": Verb(benches.bench_step),
    "bench train": Verb(benches.bench_train),
    "bench scaling": Verb(benches.bench_scaling),
    "bench host": Verb(benches.bench_host),
    "audit": Verb(verbs.audit_verb),
    "theory": Verb(verbs.theory),
}
#: What the groups are for.
GROUPS = {"bench": "Times LoRARite beside its peers"}
