"""transformers' Trainer: LoRARiteFactory makes the optimizer from the model, LoRARiteCallback checks and logs.

python examples/trainer.py [--out runs/trainer] [--resume runs/trainer/checkpoint-10]
"""

from pathlib import Path

import torch
from common import adapted, model_and_tokenizer, tell, windows
from jsonargparse import auto_cli
from transformers import Trainer, TrainingArguments

from lora_rite import LoRARite, LoRARiteCallback, LoRARiteFactory
from lora_rite.hf import unwrap


def main(out: Path, steps: int = 20, save_every: int = 10, lr: float = 2e-2, resume: Path | None = None) -> LoRARite:
    network, tokenizer = model_and_tokenizer()
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=lr,
        max_grad_norm=0.0,  # LoRARite clips by itself, invariantly
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        logging_steps=5,
        save_steps=save_every,
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        adapted(network),
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in windows(tokenizer)],
        optimizer_cls_and_kwargs=(LoRARiteFactory, {"lr": lr}),
        callbacks=[LoRARiteCallback()],
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.save_model(str(out / "adapter"))
    return tell(unwrap(trainer.optimizer), out / "adapter")


if __name__ == "__main__":
    auto_cli(main, as_positional=False, set_defaults={"out": "runs/trainer"})
