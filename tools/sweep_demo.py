"""Find the demo's learning rates: equal budgets for both optimizers, judged on the demo's validation split.

    python tools/sweep_demo.py            # about 16 minutes on 2 cores

Same settings as `lora-rite demo`, other seeds, the same grid of learning rates for each optimizer. Every rate is run
with one seed, and the three best of each optimizer with the others; the mean over seeds decides. Finished runs are not
run again. Writes benchmarks/results/demo_sweep.json; the best rates belong into src/lora_rite/finetune/demo.py.
"""

import argparse
import json
import pathlib
import statistics

from lora_rite.finetune.checkpoint import write_json
from lora_rite.finetune.demo import SETTINGS, write_data
from lora_rite.finetune.train import train, versions

REPO = pathlib.Path(__file__).resolve().parents[1]
GRID = (2.5e-3, 5e-3, 7e-3, 1e-2, 1.4e-2, 2e-2, 4e-2, 8e-2)
SEEDS = (100, 101)  # not the demo's
FINALISTS = 3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, default=REPO / "runs" / "sweep_demo", help="folder for the runs")
    parser.add_argument("--results", type=pathlib.Path, default=REPO / "benchmarks/results/demo_sweep.json")
    parser.add_argument("--optimizer_args", type=json.loads, default={}, help="of LoRA-RITE, as JSON")
    arguments = parser.parse_args()
    data = write_data(arguments.runs / "data")

    def loss(optimizer, lr, seed):
        out = arguments.runs / f"{optimizer}-{lr:g}-seed{seed}"
        result = train(
            data=arguments.runs / "data" / "train.jsonl",
            validation=arguments.runs / "data" / "validation.jsonl",
            out=out,
            optimizer=optimizer,
            lr=lr,
            seed=seed,
            optimizer_args=arguments.optimizer_args if optimizer == "lora-rite" else None,
            resume=(out / "result.json").is_file(),
            progress=False,
            **SETTINGS,
        )
        value = result["held_out"]["after"]
        print(f"{optimizer:9s} lr {lr:<7g} seed {seed}: validation loss {value:.4f}", flush=True)
        return value

    rows, best = [], {}
    for optimizer in ("adamw", "lora-rite"):
        first = {lr: loss(optimizer, lr, SEEDS[0]) for lr in GRID}
        finalists = sorted(GRID, key=first.__getitem__)[:FINALISTS]
        losses = {lr: [value] for lr, value in first.items()}
        for lr in finalists:
            losses[lr] += [loss(optimizer, lr, seed) for seed in SEEDS[1:]]
        rows += [{"optimizer": optimizer, "lr": lr, "validation_losses": losses[lr]} for lr in GRID]
        chosen = min(finalists, key=lambda lr: statistics.mean(losses[lr]))
        best[optimizer] = {"lr": chosen, "validation_loss": statistics.mean(losses[chosen])}
    print("best:", best)
    settings = {**SETTINGS, "seeds": SEEDS, "optimizer_args": arguments.optimizer_args}
    result = {"command": "python tools/sweep_demo.py", "settings": settings, "data": data, "runs": rows, "best": best}
    write_json(arguments.results, {**result, "versions": versions()})


if __name__ == "__main__":
    main()
