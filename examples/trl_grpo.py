"""TRL's GRPOTrainer: the model writes, a function rewards, and LoRARite steps the adapter that is attached before.

python examples/trl_grpo.py [--out runs/grpo] [--resume runs/grpo/checkpoint-10]
"""

from pathlib import Path
from typing import Any

import torch
from common import adapted, model_and_tokenizer, tell
from datasets import Dataset
from jsonargparse import auto_cli
from trl import GRPOConfig, GRPOTrainer

from lora_rite import LoRARite, LoRARiteCallback, create_lora_rite
from lora_rite.hf import unwrap


def letters(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The reward: the share of letters in what was written."""
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]


def main(out: Path, steps: int = 20, save_every: int = 10, lr: float = 5e-3, resume: Path | None = None) -> LoRARite:
    network, tokenizer = model_and_tokenizer()
    model = adapted(network)  # attached here, not by peft_config=…, so that the optimizer can see the factors
    arguments = GRPOConfig(
        output_dir=str(out),
        max_steps=steps,
        num_generations=4,
        max_completion_length=12,
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
    trainer = GRPOTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [f"def f{i}(x):" for i in range(40)]}),
        processing_class=tokenizer,
        reward_funcs=letters,
        optimizers=(create_lora_rite(model, lr=lr), None),
        callbacks=[LoRARiteCallback()],
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.save_model(str(out / "adapter"))
    return tell(unwrap(trainer.optimizer), out / "adapter")


if __name__ == "__main__":
    auto_cli(main, as_positional=False, set_defaults={"out": "runs/grpo"})
