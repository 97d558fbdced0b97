"""What the rivals share: pairs of a shape gathered into one batch, stepped together, and written back."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..errors import LoRARiteValueError
from ..optim.precision import full_precision
from ..plan.layout import Layout, layouts
from ..plan.pairs import find_pairs, param_groups
from ..plan.sharding import is_sharded
from ..plan.state import State, work_dtype

Pairs = list[tuple[Tensor, Tensor]]


class Side(NamedTuple):
    """One factor of k pairs of a shape, tall: Aᵀ (k, n, r) or B (k, m, r), its gradient, and its state, each tensor of
    which has the leading dimension k."""

    x: Tensor
    grad: Tensor
    state: State


class PairOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer of LoRA pairs alone: it refuses other trainable parameters, frozen factors and sharded ones.

    A pair without a gradient on one of its factors in a step is left as it is, state too. Convolutions are taken as
    matrices, several pairs in one parameter (experts, groups) each by itself. Arithmetic and state are float32, or
    float64 for float64 factors, whatever the dtype of the factors, into which the result is rounded to nearest.

    Args:
        params: the model, or its ``named_parameters()``.
        options: the hyperparameters, ``lr`` and ``weight_decay`` among them.

    Raises:
        LoRARiteValueError: no pairs, parameters that it does not take, or hyperparameters out of range.
    """

    def __init__(self, params: nn.Module | Iterable[tuple[str, Tensor]], options: dict[str, Any]):
        for key, value in options.items():
            _check_hyperparameter(key, value)
        named = params if isinstance(params, nn.Module) else list(params)
        self._check(named)
        super().__init__(param_groups(named), options)

    @classmethod
    def for_model(cls, model: nn.Module, **options: Any) -> Self:
        """The optimizer of a model, as factories are called that get the model instead of its parameters."""
        return cls(model, **options)  # type: ignore[arg-type]

    def _check(self, named: nn.Module | list[tuple[str, Tensor]]) -> None:
        name, pairing = type(self).__name__, find_pairs(named)
        if others := [other.name for other in pairing.left_out]:
            raise LoRARiteValueError(
                f"{name} trains LoRA factors alone, and {len(others)} other parameters are trainable "
                f"({', '.join(others[:3])}{', …' if len(others) > 3 else ''}): freeze them, or take another optimizer"
            )
        if not pairing.pairs:
            raise LoRARiteValueError(f"{name} found no trainable LoRA pairs; attach an adapter (peft.get_peft_model)")
        for pair in pairing.pairs:
            for p_name, p in ((pair.a_name, pair.a), (pair.b_name, pair.b)):
                if not p.requires_grad:
                    raise LoRARiteValueError(f"{p_name} is frozen: {name} needs both factors of a pair trainable")
                if is_sharded(p):
                    raise LoRARiteValueError(f"{p_name} is sharded: {name} takes whole factors (DDP, one process)")

    @abstractmethod
    def new_state(self, x: Tensor) -> State:
        """The state of a side (k, rows, r) before its first step, with the leading dimension k."""

    @abstractmethod
    def update(self, sides: tuple[Side, Side], group: dict[str, Any]) -> list[Tensor]:
        """Aᵀ (k, n, r) and B (k, m, r) after a step. New states go into ``state`` of the sides; no tensor is written
        to."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: evaluates the model anew and returns the loss, which ``step`` returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with full_precision(self.param_groups):
            for group in self.param_groups:
                for pairs in self._alike(group):
                    self._step_together(pairs, group)
        return loss

    def _alike(self, group: dict[str, Any]) -> Iterable[Pairs]:
        """The pairs of a group that have gradients, by shape, dtype and device."""
        batches: dict[Any, Pairs] = {}
        params = group["params"]
        for a, b in zip(params[::2], params[1::2], strict=True):
            if a.grad is None or b.grad is None:
                continue
            if a.grad.is_sparse or b.grad.is_sparse:
                raise LoRARiteValueError(f"{type(self).__name__} takes no sparse gradients (sparse=False)")
            batches.setdefault((a.shape, b.shape, a.dtype, b.dtype, a.device), []).append((a, b))
        return batches.values()

    def _step_together(self, pairs: Pairs, group: dict[str, Any]) -> None:
        dtype, sides = work_dtype(*pairs[0]), layouts(group)
        factors = [list(side) for side in zip(*pairs, strict=True)]
        a, b = (self._gather(layout, params, dtype) for layout, params in zip(sides, factors, strict=True))
        moved = self.update((a, b), group)
        for layout, params, side, new in zip(sides, factors, (a, b), moved, strict=True):
            torch._foreach_copy_(params, [x.view(params[0].shape) for x in layout.flat(new).contiguous()])
            for key, value in side.state.items():
                torch._foreach_copy_([self.state[p][key] for p in params], list(value.split(layout.blocks)))

    def _gather(self, layout: Layout, params: list[Tensor], dtype: torch.dtype) -> Side:
        x, grad = (layout.tall(tensors, dtype) for tensors in (params, [p.grad for p in params]))  # type: ignore[arg-type]
        for i, p in enumerate(params):
            if not self.state[p]:
                own = x[i * layout.blocks : (i + 1) * layout.blocks]
                self.state[p].update(self.new_state(own))
        keys = self.state[params[0]]
        return Side(x, grad, {key: torch.cat([self.state[p][key] for p in params]) for key in keys})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its dtype, which torch would cast to the parameters'."""
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                self.state[p][key] = value.detach().to(p.device, copy=True)


def _check_hyperparameter(key: str, value: Any) -> None:
    if key == "lr" and isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    numbers = list(value) if key == "betas" and isinstance(value, (tuple, list)) else [value]
    decays = key.startswith("beta")
    real = all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers)
    if (
        not real
        or len(numbers) != 1 + (key == "betas")
        or not all(0 <= n < (1 if decays else math.inf) for n in numbers)
    ):
        what = {"betas": "two numbers in [0, 1)", "beta": "a number in [0, 1)"}.get(key, "a finite number ≥ 0")
        raise LoRARiteValueError(f"{key} must be {what}, got {value!r}")
