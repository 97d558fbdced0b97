"""``lora-rite eval``: accuracy on tasks by lm_eval and rouge-score, and the loss on answers and on held-out text."""

import hashlib
import json
import logging
import math
import statistics
import string
import sys
import time
from collections import Counter
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LoRARiteValueError
from ..inputs import blame, parse_json, suffix
from ..run.checkpoints import changes, check_folder, digest_file, list_changes, prepare_folder, write_json
from .data import IGNORED, RECORDS, Example, Windows, label_count, read_examples, windows
from .labelled import predict_labelled
from .models import locate
from .tasks import TASKS, Row, Rows, Task, examples, find_task, require_rows
from .train import attach_adapter, held_out_loss, load_model, versions
from .untrusted import find_adapter

#: Of what a model and its tokenizer are made.
MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".py")
#: Categories of Super-Natural Instructions' test split that Tk-Instruct judges by exact match; the others by ROUGE-L.
EXACT_MATCH = {
    "Textual Entailment",
    "Cause Effect Classification",
    "Coreference Resolution",
    "Dialogue Act Recognition",
    "Answerability Classification",
    "Word Analogy",
}
#: Tokens that are generated for an instruction, as in Tk-Instruct.
INSTRUCTION_TOKENS = 128
#: The seed of lm_eval's choice of few-shot examples, which is lm_eval's own.
FEWSHOT_SEED = 1234
#: What lm_eval's filters give where they find no answer.
NO_ANSWER = ("", "[invalid]")
#: The metric that stands for a task.
MAIN_METRIC = {"choices": "acc_norm", "generation": "exact_match,strict-match", "instructions": "score"}


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
    texts: list[Example]
    rows: list[Row]
    judge: Any
    sha256: str | None


