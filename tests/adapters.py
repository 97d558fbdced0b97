"""Tiny PEFT models, one of each kind of layer that holds a product B·A, and what each of them computes.

``ADAPTERS`` are those whose pairs are whole parameters. ``STACKED`` are those whose pairs are blocks of parameters: for
them ``products(model)`` gives the blocks (A_i, B_i) as views, and ``delta(model, x)`` is what PEFT's layer must add to
its base layer on input x if these blocks, multiplied pair by pair, are all there is.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import peft
import peft.optimizers
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Adapter:
    """``build()`` gives a model whose zero factors are zero still, and ``inputs(t)`` is its batch of step t."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    pairs: int
    others: int = 0


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(*shape: int) -> Callable[[int], Tensor]:
    return lambda t: torch.randn(*shape, generator=_seeded(t))


def tokens(*shape: int) -> Callable[[int], Tensor]:
    return lambda t: torch.randint(0, 20, shape, generator=_seeded(t))


def adapted(base: Callable[[], nn.Module], config: Callable[..., Any] = peft.LoraConfig, **options: Any):
    """A builder: PEFT's adapter of rank 4 on the modules of ``base()`` that are numbered in ``target_modules``."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        rank = {"r": 4} if "r" in signature(config).parameters else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of groups, tied weights and layers that PEFT finds unusual
            return peft.get_peft_model(base(), config(**{**rank, "target_modules": ["0", "2"], **options}))

    return build


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(20, 16), nn.Tanh(), nn.Linear(16, 8))


def conv(dimensions: int, groups: int = 1) -> Callable[[], nn.Module]:
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    return lambda: nn.Sequential(layer(4, 8, 3, groups=groups), nn.Tanh(), layer(8, 4, 1, groups=groups))


def lora_fa() -> nn.Module:
    """As PEFT sets LoRA-FA up: its optimizer's constructor freezes A."""
    model = adapted(linear)()
    peft.optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=4, lr=1e-3)
    return model


class Attention(nn.Module):
    """Self-attention by torch's own layer, whose q, k and v are one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


ADAPTERS = [
    Adapter("linear", adapted(linear), numbers(6, 12), 2),
    Adapter("rslora", adapted(linear, use_rslora=True), numbers(6, 12), 2),
    Adapter("dora", adapted(linear, use_dora=True), numbers(6, 12), 2, others=2),
    Adapter("lora_bias", adapted(linear, lora_bias=True), numbers(6, 12), 2, others=2),
    Adapter("bias", adapted(linear, bias="all"), numbers(6, 12), 2, others=2),
    Adapter("modules_to_save", adapted(linear, target_modules=["0"], modules_to_save=["2"]), numbers(6, 12), 1, 2),
    Adapter("pissa", adapted(linear, init_lora_weights="pissa"), numbers(6, 12), 2),
    Adapter("olora", adapted(linear, init_lora_weights="olora"), numbers(6, 12), 2),
    Adapter("orthogonal", adapted(linear, init_lora_weights="orthogonal"), numbers(6, 12), 2),
    Adapter("mica", adapted(linear, init_lora_weights="mica"), numbers(6, 12), 2),
    Adapter("lorafa", lora_fa, numbers(6, 12), 2),
    Adapter("velora", adapted(linear, velora_config=peft.VeloraConfig(num_groups=2)), numbers(6, 12), 2),
    Adapter("montecarlo", adapted(linear, monteclora_config=peft.MontecloraConfig()), numbers(6, 12), 2, others=4),
    Adapter("embedding", adapted(embedding), tokens(6, 3), 2),
    Adapter("dora_embedding", adapted(embedding, use_dora=True), tokens(6, 3), 2, others=2),
    Adapter(
        "trainable_tokens",
        adapted(embedding, target_modules=["2"], trainable_token_indices={"0": [1, 2]}),
        tokens(6, 3),
        1,
        others=1,
    ),
    Adapter("conv1d", adapted(conv(1)), numbers(6, 4, 7), 2),
    Adapter("conv2d", adapted(conv(2)), numbers(6, 4, 7, 7), 2),
    Adapter("conv3d", adapted(conv(3)), numbers(2, 4, 5, 5, 5), 2),
    Adapter("dora_conv2d", adapted(conv(2), use_dora=True), numbers(6, 4, 7, 7), 2, others=2),
    Adapter("attention", adapted(Attention, target_modules=["attention"]), numbers(3, 5, 16), 2),
    Adapter("hira", adapted(linear, peft.HiraConfig), numbers(6, 12), 2),
    Adapter("hira_embedding", adapted(embedding, peft.HiraConfig), tokens(6, 3), 2),
    Adapter("hira_conv2d", adapted(conv(2), peft.HiraConfig), numbers(6, 4, 7, 7), 2),
    Adapter("loha", adapted(linear, peft.LoHaConfig), numbers(6, 12), 4),
    Adapter("loha_conv2d", adapted(conv(2), peft.LoHaConfig), numbers(6, 4, 7, 7), 4),
    Adapter("lokr", adapted(wide, peft.LoKrConfig, r=2, decompose_factor=4), numbers(6, 64), 2, others=2),
    Adapter("lokr_both", adapted(wide, peft.LoKrConfig, r=2, decompose_both=True), numbers(6, 64), 4),
]


@dataclass(frozen=True)
class Stacked(Adapter):
    """An adapter whose pairs are blocks: ``products(model)`` and ``delta(model, x)``, see above. ``a`` and ``b`` are
    PEFT's parameters, ``scaling`` its factor."""

    products: Callable[[nn.Module], list[tuple[Tensor, Tensor]]] = lambda model: []
    delta: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: x


