"""TRL's DPOTrainer (and, in the same way, KTO, RLOO): it takes no factory, but an optimizer of the adapted model.

python examples/trl_dpo.py [--out runs/dpo] [--resume runs/dpo/checkpoint-10]
"""

from pathlib import Path

import torch
from common import adapted, model_and_tokenizer, tell, texts
from datasets import Dataset
from jsonargparse import auto_cli
from trl import DPOConfig, DPOTrainer

from lora_rite import LoRARite, LoRARiteCallback, create_lora_rite
from lora_rite.hf import unwrap


def main(out: Path, steps: int = 20, save_every: int = 10, lr: float = 5e-3, resume: Path | None = None) -> LoRARite:
    network, tokenizer = model_and_tokenizer()
    model = adapted(network)  # attached here, not by peft_config=…, so that the optimizer can see the factors
    arguments = DPOConfig(
        output_dir=str(out),
        max_steps=steps,
        max_length=64,
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
    lines = [line for text in texts() for line in text.splitlines() if len(line) > 40][:200]
    pairs = {
        "prompt": [a[:20] for a in lines],
        "chosen": [a[20:] for a in lines],
        "rejected": [a[:19:-1] for a in lines],
    }
    trainer = DPOTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer,
        optimizers=(create_lora_rite(model, lr=lr), None),
        callbacks=[LoRARiteCallback()],
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.save_model(str(out / "adapter"))
    return tell(unwrap(trainer.optimizer), out / "adapter")


if __name__ == "__main__":
    auto_cli(main, as_positional=False, set_defaults={"out": "runs/dpo"})
