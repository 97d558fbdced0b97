"""The transformations: hyperparameters, the state of all factors, and an update of all ranks.

The step is that of :class:`lora_rite.LoRARite` (its docstring has the equations); :mod:`lora_rite.optax.update` has it
for the factors of one rank.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..errors import LoRARiteTypeError, LoRARiteValueError
from ..options import KNOWN_LATER
from ..options import check as check_options
from .algebra import trace
from .layouts import LAYOUTS, Layout, factors_by_rank
from .phases import FactorState, gather, zero_state
from .update import by_factor, is_finite, measure, move, new_state, precondition, rebase, scaling


class LoRARiteState(NamedTuple):
    """State of :func:`lora_rite`: arrays only.

    Memory in float32, a pair of A (r, n) and B (m, r): 4(m+n)(2r+1) + 40r² bytes, about that of AdamW. Half of it are
    the factors of the last update, in their own dtype (bfloat16: 2(m+n)r bytes less).

    count, skipped  () int32: updates that were applied; that were all zero for a NaN or Inf
    previous        the parameters of the last update that was applied; zero before the first one
    first_moment    M, of the parameters' shapes
    row_moment      of the parameters' shapes, 1 on the axis of the rank
    factors         r×r matrices and scalars by rank ("rank_…")
    """

    count: jax.Array  # type: ignore[reportIncompatibleMethodOverride]
    skipped: jax.Array
    previous: optax.Params
    first_moment: optax.Params
    row_moment: optax.Params
    factors: dict[str, FactorState]


def _auto(function: Callable[..., Any], outputs: Any, *arguments: Any) -> Any:
    """``function(*arguments)``, whose result is sharded as ``outputs`` are. Where their mesh has explicit axes
    (jax.make_mesh), the compiler shards what is computed in between, as it does where they are Auto."""
    types = jax.tree.map(jax.typeof, outputs)
    mesh = next((x.sharding.mesh for x in jax.tree.leaves(types) if x.sharding.mesh.explicit_axes), None)
    if mesh is None:
        return function(*arguments)
    placed = jax.tree.map(lambda x: jax.sharding.NamedSharding(mesh, x.sharding.spec), types)
    return jax.sharding.auto_axes(function, out_sharding=placed)(*arguments)


def _new_state(params: optax.Params, layouts: Sequence[Layout]) -> LoRARiteState:
    leaves = jax.tree.leaves(params)
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(*leaves)) if leaves else jnp.float32
    small, rows = {}, list(leaves)
    for key, factors in factors_by_rank(params, layouts).items():
        small[key] = zero_state(factors, leaves[factors[0].leaf].shape[factors[0].axis], dtype)
        for f in factors:
            x = leaves[f.leaf]
            if not isinstance(x, jax.Array):  # a shape
                x = jnp.zeros_like(x)
            rows[f.leaf] = jnp.zeros_like(x.max(f.axis, keepdims=True), dtype)  # sharded as the rows
    # Each array is one of its own: a caller may donate the state, and a buffer can be donated once.
    return LoRARiteState(
        count=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        previous=jax.tree.map(jnp.zeros_like, params),
        first_moment=jax.tree.map(lambda x: jnp.zeros_like(x, dtype), params),
        row_moment=jax.tree.unflatten(jax.tree.structure(params), rows),
        factors=small,
    )


def _updated(
    learning_rate: Any,
    options: dict[str, Any],
    layouts: Sequence[Layout],
    updates: optax.Updates,
    state: LoRARiteState,
    params: optax.Params,
) -> tuple[optax.Updates, LoRARiteState]:
    """The update and the new state; zero and the old one where anything is not finite."""
    structure = jax.tree.structure(params)
    trees = {"params": params, "gradients": updates} | {
        key: getattr(state, key) for key in ("previous", "first_moment", "row_moment")
    }
    leaves = {key: structure.flatten_up_to(tree) for key, tree in trees.items()}
    lr: Any = -1.0
    if learning_rate is not None:
        lr = learning_rate(state.count + state.skipped) if callable(learning_rate) else learning_rate
    key = None if learning_rate is None else jax.random.fold_in(jax.random.key(0), state.count)
    batches = {
        rank: gather(factors, leaves, state.factors[rank], options)
        for rank, factors in factors_by_rank(params, layouts).items()
    }
    rebased = {rank: rebase(batch, state.count == 0) for rank, batch in batches.items()}
    measured = {rank: measure(batch, rebased[rank], lr) for rank, batch in batches.items()}
    norm = jnp.sqrt(sum(trace(m.squares).sum() / scaling(batches[rank]) ** 2 for rank, m in measured.items()))
    new = {key: list(leaves[key]) for key in ("gradients", "first_moment", "row_moment")}
    finite, factor_states = [], {}
    for rank, batch in batches.items():
        conditioned = precondition(batch, rebased[rank], measured[rank], norm)
        updated = move(batch, rebased[rank], measured[rank], conditioned, lr, key)
        for f, values in by_factor(batch, updated):
            for tree, value in zip(new.values(), values, strict=True):
                tree[f.leaf] = value
        finite.append(is_finite(batch, measured[rank], conditioned, updated))
        factor_states[rank] = new_state(batch, rebased[rank], conditioned, updated)
    applied = jnp.stack(finite).all()
    moves, first_moment, row_moment = (structure.unflatten(tree) for tree in new.values())
    keep = lambda new, old: jax.tree.map(partial(jnp.where, applied), new, old)
    return jax.tree.map(lambda u, x: jnp.where(applied, u, 0).astype(x.dtype), moves, params), LoRARiteState(
        count=state.count + applied,
        skipped=state.skipped + ~applied,
        previous=keep(params, state.previous),
        first_moment=keep(first_moment, state.first_moment),
        row_moment=keep(row_moment, state.row_moment),
        factors=keep(factor_states, state.factors),
    )


def _transformation(learning_rate: Any, layouts: Sequence[Layout], **options: Any) -> Any:
    """Both transformations. ``learning_rate`` None: the update is M·Dᵀ itself."""
    layouts = tuple(layouts)
    _check(learning_rate, layouts, options)
    hyperparameters, form = jax.tree.flatten((learning_rate, options))

    def updated(arrays: dict[int, jax.Array], *of_step: Any) -> tuple[optax.Updates, LoRARiteState]:
        learning_rate, options = form.unflatten(arrays.get(i, x) for i, x in enumerate(hyperparameters))
        return _updated(learning_rate, options, layouts, *of_step)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, LoRARiteState]:
        del extra_args
        if params is None:
            raise LoRARiteValueError("LoRA-RITE needs the parameters: call update(gradients, state, params)")
        arrays = {i: x for i, x in enumerate(hyperparameters) if isinstance(x, jax.Array)}
        return _auto(updated, (params, state), arrays, updates, state, params)

    return optax.GradientTransformationExtraArgs(partial(_new_state, layouts=layouts), update)


def _check(learning_rate: Any, layouts: tuple[Layout, ...], options: dict[str, Any]) -> None:
    """LoRARiteValueError for hyperparameters out of range; the values of jax's arrays are not looked at."""
    schedule = learning_rate is None or callable(learning_rate)
    check_options({**({} if schedule else {"learning_rate": learning_rate}), **options}, _number)
    for layout in layouts:
        if not isinstance(layout, Layout):
            raise LoRARiteTypeError(f"layouts must be Layouts, got {layout!r}")


