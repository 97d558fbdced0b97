"""``lora-rite eval``: accuracy on tasks by lm_eval and rouge-score, and the loss on answers and on held-out text."""

import json
import sys
from pathlib import Path
from typing import Any, Literal

from ..errors import LoRARiteValueError
from ..run import console
from ..run.files import check_folder, prepare_folder, write_json
from ..run.processes import check_alone
from .chats import CHAT_TEMPLATE
from .checks import weights_of
from .data import Chat
from .evaluator import Evaluator
from .plans import (
    Plan,
    adapter_digest,
    file_name,
    finished_record,
    model_digest,
    print_plans,
    read_plan,
    template_digest,
    with_judge,
)

#: The options that an evaluation is known by, beside the dtype of its weights and their bits.
SETTINGS = (
    "model", "adapter", "data_dir", "num_fewshot", "limit", "batch_size", "max_length", "max_new_tokens", "loss_only",
    "chat_template",
)  # fmt: skip


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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    bf16: bool = False,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    chat_template: Path | None = None,
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
        dtype: of the model's weights and products: float32, bfloat16, float16 or auto, the checkpoint's; by default
            float32, and auto where the model is quantised.
        bf16: the same as --dtype bfloat16.
        load_in_4bit: quantise the linear maps to NF4 with bitsandbytes, as train does.
        load_in_8bit: quantise them to 8 bits (LLM.int8).
        chat_template: file with the chat template (Jinja) for conversations in a file; by default the one in the
            adapter's folder, else the model's own.
        trust_remote_code: allow the model's own code to run.
        dry_run: print what would be evaluated, and stop.
        progress: say which task is evaluated, and show progress bars where stderr is a terminal.
    """
    given = locals()
    check_alone("lora-rite eval")
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks)]
    settings = {key: str(given[key]) if isinstance(given[key], Path) else given[key] for key in SETTINGS}
    settings["dtype"], settings["bits"] = weights_of(given)
    _check(names, settings)
    if out is not None and not dry_run:
        check_folder("--out", out)
    settings["adapter_sha256"] = None if adapter is None else adapter_digest(adapter)
    settings["chat_template_sha256"] = None if chat_template is None else template_digest(chat_template)
    settings["model_digest"] = model_digest(model)
    with console.bars(progress):
        plans = [read_plan(name, data_dir, settings, progress) for name in names]
        templates = {plan.name: _template_of(plan, settings) for plan in plans}
        # What the model is loaded with; tasks without conversations do not use it.
        settings |= next((t for t in templates.values() if t["chat_template"] is not None), {})
        settings_of = lambda plan: {**settings, **templates[plan.name]}
        found = {plan.name: finished_record(out, plan, settings_of(plan)) for plan in plans}
        records = {name: record for name, record in found.items() if record is not None}
        plans = [with_judge(plan, num_fewshot) for plan in plans if plan.name not in records]
        if dry_run:
            print_plans(plans, list(records), settings)
            return {"results": records}
        evaluator = Evaluator(settings, plans, device, trust_remote_code, progress) if plans else None
        if out is not None:
            prepare_folder("--out", out)
        for n, plan in enumerate(plans, 1):
            assert evaluator is not None
            if progress:
                print(f"{plan.name} ({n} of {len(plans)})", file=sys.stderr, flush=True)
            records[plan.name], samples = evaluator(plan)
            records[plan.name]["settings"] |= templates[plan.name]
            if out is not None:
                _write(out, plan.name, records[plan.name], samples)
    return {"results": {name: records[name] for name in names}}


def _write(out: Path, name: str, record: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    file = out / file_name(name)
    lines = [json.dumps(sample, default=str) for sample in samples]
    file.with_suffix(".samples.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_json(file, record)


def _template_of(plan: Plan, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a chat template that a task has: of one with conversations, where none is given, those of the
    template in the adapter's folder."""
    keys = ("chat_template", "chat_template_sha256")
    own = None if settings["adapter"] is None else Path(settings["adapter"]) / CHAT_TEMPLATE
    chats = any(isinstance(text, Chat) for text in plan.texts)
    if settings["chat_template"] is not None or not chats or own is None or not own.is_file():
        return {key: settings[key] for key in keys}
    return dict(zip(keys, (str(own), template_digest(own)), strict=True))


def _check(names: list[str], settings: dict[str, Any]) -> None:
    files = [file_name(name) for name in names]
    if twice := [name for name, file in zip(names, files, strict=True) if files.count(file) > 1]:
        raise LoRARiteValueError(f"--tasks: {' and '.join(twice)} have one results file; evaluate them apart")
    if not all(names):
        raise LoRARiteValueError("--tasks: an empty name")
    for key, least in {"num_fewshot": 0, "limit": 1, "batch_size": 1, "max_length": 2, "max_new_tokens": 1}.items():
        if settings[key] is not None and settings[key] < least:
            raise LoRARiteValueError(f"--{key} must be at least {least}, got {settings[key]}")


def table(result: dict[str, Any]) -> str:
    """The figures of :func:`evaluate` as text: accuracies in percent, losses in nat a token."""
    rows: list[tuple[Any, ...]] = []
    for name, record in result["results"].items():
        figures = record["results"]
        for metric, value in figures.get("metrics", {}).items():
            error = figures["stderr"].get(metric)
            shown = f"{100 * value:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")
            rows.append((name, metric, shown, figures["n"], figures["unparsed"].get(metric, "–"), figures["cut"]))
            name = ""
        for category, part in figures.get("categories", {}).items():
            value = f"{100 * part['score']:.2f}"
            rows.append(("", f"{part['metric']}, {category}", value, part["n"], part["unparsed"], "–"))
        if "loss" in figures:
            loss = figures["loss"]
            rows.append((name, "loss", f"{loss['nat_per_token']:.4f}", loss["examples"], "–", loss["cut"]))
    headings = ("task", "metric", "value", "n", "unparsed", "cut")
    return console.as_text(console.table(None, headings, rows, left=("metric",)), width=120)
