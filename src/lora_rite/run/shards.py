"""Parameters and optimizer states that FSDP2 has shared out over the processes (DTensors): whole, and back. All
processes must call these together. What is not shared out stays as it is."""

import os
from typing import Any

from ..optim.modes import without_accelerate
from .digest import trained, whole
from .processes import sharded

ADAPTER, OPTIMIZER, SCHEDULER = "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"


def shard_like(like: Any, value: Any) -> Any:
    """A value that all processes have whole, shared out as another is."""
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def assign(p: Any, value: Any) -> None:
    """Gives a parameter a value that all processes have whole."""
    import torch

    with torch.no_grad():
        p.copy_(shard_like(p, value))


def unshard_trained(model: Any) -> None:
    """Puts the trained parameters whole, on the CPU, in their places: the model can be saved then, and not be run."""
    if not sharded():
        return
    import torch
    from torch.distributed.fsdp import FSDPModule

    modules = list(model.modules())
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()
    for module in modules:
        for name, p in list(module.named_parameters(recurse=False)):
            if p.requires_grad and hasattr(p, "full_tensor"):
                module._parameters[name] = torch.nn.Parameter(whole(p).cpu())


def sharded_checkpoints(trainer_class: type) -> type:
    """A class of transformers' Trainer that under FSDP2 writes and reads the checkpoints of DDP: the adapter in PEFT's
    format and the optimizer's state, both whole, so that runs go on with another number of processes."""

    class ShardedCheckpoints(trainer_class):  # type: ignore[misc, valid-type]
        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            if not self.is_fsdp_enabled:
                super().save_model(output_dir, _internal_call)
                return
            from torch.utils._pytree import tree_map

            adapter = {name: whole(p).detach().cpu() for name, p in trained(self.model)}
            # Gathered before anything is written: else the others would wait here for one whose disk is full.
            self.whole_state = tree_map(whole, self.optimizer.state_dict())
            self._save(output_dir, state_dict=adapter)

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            if not self.is_fsdp_enabled:
                super()._save_optimizer_and_scheduler(output_dir)
                return
            import torch

            if self.args.should_save:
                torch.save(self.whole_state, os.path.join(output_dir, OPTIMIZER))
                torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER))

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            if not self.is_fsdp_enabled:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            from peft import get_peft_model_state_dict
            from safetensors.torch import load_file

            parameters = get_peft_model_state_dict(self.model, state_dict=dict(trained(self.model)))
            for name, value in load_file(os.path.join(resume_from_checkpoint, ADAPTER)).items():
                assign(parameters[name], value)

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if not self.is_fsdp_enabled or checkpoint is None:
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            import torch
            from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

            state, schedule = (
                torch.load(os.path.join(checkpoint, name), weights_only=True, map_location="cpu")
                for name in (OPTIMIZER, SCHEDULER)
            )
            # Has the optimizer make a state, by a step of nothing, that says how each of its tensors is shared out.
            get_optimizer_state_dict(self.model, without_accelerate(self.optimizer))
            for i, like in self.optimizer.state_dict()["state"].items():
                of_one = state["state"].get(i, {})
                of_one.update({key: shard_like(like[key], value) for key, value in of_one.items() if key in like})
            self.optimizer.load_state_dict(state)
            self.lr_scheduler.load_state_dict(schedule)

    return ShardedCheckpoints