def _number(name: str, value: Any) -> Any:
    if getattr(value, "ndim", 0):
        raise LoRARiteValueError(f"{name} must be a number, got an array of shape {value.shape}")
    if isinstance(value, jax.Array):
        return KNOWN_LATER
    return value.item() if isinstance(value, np.ndarray) else value


def scale_by_lora_rite(
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    *,
    row_equilibration: bool = True,
    row_beta: float = 0.99,
    relative_eps: float = 1e-3,
    clip_unmagnified_grad: float = 1.0,
    update_skipping: float = 0.0,
    update_capping: float = 0.0,
    apply_escape: bool = False,
    layouts: Sequence[Layout] = LAYOUTS,
) -> optax.GradientTransformationExtraArgs:
    """The preconditioned direction M·Dᵀ of LoRA-RITE, without a learning rate: the published step and, if wanted, our
    row equilibration. ``update`` needs ``params``.

    A transformation that does not know the learning rate cannot damp (δ is in units of what a step writes into W), so
    use :func:`lora_rite` unless you have a reason, above all where a factor starts at zero. With the learning rate lr
    and weight decay w,

    >>> optax.chain(scale_by_lora_rite(), optax.add_decayed_weights(w), optax.scale_by_learning_rate(lr))

    computes ``lora_rite(lr, weight_decay=w, damping=0.0)``. What follows in a chain may scale a factor's update by a
    number; how much it did is measured at the next update.

    Args: as those of :func:`lora_rite`.
    """
    options = locals()
    absent = {"weight_decay": 0.0, "damping": 0.0, "balance_param": False, "maximize": False, "scaling": None}
    return _transformation(learning_rate=None, scaled_later=True, **options, **absent)


