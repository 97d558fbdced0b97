"""Where the factors are in a tree of parameters, and which of them belong together."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..errors import LoRARiteTypeError, LoRARiteValueError


class Layout(NamedTuple):
    """Where the factors of a product are in the tree of parameters, and which of their axes is the rank.

    a, b           how the paths of A and B end (``"lora_a"``, or ``"lora/a"`` over two levels), or what stands there
                   before further levels; the rest of the two paths is the same
    a_rank, b_rank the axis of the rank, after the batch axes or from the end; all other axes are rows of the factor
    batch_axes     number of leading axes that hold independent pairs, as those of scanned layers; None: all but two
    """

    a: str
    b: str
    a_rank: int
    b_rank: int
    batch_axes: int | None = None


#: ``flax.nnx.LoRA``: lora_a (…, in, r) and lora_b (…, r, out).
NNX = Layout("lora_a", "lora_b", -1, -2)
#: PEFT's layout: lora_A (…, r, in) and lora_B (…, out, r).
PEFT = Layout("lora_A", "lora_B", -2, -1)
#: What is looked for unless ``layouts`` says otherwise. The first that fits a path is taken.
LAYOUTS = (NNX, PEFT, Layout("lora_embedding_A", "lora_embedding_B", -2, -1))


class Factor(NamedTuple):
    """A factor's place among the leaves of the tree, and how it becomes tall."""

    leaf: int
    axis: int  # of the rank
    batch: tuple[int, ...]
    others: tuple[int, ...]  # the shape of the rows
    dtype: jnp.dtype

    @property
    def slices(self) -> int:
        return math.prod(self.batch)

    @property
    def rows(self) -> int:
        return math.prod(self.others)

    def tall(self, x: jax.Array) -> jax.Array:
        """(slices, rows, r), or (slices, rows, 1) of a row moment."""
        return jnp.moveaxis(x, self.axis, -1).reshape(self.slices, self.rows, x.shape[self.axis])

    def flat(self, x: jax.Array) -> jax.Array:
        """From (slices, rows, …) to the factor's own shape."""
        return jnp.moveaxis(x.reshape(*self.batch, *self.others, x.shape[-1]), -1, self.axis)


def name_of(path: tuple[Any, ...]) -> str:
    """ "layers/0/lora_a". The ``.value`` of flax's variables is left out: it comes and goes."""
    if path and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def match(name: str, layouts: Sequence[Layout]) -> tuple[Layout, bool, str] | None:
    """The layout of a factor, whether it is A, and the name of the other one; None where it is none, as its bias."""
    if name.endswith("/bias"):
        return None
    for layout in layouts:
        for own, other in ((layout.a, layout.b), (layout.b, layout.a)):
            if found := re.fullmatch(rf"(|.*[^A-Za-z0-9]){re.escape(own)}(|/.*)", name):
                return layout, own == layout.a, found[1] + other + found[2]
    return None


def labels(params: optax.Params, layouts: Sequence[Layout] = LAYOUTS) -> Any:
    """The tree of ``params`` with "lora" for factors and "other" for the rest: for :func:`optax.partition`.

    >>> optax.partition({"lora": lora_rite(5e-4), "other": optax.adamw(2e-4)}, labels)
    """
    return jax.tree_util.tree_map_with_path(lambda p, _: "lora" if match(name_of(p), layouts) else "other", params)


def factors_by_rank(params: optax.Params, layouts: Sequence[Layout]) -> dict[str, list[Factor]]:
    """Factors by rank, under "rank_…": those of A first, then those of B in the same order; equal shapes side by side.

    Raises:
        LoRARiteValueError: a leaf that is no factor or has no partner, or two that cannot be multiplied.
    """
    leaves = {name_of(path): (i, x) for i, (path, x) in enumerate(jax.tree_util.tree_flatten_with_path(params)[0])}
    found: dict[str, list[tuple[Factor, Factor]]] = {}
    for name, (_, x) in leaves.items():
        matched = match(name, layouts)
        if matched is None:
            raise LoRARiteValueError(
                f"{name} {x.shape} is not a LoRA factor: give it to another transformation (optax.partition with "
                "lora_rite.optax.labels), or name the factors by layouts=…"
            )
        layout, is_a, partner = matched
        if partner not in leaves:
            raise LoRARiteValueError(f"unpaired factor {name}: there is no {partner}. Pass both factors, or neither")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise LoRARiteTypeError(f"{name} is of {x.dtype}: only real floating-point parameters can be trained")
        if is_a:
            a = _factor(*leaves[name], name, layout.a_rank, layout.batch_axes)
            b = _factor(*leaves[partner], partner, layout.b_rank, layout.batch_axes)
            shape, other = x.shape, leaves[partner][1].shape
            if shape[a.axis] != other[b.axis] or a.batch != b.batch:
                raise LoRARiteValueError(
                    f"rank mismatch {shape[a.axis]} vs {other[b.axis]}: {name} has shape {shape}, {partner} {other}, "
                    f"with the ranks on axes {a.axis} and {b.axis}; other layouts are told by layouts=…"
                )
            found.setdefault(f"rank_{shape[a.axis]}", []).append((a, b))
    if not found:
        raise LoRARiteValueError("no LoRA pairs among the parameters: attach an adapter first, or give layouts=…")
    for pairs in found.values():
        pairs.sort(key=lambda pair: [(f.rows, str(f.dtype)) for f in pair])
    return {rank: [pair[side] for side in (0, 1) for pair in pairs] for rank, pairs in sorted(found.items())}


def _factor(leaf: int, x: jax.Array, name: str, rank_axis: int, batch_axes: int | None) -> Factor:
    batch = max(x.ndim - 2, 0) if batch_axes is None else batch_axes
    own = x.shape[batch:]
    if len(own) < 2 or x.size == 0 or not -len(own) <= rank_axis < len(own):
        raise LoRARiteValueError(
            f"{name} has shape {x.shape}; a factor is a non-empty matrix, or a stack of them, with the rank on axis "
            f"{rank_axis}"
        )
    axis = rank_axis % len(own)
    return Factor(leaf, batch + axis, x.shape[:batch], own[:axis] + own[axis + 1 :], x.dtype)
