"""Accelerate: the same script on one device and, by `accelerate launch`, on several (DDP).

python examples/accelerate_loop.py [--out runs/accelerate] [--resume runs/accelerate/checkpoint-10]
"""

from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from common import adapted, model_and_tokenizer, tell, windows
from jsonargparse import auto_cli
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from lora_rite import LoRARite, create_lora_rite
from lora_rite.hf import unwrap


def main(out: Path, steps: int = 20, save_every: int = 10, lr: float = 2e-2, resume: Path | None = None) -> LoRARite:
    set_seed(0)
    by_epoch = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), dataloader_config=by_epoch)
    network, tokenizer = model_and_tokenizer()
    model, rows = adapted(network), windows(tokenizer)
    optimizer = create_lora_rite(model, lr=lr)
    processes = accelerator.num_processes  # at each step, a prepared schedule goes on by that many
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10 * processes, steps * processes)
    loader = DataLoader(rows, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    step = 0
    if resume:
        accelerator.load_state(str(resume))  # weights, optimizer, schedule, random numbers
        step = int(resume.name.removeprefix("checkpoint-"))
    while step < steps:
        epoch, done = divmod(step, len(loader))
        loader.set_epoch(epoch)  # a resumed run shuffles as the whole one
        for batch in islice(accelerator.skip_first_batches(loader, done), steps - step):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)  # no accelerator.clip_grad_norm_ after it
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            accelerator.print(f"step {step} loss {loss.item():.3f} next lr {schedule.get_last_lr()[0]:.4f}")
            if step % save_every == 0:
                accelerator.save_state(str(out / f"checkpoint-{step}"))
    accelerator.unwrap_model(model).save_pretrained(out / "adapter", is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:
        tell(unwrap(optimizer), out / "adapter")
    return unwrap(optimizer)


if __name__ == "__main__":
    auto_cli(main, as_positional=False, set_defaults={"out": "runs/accelerate"})
