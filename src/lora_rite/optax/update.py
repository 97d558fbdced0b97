"""The update of the factors of one rank, in phases from values to values: ``gather`` → :class:`Batch` → ``rebase`` →
:class:`Rebased` → ``measure`` → :class:`Unmagnified` → ``precondition`` → :class:`Conditioned` → ``move`` →
:class:`Updated`.

The phases are those of ``lora_rite/execute``: a tall factor X = Q·T is handled through r×r matrices, K with Q = X·K.
One thing differs. A transformation never sees the parameters that its update leads to, so the new basis is measured at
the start of the next update, from ``params`` and from the factors of the last one, which the state keeps. Whatever
moved them meanwhile (a later scale, a schedule, an average, another factorisation), both moments are carried over to
where they are.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp

from ..options import lr_scale, product_scale
from .algebra import (
    bias_corrected_decay,
    damped_inverse,
    eigh,
    gram,
    is_exactly,
    orthonormalise,
    row_scales,
    stochastic_round,
    times,
    trace,
    warm_basis,
)
from .layouts import Factor
from .phases import Batch, Conditioned, FactorState, Rebased, Unmagnified, Updated


def scaling(batch: Batch) -> Any:
    """What the model multiplies B·A by, where that is given; else 1."""
    return product_scale(batch.options["scaling"])


def _lr_of_product(batch: Batch, lr: Any) -> Any:
    return lr * lr_scale(batch.options["scaling"], batch.state.basis.shape[-1])


def _partners(m: jax.Array) -> jax.Array:
    """Of each factor, what belongs to the other one of its pair."""
    return jnp.roll(m, m.shape[0] // 2, 0)


def rebase(batch: Batch, first: jax.Array) -> Rebased:
    """Measures the bases of the factors as they are, and carries V over from the old ones."""
    old = batch.state
    step = old.step
    if batch.options["scaled_later"]:
        moved = batch.norms([x - x_old for x, x_old in zip(batch.x, batch.x_old, strict=True)])
        step = step * jnp.where(old.update_norm > 0, moved / jnp.where(old.update_norm > 0, old.update_norm, 1), 0)
    noise = batch.rounding * batch.norms(batch.x_old)
    warm = batch.rounded(warm_basis(old.warm_basis, old.root, step, old.moment_norm, noise))
    grams = _grams(batch, warm)
    known = jnp.all(trace(grams[0]) <= 2 * warm.shape[-1]) & ~first  # by the triangle inequality no more than 1.5r
    warm, (gram_z, cross) = jax.lax.cond(known, lambda: (warm, grams), lambda: _anew(batch))
    basis = orthonormalise(warm, gram_z, batch.num_rows)
    # a factor that starts at zero is damped; B where both or none do
    zero = batch.join([jnp.all(x == 0, (-2, -1), keepdims=True) for x in batch.x]) > 0
    half = zero.shape[0] // 2
    damps_a = zero[:half] & ~zero[half:]
    damped = jnp.where(first, jnp.concatenate([damps_a, ~damps_a]), old.damped)
    transport = _partners(times(gram(basis.c, cross), old.basis))
    second_moment = times(times(transport, old.second_moment), transport.mT)
    escaped_mass = old.escaped_mass
    if batch.options["apply_escape"]:
        lost = jnp.max(eigh(old.second_moment)[0] - eigh(second_moment)[0], -1)[..., None, None]
        lost = jnp.minimum(lost, trace(old.second_moment - second_moment))
        escaped_mass = escaped_mass + jnp.maximum(lost, 0)
    return Rebased(warm, basis, damped, transport, second_moment, escaped_mass)


def _anew(batch: Batch) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """K_w (and what is measured in it) of factors that the state knows nothing of: scaled to 1, then made orthonormal
    three times, each of which makes the Gram matrix better conditioned (algebra.basis.initial_basis)."""
    scale = batch.join([jnp.max(jnp.abs(x), (-2, -1), keepdims=True) for x in batch.x])
    warm = jnp.eye(batch.state.basis.shape[-1], dtype=batch.algebra) / jnp.where(scale == 0, 1, scale)
    noise, none = batch.rounding * batch.norms(batch.x), jnp.zeros_like(warm)
    for _ in range(3):
        w, u = eigh(_grams(batch, warm)[0])
        s = jnp.sqrt(jnp.maximum(w, w[..., -1:] * (10 * jnp.finfo(batch.dtype).eps)))
        warm = batch.rounded(warm_basis(warm, s[..., None] * u.mT, none, noise, noise))
    return warm, _grams(batch, warm)


def _grams(batch: Batch, warm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """zᵀz and zᵀ·X_old of z = X·K_w."""
    z = batch.each(times, batch.x, warm)
    cross = [gram(*pair) for pair in zip(z, batch.x_old, strict=True)]
    return batch.join([gram(x, x) for x in z]), batch.join(cross)


def measure(batch: Batch, rebased: Rebased, lr: Any) -> Unmagnified:
    """Unmagnified gradients ḡ = g·D."""
    damping, skipping = batch.options["damping"], batch.options["update_skipping"]
    skipping = skipping if is_exactly(skipping, 0) else skipping * scaling(batch)
    num_rows, basis = batch.num_rows, rebased.basis
    unmagnifier = _partners(basis.basis)
    if not is_exactly(damping, 0):
        t, half = basis.coordinates, num_rows.shape[0] // 2
        damps_a = rebased.damped[:half]
        delta = damping * _lr_of_product(batch, lr) * jnp.sqrt(jnp.where(damps_a, num_rows[:half], num_rows[half:]))
        y, x = jnp.where(damps_a, t[:half], t[half:]), jnp.where(damps_a, t[half:], t[:half])
        damped = jnp.tile(times(x.mT, damped_inverse(times(y, x.mT), delta)), (2, 1, 1))
        unmagnifier = jnp.where(_partners(rebased.damped) & (damping > 0), damped, unmagnifier)
    squares = batch.join([gram(g, g) for g in batch.each(times, batch.gradients, unmagnifier)])
    kept = jnp.ones_like(num_rows, bool)
    if not is_exactly(skipping, 0):
        mean_square = trace(squares) / (num_rows * squares.shape[-1])
        kept = ~((mean_square > skipping**2) & (skipping > 0))
        squares = squares * kept  # (what is infinite becomes NaN)
    return Unmagnified(unmagnifier, squares, kept)


def precondition(batch: Batch, rebased: Rebased, measured: Unmagnified, norm: jax.Array) -> Conditioned:
    """V and g → S, for ``norm`` of the unmagnified gradients of all ranks. Of several pairs in one parameter (experts),
    those without any gradient are passed over: M and V are only carried over."""
    options, clip = batch.options, batch.options["clip_unmagnified_grad"]
    seen = trace(measured.squares) != 0  # NaN too
    moving = seen | _partners(seen) | (batch.slices == 1)
    step = (batch.state.count + 1).astype(batch.algebra)
    betas = (*options["betas"], options["row_beta"])
    decays = [jnp.where(moving, bias_corrected_decay(step, beta), 1) for beta in betas]
    scale = 1.0 if is_exactly(clip, 0) else jnp.where((clip > 0) & (norm > clip), clip / norm, 1)
    squares = measured.squares * scale**2 / batch.num_rows
    fresh = 1 if is_exactly(options["betas"][1], 1) else 1 - decays[1]
    second_moment = decays[1] * rebased.second_moment + fresh * squares
    escaped_mass = decays[1] * rebased.escaped_mass
    w, u = eigh(second_moment)
    root = jnp.sqrt(jnp.maximum(w, 0) + escaped_mass[..., 0])
    inverse_root = 1 / (root + options["eps"] * scaling(batch) + options["relative_eps"] * root[..., -1:])
    whitener = times(u * inverse_root[..., None, :], u.mT)
    sign = -1.0 if options["maximize"] else 1.0
    preconditioner = times(measured.unmagnifier, whitener) * (measured.kept * scale * sign)
    return Conditioned(moving, decays, second_moment, escaped_mass, preconditioner)


def move(
    batch: Batch, rebased: Rebased, measured: Unmagnified, conditioned: Conditioned, lr: Any, key: jax.Array | None
) -> Updated:
    """The update and the moments. ``lr`` is −1 for scale_by_lora_rite, ``key`` that of the rounding to low precision,
    if there is any."""
    options, x = batch.options, batch.x
    decay, _, row_decay = conditioned.decays
    lr = jnp.where(conditioned.moving, lr, 0)
    step = _lr_of_product(batch, lr) * measured.unmagnifier.mT

    def momentum(g: jax.Array, m: jax.Array, rows: jax.Array, preconditioner: jax.Array, transport: jax.Array,
                 rest: jax.Array, row_decay: jax.Array) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """M ← M·(β₁ₜPᵀ) + (1 − β₁ₜ)·S, rows of S equilibrated, and the row moment."""
        s = times(g, preconditioner)
        if options["row_equilibration"]:
            squares = jnp.mean(s * s, -1, keepdims=True)
            rows = row_decay * rows + (1 - row_decay) * squares
            rest = row_scales(squares, rows, rest)
        return times(m, transport) + rest * s, rows

    results = batch.each(
        momentum, batch.gradients, batch.moments, batch.row_moments, conditioned.preconditioner,
        decay * rebased.transport.mT, 1 - decay, row_decay,
    )  # fmt: skip
    moments, row_moments = [m for m, _ in results], [row for _, row in results]
    moment_norm, cap = batch.norms(moments), options["update_capping"]
    if not is_exactly(cap, 0):
        rms = moment_norm / jnp.sqrt(batch.num_rows * step.shape[-1])
        step = step / jnp.where(cap > 0, jnp.maximum(rms / jnp.where(cap > 0, cap, 1), 1), 1)
    shrink = lr * options["weight_decay"]
    updates = batch.each(lambda m, x, step, s: -times(m, step) - s * x, moments, x, step, shrink)
    ratio = _balance(batch, updates, lr) if options["balance_param"] else jnp.ones_like(batch.num_rows)
    step, root = step * ratio, rebased.basis.root * ratio
    if options["balance_param"]:
        updates = batch.each(lambda x, u, ratio: ratio * (x + u) - x, x, updates, ratio)
    if key is not None:
        updates = _rounded(batch, updates, key)
    return Updated(updates, moments, row_moments, step, root, moment_norm, batch.norms(updates))


def _balance(batch: Batch, updates: list[jax.Array], lr: Any) -> jax.Array:
    """(f, 1, 1) factors that give both factors of a pair one norm; 1 where one is zero or lr is 0."""
    norms = batch.norms([x + u for x, u in zip(batch.x, updates, strict=True)])
    others = _partners(norms)
    ratio = jnp.sqrt((others + 1e-6) / (norms + 1e-6))  # 1e-6 as in the authors' code
    return jnp.where((norms > 0) & (others > 0) & (lr != 0), ratio, 1)


def _rounded(batch: Batch, updates: list[jax.Array], key: jax.Array) -> list[jax.Array]:
    """Updates that lead factors of low precision to values of their dtype."""
    rounded = list(updates)
    for i, (chunk, x) in enumerate(zip(batch.chunks, batch.x, strict=True)):
        if jnp.finfo(chunk[0].dtype).bits < 32:
            own = jax.random.fold_in(key, chunk[0].leaf)
            rounded[i] = stochastic_round(x + updates[i], chunk[0].dtype, own) - x
    return rounded


def by_factor(batch: Batch, updated: Updated) -> Iterator[tuple[Factor, list[jax.Array]]]:
    """The update, M and the row moment of each factor, in its shape."""
    tall = (updated.updates, updated.moments, updated.row_moments)
    for chunk, *of_chunk in zip(batch.chunks, *tall, strict=True):
        ends = list(accumulate(f.slices for f in chunk))
        for f, *parts in zip(chunk, *(jnp.split(x, ends[:-1]) for x in of_chunk), strict=True):
            yield f, [f.flat(part) for part in parts]


def is_finite(batch: Batch, measured: Unmagnified, conditioned: Conditioned, updated: Updated) -> jax.Array:
    """Whether everything is finite in the state's dtype; what is tall, and lr, by the norms."""
    matrices = [conditioned.second_moment, conditioned.preconditioner, measured.unmagnifier]
    norms = jnp.stack([updated.moment_norm, updated.update_norm]).astype(batch.dtype)
    return jnp.isfinite(jnp.stack(matrices).astype(batch.dtype)).all() & jnp.isfinite(norms).all()


def new_state(batch: Batch, rebased: Rebased, conditioned: Conditioned, updated: Updated) -> FactorState:
    matrix, scalar = lambda m: m.astype(batch.dtype), lambda m: m[:, 0, 0].astype(batch.dtype)
    return FactorState(
        second_moment=matrix(conditioned.second_moment),
        escaped_mass=scalar(conditioned.escaped_mass),
        basis=matrix(rebased.basis.basis),
        root=matrix(updated.root),
        warm_basis=matrix(rebased.warm),
        step=matrix(updated.step),
        moment_norm=scalar(updated.moment_norm),
        update_norm=scalar(updated.update_norm),
        count=(batch.state.count + conditioned.moving)[:, 0, 0],
        damped=rebased.damped[:, 0, 0],
    )
