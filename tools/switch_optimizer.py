"""A fine-tune that begins with AdamW and goes on with LoRARite from its adapter: the figures of docs/tuning.md.

The demo's setting (the embedded model learns C++, rank 16, 200 steps, cosine). AdamW at its best rate all the way; and
three ways to go on from its adapter at half time. Five minutes on one core. Writes benchmarks/results/switch.json.
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from transformers import DataCollatorForSeq2Seq, set_seed

from lora_rite import create_lora_rite
from lora_rite.finetune.data import read_examples
from lora_rite.finetune.load import attach_adapter, load_model
from lora_rite.finetune.trainer import held_out_loss
from lora_rite.finetune.windows import IGNORED, windows
from lora_rite.run.files import write_json
from lora_rite.run.versions import versions
from lora_rite.study.demo import SETTINGS, write_data

ROOT = Path(__file__).parents[1]
STEPS, SWITCH, LR = 200, 100, 1e-2
#: Name → lr of LoRARite in units of AdamW's at the same step, and steps of warm-up.
BRANCHES = {"1×, 10 steps of warm-up": (1.0, 10), "2×, 10 steps of warm-up": (2.0, 10), "2×, no warm-up": (2.0, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "switch.json")
    options = parser.parse_args()
    network, tokenizer = load_model("tiny")
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "data")
        parts = [read_examples(Path(folder) / "data" / f"{name}.jsonl") for name in ("train", "validation")]
        train_rows, held_out = (windows(part, tokenizer, SETTINGS["max_length"]).rows for part in parts)
        batches = [
            collator([train_rows[i] for i in torch.randint(len(train_rows), (SETTINGS["batch_size"],)).tolist()])
            for _ in range(STEPS)
        ]

        def fit(model, optimizer, lr, steps):
            model.train()
            for step in steps:
                for group in optimizer.param_groups:
                    group["lr"] = lr(step)
                model(**batches[step]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            return held_out_loss(model, held_out, collator, SETTINGS["batch_size"])

        cosine = lambda step: LR * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / STEPS)) / 2
        set_seed(0)
        model = attach_adapter(network, rank=SETTINGS["rank"])
        adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
        rows = {"AdamW, at the switch": fit(model, adamw, cosine, range(SWITCH))}
        adapter = Path(folder) / "adapter"
        model.save_pretrained(adapter)
        rows["AdamW to the end"] = fit(model, adamw, cosine, range(SWITCH, STEPS))
        for name, (factor, warmup) in BRANCHES.items():
            model = attach_adapter(load_model("tiny")[0], adapter=adapter)
            lr = lambda step, f=factor, w=warmup: f * min(1, (step - SWITCH + 1) / w) * cosine(step)
            optimizer = create_lora_rite(model, lr=LR)
            rows[f"LoRARite from the switch, {name}"] = fit(model, optimizer, lr, range(SWITCH, STEPS))
    for name, loss in rows.items():
        print(f"{loss:.3f}  {name}")
    settings = {"steps": STEPS, "switch": SWITCH, "lr": LR, "seed": 0}
    write_json(options.out, {"settings": settings, "data": data, "held_out_loss": rows, "versions": versions()})


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
