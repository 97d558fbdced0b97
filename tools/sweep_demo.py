"""Find the demo's learning rates: equal budgets for both optimizers, judged on the demo's validation split.

    python tools/sweep_demo.py            # about 10 minutes on 2 cores

Same settings as `lora-rite demo`, another seed, the same grid of learning rates for each optimizer. Finished runs are
not run again. Writes benchmarks/results/demo_sweep.json; the best rates belong into src/lora_rite/finetune/demo.py.
"""

import argparse
import json
import pathlib

from lora_rite.finetune.demo import SETTINGS, write_data
from lora_rite.finetune.train import train, versions, write_json

REPO = pathlib.Path(__file__).resolve().parents[1]
GRID = (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, default=REPO / "runs" / "sweep_demo", help="folder for the runs")
    parser.add_argument("--results", type=pathlib.Path, default=REPO / "benchmarks/results/demo_sweep.json")
    parser.add_argument("--seed", type=int, default=100, help="not one of the demo's")
    parser.add_argument("--optimizer_args", type=json.loads, default={}, help="of LoRA-RITE, as JSON")
    arguments = parser.parse_args()
    data = write_data(arguments.runs / "data")
    rows = []
    for optimizer in ("adamw", "lora-rite"):
        for lr in GRID:
            out = arguments.runs / f"{optimizer}-{lr:g}"
            result = train(
                data=arguments.runs / "data" / "train.jsonl",
                validation=arguments.runs / "data" / "validation.jsonl",
                out=out,
                optimizer=optimizer,
                lr=lr,
                seed=arguments.seed,
                optimizer_args=arguments.optimizer_args if optimizer == "lora-rite" else None,
                resume=(out / "settings.json").is_file() and (out / "result.json").is_file(),
                progress=False,
                **SETTINGS,
            )
            rows.append({"optimizer": optimizer, "lr": lr, "validation_loss": result["held_out"]["after"]})
            print(f"{optimizer:9s} lr {lr:<7g} validation loss {result['held_out']['after']:.4f}", flush=True)
    best = {
        name: min((r for r in rows if r["optimizer"] == name), key=lambda r: r["validation_loss"])
        for name in ("adamw", "lora-rite")
    }
    print("best:", best)
    write_json(
        arguments.results,
        {
            "command": "python tools/sweep_demo.py",
            "settings": {**SETTINGS, "seed": arguments.seed, "optimizer_args": arguments.optimizer_args},
            "data": data,
            "runs": rows,
            "best": best,
            "versions": versions(),
        },
    )


if __name__ == "__main__":
    main()
