"""What an evaluation is asked for: read, compared with what is finished, and shown."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LoRARiteValueError
from ..inputs import blame, parse_json, suffix
from ..run.console import table
from ..run.digest import digest_file
from ..run.settings import changes, list_changes
from .checks import weights_of
from .data import Sample, read_examples
from .judges import lm_eval_tasks, other_judge, task_judge
from .models import locate
from .records import RECORDS, read_text
from .tasks import TASKS, Row, examples, find_task, require_rows
from .untrusted import find_adapter

#: Of what a model and its tokenizer are made.
MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".py")


class Plan(NamedTuple):
    """What is to be evaluated under a name.

    Attributes:
        name: as the user gave it.
        kind: as in :class:`~lora_rite.finetune.tasks.Task`, or ``lm_eval`` (another task of lm_eval), or ``text``.
        source: where the rows come from.
        texts: the examples whose loss is measured.
        rows: the rows of a task of ``instructions``.
        judge: lm_eval's task.
        sha256: of the rows or texts, those of few-shot examples among them; of another task of lm_eval, of its YAML
            file, and None where it has a name alone.
    """

    name: str
    kind: str
    source: str
    texts: Sequence[Sample]
    rows: list[Row]
    judge: Any
    sha256: str | None


def read_plan(name: str, data_dir: Path | None, settings: dict[str, Any], progress: bool) -> Plan:
    """Reads what a name stands for, so that what is missing or wrong is told before the model is loaded."""
    limit, loss_only = settings["limit"], settings["loss_only"]
    path = Path(name)
    if name.partition(":")[0] in TASKS:
        task = find_task(name)
        rows = require_rows(name, "test", data_dir, limit=limit, progress=progress)
        judge, shown = None, []
        if not loss_only:
            lm_eval_tasks()
            if task.evaluation != "instructions":
                judge, shown = task_judge(name, task, rows, data_dir, settings["num_fewshot"])
        sha256 = _rows_digest([rows.rows, shown])
        return Plan(name, task.evaluation, rows.source, examples(name, rows), rows.rows, judge, sha256)
    if suffix(path) in RECORDS or (path.is_file() and suffix(path) not in (".yaml", ".yml")):
        texts = read_examples(path)[:limit]
        return Plan(name, "text", name, texts, [], None, _rows_digest(texts))
    if loss_only:
        raise LoRARiteValueError(f"--loss_only: {name} is neither a file nor one of {', '.join(TASKS)}")
    return Plan(name, "lm_eval", "its own data set", [], [], None, digest_file(path) if path.is_file() else None)


def with_judge(plan: Plan, num_fewshot: int | None) -> Plan:
    """The plan of another task of lm_eval with its judge, whose search takes ten seconds; other plans have theirs."""
    return plan._replace(judge=other_judge(plan.name, num_fewshot)) if plan.kind == "lm_eval" else plan


def file_name(name: str) -> str:
    return f"{Path(name).stem.replace(':', '.')}.json"


def adapter_digest(adapter: Path) -> str:
    with blame(f"--adapter {adapter}"):
        return digest_file(find_adapter(adapter)[1])


def template_digest(chat_template: Path) -> str:
    with blame(f"--chat_template {chat_template}"):
        return hashlib.sha256(read_text(chat_template).encode()).hexdigest()


def model_digest(model: str) -> str | None:
    """sha256 of a local model's files, the tokenizer's among them, or of its GGUF file; of one from the hub the commit
    that is in its cache, None where there is none yet."""
    with blame(f"--model {model}"):
        place, gguf = locate(model)
    folder = Path(place)
    if gguf and folder.is_dir():
        return digest_file(folder / gguf["gguf_file"])
    if folder.is_dir():
        digest = hashlib.sha256()
        for file in sorted(p for p in folder.iterdir() if suffix(p) in MODEL_FILES):
            digest.update(f"{file.name} {digest_file(file)}\n".encode())
        return digest.hexdigest()
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(place, gguf.get("gguf_file", "config.json"))
    except HFValidationError:  # what is no hub id is told when it is loaded
        return None
    return Path(config).parent.name if isinstance(config, str) else None


def _rows_digest(rows: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()


def finished_record(out: Path | None, plan: Plan, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The record of that task in OUT, if there is one.

    Raises:
        LoRARiteValueError: it is of other settings, another model or adapter, or other data. (Where an adapter, a
            chat template and data are does not matter: they are known by their sha256.)
    """
    if out is None or not (file := out / file_name(plan.name)).exists():
        return None
    try:
        record = parse_json(file.read_text(encoding="utf-8"))
        before = {"task": record["task"], **record["settings"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise LoRARiteValueError(f"{file} is not an evaluation; choose another --out") from None
    if "data_sha256" not in before:
        raise LoRARiteValueError(f"{file} does not say which data it is of (an older version's); choose another --out")
    if "dtype" not in before:  # before there was --dtype
        before["dtype"], before["bits"] = weights_of(before)
    now = {"task": plan.name, **settings, "data_sha256": plan.sha256}
    changed = changes({k: before.get(k) for k in now}, now)
    for key in ("adapter", "data_dir", "chat_template"):
        changed.pop(key, None)
    if None in changed.get("model_digest", ()):  # not known of a model on the hub that is not in the cache
        del changed["model_digest"]
    if changed:
        raise LoRARiteValueError(
            f"{file} was made with other settings or data ({list_changes(changed)}); choose another --out"
        )
    return record


def print_plans(plans: list[Plan], finished: list[str], settings: dict[str, Any]) -> None:
    from rich.console import Console

    headings = ("task", "by", "examples", "few-shot", "from")
    rows: list[tuple[str, ...]] = []
    for plan in plans:
        by = [] if plan.kind == "text" or settings["loss_only"] else [plan.kind]
        by += ["loss"] if plan.texts else []
        shots = "–" if plan.judge is None else str(plan.judge.get_config("num_fewshot"))
        size = len(plan.texts) if plan.judge is None else len(plan.judge.eval_docs)
        rows.append((plan.name, ", ".join(by), str(size), shots, plan.source))
    rows += [(name, "finished already", "–", "–", "–") for name in finished]
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(None, headings, rows, left=headings))
    adapter = "" if settings["adapter"] is None else f" with {settings['adapter']}"
    console.print(f"{settings['model']}{adapter}, {settings['batch_size']} sequences in a batch", highlight=False)
