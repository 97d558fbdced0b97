"""A plain PyTorch loop: warm-up and cosine, checkpoints, resume.

python examples/plain.py [--out runs/plain] [--resume runs/plain/checkpoint-10.pt]
"""

from pathlib import Path

import torch
from common import adapted, draw, model_and_tokenizer, tell, windows
from jsonargparse import auto_cli
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import get_cosine_schedule_with_warmup

from lora_rite import LoRARite, create_lora_rite


def main(out: Path, steps: int = 20, save_every: int = 10, lr: float = 2e-2, resume: Path | None = None) -> LoRARite:
    network, tokenizer = model_and_tokenizer()
    model, rows = adapted(network).train(), windows(tokenizer)
    optimizer = create_lora_rite(model, lr=lr)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    start = 0
    if resume:
        saved = torch.load(resume, weights_only=True)
        set_peft_model_state_dict(model, saved["adapter"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved["rng"])  # dropout
        start = saved["step"]
    for step in range(start, steps):
        batch = draw(rows, step)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()  # no clip_grad_norm_ after it: LoRARite clips by itself, invariantly
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {step + 1} loss {loss.item():.3f}")
        if (step + 1) % save_every == 0:
            saved = {"adapter": get_peft_model_state_dict(model), "optimizer": optimizer.state_dict()}
            saved |= {"schedule": schedule.state_dict(), "rng": torch.get_rng_state(), "step": step + 1}
            out.mkdir(parents=True, exist_ok=True)
            torch.save(saved, out / f"checkpoint-{step + 1}.pt")
    model.save_pretrained(out / "adapter")
    return tell(optimizer, out / "adapter")


if __name__ == "__main__":
    auto_cli(main, as_positional=False, set_defaults={"out": "runs/plain"})
