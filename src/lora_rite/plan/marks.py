"""What a plan rests on, and whether it is still so."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, compress
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

from .layout import LAYOUT_KEYS
from .sharding import is_sharded
from .state import State

#: What of a parameter, and of a gradient, decides how it is stepped.
_PROPERTIES = (*map(attrgetter, ("requires_grad", "dtype", "shape", "device")), Tensor.is_contiguous)
_OF_GRADIENTS = attrgetter("dtype"), attrgetter("layout")


class Marks:
    """What a plan rests on, to be compared with what there is now: a plan whose marks differ is stale.

    Of the states' tensors it has the identities and the addresses, and no reference, which would keep them in memory.
    An identity is free to be another object's once ``gone`` has been called, with the first tensor that is no more."""

    def __init__(self, groups: list[dict[str, Any]], states: dict[Tensor, State], gone: Callable[[Any], None]):
        self.groups = list(groups)
        self.params = [list(group["params"]) for group in groups]
        self.options = [_options(group) for group in groups]
        self.kinds = self._kinds()
        self.gradients = self._gradients()
        self.owners = list(states)
        tensors = list(_tensors(states))
        self.counts, self.identities = list(map(len, states.values())), list(map(id, tensors))
        self.whole = [isinstance(t, Tensor) and not is_sharded(t) for t in tensors]
        self.addresses = list(map(Tensor.data_ptr, compress(tensors, self.whole)))
        self.references = [weakref.ref(t, gone) if isinstance(t, Tensor) else t for t in tensors]

    def _kinds(self) -> list[list[Any]]:
        """What decides how parameters are stepped, a list a property: no object is made for each parameter."""
        return [list(map(read, chain.from_iterable(self.params))) for read in _PROPERTIES]

    def _gradients(self) -> list[list[Any]]:
        """Dtypes and layouts of the gradients."""
        gradients = [p.grad for p in chain.from_iterable(self.params)]
        return [[g if g is None else read(g) for g in gradients] for read in _OF_GRADIENTS]

    def gradients_hold(self) -> bool:
        return self._gradients() == self.gradients

    def hold(self, groups: list[dict[str, Any]], states: dict[Tensor, State]) -> bool:
        """Whether groups, parameters and states are of the same kind and in the same place as before."""
        return (
            _same(groups, self.groups)
            and all(_same(group["params"], params) for group, params in zip(groups, self.params, strict=True))
            and [_options(group) for group in groups] == self.options
            and self._kinds() == self.kinds
            and _same(states, self.owners)
            and list(map(len, states.values())) == self.counts
            and list(map(id, tensors := list(_tensors(states)))) == self.identities
            and list(map(Tensor.data_ptr, compress(tensors, self.whole))) == self.addresses
        )


def _same(now: Iterable[Any], before: Sequence[Any]) -> bool:
    """Whether the objects are the same ones, in the same order."""
    now = list(now)
    return len(now) == len(before) and all(map(is_, now, before))


def _tensors(states: dict[Tensor, State]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, states.values()))


def _options(group: dict[str, Any]) -> tuple[Any, ...]:
    return group["kind"], group["capturable"], *map(group.get, ("first_moment_dtype", "algebra_dtype", *LAYOUT_KEYS))
