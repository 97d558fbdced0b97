"""The mathematics of ``lora_rite/algebra`` in JAX, under the same names: functions of (f, r, r) stacks of matrices.

Products are of full precision on every device.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LIVE, NOISE, ROW_FLOOR = 1e-3, 0.75, 1e-2  # as in algebra/: which directions count as null, and which rows as noise

times = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def gram(x: jax.Array, y: jax.Array) -> jax.Array:
    return times(x.mT, y)


def trace(m: jax.Array) -> jax.Array:
    return jnp.trace(m, axis1=-2, axis2=-1)[..., None, None]


def frobenius_norm(x: jax.Array) -> jax.Array:
    """(f, 1, 1) Frobenius norms."""
    return jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True))


def finite(m: jax.Array) -> jax.Array:
    return jnp.isfinite(m).all((-2, -1), keepdims=True)


def eigh(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues (ascending) and eigenvectors; all NaN for a matrix that is not finite."""
    good = finite(m)
    values, vectors = jnp.linalg.eigh(jnp.where(good, m, jnp.eye(m.shape[-1], dtype=m.dtype)))
    return jnp.where(good[..., 0], values, jnp.nan), jnp.where(good, vectors, jnp.nan)


def is_exactly(value: Any, number: float) -> bool:
    """Whether a hyperparameter has this value for good: not where it is an array, as optax.inject_hyperparams makes of
    it."""
    return not isinstance(value, jax.Array) and value == number


def bias_corrected_decay(step: jax.Array, beta: Any) -> jax.Array:
    """β(1 − βᵗ⁻¹)/(1 − βᵗ), exact in float32 too; 1 for β = 1."""
    if is_exactly(beta, 1):
        return jnp.ones_like(step)
    log = jnp.log(jnp.maximum(beta, 1e-30)) if isinstance(beta, jax.Array) else math.log(max(beta, 1e-30))
    return beta * jnp.expm1((step - 1) * log) / jnp.expm1(step * log)


def warm_basis(warm: jax.Array, root: jax.Array, step: jax.Array, norm: jax.Array, noise: jax.Array) -> jax.Array:
    """K_w for the factor after a step X − M·``step``: neither X (``root``ᵀ·``root`` is the Gram matrix of X·K_w), nor
    the step (``norm`` = ‖M‖), nor the rounding of X (its size ``noise``) is longer than 1 in it
    (algebra.basis.warm_basis).

    By QR of the stacked parts: their Gram matrix would have the square of their condition.
    """
    parts = jnp.concatenate([root, norm * times(step, warm), noise * warm], -2) * math.sqrt(2)
    size = jnp.linalg.norm(parts, axis=-2, keepdims=True)
    size = jnp.where(size > 0, size, 1)  # columns of 1: those of a null direction may be 1/eps
    eye = jnp.broadcast_to(jnp.eye(warm.shape[-1], dtype=warm.dtype), warm.shape)
    parts = jnp.concatenate([parts / size, (10 * jnp.finfo(warm.dtype).eps) * eye], -2)
    good = finite(parts) & (frobenius_norm(parts[..., : -warm.shape[-1], :]) > 0)
    upper = jnp.linalg.qr(jnp.where(good, parts, jnp.eye(*parts.shape[-2:], dtype=warm.dtype)), mode="r")
    return jax.lax.linalg.triangular_solve(upper, warm / size, left_side=False, lower=False)


class Orthonormalised(NamedTuple):
    """``basis`` K: X·K has orthonormal columns, zero ones where X has no rank; ``coordinates`` T: X = (X·K)·T;
    ``root`` = T·K_w; ``c``: X·K = (X·K_w)·c. All (f, r, r)."""

    basis: jax.Array
    coordinates: jax.Array
    root: jax.Array
    c: jax.Array


