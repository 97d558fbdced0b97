"""TRL's SFTTrainer, on conversational or plain text: the same hook as the Trainer's.

python examples/trl_sft.py [--out runs/sft] [--resume runs/sft/checkpoint-10]
"""

from pathlib import Path

import torch
from common import lora_config, model_and_tokenizer, tell, texts
from datasets import Dataset
from jsonargparse import auto_cli
from trl import SFTConfig, SFTTrainer

from lora_rite import LoRARite, LoRARiteCallback, LoRARiteFactory
from lora_rite.hf import unwrap


def main(out: Path, steps: int = 20, save_every: int = 10, lr: float = 2e-2, resume: Path | None = None) -> LoRARite:
    network, tokenizer = model_and_tokenizer()
    arguments = SFTConfig(
        output_dir=str(out),
        max_steps=steps,
        max_length=64,
        packing=True,
        per_device_train_batch_size=4,
        learning_rate=lr,
        max_grad_norm=0.0,  # LoRARite clips by itself, invariantly
        logging_steps=5,
        save_steps=save_every,
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
        bf16=torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(
        network,
        arguments,
        train_dataset=Dataset.from_dict({"text": texts()}),
        processing_class=tokenizer,
        peft_config=lora_config(),
        optimizer_cls_and_kwargs=(LoRARiteFactory, {"lr": lr}),
        callbacks=[LoRARiteCallback()],
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.save_model(str(out / "adapter"))
    return tell(unwrap(trainer.optimizer), out / "adapter")


if __name__ == "__main__":
    auto_cli(main, as_positional=False, set_defaults={"out": "runs/sft"})
