"""What LoRARite's figures look like in a good run and in bad ones: the pictures and numbers of docs/tuning.md.

Three runs of the demo's setting (the embedded model learns C++, rank 16, 200 steps, seed 0) that differ in lr alone:
half a minute to two minutes each on one core. Writes benchmarks/results/tuning.json and docs/tuning.png.
"""

import argparse
import json
import tempfile
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from lora_rite.finetune.train import train
from lora_rite.run.files import write_json
from lora_rite.run.versions import versions
from lora_rite.study.demo import EVAL_EVERY, SETTINGS, write_data

ROOT = Path(__file__).parents[1]
RUNS = {"good": 2e-2, "too low": 1e-3, "too high": 8e-2}
#: Of a run: keys of the log. Of a layer: means over all layers of one kind.
FIGURES = ("damped_share", "sigma_over_delta", "clip_rate", "gradient_norm", "update_norm", "skipped")
LAYER_FIGURES = ("damped_share", "sigma_over_delta", "update_norm", "product_norm")


def run(lr: float, data: Path, out: Path) -> dict:
    result = train(
        data=data / "train.jsonl", validation=data / "validation.jsonl", out=out, lr=lr, eval_every=EVAL_EVERY,
        layers_every=10, progress=False, **SETTINGS,
    )  # fmt: skip
    log = [entry for entry in result["log"] if "lora_rite/update_norm" in entry]
    figures = {key: [entry.get(f"lora_rite/{key}") for entry in log] for key in FIGURES}
    lines = (out / "layers.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "lr": lr,
        "loss": [entry["loss"] for entry in log],
        "held_out": result["held_out_losses"],
        "after": result["held_out"]["after"],
        **figures,
        "layers": [by_kind(json.loads(line)) for line in lines[:-1]],  # at the end lr is 0, and so is δ
    }


def by_kind(line: dict) -> dict:
    """Means over the layers whose modules have the same name (q_proj, …)."""
    kinds: dict[str, list[dict]] = {}
    for layer in line["layers"]:
        kinds.setdefault(layer["name"].split(".lora_")[0].split(".")[-1], []).append(layer)
    mean = lambda layers, key: round(sum(layer[key] for layer in layers) / len(layers), 4)
    return {"step": line["step"], **{k: {key: mean(v, key) for key in LAYER_FIGURES} for k, v in kinds.items()}}


def draw(runs: dict[str, dict], path: Path) -> None:
    matplotlib.use("Agg")
    panels = {
        "loss": "training loss",
        "damped_share": "share of directions with σ < δ",
        "sigma_over_delta": "median σ/δ",
        "update_norm": "‖ΔW‖ of the step",
        "gradient_norm": "norm of the unmagnified gradients",
        "clip_rate": "clip rate since the start",
    }
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained", sharex=True)
    for axis, (key, title) in zip(axes.flat, panels.items(), strict=True):
        for name, result in runs.items():
            values = result[key]
            axis.plot(range(1, len(values) + 1), values, label=f"{name}: lr {result['lr']:g}", linewidth=1)
        axis.set_title(title, fontsize=10)
        if key in ("sigma_over_delta", "update_norm", "gradient_norm"):
            axis.set_yscale("log")
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "tuning.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "tuning.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "data")
        runs = {name: run(lr, Path(folder) / "data", Path(folder) / name) for name, lr in RUNS.items()}
    write_json(options.out, {"data": data, "runs": runs, "versions": versions()})
    draw(runs, options.picture)
    for name, result in runs.items():
        print(f"{name}: lr {result['lr']:g}, held-out loss {result['after']:.3f}")


if __name__ == "__main__":
    main()