def orthonormalise(warm: jax.Array, gram_z: jax.Array, rows: jax.Array) -> Orthonormalised:
    """The basis of X from K_w and the Gram matrix of X·K_w (algebra.basis.orthonormalise)."""
    w, u = eigh(gram_z)
    r = w.shape[-1]
    live = (w > w[..., -1:] * LIVE) & (jnp.arange(r, 0, -1) <= rows[..., 0])
    s = jnp.sqrt(jnp.where(live, w, 1))
    c = u * jnp.where(live, 1 / s, 0)[..., None, :]
    root = jnp.where(live, s, 0)[..., None] * u.mT
    t = jnp.linalg.solve(warm.mT, root.mT).mT
    basis = times(warm, c)
    deficient = lambda: jnp.where(live.all(-1)[..., None, None], basis, _pseudo_inverse(t, live))
    return Orthonormalised(jax.lax.cond(live.all(), lambda: basis, deficient), t, root, c)


def _pseudo_inverse(t: jax.Array, live: jax.Array) -> jax.Array:
    """T⁺ where the first rows of T are zero."""
    good = finite(t)
    q, root = jnp.linalg.qr(jnp.flip(jnp.where(good, t, 0), -2).mT)  # T's live rows first: Tᵀ = Q·[R 0]
    mask = jnp.flip(live, -1).astype(t.dtype)
    root = root * mask[..., None, :] + jnp.eye(t.shape[-1], dtype=t.dtype) * (1 - mask)[..., None, :]
    inverse = jax.lax.linalg.triangular_solve(
        root, q * mask[..., None, :], left_side=False, lower=False, transpose_a=True
    )
    return jnp.where(good, jnp.flip(inverse, -1), jnp.nan)


def damped_inverse(s: jax.Array, delta: jax.Array) -> jax.Array:
    """V diag(σ/(σ² + δ²)) Uᵀ of S = U diag(σ) Vᵀ, by QR of [Sᵀ; δ]; 0 where σ = 0 (algebra.step.damped_inverse).

    δ is at least 1e-6·‖S‖, so that σ that are rounding noise count for little.
    """
    good, r = finite(s), s.shape[-1]
    s = jnp.where(good, s, 0)
    floor = float(jnp.finfo(jnp.float64).eps) ** 0.375
    delta = jnp.maximum(jnp.maximum(delta, floor * frobenius_norm(s)), 1e-30)
    q, root = jnp.linalg.qr(jnp.concatenate([s.mT, delta * jnp.eye(r, dtype=s.dtype)], -2))
    inverse = jax.lax.linalg.triangular_solve(root, q[..., :r, :], left_side=False, lower=False, transpose_a=True)
    return jnp.where(good, inverse, jnp.nan)


def row_scales(squares: jax.Array, moment: jax.Array, rest: jax.Array) -> jax.Array:
    """``rest`` times what equilibrates the rows of S, whose mean ``squares`` and ``moment`` are (slices, rows, 1); the
    norm of S stays (algebra.step.row_scales)."""
    factors = 1 / (jnp.sqrt(moment) + ROW_FLOOR * jnp.sqrt(jnp.mean(moment, -2, keepdims=True)) + 1e-12)
    even = jnp.sum(squares * factors**2, -2, keepdims=True)
    return rest * factors * jnp.sqrt(jnp.sum(squares, -2, keepdims=True) / jnp.maximum(even, 1e-30))


def stochastic_round(x: jax.Array, dtype: jnp.dtype, key: jax.Array) -> jax.Array:
    """x float32, rounded to values of bfloat16 or float16, up or down with the probabilities that make it unbiased.
    Values that ``dtype`` has stay as they are, for the noise has just the bits that are dropped."""
    eps, tiny = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).tiny)
    tiny = max(tiny, float(jnp.finfo(jnp.float32).tiny) / eps)  # no subnormal quantum: XLA makes it zero
    quantum = jnp.ldexp(jnp.float32(eps), jnp.frexp(jnp.maximum(jnp.abs(x), tiny))[1] - 1)
    dropped = 2 ** (23 + round(math.log2(eps)))
    noise = (jax.random.bits(key, x.shape) % dropped).astype(jnp.float32) / dropped
    return jnp.floor(x / quantum + noise) * quantum