def lora_layer(model: nn.Module) -> Any:
    """The outermost LoRA layer of a model."""
    return next(m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))


def whole(model: nn.Module) -> tuple[Tensor, Tensor]:
    layer = lora_layer(model)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


class Experts(nn.Module):
    """Three experts in one parameter, (3, out, in), or (3, in, out) where ``is_transposed``. Every third row of x goes
    to the same expert, and none to the last where ``idle``."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        shape = (3, 6, 8) if transposed else (3, 8, 6)
        self.weight, self.is_transposed = nn.Parameter(torch.randn(shape)), transposed
        self.idle = False

    def route(self, x: Tensor) -> Tensor:
        return torch.arange(len(x)) % (2 if self.idle else 3)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.mT if self.is_transposed else self.weight
        return torch.einsum("bi,boi->bo", x, w[self.route(x)])


def expert_blocks(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """A (3·r, in) is expert-major: rows e·r … of expert e. B (out, r·3) is rank-major: columns e, e + 3, … of it."""
    a, b = whole(model)
    return list(zip(a.unflatten(0, (3, -1)).unbind(0), b.unflatten(1, (-1, 3)).unbind(2), strict=True))


def expert_delta(model: nn.Module, x: Tensor) -> Tensor:
    base = lora_layer(model).get_base_layer()
    maps = torch.stack([b @ a for a, b in expert_blocks(model)]) * lora_layer(model).scaling["default"]
    return torch.einsum("bi,boi->bo", x, maps[base.route(x)])


def group_blocks(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """A (r, in, k, k) is not grouped, B (out, r/2, 1, 1) is: rows of both belong to a group, r/2 of A, out/2 of B."""
    a, b = whole(model)
    return list(zip(a.chunk(2, 0), b.chunk(2, 0), strict=True))


def group_delta(model: nn.Module, x: Tensor) -> Tensor:
    kernel = torch.cat([(b.flatten(1) @ a.flatten(1)).unflatten(1, a.shape[1:]) for a, b in group_blocks(model)])
    return nn.functional.conv2d(x, kernel) * lora_layer(model).scaling["default"]


def bd_a_blocks(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """A (r, in/2) is block-diagonal: its rows i·r/2 … see the i-th half of the input. B (out, r): columns i·r/2 …"""
    a, b = whole(model)
    return list(zip(a.chunk(2, 0), b.chunk(2, 1), strict=True))


def bd_a_delta(model: nn.Module, x: Tensor) -> Tensor:
    parts = zip(x.chunk(2, 1), bd_a_blocks(model), strict=True)
    return sum(half @ (b @ a).mT for half, (a, b) in parts) * lora_layer(model).scaling["default"]


def bd_b_blocks(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """A (r, in): rows i·r/2 …; B (out, r/2) is block-diagonal: its rows i·out/2 … write the i-th half of the output."""
    a, b = whole(model)
    return list(zip(a.chunk(2, 0), b.chunk(2, 0), strict=True))


def bd_b_delta(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([x @ (b @ a).mT for a, b in bd_b_blocks(model)], 1) * lora_layer(model).scaling["default"]


def _experts(transposed: bool):
    base = lambda: nn.Sequential(Experts(transposed))
    return adapted(base, target_parameters=["0.weight"], target_modules=[])


def _block_diagonal(**side: list[str]):
    base = lambda: nn.Sequential(nn.Linear(12, 16))
    return adapted(base, target_modules=["0"], use_bdlora=peft.BdLoraConfig(nblocks=2, **side))


STACKED = [
    Stacked("experts", _experts(False), numbers(9, 6), 3, products=expert_blocks, delta=expert_delta),
    Stacked("experts_transposed", _experts(True), numbers(9, 6), 3, products=expert_blocks, delta=expert_delta),
    Stacked(
        "grouped_conv2d",
        adapted(lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), target_modules=["0"]),
        numbers(6, 4, 7, 7),
        2,
        products=group_blocks,
        delta=group_delta,
    ),
    Stacked("bdlora_a", _block_diagonal(target_modules_bd_a=["0"]), numbers(6, 12), 2, 0, bd_a_blocks, bd_a_delta),
    Stacked("bdlora_b", _block_diagonal(target_modules_bd_b=["0"]), numbers(6, 12), 2, 0, bd_b_blocks, bd_b_delta),
]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """Distance to a fixed random target of the output's shape."""
    y = model(x)
    return (y - torch.randn(y.shape, generator=_seeded(7))).square().mean()


def randomise(model: nn.Module) -> None:
    """Random numbers in every trainable parameter: no factor is zero then."""
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.copy_(torch.randn(p.shape, generator=_seeded(i)))
