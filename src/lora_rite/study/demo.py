"""``lora-rite demo``: the embedded model learns C++ by AdamW and by LoRA-RITE, on the same batches.

The text is there on every machine: torch installs its C++ headers. The model has read Python's standard library only.
"""

import hashlib
import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LoRARiteValueError
from ..finetune.data import Example
from ..finetune.train import train
from ..run.console import number, shows_bars, table
from ..run.files import write_json
from ..run.processes import check_alone
from ..run.versions import versions
from .statistics import curve, step_at


class Entry(NamedTuple):
    label: str
    optimizer: str
    lr: float


#: The best learning rates of a sweep with equal budgets, judged on the validation split
#: (benchmarks/results/demo_sweep.json; recipes/small/demo.yaml makes it anew).
ENTRIES = (Entry("AdamW", "adamw", 1e-2), Entry("LoRA-RITE", "lora-rite", 2e-2))
SETTINGS: dict[str, Any] = {"steps": 200, "batch_size": 8, "max_length": 128, "rank": 16, "warmup": 0.1}
#: Measurements of the held-out loss are so many steps apart.
EVAL_EVERY = 20
#: Characters of text in each split, at most.
CHARACTERS = {"train": 4_000_000, "validation": 64_000, "test": 48_000}
HEADERS = ("c10", "torch/csrc")
MARKER = "The results in this folder were made by `lora-rite demo`, which replaces them.\n"
#: What a demo writes into its folder, beside the marker.
MADE = ("data", "runs", "result.json", "curves.png")


def read_headers() -> dict[str, list[Example]]:
    """The C++ headers of torch, an example a file, as train, validation and test.

    Split by file: by the sha256 of its path 1 in 10 goes to validation and 1 in 10 to test; in that order, as many as
    :data:`CHARACTERS` allows. Files of the same text count once.
    """
    import torch

    root = Path(torch.__file__).parent / "include"
    files = sorted(f for top in HEADERS for f in (root / top).rglob("*.h"))
    if len(files) < 100:
        raise LoRARiteValueError(f"the demo's text, the C++ headers of torch, is not in {root}")
    ordered = sorted((hashlib.sha256(f.relative_to(root).as_posix().encode()).hexdigest(), f) for f in files)
    sizes = dict.fromkeys(CHARACTERS, 0)
    found: dict[str, list[Example]] = {name: [] for name in CHARACTERS}
    seen: set[str] = set()
    for digest, file in ordered:
        name = {0: "test", 1: "validation"}.get(int(digest, 16) % 10, "train")
        text = file.read_text(encoding="utf-8")
        if text not in seen and len(text) <= 20_000 and sizes[name] + len(text) <= CHARACTERS[name]:
            seen.add(text)
            sizes[name] += len(text)
            found[name].append(Example("", text))
    return found


def write_data(folder: Path) -> dict[str, Any]:
    """Writes :func:`read_headers` as train.jsonl, validation.jsonl and test.jsonl and returns what is in them."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    found = read_headers()
    for name, examples in found.items():
        lines = [json.dumps({"text": example.completion}) for example in examples]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = {name: [example.completion for example in examples] for name, examples in found.items()}
    return {
        "text": f"C++ headers of torch {torch.__version__} ({', '.join(HEADERS)})",
        "sha256": hashlib.sha256("".join(sorted(chain.from_iterable(texts.values()))).encode()).hexdigest(),
        "files": {name: len(part) for name, part in texts.items()},
        "characters": {name: sum(map(len, part)) for name, part in texts.items()},
    }


def demo(out: Path, *, seeds: int = 2, progress: bool = True, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Runs every entry with every seed, prints the table, writes ``result.json`` and ``curves.png`` into ``out``.

    Args:
        out: folder for the results; an earlier demo in it is replaced.
        seeds: number of seeds, from 0.
        progress: show progress bars where stderr is a terminal; elsewhere a run is a line.
        settings: keyword arguments of :func:`lora_rite.finetune.train.train`, over :data:`SETTINGS`.

    Raises:
        LoRARiteValueError: ``out`` has something else than an earlier demo in it.
    """
    check_alone("lora-rite demo")
    if seeds < 1:
        raise LoRARiteValueError(f"--seeds must be at least 1, got {seeds}")
    _clear(out)
    data = write_data(out / "data")
    files = number(data["files"]["train"], "file")
    print(f"The embedded model (Python) learns {data['text']}: {files} to train on.", flush=True)
    runs: list[dict[str, Any]] = []
    bars = shows_bars(progress)
    for seed in range(seeds):
        for entry in ENTRIES:
            print(f"{entry.label}, lr {entry.lr:g}, seed {seed}", end="\n" if bars else ": ", flush=True)
            run = train(
                data=out / "data" / "train.jsonl",
                validation=out / "data" / "test.jsonl",
                out=out / "runs" / f"{entry.optimizer}-seed{seed}",
                optimizer=entry.optimizer,
                lr=entry.lr,
                seed=seed,
                eval_every=EVAL_EVERY,
                eval_limit=0,
                progress=bars,
                **{**SETTINGS, **(settings or {})},
            )
            runs.append({"label": entry.label, "seed": seed, **run})
            loss, took = run["held_out"], run["seconds"]["training"]
            print(f"held-out loss {loss['before']:.3f} → {loss['after']:.3f}, {took:.0f} s of training", flush=True)
    rows = [_row(entry, runs) for entry in ENTRIES]
    result = {"data": data, "table": rows, "runs": runs, "versions": versions()}
    write_json(out / "result.json", result)
    _plot(runs, out / "curves.png")
    _print_table(rows, runs, out)
    return result


