"""The pairs that a step is about: those that are wanted, by what is stepped together; and why a pair cannot be."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import LoRARiteValueError
from ..plan.checks import check_pair, is_cut_through
from ..plan.layout import layout_options, rank_of
from ..plan.sharding import is_sharded
from ..plan.state import FactorPair, State, work_dtype
from .checks import changed_shape, names_of, sparse_gradient

Group = dict[str, Any]
States = Mapping[Tensor, State]


def alike(
    groups: list[Group], states: States, wanted: Callable[[Tensor, Tensor], Any]
) -> Iterator[tuple[Group, list[FactorPair]]]:
    """Pairs (A, B) that are wanted, by group, rank, dtype of the arithmetic and device.

    Raises:
        LoRARiteValueError: a pair cannot be stepped.
    """
    position = 0
    for number, group in enumerate(groups):
        params, layout = group["params"], layout_options(group)
        named = group.get("param_names", params)
        if group["kind"] == "lora" and (len(params) != len(named) or len(params) % 2):
            raise LoRARiteValueError(
                f"group {number} holds {len(params)} parameters instead of its factors A, B, A, B, …: DeepSpeed "
                "ZeRO flattens and splits them. Hand DeepSpeed lora_rite.ZeroLoRARite(optimizer) instead"
            )
        together: dict[Any, list[FactorPair]] = {}
        for k in range(0, len(params) if group["kind"] == "lora" else 0, 2):
            a, b = params[k : k + 2]
            if not wanted(a, b):
                continue
            wrong = _altered(a, states) or _altered(b, states) or _newly_frozen(a, b, states) or _retyped(a, b, states)
            if wrong or is_cut_through(b, **layout):
                _explain(group, a, b, names_of(groups)[number][k : k + 2], states)
            moving = with_state(a, b, states) or (a.requires_grad, b.requires_grad)
            mesh = getattr(a, "device_mesh", None)
            key = rank_of(group, a), work_dtype(a, b), a.device, mesh, is_sharded(b), moving
            together.setdefault(key, []).append(FactorPair(a, b, position + k))
        position += len(params)
        yield from ((group, pairs) for pairs in together.values())


def have_gradients(a: Tensor, b: Tensor) -> bool:
    """Whether the factors that are trained, both or one, have gradients."""
    trained = [p for p in (a, b) if p.requires_grad]
    return bool(trained) and all(p.grad is not None for p in trained)


def with_state(a: Tensor, b: Tensor, states: States) -> tuple[bool, bool] | None:
    """Which of two factors have a state: both, or the one that is not frozen; None where the pair has none yet."""
    have = bool(states.get(a)), bool(states.get(b))
    return have if any(have) else None


def one_sided(groups: list[Group]) -> list[int]:
    """The positions of the pairs of which both factors are trained and one alone has a gradient."""
    found, position = [], 0
    for group in groups:
        params = group["params"]
        for k in range(0, len(params) if group["kind"] == "lora" else 0, 2):
            a, b = params[k : k + 2]
            if a.requires_grad and b.requires_grad and (a.grad is None) != (b.grad is None):
                found.append(position + k)
        position += len(params)
    return found


def _altered(p: Tensor, states: States) -> bool:
    """Whether p cannot be stepped: sharded, of another shape than its state was made for, or a sparse gradient."""
    state = states.get(p)
    sparse = p.grad is not None and p.grad.layout != torch.strided
    swapped = is_sharded(p) != is_sharded(state["first_moment"]) if state else False
    return p.ndim < 2 or sparse or swapped or (bool(state) and state["first_moment"].shape != p.shape)  # type: ignore[index]


def _retyped(a: Tensor, b: Tensor, states: States) -> bool:
    """Whether the state of a pair is of another dtype than its arithmetic is to be in."""
    state = states.get(a) or states.get(b)
    return bool(state) and state["matrices"].dtype != work_dtype(a, b)  # type: ignore[index]


def _newly_frozen(a: Tensor, b: Tensor, states: States) -> bool:
    """Whether other factors of a pair are trained than its state was made for. (A pair that is frozen as a whole,
    an adapter that is not active, keeps its state.)"""
    trained = a.requires_grad, b.requires_grad
    return any(trained) and with_state(a, b, states) not in (None, trained)


def _explain(group: Group, a: Tensor, b: Tensor, names: list[str], states: States) -> None:
    """Raises LoRARiteValueError: why a pair cannot be stepped."""
    check_pair(a, b, names[0], names[1], **layout_options(group))
    for p, name in zip((a, b), names, strict=True):
        state = states.get(p)
        if p.grad is not None and p.grad.layout != torch.strided:
            raise LoRARiteValueError(sparse_gradient(name))
        if state and is_sharded(p) != is_sharded(state["first_moment"]):
            raise LoRARiteValueError(
                f"{name} is sharded and its state is not, or the reverse: shard the model (fully_shard) before the "
                "optimizer's first step, and load states by torch.distributed.checkpoint"
            )
        if state and p.shape != state["first_moment"].shape:
            raise LoRARiteValueError(changed_shape(name, state["first_moment"], p))
        if _retyped(a, b, states):
            raise LoRARiteValueError(
                f"{name} changed its dtype to {p.dtype} since its state was made: save the optimizer's state_dict, "
                "make a new optimizer, and load it there"
            )
        if _newly_frozen(a, b, states) and p.requires_grad != bool(state):
            raise LoRARiteValueError(
                f"{name} is {'trained' if p.requires_grad else 'frozen'}, and was not when its state was made: "
                "make a new optimizer, or remove the state of both factors (optimizer.state.pop) to start anew"
            )