def evaluate(
    tasks: str | list[str],
    model: str = "tiny",
    adapter: Path | None = None,
    data_dir: Path | None = None,
    out: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int = 1024,
    max_new_tokens: int | None = None,
    loss_only: bool = False,
    device: str | None = None,
    bf16: bool = False,
    trust_remote_code: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates a model, with an adapter or without: accuracy on tasks, loss on answers and on held-out text.

    hellaswag, arc_challenge, arc_easy, openbookqa and gsm8k go through lm_eval (prompts, few-shot examples and metrics
    are its own), natural_instructions through rouge-score as in Tk-Instruct, and a file gives the loss on its text. For
    each of these tasks the loss of the right answers is measured too, in the format that train --task learns.

    Into OUT go, for each task, a JSON file with figures, settings and versions, and a .jsonl file with every answer. A
    task that is there already is not evaluated again, and refused where settings, model, adapter or data have changed.

    Args:
        tasks: names, with commas between them or as a list: hellaswag, arc_challenge, arc_easy, openbookqa, gsm8k,
            natural_instructions (the standard test split) or natural_instructions:TASK, any other task of lm_eval, or a
            .jsonl or text file as train takes it.
        model: hub id, local folder or GGUF file (.gguf, dequantised) of a causal or an encoder-decoder language model;
            "tiny" is the causal one inside this package.
        adapter: folder of a PEFT adapter.
        data_dir: folder with the tasks' rows as local files (a folder a task); without it, they come from the hub.
        out: folder for the results; without it, they are printed alone.
        num_fewshot: examples in the prompt of lm_eval's tasks; by default the task's own number (5 for gsm8k, else 0).
        limit: the first so many rows of each test split alone (of each task of natural_instructions): to try it out.
        batch_size: sequences in a batch.
        max_length: tokens in a window where losses are measured, and in a prompt of natural_instructions.
        max_new_tokens: tokens of a generated answer; by default lm_eval's 256, and 128 for natural_instructions.
        loss_only: measure the losses alone, with no choices and no generated answers.
        device: where to run; by default the accelerator if there is one, else cpu.
        bf16: load and run the model in bfloat16.
        trust_remote_code: allow the model's own code to run.
        dry_run: print what would be evaluated, and stop.
        progress: show progress bars.
    """
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks)]
    settings: dict[str, Any] = {
        "model": model,
        "adapter": None if adapter is None else str(adapter),
        "data_dir": None if data_dir is None else str(data_dir),
        "num_fewshot": num_fewshot,
        "limit": limit,
        "batch_size": batch_size,
        "max_length": max_length,
        "max_new_tokens": max_new_tokens,
        "loss_only": loss_only,
        "bf16": bf16,
    }
    _check(names, settings)
    if out is not None and not dry_run:
        check_folder("--out", out)
    settings["adapter_sha256"] = None if adapter is None else _digest(adapter)
    settings["model_digest"] = _model_digest(model)
    plans = [_plan(name, data_dir, settings, progress) for name in names]
    records = {plan.name: record for plan in plans if (record := _finished(out, plan, settings)) is not None}
    plans = [_with_judge(plan, num_fewshot) for plan in plans if plan.name not in records]
    if dry_run:
        _print_plans(plans, list(records), settings)
        return {"results": records}
    evaluator = _Evaluator(settings, plans, device, trust_remote_code, progress) if plans else None
    if out is not None:
        prepare_folder("--out", out)
    for plan in plans:
        assert evaluator is not None
        records[plan.name], samples = evaluator(plan)
        if out is not None:
            file = out / _file_name(plan.name)
            lines = [json.dumps(sample, default=str) for sample in samples]
            file.with_suffix(".samples.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            write_json(file, records[plan.name])
    return {"results": {name: records[name] for name in names}}


def table(result: dict[str, Any]) -> str:
    """The figures of :func:`evaluate` as text: accuracies in percent, losses in nat a token."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    out = Table()
    for i, heading in enumerate(("task", "metric", "value", "n", "unparsed", "cut")):
        out.add_column(heading, justify="right" if i > 1 else "left")
    for name, record in result["results"].items():
        figures = record["results"]
        for metric, value in figures.get("metrics", {}).items():
            error = figures["stderr"].get(metric)
            out.add_row(
                name,
                metric,
                f"{100 * value:.2f}" + ("" if error is None else f" ± {100 * error:.2f}"),
                str(figures["n"]),
                str(figures["unparsed"].get(metric, "–")),
                str(figures["cut"]),
            )
            name = ""
        for category, part in figures.get("categories", {}).items():
            value = f"{100 * part['score']:.2f}"
            out.add_row("", f"{part['metric']}, {category}", value, str(part["n"]), str(part["unparsed"]), "–")
        if "loss" in figures:
            loss = figures["loss"]
            out.add_row(name, "loss", f"{loss['nat_per_token']:.4f}", str(loss["examples"]), "–", str(loss["cut"]))
    text = StringIO()
    Console(file=text, width=120).print(out)
    return text.getvalue()


# --------------------------------------------------------------------------------------------------------- the plan


def _check(names: list[str], settings: dict[str, Any]) -> None:
    files = [_file_name(name) for name in names]
    if twice := [name for name, file in zip(names, files, strict=True) if files.count(file) > 1]:
        raise LoRARiteValueError(f"--tasks: {' and '.join(twice)} have one results file; evaluate them apart")
    if not all(names):
        raise LoRARiteValueError("--tasks: an empty name")
    for key, least in {"num_fewshot": 0, "limit": 1, "batch_size": 1, "max_length": 2, "max_new_tokens": 1}.items():
        if settings[key] is not None and settings[key] < least:
            raise LoRARiteValueError(f"--{key} must be at least {least}, got {settings[key]}")


def _file_name(name: str) -> str:
    return f"{Path(name).stem.replace(':', '.')}.json"


def _digest(adapter: Path) -> str:
    with blame(f"--adapter {adapter}"):
        return digest_file(find_adapter(adapter)[1])


def _model_digest(model: str) -> str | None:
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


def _finished(out: Path | None, plan: Plan, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The record of that task in OUT, if there is one.

    Raises:
        LoRARiteValueError: it is of other settings, another model or adapter, or other data. (Where an adapter and data
            are does not matter: they are known by their sha256.)
    """
    if out is None or not (file := out / _file_name(plan.name)).exists():
        return None
    try:
        record = parse_json(file.read_text(encoding="utf-8"))
        before = {"task": record["task"], **record["settings"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise LoRARiteValueError(f"{file} is not an evaluation; choose another --out") from None
    if "data_sha256" not in before:
        raise LoRARiteValueError(f"{file} does not say which data it is of (an older version's); choose another --out")
    now = {"task": plan.name, **settings, "data_sha256": plan.sha256}
    changed = changes({k: before.get(k) for k in now}, now)
    for key in ("adapter", "data_dir"):
        changed.pop(key, None)
    if None in changed.get("model_digest", ()):  # not known of a model on the hub that is not in the cache
        del changed["model_digest"]
    if changed:
        raise LoRARiteValueError(
            f"{file} was made with other settings or data ({list_changes(changed)}); choose another --out"
        )
    return record


def _plan(name: str, data_dir: Path | None, settings: dict[str, Any], progress: bool) -> Plan:
    """Reads what a name stands for, so that what is missing or wrong is told before the model is loaded."""
    limit, loss_only = settings["limit"], settings["loss_only"]
    path = Path(name)
    if name.partition(":")[0] in TASKS:
        task = find_task(name)
        rows = require_rows(name, "test", data_dir, limit=limit, progress=progress)
        judge, shown = None, []
        if not loss_only:
            _lm_eval_tasks()
            if task.evaluation != "instructions":
                judge, shown = _judge(name, task, rows, data_dir, settings["num_fewshot"])
        sha256 = _rows_digest([rows.rows, shown])
        return Plan(name, task.evaluation, rows.source, examples(name, rows), rows.rows, judge, sha256)
    if suffix(path) in RECORDS or (path.is_file() and suffix(path) not in (".yaml", ".yml")):
        texts = read_examples(path)[:limit]
        return Plan(name, "text", name, texts, [], None, _rows_digest(texts))
    if loss_only:
        raise LoRARiteValueError(f"--loss_only: {name} is neither a file nor one of {', '.join(TASKS)}")
    return Plan(name, "lm_eval", "its own data set", [], [], None, digest_file(path) if path.is_file() else None)


def _rows_digest(rows: list[Any]) -> str:
    return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()


def _with_judge(plan: Plan, num_fewshot: int | None) -> Plan:
    """The plan of another task of lm_eval with its judge, whose search takes ten seconds; other plans have theirs."""
    return plan._replace(judge=_other_judge(plan.name, num_fewshot)) if plan.kind == "lm_eval" else plan


def _judge(name: str, task: Task, rows: Rows, data_dir: Path | None, num_fewshot: int | None) -> tuple[Any, list[Row]]:
    """lm_eval's task of that name, as it is, on our rows; and the rows that it takes few-shot examples from."""
    TaskManager, root = _lm_eval_tasks()
    from datasets import Dataset, DatasetDict

    manager = TaskManager(include_path=root / name.partition("_")[0], include_defaults=False)
    shots = (manager.task_index[name].cfg.get("num_fewshot") or 0) if num_fewshot is None else num_fewshot
    test = task.splits["test"]
    parts = {test: rows.rows}
    if shots:
        parts["train"] = require_rows(name, "train", data_dir).rows
    data = DatasetDict({split: Dataset.from_list(part) for split, part in parts.items()})
    changes = {
        "custom_dataset": lambda **_: data,
        "validation_split": test if test == "validation" else None,
        "num_fewshot": shots,
        **({} if shots else {"training_split": None, "fewshot_split": None}),
    }
    found = manager.load([{"group": "local", "task": [{"task": name, **changes}]}])["tasks"][name]
    found.set_fewshot_seed(seed=FEWSHOT_SEED)
    return found, parts.get("train", [])


def _other_judge(name: str, num_fewshot: int | None) -> Any:
    """Any other task of lm_eval: by its name, or by the path of its YAML file."""
    TaskManager, _ = _lm_eval_tasks()
    path = Path(name)
    with blame(f"--tasks {name}"):
        try:
            found = TaskManager(include_defaults=not path.is_file()).load(name)["tasks"]
        except KeyError:
            known = f"{', '.join(TASKS)}, a task of lm_eval or a file"
            raise LoRARiteValueError(f"no such task or file; give {known}") from None
    if len(found) != 1:
        raise LoRARiteValueError(f"--tasks {name} is a group of {len(found)} tasks; name the tasks")
    (judge,) = found.values()
    if num_fewshot is not None or judge.get_config("num_fewshot") is None:
        judge.set_config(key="num_fewshot", value=num_fewshot or 0)
    judge.set_fewshot_seed(seed=FEWSHOT_SEED)
    return judge


def _lm_eval_tasks() -> tuple[Any, Path]:
    """lm_eval's TaskManager and the folder of its tasks; an error that names the extra where a package is missing."""
    try:
        import rouge_score  # noqa: F401
        from lm_eval import tasks
    except ImportError:
        raise ImportError('evaluation on tasks needs its extra: pip install "lora-rite[eval]"') from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about its own command line
    return tasks.TaskManager, Path(tasks.__file__).parent


def _print_plans(plans: list[Plan], finished: list[str], settings: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Table("task", "by", "examples", "few-shot", "from")
    for plan in plans:
        by = [] if plan.kind == "text" or settings["loss_only"] else [plan.kind]
        by += ["loss"] if plan.texts else []
        shots = "–" if plan.judge is None else str(plan.judge.get_config("num_fewshot"))
        size = len(plan.texts) if plan.judge is None else len(plan.judge.eval_docs)
        out.add_row(plan.name, ", ".join(by), str(size), shots, plan.source)
    for name in finished:
        out.add_row(name, "finished already", "–", "–", "–")
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(out)
    adapter = "" if settings["adapter"] is None else f" with {settings['adapter']}"
    console.print(f"{settings['model']}{adapter}, {settings['batch_size']} sequences in a batch", highlight=False)


# ---------------------------------------------------------------------------------------------------- the evaluation


class _Evaluator:
    """The model, and what evaluates it on a plan.

    Raises:
        LoRARiteValueError: the model cannot be evaluated so; nothing has been measured then.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        plans: list[Plan],
        device: str | None,
        trust_remote_code: bool,
        progress: bool,
    ) -> None:
        import torch

        from .limits import find_limits

        self.progress = progress
        network, self.tokenizer = load_model(
            settings["model"], bf16=settings["bf16"], trust_remote_code=trust_remote_code
        )
        self.settings = {**settings, "model_digest": settings["model_digest"] or _model_digest(settings["model"])}
        self.limits = find_limits(network, self.tokenizer, settings["model"])
        if (size := self.tokenizer.vocab_size) > self.limits.tokens and any(plan.kind != "text" for plan in plans):
            raise LoRARiteValueError(
                f"the tokenizer of --model has {size} tokens, and the model knows {self.limits.tokens}"
            )
        self.windows = {plan.name: self._windows(plan.texts, network) for plan in plans if plan.texts}
        if settings["adapter"] is not None:
            network = attach_adapter(network, adapter=Path(settings["adapter"]))
        predict_labelled(network)
        if device is None:
            accelerator = torch.accelerator.current_accelerator()
            device = "cpu" if accelerator is None else accelerator.type
        with blame(f"--device {device}"):
            self.network = network.to(device).eval()
        for plan in plans:  # what is wrong with one must not be found out after hours at another
            self._answer_tokens(plan)

    def __call__(self, plan: Plan) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Figures, settings and versions of a task; and its answers."""
        begin = time.perf_counter()
        figures: dict[str, Any] = {}
        samples: list[dict[str, Any]] = []
        loss = {"loss": self._loss(plan)} if plan.texts else {}
        if plan.judge is not None:
            figures, samples = self._by_lm_eval(plan)
        elif plan.kind == "instructions" and not self.settings["loss_only"]:
            predictions, cut = self._generate(plan)
            figures, samples = instruction_scores(plan.rows, predictions)
            figures["cut"] = cut
        packages = () if plan.kind == "text" or self.settings["loss_only"] else ("lm_eval", "rouge-score", "datasets")
        record = {
            "task": plan.name,
            "results": {**figures, **loss},
            "source": plan.source,
            "settings": {**self.settings, "data_sha256": plan.sha256},
            "model": {
                "parameters": sum(p.numel() for p in self.network.parameters()),
                "dtype": str(self.network.dtype).removeprefix("torch."),
                "device": str(self.network.device),
            },
            "seconds": time.perf_counter() - begin,
            "versions": versions(*packages),
        }
        return record, samples

    def _windows(self, texts: list[Example], network: Any) -> tuple[Windows, int]:
        """The windows in which the loss of texts is measured, and their length: that of the model at most."""
        from .limits import check_rows

        limits, encoder_decoder = self.limits, network.config.is_encoder_decoder
        most = (self.settings["max_length"], limits.positions, limits.answer_positions, limits.declared)
        length = min(limit for limit in most if limit is not None)
        found = windows(texts, self.tokenizer, length, encoder_decoder=encoder_decoder)
        check_rows(found.rows, limits, network, self.tokenizer)
        return found, length

    def _loss(self, plan: Plan) -> dict[str, Any]:
        from transformers import DataCollatorForSeq2Seq

        (rows, cut), length = self.windows[plan.name]
        collator = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED)
        loss = held_out_loss(self.network, rows, collator, self.settings["batch_size"], progress=self.progress)
        return {
            "nat_per_token": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "tokens": label_count(rows, self.network.config.is_encoder_decoder),
            "examples": len(plan.texts),
            "cut": cut,
            "window": length,
        }

    @cached_property
    def _lm(self) -> Any:
        """The model as lm_eval's."""
        _lm_eval_tasks()
        from lm_eval.models.huggingface import HFLM

        options = {"batch_size": self.settings["batch_size"], "max_length": self.limits.positions}
        lm: Any = HFLM(self.network, tokenizer=self.tokenizer, **options)  # type: ignore[call-arg]
        for request in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, request, partial(getattr(lm, request), disable_tqdm=not self.progress))
        return lm

    def _answer_tokens(self, plan: Plan) -> int:
        """Tokens that are generated for an answer; 0 where none is.

        Raises:
            LoRARiteValueError: they leave no room for a prompt.
        """
        tokens = self.settings["max_new_tokens"]
        if plan.judge is not None and plan.judge.OUTPUT_TYPE == "generate_until":
            tokens = tokens or plan.judge.get_config("generation_kwargs").get("max_gen_toks", self._lm.max_gen_toks)
        elif plan.kind == "instructions" and not self.settings["loss_only"]:
            tokens = tokens or INSTRUCTION_TOKENS
        else:
            return 0
        if not self.network.config.is_encoder_decoder and tokens >= self._lm.max_length:
            raise LoRARiteValueError(
                f"{plan.name}: answers of {tokens} tokens leave no room for a prompt in the model's "
                f"{self._lm.max_length}; give --max_new_tokens"
            )
        return tokens

    def _by_lm_eval(self, plan: Plan) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        import lm_eval

        lm = self._lm
        name, judge = plan.judge.task_name, plan.judge
        room = self._answer_tokens(plan)
        generated = room > 0
        if generated and self.settings["max_new_tokens"] is not None:
            judge.set_config(key="generation_kwargs", value={"max_gen_toks": room}, update=True)
        tasks: Any = {"tasks": {name: judge}}
        output: Any = lm_eval.evaluate(lm, tasks, limit=self.settings["limit"])
        metrics: dict[str, float] = {}
        stderr: dict[str, float] = {}
        for key, value in output["results"][name].items():
            metric, _, which = key.partition(",")
            if which and isinstance(value, (int, float)):
                into = stderr if metric.endswith("_stderr") else metrics
                into[metric.removesuffix("_stderr") + ("" if which == "none" else f",{which}")] = value
        answers = output["samples"][name]
        failed = Counter(answer["filter"] for answer in answers if _is_unparsed(answer["filtered_resps"], generated))
        limit = lm.max_length + 1  # the last token is only predicted
        if generated:
            limit = lm.max_length - (0 if self.network.config.is_encoder_decoder else room)
        figures = {
            "metric": MAIN_METRIC.get(plan.kind, next(iter(metrics))),
            "metrics": metrics,
            "stderr": stderr,
            "n": len({answer["doc_id"] for answer in answers}),
            "unparsed": {metric: failed[metric.partition(",")[2] or "none"] for metric in metrics},
            "cut": _count_cut(lm, answers, limit),
            "num_fewshot": judge.get_config("num_fewshot"),
            "fewshot_seed": FEWSHOT_SEED,
        }
        keep = ("doc_id", "filter", "target", "resps", "filtered_resps", *{key.partition(",")[0] for key in metrics})
        return figures, [{key: answer[key] for key in keep if key in answer} for answer in answers]

    def _generate(self, plan: Plan) -> tuple[list[str], int]:
        """Answers to instructions, greedily, and how many prompts are too long and are cut.

        As in Tk-Instruct a prompt has as many positive examples as fit, and if it is too long without, its end is cut;
        of a causal model's prompt the beginning, since it has to end on "Output:". A causal model's answer ends before
        a blank line, where the examples in its prompt end.
        """
        from lm_eval.api.instance import Instance

        lm, tokens = self._lm, self._answer_tokens(plan)
        encoder_decoder = self.network.config.is_encoder_decoder
        room = min(self.settings["max_length"], lm.max_length - (0 if encoder_decoder else tokens))
        how = {"max_length": tokens} if encoder_decoder else {"max_gen_toks": tokens, "until": ["\n\n"]}
        requests, cut = [], 0
        for n, (prompt, _, shorter, _) in enumerate(plan.texts):
            text = next((text for text in (prompt, *shorter) if len(lm.tok_encode(text)) <= room), None)
            if text is None:
                cut += 1
                ids = lm.tok_encode((prompt, *shorter)[-1])
                text = lm.tok_decode(ids[:room] if encoder_decoder else ids[-room:])
            requests.append(Instance("generate_until", {}, (text, {"do_sample": False, **how}), n))
        return [answer.strip() for answer in lm.generate_until(requests)], cut


def _is_unparsed(answers: Any, generated: bool) -> bool:
    """No answer was found in a generated text; or a choice's log-likelihood is not finite, so that none is the best."""
    if generated:
        return any(isinstance(answer, str) and answer.strip() in NO_ANSWER for answer in answers)
    return any(not math.isfinite(answer[0]) for answer in answers if isinstance(answer, (tuple, list)))


def _count_cut(lm: Any, answers: list[dict[str, Any]], limit: int) -> int:
    """How many questions lm_eval has cut at their beginning to ``limit`` tokens."""
    cut = 0
    for answer in {answer["doc_id"]: answer for answer in answers}.values():  # a filter each
        # arguments: a context, and the continuation or how to generate
        texts = ("".join(part for part in argument if isinstance(part, str)) for argument in answer["arguments"])
        cut += any(len(lm.tok_encode(text)) > limit for text in texts)
    return cut


# --------------------------------------------------------------------------------------- Super-Natural Instructions


def instruction_scores(rows: list[Row], predictions: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of Super-Natural Instructions as Tk-Instruct's ``compute_metrics.py`` has them, but from 0 to 1.

    ROUGE-L (F, stemmed) and exact match (of lower-case text without punctuation), each the best over the references;
    the mean over instances, for all, for each category and for each task. ``score`` is exact match for the categories
    of :data:`EXACT_MATCH` and others whose name says Classification, and ROUGE-L for the rest. An answer is unparsed
    where it is empty, or where exact match decides and it is none of the task's outputs.

    Args:
        rows: the instances, as :func:`~lora_rite.finetune.tasks.read_rows` gives them.
        predictions: an answer for each.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    labels = {row["Task"]: {_normal(output) for output in row["Outputs"]} for row in rows}
    samples = []
    for row, prediction in zip(rows, predictions, strict=True):
        category, references = row["Categories"][0], row["Instance"]["output"]
        exact = category in EXACT_MATCH or "Classification" in category
        metric = "exact_match" if exact else "rougeL"
        sample = {
            "task": row["Task"],
            "category": category,
            "id": row["Instance"].get("id"),
            "references": references,
            "prediction": prediction,
            "rougeL": scorer.score_multi(references, prediction)["rougeL"].fmeasure,
            "exact_match": float(_normal(prediction) in map(_normal, references)),
            "metric": metric,
            "unparsed": not prediction or (exact and _normal(prediction) not in labels[row["Task"]]),
        }
        samples.append({**sample, "score": sample[metric]})
    names = ("score", "rougeL", "exact_match")
    whole = _means(samples)
    figures = {
        "metric": MAIN_METRIC["instructions"],
        "metrics": {name: whole[name] for name in names},
        "stderr": {
            name: statistics.stdev(sample[name] for sample in samples) / math.sqrt(len(samples))
            for name in names
            if len(samples) > 1
        },
        "n": whole["n"],
        "unparsed": {"score": whole["unparsed"]},
    }
    for group, key in (("by_metric", "metric"), ("categories", "category"), ("tasks", "task")):
        values = sorted({sample[key] for sample in samples})
        figures[group] = {value: _means([sample for sample in samples if sample[key] == value]) for value in values}
    return figures, samples


def _means(samples: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = {sample["metric"] for sample in samples}
    return {
        **{name: statistics.fmean(sample[name] for sample in samples) for name in ("score", "rougeL", "exact_match")},
        "metric": metrics.pop() if len(metrics) == 1 else "both",
        "n": len(samples),
        "unparsed": sum(sample["unparsed"] for sample in samples),
    }


def _normal(text: str) -> str:
    """Lower case, without punctuation, single spaces: what exact match compares."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())
