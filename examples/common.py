"""What the examples share: the embedded model, something to read, and an adapter."""

from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lora_rite.finetune.models import TINY

logging.disable_progress_bar()


def model_and_tokenizer():
    """The language model inside lora_rite (3 million parameters), which has read Python only, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), AutoTokenizer.from_pretrained(TINY)


def texts(count: int = 32) -> list[str]:
    """C++ headers: torch installs them, so that they are there without a network."""
    files = sorted((Path(torch.__file__).parent / "include" / "c10" / "core").glob("*.h"))
    return [file.read_text(encoding="utf-8") for file in files[:count]]


def windows(tokenizer, length: int = 64) -> torch.Tensor:
    """Token windows (windows, length) of the texts."""
    tokens = tokenizer("\n".join(texts()), return_tensors="pt", verbose=False)["input_ids"][0]
    return tokens[: len(tokens) // length * length].view(-1, length)


def draw(rows: torch.Tensor, step: int) -> torch.Tensor:
    """The batch of a step, (4, length): the same in a resumed run."""
    return rows[torch.randint(len(rows), (4,), generator=torch.Generator().manual_seed(step))]


def lora_config() -> peft.LoraConfig:
    return peft.LoraConfig(r=8, lora_alpha=8, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")


def tell(optimizer, out: Path):
    """Prints what has happened; returns the optimizer."""
    report = optimizer.report()
    print(f"{report['steps']} steps of {report['pairs']} pairs; the adapter is in {out}. The optimizer's report:")
    print(report)
    return optimizer


def adapted(model):
    """The model with a LoRA adapter; its initialisation is always the same."""
    torch.manual_seed(0)
    return peft.get_peft_model(model, lora_config())
