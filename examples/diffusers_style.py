"""LoRA layers of your own, named lora_down and lora_up as in diffusers' and sd-scripts' files: no PEFT.

python examples/diffusers_style.py [--out runs/diffusers] [--resume runs/diffusers/checkpoint-10.pt]
"""

from pathlib import Path

import torch
from common import draw, model_and_tokenizer, tell, windows
from jsonargparse import auto_cli
from safetensors.torch import save_file
from torch import nn

from lora_rite import LoRARite, create_lora_rite


class LoRALinear(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 8):
        super().__init__()
        self.base = base
        self.lora_down = nn.Linear(base.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x):
        return self.base(x) + self.lora_up(self.lora_down(x))


def main(out: Path, steps: int = 20, save_every: int = 10, lr: float = 2e-2, resume: Path | None = None) -> LoRARite:
    model, tokenizer = model_and_tokenizer()
    rows = windows(tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    model.requires_grad_(False)
    torch.manual_seed(0)
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.model.set_submodule(name, LoRALinear(layer))
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = create_lora_rite(model, lr=lr)
    saved = torch.load(resume, weights_only=True) if resume else {"step": 0}
    if resume:
        model.load_state_dict(saved["factors"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
    for step in range(saved["step"], steps):
        batch = draw(rows, step)
        (loss := model(input_ids=batch, labels=batch).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} loss {loss.item():.3f}")
        if (step + 1) % save_every == 0:
            saved = {"step": step + 1, "factors": factors, "optimizer": optimizer.state_dict()}
            torch.save(saved, out / f"checkpoint-{step + 1}.pt")
    save_file(factors, out / "adapter_model.safetensors")
    return tell(optimizer, out)


if __name__ == "__main__":
    auto_cli(main, as_positional=False, set_defaults={"out": "runs/diffusers"})
