"""Times ``lora-rite train`` on a real language model in several settings, one after the other in each round, so that
what else the machine does falls on all alike.

    python benchmarks/bench_language_model.py models/gemma3-270m --data_dir data --before ../before/src --out FILE.json

The task is GSM8K's training split, rank 16 on all linear maps. ``--before`` is the ``src`` of an older checkout, whose
command is timed too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from lora_rite.finetune.tasks import read_task
from lora_rite.run.files import write_json

#: Name → whether the code is the older one, and options.
SETTINGS = {
    "before": (True, []),
    "before, --bf16": (True, ["--bf16"]),
    "now": (False, []),
    "now, --bf16": (False, ["--bf16"]),
    "now, --bf16 --group_by_length": (False, ["--bf16", "--group_by_length"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    settings = {k: v for k, v in SETTINGS.items() if options.before or not v[0]}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in settings}
    versions = {}
    with tempfile.TemporaryDirectory() as folder:
        examples = [
            {"prompt": e.prompt, "completion": e.completion} for e in read_task("gsm8k", "train", options.data_dir)[0]
        ]
        for name, part in (("train", examples[:400]), ("validation", examples[-2:])):
            lines = [json.dumps(example) + "\n" for example in part]
            Path(folder, f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        for n in range(options.rounds):
            for name, (old, more) in settings.items():
                out = Path(folder, f"{n}-{len(runs[name])}-{list(settings).index(name)}")
                shared = {
                    "data": f"{folder}/train.jsonl",
                    "validation": f"{folder}/validation.jsonl",
                    "model": options.model,
                }
                shared |= {"steps": options.steps, "batch_size": options.batch_size, "max_length": 256, "out": out}
                words = [word for key, value in shared.items() for word in (f"--{key}", str(value))]
                env = {**os.environ, **({"PYTHONPATH": str(options.before)} if old else {})}
                command = [sys.executable, "-m", "lora_rite.cli", "train", *words, *more, "--no_progress"]
                subprocess.run(command, check=True, env=env)
                result = json.loads((out / "result.json").read_text(encoding="utf-8"))
                tokens = max(entry.get("num_input_tokens_seen", 0) for entry in result["log"])
                seconds = result["seconds"]["training"]
                runs[name].append({"tokens": tokens, "seconds": seconds, "loss": result["losses"][-1]["loss"]})
                versions.setdefault("before" if old else "now", result["versions"])
                print(f"{name}: {tokens / seconds:.1f} tokens/s", flush=True)
                write_json(options.out, {"command": " ".join(sys.argv[1:]), "runs": runs, "versions": versions})
    first = next(iter(runs))
    for name, found in runs.items():
        speed = [run["tokens"] / run["seconds"] for run in found]
        ratios = [a / (run["tokens"] / run["seconds"]) for a, run in zip(speed, runs[first], strict=True)]
        print(f"{name}: {statistics.fmean(speed):.1f} tokens/s, {statistics.fmean(ratios):.2f} × {first}")


if __name__ == "__main__":
    main()