def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    damping: float = 20.0,
    row_equilibration: bool = True,
    row_beta: float = 0.99,
    relative_eps: float = 1e-3,
    clip_unmagnified_grad: float = 1.0,
    update_skipping: float = 0.0,
    update_capping: float = 0.0,
    apply_escape: bool = False,
    balance_param: bool = False,
    maximize: bool = False,
    scaling: float | None = None,
    layouts: Sequence[Layout] = LAYOUTS,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-RITE, to be used as any optimizer of optax; ``update`` needs ``params``. Put it last in a chain, and no
    ``clip_by_global_norm`` before it: it clips by itself, and raw gradients depend on the factorisation.

    The tree of parameters has factors only (``nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)``); where other leaves are
    trained too:

    >>> optax.partition({"lora": lora_rite(5e-4), "other": optax.adamw(2e-4)}, labels)

    Keywords, defaults and equations are those of :class:`lora_rite.LoRARite`. The differences: an update with NaN or
    Inf in any gradient (or in a parameter, or in lr) is zero for all pairs and leaves the state as it was, and
    ``state.skipped`` goes up, but nothing warns or raises; factors that were changed from outside keep their moments,
    carried over; a pair of which one factor is frozen (masked out) is an error; and the noise of the stochastic
    rounding is another one. What is as there: with bfloat16 and float16 factors the arithmetic and the state are
    float32, and ``params + update`` is rounded stochastically; of several pairs in one parameter (experts), those
    without a gradient stay as they are.

    Args:
        learning_rate: the learning rate, a number or a schedule (of the number of updates, skipped ones too). 5e-4 is
            the default of LoRARite; start from the one that suits AdamW on the same adapter and try up to five times
            that.
        betas: decays of the first and the second moment. A second of 1 (a number, not an array) sums V over all steps,
            as Adagrad does.
        eps: added to the root of the eigenvalues of V.
        weight_decay: decoupled, on both factors.
        damping: how many steps' worth of W must lie along a direction of B·A before the factor opposite to the zero one
            follows it. 0 is the published step.
        row_equilibration: divide each row of the preconditioned gradient by its running root mean square, to which a
            hundredth of that of all rows is added, so that rows of rounding noise do not become as large as the others.
        row_beta: decay of that mean square.
        relative_eps: eps in units of √λ_max(V): makes the step independent of the gradient's scale.
        clip_unmagnified_grad: largest norm of the unmagnified gradients of all pairs together; 0 is off.
        update_skipping: drop a factor's gradient in this step where its unmagnified root mean square exceeds this; 0 is
            off.
        update_capping: largest root mean square of M in the update; 0 is off.
        apply_escape: add the mass of V that the new basis does not see (ρ of Algorithm 1) to its eigenvalues.
        balance_param: rescale both factors to equal Frobenius norms after each step.
        maximize: ascend instead of descend.
        scaling: what the model multiplies B·A by (alpha/r; rsLoRA: alpha/√r). lr, clipping and eps are then those of W,
            lr at rank 16: one value suits every alpha and, nearly, every rank. None: they are those of B·A as it is.
            Of one value for all pairs; where they differ, ``optax.partition``.
        layouts: where the factors are and which axis is the rank, see :class:`Layout`.

    All numbers may be arrays; those of jax (under :func:`optax.inject_hyperparams`, say) change without recompilation.

    Raises:
        LoRARiteValueError, LoRARiteTypeError: hyperparameters out of range; from ``init`` and ``update``, leaves that
            do not form pairs.
    """
    options = locals()
    return _transformation(**options, scaled_later=False)
