"""Factors without a model, to try optimizers on."""

import torch
from torch import nn

from ..plan.pairs import Shape

Shapes = list[Shape]


class Adapter(nn.Module):
    """The factors of a PEFT adapter (and their names), without a model: of what holds several pairs, the weights are on
    the meta device, whose shape says so."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, device: str):
        super().__init__()
        self.layers = nn.ModuleList()
        for shape in shapes:
            layer = nn.Module()
            for name, (rows, columns) in (("lora_A", shape.a), ("lora_B", shape.b)):
                factor = nn.Linear(columns, rows, bias=False, dtype=dtype, device=device)
                setattr(layer, name, nn.ModuleDict({"default": factor}))
            if shape.blocks > 1:
                layer.base_layer = nn.Module()
                layer.base_layer.weight = nn.Parameter(torch.empty(shape.weight, device="meta"), requires_grad=False)
            self.layers.append(layer)