def _clear(out: Path) -> None:
    marker = out / "MADE-BY-LORA-RITE-DEMO.txt"
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not marker.is_file())):
        raise LoRARiteValueError(f"{out} is not an empty folder or an earlier demo; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    for path in (out / name for name in MADE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    marker.write_text(MARKER, encoding="utf-8")


def _row(entry: Entry, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one optimizer over its seeds: ``spread`` is half the difference between the best and the worst,
    ``steps_to_first`` the mean number of steps to the final loss of the first optimizer's best seed."""
    own = [run for run in runs if run["label"] == entry.label]
    final = [run["held_out"]["after"] for run in own]
    target = min(run["held_out"]["after"] for run in runs if run["label"] == ENTRIES[0].label)
    steps = [step for run in own if (step := step_at(curve(run), target)) is not None]
    return {
        "optimizer": entry.label,
        "lr": entry.lr,
        "held_out_loss": sum(final) / len(final),
        "spread": (max(final) - min(final)) / 2,
        "steps_to_first": sum(steps) / len(steps) if len(steps) == len(own) else None,
        "state_bytes": own[0]["optimizer"]["state_bytes"],
        "optimizer_share": sum(run["seconds"]["optimizer_share"] for run in own) / len(own),
    }


def _print_table(rows: list[dict[str, Any]], runs: list[dict[str, Any]], out: Path) -> None:
    from rich.console import Console

    steps, seeds = runs[0]["settings"]["steps"], len(runs) // len(rows)
    title = f"{number(steps, 'step')}, {number(seeds, 'seed')}, before: {runs[0]['held_out']['before']:.3f}"
    headings = ("optimizer", "lr", "held-out loss", "steps to AdamW's best", "optimizer state", "share of a step")
    cells = [
        (
            row["optimizer"],
            f"{row['lr']:g}",
            f"{row['held_out_loss']:.3f} ± {row['spread']:.3f}",
            f"{row['steps_to_first']:.0f}" if row["steps_to_first"] is not None else "–",
            f"{row['state_bytes'] / 1e6:.2f} MB",
            f"{row['optimizer_share']:.1%}",
        )
        for row in rows
    ]
    console = Console()
    console.print(table(title, headings, cells))
    console.print(
        f"Curves: {out / 'curves.png'}; figures: {out / 'result.json'}; adapters: {out / 'runs'}/*/adapter\n"
        "Next: lora-rite train --data your.jsonl --out runs/first [--model HUB_ID_OR_FOLDER]",
        highlight=False,
        soft_wrap=True,
    )


def _plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss and training loss over steps: a thin line a seed, a thick one for the mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    before = runs[0]["held_out"]["before"]
    for color, entry in zip(("tab:gray", "tab:blue"), ENTRIES, strict=True):
        own = [run for run in runs if run["label"] == entry.label]
        label = f"{entry.label}, lr {entry.lr:g}"
        held_out = [[before] + [e["held_out_loss"] for e in run["held_out_losses"]] for run in own]
        steps = [0] + [e["step"] for e in own[0]["held_out_losses"]]
        training = [_smoothed([e["loss"] for e in run["losses"]]) for run in own]
        for axis, x, curves in ((axes[0], steps, held_out), (axes[1], range(1, len(training[0]) + 1), training)):
            for values in curves:
                axis.plot(x, values, color=color, linewidth=0.7, alpha=0.5)
            mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
            axis.plot(x, mean, color=color, linewidth=2, label=label)
    for axis, title in zip(axes, ("held-out loss", "training loss (running mean of 10 steps)"), strict=True):
        axis.set(title=title, xlabel="step", ylabel="nat a token")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smoothed(values: list[float], width: int = 10) -> list[float]:
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]
