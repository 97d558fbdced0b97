"""The values that an update hands from phase to phase (see :mod:`lora_rite.optax.update`), all frozen.

Shapes: factors of one rank r are computed together, f of them (A's and then B's; a scanned layer counts once for each
of its slices). r×r matrices are (f, r, r) in the *algebra* dtype: float64 with ``jax_enable_x64``, else float32;
numbers of a factor are (f, 1, 1). Tall factors are (slices, rows, r) in the *work* dtype, that of the state: float64
where a factor is float64, else float32. They are in chunks of one shape, which are multiplied together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .algebra import NOISE, Orthonormalised, frobenius_norm
from .layouts import Factor


class FactorState(NamedTuple):
    """State of the factors of one rank, A's and then B's: (f, r, r), or (f,) in the work dtype.

    Everything is of the factor as it was in the last update, but ``second_moment``, ``escaped_mass``: those are in the
    basis of the other factor.
    """

    second_moment: jax.Array
    escaped_mass: jax.Array  # (f,)
    basis: jax.Array
    root: jax.Array
    warm_basis: jax.Array
    step: jax.Array  # the update was M·step
    moment_norm: jax.Array  # (f,) ‖M‖
    update_norm: jax.Array  # (f,) that of the update
    count: jax.Array  # type: ignore[reportIncompatibleMethodOverride]  # (f,) int32: updates that moved it
    damped: jax.Array  # (f,) bool: T⁺ of this factor is damped: of the one that was zero at first, else of B


@dataclass(frozen=True)
class Batch:
    """What an update begins with.

    options      the hyperparameters but the learning rate, numbers or arrays
    chunks       the factors, those of one shape together
    x, x_old     the factors, and as they were in the last update; by chunk
    gradients    by chunk, as ``moments`` M and ``row_moments`` (slices, rows, 1)
    num_rows     of each factor
    slices       pairs in the parameter that the factor is of
    rounding     relative error with which the factor is known
    state        in the algebra dtype, numbers as (f, 1, 1)
    """

    options: dict[str, Any]
    chunks: list[list[Factor]]
    x: list[jax.Array]
    x_old: list[jax.Array]
    moments: list[jax.Array]
    row_moments: list[jax.Array]
    gradients: list[jax.Array]
    num_rows: jax.Array
    slices: jax.Array
    rounding: jax.Array
    state: FactorState

    @property
    def dtype(self) -> jnp.dtype:
        """The work dtype."""
        return self.x[0].dtype

    @property
    def algebra(self) -> jnp.dtype:
        return self.num_rows.dtype

    def each(self, function: Callable[..., Any], *arrays: Any) -> list[Any]:
        """``function`` of each chunk's parts of the arguments: lists by chunk, or (f, …)."""
        results, begin = [], 0
        for i, x in enumerate(self.x):
            run = slice(begin, begin := begin + x.shape[0])
            results.append(function(*(a[i] if isinstance(a, list) else a[run].astype(self.dtype) for a in arrays)))
        return results

    def join(self, parts: Sequence[jax.Array]) -> jax.Array:
        """(f, …) in the algebra dtype from results by chunk."""
        return jnp.concatenate(parts).astype(self.algebra)

    def norms(self, tall: list[jax.Array]) -> jax.Array:
        return self.join([frobenius_norm(x) for x in tall])

    def rounded(self, m: jax.Array) -> jax.Array:
        """As the state will keep it: what is measured must be in the same basis."""
        return m.astype(self.dtype).astype(self.algebra)


@dataclass(frozen=True)
class Rebased:
    """The bases of the factors as they are, and what was carried over into them.

    warm           K_w
    basis          of each factor
    damped         (f, 1, 1) bool, whether T⁺ of this factor is damped
    transport      P, from the last update's basis of the other factor into the present one
    second_moment  V of the last update in the present basis
    escaped_mass   ρ
    """

    warm: jax.Array
    basis: Orthonormalised
    damped: jax.Array
    transport: jax.Array
    second_moment: jax.Array
    escaped_mass: jax.Array


@dataclass(frozen=True)
class Unmagnified:
    """unmagnifier  D of each factor: ḡ = g·D, and the step is M·Dᵀ
    squares      ḡᵀ·ḡ
    kept         (f, 1, 1) bool, False where ``update_skipping`` drops the gradient
    """

    unmagnifier: jax.Array
    squares: jax.Array
    kept: jax.Array


@dataclass(frozen=True)
class Conditioned:
    """moving          (f, 1, 1) bool: False for pairs of a parameter with several that have no gradient
    decays          of the first, the second and the rows' moment, bias-corrected
    second_moment   V of this update
    escaped_mass    ρ of this update
    preconditioner  g to S: D·(V^½ + eps)⁻¹, with the scale of the clip and the sign of ``maximize``
    """

    moving: jax.Array
    decays: list[jax.Array]
    second_moment: jax.Array
    escaped_mass: jax.Array
    preconditioner: jax.Array


@dataclass(frozen=True)
class Updated:
    """updates, moments, row_moments  by chunk
    step                           the update is M·``step``, weight decay aside
    root                           T·K_w, rescaled as the factor
    moment_norm, update_norm       Frobenius norms of each factor
    """

    updates: list[jax.Array]
    moments: list[jax.Array]
    row_moments: list[jax.Array]
    step: jax.Array
    root: jax.Array
    moment_norm: jax.Array
    update_norm: jax.Array


def gather(factors: list[Factor], leaves: dict[str, list[jax.Array]], state: FactorState, options: dict) -> Batch:
    """The factors of one rank from the leaves of the trees ``params``, ``previous``, ``gradients``, …"""
    dtype = state.second_moment.dtype
    algebra = jnp.promote_types(dtype, jnp.result_type(float))
    half, alike = len(factors) // 2, lambda f: (f.rows, f.dtype)
    chunks = [list(run) for side in (factors[:half], factors[half:]) for _, run in groupby(side, alike)]

    def tall(key: str) -> list[jax.Array]:
        return [jnp.concatenate([f.tall(leaves[key][f.leaf]) for f in chunk]).astype(dtype) for chunk in chunks]

    def column(value: Callable[[Factor], float]) -> jax.Array:
        values = [value(f) for chunk in chunks for f in chunk for _ in range(f.slices)]
        return jnp.array(values, algebra)[:, None, None]

    full = lambda m: m.astype(algebra) if jnp.issubdtype(m.dtype, jnp.floating) else m
    floor = float(jnp.finfo(dtype).eps) ** NOISE
    return Batch(
        options=options,
        chunks=chunks,
        x=tall("params"),
        x_old=tall("previous"),
        moments=tall("first_moment"),
        row_moments=tall("row_moment"),
        gradients=tall("gradients"),
        num_rows=column(lambda f: f.rows),
        slices=column(lambda f: f.slices),
        # (of bfloat16 without the margin: a quarter of the factor is no noise)
        rounding=column(lambda f: max(floor, float(jnp.finfo(f.dtype).eps))),
        state=FactorState(*(full(m if m.ndim == 3 else m[:, None, None]) for m in state)),
    )


def zero_state(factors: list[Factor], rank: int, dtype: jnp.dtype) -> FactorState:
    f = sum(factor.slices for factor in factors)
    matrices = {"second_moment", "basis", "root", "warm_basis", "step"}
    shapes = {key: (f, rank, rank) if key in matrices else (f,) for key in FactorState._fields}
    dtypes = {"count": jnp.int32, "damped": bool}
    return FactorState(**{key: jnp.zeros(shape, dtypes.get(key, dtype)) for key, shape in shapes.items()})
