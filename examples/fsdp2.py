"""FSDP2: model, gradients and optimizer state shared out over processes; any number of them reads a checkpoint.

torchrun --nproc-per-node 2 examples/fsdp2.py [--out runs/fsdp2] [--resume runs/fsdp2/checkpoint-10]
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import adapted, model_and_tokenizer, tell, windows
from jsonargparse import auto_cli
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from lora_rite import LoRARite, create_lora_rite


def main(out: Path, steps: int = 20, save_every: int = 10, lr: float = 2e-2, resume: Path | None = None) -> LoRARite:
    if "RANK" not in os.environ:
        sys.exit("several processes share the model: torchrun --nproc-per-node 2 examples/fsdp2.py")
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )
    network, tokenizer = model_and_tokenizer()
    torch.manual_seed(0)  # the same adapter everywhere
    model, rows = adapted(network).to(device), windows(tokenizer)
    mesh = dist.init_device_mesh(device.type, (world,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = create_lora_rite(model, lr=lr)  # after fully_shard
    step = 0
    if resume:
        weights, state = get_state_dict(model, optimizer)
        loaded = {"model": weights, "optimizer": state}
        dcp.load(loaded, checkpoint_id=resume)
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        step = int(resume.name.removeprefix("checkpoint-"))
    while step < steps:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([rows[i] for i in order[rank * 4 : rank * 4 + 4]]).to(device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if rank == 0:
            print(f"step {step} loss {loss.item():.3f}")
        if step % save_every == 0:
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=out / f"checkpoint-{step}")
    if rank == 0:
        tell(optimizer, out / f"checkpoint-{step}")
    dist.destroy_process_group()
    return optimizer


if __name__ == "__main__":
    auto_cli(main, as_positional=False, set_defaults={"out": "runs/fsdp2"})
