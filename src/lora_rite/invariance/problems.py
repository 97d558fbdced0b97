"""What optimizers are tried on: factors without a model, small synthetic problems, and a model on random tokens."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import LoRARiteValueError
from ..plan.pairs import Shape, find_pairs

Shapes = list[Shape]
Loss = Callable[[Any, int], Tensor]

#: The synthetic problems: kind of layer, and of its gradient ("few samples": rank of the gradient below the adapter's).
SYNTHETIC = ("linear", "linear, few samples", "embedding", "convolution")


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


def problems_of(
    model: nn.Module | None, loss: Loss | None, names: Sequence[str], seed: int
) -> Iterator[tuple[str, nn.Module, Loss]]:
    """(name of the start, model, loss) of what is to be audited."""
    if model is None:
        for name in names:
            for zero in (True, False):
                problem = Synthetic(name, zero, seed)
                yield f"{name}, {'zero' if zero else 'dense'}", problem, Synthetic.loss
        return
    if not find_pairs(model).pairs:
        raise LoRARiteValueError("the model has no LoRA pairs; attach an adapter first (peft.get_peft_model)")
    if loss is None:
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        if vocabulary is None:
            raise LoRARiteValueError("loss is needed: the model has no vocabulary to draw random tokens from")
        loss = random_tokens(int(vocabulary), seed)
    yield "as it is", model, loss


def random_tokens(vocabulary: int, seed: int = 0, *, batch: int = 2, length: int = 32) -> Loss:
    """The loss of a causal language model on random tokens, other ones in each step."""

    def loss(model: nn.Module, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        tokens = torch.randint(vocabulary, (batch, length), generator=generator)
        tokens = tokens.to(next(model.parameters()).device)
        return model(input_ids=tokens, labels=tokens).loss

    return loss


class SyntheticLayer(nn.Module):
    """A frozen map and its adapter of rank 4, with the names that PEFT gives."""

    def __init__(self, kind: str, n: int, m: int, zero: bool):
        super().__init__()
        r = 4
        if kind == "convolution":
            a, b = nn.Conv2d(n, r, 3, bias=False), nn.Conv2d(r, m, 1, bias=False)
            self.lora_A, self.lora_B = nn.ModuleDict({"default": a}), nn.ModuleDict({"default": b})
            pair = a.weight, b.weight
        elif kind == "embedding":
            pair = nn.Parameter(torch.empty(r, n)), nn.Parameter(torch.empty(m, r))
            self.lora_embedding_A = nn.ParameterDict({"default": pair[0]})
            self.lora_embedding_B = nn.ParameterDict({"default": pair[1]})
        else:
            a, b = nn.Linear(n, r, bias=False), nn.Linear(r, m, bias=False)
            self.lora_A, self.lora_B = nn.ModuleDict({"default": a}), nn.ModuleDict({"default": b})
            pair = a.weight, b.weight
        for p in pair:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
        if zero:  # as PEFT: A of embeddings, B elsewhere
            nn.init.zeros_(pair[0] if kind == "embedding" else pair[1])
        shape = (m, n, 3, 3) if kind == "convolution" else (m, n)
        self.weight = nn.Parameter(torch.randn(shape) * (m * n) ** -0.25, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "lora_embedding_A"):
            a, b = self.lora_embedding_A["default"], self.lora_embedding_B["default"]
            return F.embedding(x, self.weight.mT) + F.embedding(x, a.mT) @ b.mT
        path = self.lora_B["default"](self.lora_A["default"](x))
        return (F.linear if self.weight.ndim == 2 else F.conv2d)(x, self.weight) + path


class Synthetic(nn.Module):
    """Two adapted layers with a tanh between them, which learn a fixed random linear map."""

    def __init__(self, name: str, zero: bool, seed: int):
        super().__init__()
        kind, _, few = name.partition(", ")
        self.kind, self.samples, self.seed = kind, 2 if few else 16, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = SyntheticLayer(kind, *((3, 8) if kind == "convolution" else (20, 12)), zero)
            second = kind if kind == "convolution" else "linear"
            self.second = SyntheticLayer(second, *((8, 6) if kind == "convolution" else (12, 10)), zero)
            self.teacher = nn.Parameter(torch.randn(20, 10), requires_grad=False)

    def loss(self, step: int) -> Tensor:
        g = torch.Generator().manual_seed(1000 * self.seed + step)
        dtype = self.teacher.dtype
        if self.kind == "embedding":
            x = torch.randint(20, (self.samples,), generator=g)
            y = self.teacher[x]
        elif self.kind == "convolution":
            x = torch.randn(2, 3, 8, 8, generator=g, dtype=torch.float64).to(dtype)
            y = F.conv2d(x, self.teacher[:18, :9].reshape(6, 3, 3, 3))[..., 1:-1, 1:-1]
        else:
            x = torch.randn(self.samples, 20, generator=g, dtype=torch.float64).to(dtype)
            y = x @ self.teacher
        return (self.second(self.first(x).tanh()) - y).square().mean()
