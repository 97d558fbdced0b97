"""Parameters and keys of groups: what is wrong with them, and how it is said."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..errors import LoRARiteTypeError, LoRARiteValueError
from ..plan.sharding import Shards, check_sharding, local


def names_of(groups: list[dict[str, Any]]) -> list[list[str]]:
    """Names of the parameters, by group; a running number where they have none."""
    names, offset = [], 0
    for group in groups:
        numbers = range(offset, offset + len(group["params"]))
        names.append(group.get("param_names") or [f"parameter {i}" for i in numbers])
        offset += len(group["params"])
    return names


def names_by_position(groups: list[dict[str, Any]]) -> list[str]:
    return list(chain.from_iterable(names_of(groups)))


def check_tensors(named: list[tuple[str, Any]]) -> None:
    for name, p in named:
        if not isinstance(p, Tensor):
            raise LoRARiteTypeError(f"{name} is a {type(p).__name__}, not a tensor")
        if not p.is_floating_point():
            raise LoRARiteTypeError(f"{name} is of {p.dtype}: only real floating-point parameters can be trained")
        check_sharding(name, p)
        if p.is_meta or p.layout != torch.strided:
            what = "on the meta device" if p.is_meta else f"of layout {p.layout}"
            raise LoRARiteValueError(f"{name} is {what}: LoRARite needs dense parameters with values")
        if not (p.is_leaf or p.retains_grad):
            raise LoRARiteValueError(f"{name} is not a leaf: it is computed from other tensors, so it has no gradient")


def all_finite(t: Tensor) -> bool:
    """Whether t is finite, in all processes that share it."""
    return not Shards(t).largest((~local(t).isfinite()).any().to(torch.float32)[None]).any()


def sparse_gradient(name: str) -> str:
    return f"the gradient of {name} is sparse: use dense gradients (sparse=False)"


def changed_shape(name: str, moment: Tensor, p: Tensor) -> str:
    return (
        f"{name} changed its shape from {tuple(moment.shape)} to {tuple(p.shape)}: make a new optimizer, or remove its "
        "state, of a pair that of both factors (optimizer.state.pop), to start anew"
    )
