"""The optimizers that are timed: :func:`optimizers` has a line for each, and all of :mod:`lora_rite.rivals`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import kernels
from ..finetune.optimizers import PRESETS, create_optimizer
from ..integrations.peft import create_lora_rite
from ..invariance.problems import Adapter, Shapes
from .watch import Watch, seconds

BASELINE = "AdamW (fused)"
WARM_UP = 3


def optimizers(adapter: nn.Module, device: str) -> dict[str, Callable[[], torch.optim.Optimizer]]:
    """Makers of the optimizers to compare. On CUDA, those named so are replayed as a CUDA graph."""
    params = [p for p in adapter.parameters() if p.requires_grad]

    def pytorch_optimizer() -> torch.optim.Optimizer:
        from pytorch_optimizer import LoRARite as Other  # type: ignore[import-not-found]

        return Other(params, lr=1e-4)

    def riemannian() -> torch.optim.Optimizer:
        from peft.optimizers import create_riemannian_optimizer  # type: ignore[attr-defined]

        return create_riemannian_optimizer(adapter, torch.optim.AdamW, lr=1e-4)  # type: ignore[arg-type]

    rivals = [name for name, preset in PRESETS.items() if preset.path.startswith("lora_rite.rivals:")]
    cuda = device == "cuda"
    graphs: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "LoRARite (CUDA graph)" if cuda else "LoRARite (capturable)": lambda: create_lora_rite(
            adapter, 1e-4, capturable=True
        )
    }
    if cuda or kernels.pretended:
        graphs["LoRARite (triton)"] = lambda: create_lora_rite(adapter, 1e-4, engine="triton")
    if cuda:
        graphs |= {
            "LoRARite (triton, CUDA graph)": lambda: create_lora_rite(adapter, 1e-4, engine="triton", capturable=True),
            "AdamW (fused, CUDA graph)": lambda: torch.optim.AdamW(params, 1e-4, fused=True, capturable=True),
        }
    return {
        "LoRARite": lambda: create_lora_rite(adapter, lr=1e-4),
        **graphs,
        BASELINE: lambda: torch.optim.AdamW(params, lr=1e-4, fused=True),
        "AdamW (foreach)": lambda: torch.optim.AdamW(params, lr=1e-4, foreach=True),
        "pytorch_optimizer.LoRARite": pytorch_optimizer,
        "peft Riemannian (AdamW)": riemannian,
        "torch Muon": lambda: torch.optim.Muon(params, lr=1e-4),
        **{name: partial(create_optimizer, adapter, name, lr=1e-4) for name in rivals},
    }


class TimedOptimizer:
    """An optimizer on an adapter of its own, warmed up."""

    def __init__(self, name: str, shapes: Shapes, dtype: torch.dtype, device: str):
        adapter = Adapter(shapes, dtype, device)
        self.params, self.device = [p for p in adapter.parameters() if p.requires_grad], device
        self.gradients = [torch.randn_like(p) * 1e-3 for p in self.params]
        self.optimizer = optimizers(adapter, device)[name]()
        self.step: Callable[[], Any] = self.optimizer.step
        for _ in range(WARM_UP):
            self.seconds()
        if "CUDA graph" in name:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.optimizer.step()
            self.step = graph.replay

    def reset_gradients(self) -> None:
        """Some peers write into them; a graph reads them at the same address."""
        for p, g in zip(self.params, self.gradients, strict=True):
            if p.grad is None:
                p.grad = torch.empty_like(g)
            p.grad.copy_(g)

    def seconds(self) -> float:
        self.reset_gradients()
        return seconds(self.step, self.device)

    def watch(self) -> dict[str, int]:
        """Bytes at the peak of what a step (in eager mode) allocates and does not keep; reads of the device by the
        host in what is timed."""
        self.reset_gradients()
        with Watch(self.device) as eager:
            self.optimizer.step()
        peak = eager.peak
        if self.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.optimizer.step()
            peak = torch.cuda.max_memory_allocated() - before
        graph = self.step != self.optimizer.step
        return {"extra_bytes": peak, "synchronisations": 0 if graph else eager.synchronisations}
