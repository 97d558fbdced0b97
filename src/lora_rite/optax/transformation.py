"""LoRA-RITE for JAX: ``lora_rite`` and ``scale_by_lora_rite``, gradient transformations of optax.

The step is that of :class:`lora_rite.LoRARite` (its docstring has the equations), with the mathematics of
``lora_rite/algebra``: a tall factor X = Q·T is handled through r×r matrices, K with Q = X·K. One thing differs. A
transformation never sees the parameters that its update leads to, so the new basis is measured at the start of the next
update, from ``params`` and from the factors of the last one, which the state keeps. Whatever moved them meanwhile
(a later scale, a schedule, an average, another factorisation), both moments are carried over to where they are.

Shapes: factors of one rank r are computed together, f of them (A's and then B's; a scanned layer counts once for each
of its slices). r×r matrices are (f, r, r) in the *algebra* dtype: float64 with ``jax_enable_x64``, else float32. Tall
factors are (slices, rows, r) in the *work* dtype: float64 where a factor is float64, else float32. Products are of full
precision on every device. Nothing here depends on torch.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, groupby
from typing import Any, NamedTuple

from ..errors import LoRARiteTypeError, LoRARiteValueError
from ..options import KNOWN_LATER, PUBLISHED
from ..options import check as check_options

try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
except ImportError as error:
    raise ImportError(f'lora_rite.optax needs {error.name}: pip install "lora-rite[jax]"') from error

__all__ = [
    "LAYOUTS",
    "NNX",
    "PEFT",
    "PUBLISHED",
    "Layout",
    "LoRARiteState",
    "labels",
    "lora_rite",
    "scale_by_lora_rite",
]

LIVE, NOISE, ROW_FLOOR = 1e-3, 0.75, 1e-2  # as in algebra/: which directions count as null, and which rows as noise

# ------------------------------------------------------------------------------------------------------------- layouts


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


class _Factor(NamedTuple):
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


def _name(path: tuple[Any, ...]) -> str:
    """ "layers/0/lora_a". The ``.value`` of flax's variables is left out: it comes and goes."""
    if path and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _match(name: str, layouts: Sequence[Layout]) -> tuple[Layout, bool, str] | None:
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
    return jax.tree_util.tree_map_with_path(lambda p, _: "lora" if _match(_name(p), layouts) else "other", params)


def _pairs(params: optax.Params, layouts: Sequence[Layout]) -> dict[str, list[_Factor]]:
    """Factors by rank, under "rank_…": those of A first, then those of B in the same order; equal shapes side by side.

    Raises:
        LoRARiteValueError: a leaf that is no factor or has no partner, or two that cannot be multiplied.
    """
    leaves = {_name(path): (i, x) for i, (path, x) in enumerate(jax.tree_util.tree_flatten_with_path(params)[0])}
    found: dict[str, list[tuple[_Factor, _Factor]]] = {}
    for name, (_, x) in leaves.items():
        match = _match(name, layouts)
        if match is None:
            raise LoRARiteValueError(
                f"{name} {x.shape} is not a LoRA factor: give it to another transformation (optax.partition with "
                "lora_rite.optax.labels), or name the factors by layouts=…"
            )
        layout, is_a, partner = match
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


def _factor(leaf: int, x: jax.Array, name: str, rank_axis: int, batch_axes: int | None) -> _Factor:
    batch = max(x.ndim - 2, 0) if batch_axes is None else batch_axes
    own = x.shape[batch:]
    if len(own) < 2 or x.size == 0 or not -len(own) <= rank_axis < len(own):
        raise LoRARiteValueError(
            f"{name} has shape {x.shape}; a factor is a non-empty matrix, or a stack of them, with the rank on axis "
            f"{rank_axis}"
        )
    axis = rank_axis % len(own)
    return _Factor(leaf, batch + axis, x.shape[:batch], own[:axis] + own[axis + 1 :], x.dtype)


# --------------------------------------------------------------------------------------------------------- mathematics

_times = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _gram(x: jax.Array, y: jax.Array) -> jax.Array:
    return _times(x.mT, y)


def _trace(m: jax.Array) -> jax.Array:
    return jnp.trace(m, axis1=-2, axis2=-1)[..., None, None]


def _norm(x: jax.Array) -> jax.Array:
    """(f, 1, 1) Frobenius norms."""
    return jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True))


def _finite(m: jax.Array) -> jax.Array:
    return jnp.isfinite(m).all((-2, -1), keepdims=True)


def _eigh(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues (ascending) and eigenvectors; all NaN for a matrix that is not finite."""
    good = _finite(m)
    values, vectors = jnp.linalg.eigh(jnp.where(good, m, jnp.eye(m.shape[-1], dtype=m.dtype)))
    return jnp.where(good[..., 0], values, jnp.nan), jnp.where(good, vectors, jnp.nan)


def _decay(step: jax.Array, beta: Any) -> jax.Array:
    """β(1 − βᵗ⁻¹)/(1 − βᵗ), exact in float32 too; 1 for β = 1."""
    if _is(beta, 1):
        return jnp.ones_like(step)
    log = jnp.log(jnp.maximum(beta, 1e-30)) if isinstance(beta, jax.Array) else math.log(max(beta, 1e-30))
    return beta * jnp.expm1((step - 1) * log) / jnp.expm1(step * log)


def _warm_basis(warm: jax.Array, root: jax.Array, step: jax.Array, norm: jax.Array, noise: jax.Array) -> jax.Array:
    """K_w for the factor after a step X − M·``step``: neither X (``root``ᵀ·``root`` is the Gram matrix of X·K_w), nor
    the step (``norm`` = ‖M‖), nor the rounding of X (its size ``noise``) is longer than 1 in it
    (algebra.basis.warm_basis).

    By QR of the stacked parts: their Gram matrix would have the square of their condition.
    """
    parts = jnp.concatenate([root, norm * _times(step, warm), noise * warm], -2) * math.sqrt(2)
    size = jnp.linalg.norm(parts, axis=-2, keepdims=True)
    size = jnp.where(size > 0, size, 1)  # columns of 1: those of a null direction may be 1/eps
    eye = jnp.broadcast_to(jnp.eye(warm.shape[-1], dtype=warm.dtype), warm.shape)
    parts = jnp.concatenate([parts / size, (10 * jnp.finfo(warm.dtype).eps) * eye], -2)
    good = _finite(parts) & (_norm(parts[..., : -warm.shape[-1], :]) > 0)
    upper = jnp.linalg.qr(jnp.where(good, parts, jnp.eye(*parts.shape[-2:], dtype=warm.dtype)), mode="r")
    return jax.lax.linalg.triangular_solve(upper, warm / size, left_side=False, lower=False)


class _Basis(NamedTuple):
    """``basis`` K: X·K has orthonormal columns, zero ones where X has no rank; ``coordinates`` T: X = (X·K)·T;
    ``root`` = T·K_w; ``c``: X·K = (X·K_w)·c. All (f, r, r)."""

    basis: jax.Array
    coordinates: jax.Array
    root: jax.Array
    c: jax.Array


def _orthonormalise(warm: jax.Array, gram_z: jax.Array, rows: jax.Array) -> _Basis:
    """The basis of X from K_w and the Gram matrix of X·K_w (algebra.basis.orthonormalise)."""
    w, u = _eigh(gram_z)
    r = w.shape[-1]
    live = (w > w[..., -1:] * LIVE) & (jnp.arange(r, 0, -1) <= rows[..., 0])
    s = jnp.sqrt(jnp.where(live, w, 1))
    c = u * jnp.where(live, 1 / s, 0)[..., None, :]
    root = jnp.where(live, s, 0)[..., None] * u.mT
    t = jnp.linalg.solve(warm.mT, root.mT).mT
    basis = _times(warm, c)
    deficient = lambda: jnp.where(live.all(-1)[..., None, None], basis, _pseudo_inverse(t, live))
    return _Basis(jax.lax.cond(live.all(), lambda: basis, deficient), t, root, c)


def _pseudo_inverse(t: jax.Array, live: jax.Array) -> jax.Array:
    """T⁺ where the first rows of T are zero."""
    good = _finite(t)
    q, root = jnp.linalg.qr(jnp.flip(jnp.where(good, t, 0), -2).mT)  # T's live rows first: Tᵀ = Q·[R 0]
    mask = jnp.flip(live, -1).astype(t.dtype)
    root = root * mask[..., None, :] + jnp.eye(t.shape[-1], dtype=t.dtype) * (1 - mask)[..., None, :]
    inverse = jax.lax.linalg.triangular_solve(
        root, q * mask[..., None, :], left_side=False, lower=False, transpose_a=True
    )
    return jnp.where(good, jnp.flip(inverse, -1), jnp.nan)


def _damped_inverse(s: jax.Array, delta: jax.Array) -> jax.Array:
    """V diag(σ/(σ² + δ²)) Uᵀ of S = U diag(σ) Vᵀ, by QR of [Sᵀ; δ]; 0 where σ = 0 (algebra.step.damped_inverse).

    δ is at least 1e-6·‖S‖, so that σ that are rounding noise count for little.
    """
    good, r = _finite(s), s.shape[-1]
    s = jnp.where(good, s, 0)
    floor = float(jnp.finfo(jnp.float64).eps) ** 0.375
    delta = jnp.maximum(jnp.maximum(delta, floor * _norm(s)), 1e-30)
    q, root = jnp.linalg.qr(jnp.concatenate([s.mT, delta * jnp.eye(r, dtype=s.dtype)], -2))
    inverse = jax.lax.linalg.triangular_solve(root, q[..., :r, :], left_side=False, lower=False, transpose_a=True)
    return jnp.where(good, inverse, jnp.nan)


def _stochastic_round(x: jax.Array, dtype: jnp.dtype, key: jax.Array) -> jax.Array:
    """x float32, rounded to values of bfloat16 or float16, up or down with the probabilities that make it unbiased.
    Values that ``dtype`` has stay as they are, for the noise has just the bits that are dropped."""
    eps, tiny = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).tiny)
    tiny = max(tiny, float(jnp.finfo(jnp.float32).tiny) / eps)  # no subnormal quantum: XLA makes it zero
    quantum = jnp.ldexp(jnp.float32(eps), jnp.frexp(jnp.maximum(jnp.abs(x), tiny))[1] - 1)
    dropped = 2 ** (23 + round(math.log2(eps)))
    noise = (jax.random.bits(key, x.shape) % dropped).astype(jnp.float32) / dropped
    return jnp.floor(x / quantum + noise) * quantum


# ------------------------------------------------------------------------------------------------------ transformation


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


class _Batch:
    """The factors of one rank in one update: measured, preconditioned, moved (as in lora_rite/execute)."""

    def __init__(self, factors: list[_Factor], leaves: dict[str, list[jax.Array]], small: FactorState, options: dict):
        self.options, self.dtype = options, small.second_moment.dtype
        self.algebra = jnp.promote_types(self.dtype, jnp.result_type(float))
        # chunks: factors of one shape, which are multiplied together
        half, alike = len(factors) // 2, lambda f: (f.rows, f.dtype)
        self.chunks = [list(run) for side in (factors[:half], factors[half:]) for _, run in groupby(side, alike)]
        tall = lambda key: [
            jnp.concatenate([f.tall(leaves[key][f.leaf]) for f in chunk]).astype(self.dtype) for chunk in self.chunks
        ]
        self.x, self.x_old, self.moments, self.row_moments, self.gradients = (
            tall(key) for key in ("params", "previous", "first_moment", "row_moment", "gradients")
        )
        # (of bfloat16 without the margin: a quarter of the factor is no noise)
        floor = float(jnp.finfo(self.dtype).eps) ** NOISE
        self.rounding = self._column(lambda f: max(floor, float(jnp.finfo(f.dtype).eps)))
        self.rows = self._column(lambda f: f.rows)
        self.slices = self._column(lambda f: f.slices)
        full = lambda m: m.astype(self.algebra) if jnp.issubdtype(m.dtype, jnp.floating) else m
        self.small = FactorState(*(full(m if m.ndim == 3 else m[:, None, None]) for m in small))

    def _column(self, value: Callable[[_Factor], float]) -> jax.Array:
        """(f, 1, 1) from one value a factor."""
        column = [value(f) for chunk in self.chunks for f in chunk for _ in range(f.slices)]
        return jnp.array(column, self.algebra)[:, None, None]

    def _each(self, function: Callable[..., Any], *arrays: Any) -> list[Any]:
        """``function`` of each chunk's parts of the arguments: lists by chunk, or (f, …)."""
        results, begin = [], 0
        for i, x in enumerate(self.x):
            run = slice(begin, begin := begin + x.shape[0])
            results.append(function(*(a[i] if isinstance(a, list) else a[run].astype(self.dtype) for a in arrays)))
        return results

    def _join(self, parts: Sequence[jax.Array]) -> jax.Array:
        return jnp.concatenate(parts).astype(self.algebra)

    def _norms(self, tall: list[jax.Array]) -> jax.Array:
        return self._join([_norm(x) for x in tall])

    def _partners(self, m: jax.Array) -> jax.Array:
        return jnp.roll(m, m.shape[0] // 2, 0)

    def rebase(self, first: jax.Array) -> None:
        """Measures the bases of the factors as they are, and carries V over from the old ones."""
        old = self.small
        step = old.step
        if self.options["scaled_later"]:
            moved = self._norms([x - x_old for x, x_old in zip(self.x, self.x_old, strict=True)])
            step = step * jnp.where(old.update_norm > 0, moved / jnp.where(old.update_norm > 0, old.update_norm, 1), 0)
        noise = self.rounding * self._norms(self.x_old)
        warm = self._rounded(_warm_basis(old.warm_basis, old.root, step, old.moment_norm, noise))
        grams = self._grams(warm)
        known = jnp.all(_trace(grams[0]) <= 2 * warm.shape[-1]) & ~first  # by the triangle inequality no more than 1.5r
        warm, (gram_z, cross) = jax.lax.cond(known, lambda: (warm, grams), self._anew)
        self.warm, self.basis = warm, _orthonormalise(warm, gram_z, self.rows)
        # a factor that starts at zero is damped; B where both or none do
        zero = self._join([jnp.all(x == 0, (-2, -1), keepdims=True) for x in self.x]) > 0
        half = zero.shape[0] // 2
        damps_a = zero[:half] & ~zero[half:]
        self.damped = jnp.where(first, jnp.concatenate([damps_a, ~damps_a]), old.damped)
        self.transport = self._partners(_times(_gram(self.basis.c, cross), old.basis))
        self.second_moment = _times(_times(self.transport, old.second_moment), self.transport.mT)
        self.escaped = old.escaped_mass
        if self.options["apply_escape"]:
            lost = jnp.max(_eigh(old.second_moment)[0] - _eigh(self.second_moment)[0], -1)[..., None, None]
            lost = jnp.minimum(lost, _trace(old.second_moment - self.second_moment))
            self.escaped = self.escaped + jnp.maximum(lost, 0)

    def _anew(self) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """K_w (and what is measured in it) of factors that the state knows nothing of: scaled to 1, then made
        orthonormal three times, each of which makes the Gram matrix better conditioned
        (algebra.basis.initial_basis)."""
        scale = self._join([jnp.max(jnp.abs(x), (-2, -1), keepdims=True) for x in self.x])
        warm = jnp.eye(self.small.basis.shape[-1], dtype=self.algebra) / jnp.where(scale == 0, 1, scale)
        noise, none = self.rounding * self._norms(self.x), jnp.zeros_like(warm)
        for _ in range(3):
            w, u = _eigh(self._grams(warm)[0])
            s = jnp.sqrt(jnp.maximum(w, w[..., -1:] * (10 * jnp.finfo(self.dtype).eps)))
            warm = self._rounded(_warm_basis(warm, s[..., None] * u.mT, none, noise, noise))
        return warm, self._grams(warm)

    def _rounded(self, m: jax.Array) -> jax.Array:
        """What the state keeps is what is measured."""
        return m.astype(self.dtype).astype(self.algebra)

    def _grams(self, warm: jax.Array) -> tuple[jax.Array, jax.Array]:
        """zᵀz and zᵀ·X_old of z = X·K_w."""
        z = self._each(_times, self.x, warm)
        cross = [_gram(*pair) for pair in zip(z, self.x_old, strict=True)]
        return self._join([_gram(x, x) for x in z]), self._join(cross)

    def measure(self, lr: Any) -> jax.Array:
        """Unmagnified gradients ḡ = g·D. Returns the sum of their squares."""
        damping, skipping = self.options["damping"], self.options["update_skipping"]
        self.inverse = self._partners(self.basis.basis)
        if not _is(damping, 0):
            t, half = self.basis.coordinates, self.rows.shape[0] // 2
            damps_a = self.damped[:half]
            delta = damping * lr * jnp.sqrt(jnp.where(damps_a, self.rows[:half], self.rows[half:]))
            y, x = jnp.where(damps_a, t[:half], t[half:]), jnp.where(damps_a, t[half:], t[:half])
            damped = jnp.tile(_times(x.mT, _damped_inverse(_times(y, x.mT), delta)), (2, 1, 1))
            self.inverse = jnp.where(self._partners(self.damped) & (damping > 0), damped, self.inverse)
        unmagnified = self._each(_times, self.gradients, self.inverse)
        self.squares = self._join([_gram(g, g) for g in unmagnified])
        self.kept = jnp.ones_like(self.rows, bool)
        if not _is(skipping, 0):
            mean_square = _trace(self.squares) / (self.rows * self.squares.shape[-1])
            self.kept = ~((mean_square > skipping**2) & (skipping > 0))
            self.squares = self.squares * self.kept  # (what is infinite becomes NaN)
        return _trace(self.squares).sum()

    def precondition(self, norm: jax.Array) -> None:
        """V and g → S. Of several pairs in one parameter (experts), those without any gradient are passed over: M and
        V are only carried over."""
        seen = _trace(self.squares) != 0  # NaN too
        self.moves = seen | self._partners(seen) | (self.slices == 1)
        step = (self.small.count + 1).astype(self.algebra)
        betas = (*self.options["betas"], self.options["row_beta"])
        self.decays = [jnp.where(self.moves, _decay(step, beta), 1) for beta in betas]
        options, clip = self.options, self.options["clip_unmagnified_grad"]
        scale = 1.0 if _is(clip, 0) else jnp.where((clip > 0) & (norm > clip), clip / norm, 1)
        squares = self.squares * scale**2 / self.rows
        fresh = 1 if _is(options["betas"][1], 1) else 1 - self.decays[1]
        self.second_moment = self.decays[1] * self.second_moment + fresh * squares
        self.escaped = self.decays[1] * self.escaped
        w, u = _eigh(self.second_moment)
        root = jnp.sqrt(jnp.maximum(w, 0) + self.escaped[..., 0])
        inverse_root = 1 / (root + options["eps"] + options["relative_eps"] * root[..., -1:])
        sign = -1.0 if options["maximize"] else 1.0
        self.whiten = _times(self.inverse, _times(u * inverse_root[..., None, :], u.mT)) * (self.kept * scale * sign)

    def move(self, lr: Any, key: jax.Array | None) -> Iterator[tuple[_Factor, list[jax.Array]]]:
        """The update, M and the row moment of each factor, in its shape. ``lr`` is −1 for scale_by_lora_rite, ``key``
        that of the rounding to low precision, if there is any."""
        decay, _, row_decay = self.decays
        carry, rest, lr = decay * self.transport.mT, 1 - decay, jnp.where(self.moves, lr, 0)
        self.step = lr * self.inverse.mT
        results = self._each(
            self._momentum, self.gradients, self.moments, self.row_moments, self.whiten, carry, rest, row_decay
        )
        moments, row_moments = [m for m, _ in results], [row for _, row in results]
        self.moment_norm, cap = self._norms(moments), self.options["update_capping"]
        if not _is(cap, 0):
            rms = self.moment_norm / jnp.sqrt(self.rows * self.step.shape[-1])
            self.step = self.step / jnp.where(cap > 0, jnp.maximum(rms / jnp.where(cap > 0, cap, 1), 1), 1)
        shrink = lr * self.options["weight_decay"]
        updates = self._each(lambda m, x, step, s: -_times(m, step) - s * x, moments, self.x, self.step, shrink)
        ratio = self._balance(updates, lr) if self.options["balance_param"] else jnp.ones_like(self.rows)
        self.step, self.root = self.step * ratio, self.basis.root * ratio
        if self.options["balance_param"]:
            updates = self._each(lambda x, u, ratio: ratio * (x + u) - x, self.x, updates, ratio)
        if key is not None:
            for i, (chunk, x) in enumerate(zip(self.chunks, self.x, strict=True)):
                if jnp.finfo(chunk[0].dtype).bits < 32:
                    own = jax.random.fold_in(key, chunk[0].leaf)
                    updates[i] = _stochastic_round(x + updates[i], chunk[0].dtype, own) - x
        self.update_norm = self._norms(updates)
        for chunk, *moved in zip(self.chunks, updates, moments, row_moments, strict=True):
            ends = list(accumulate(f.slices for f in chunk))
            for f, *parts in zip(chunk, *(jnp.split(tall, ends[:-1]) for tall in moved), strict=True):
                yield f, [f.flat(part) for part in parts]

    def finite(self) -> jax.Array:
        """Whether everything is finite in the state's dtype, after the move; what is tall, and lr, by the norms."""
        matrices = jnp.stack([self.second_moment, self.whiten, self.inverse]).astype(self.dtype)
        norms = jnp.stack([self.moment_norm, self.update_norm]).astype(self.dtype)
        return jnp.isfinite(matrices).all() & jnp.isfinite(norms).all()

    def _momentum(
        self, g: jax.Array, m: jax.Array, rows: jax.Array, whiten: jax.Array, carry: jax.Array, rest: jax.Array,
        row_decay: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """M ← M·(β₁ₜPᵀ) + (1 − β₁ₜ)·S, rows of S equilibrated (algebra.step.row_scales), and the row moment."""
        s = _times(g, whiten)
        if self.options["row_equilibration"]:
            squares = jnp.mean(s * s, -1, keepdims=True)
            rows = row_decay * rows + (1 - row_decay) * squares
            factors = 1 / (jnp.sqrt(rows) + ROW_FLOOR * jnp.sqrt(jnp.mean(rows, -2, keepdims=True)) + 1e-12)
            even = jnp.sum(squares * factors**2, -2, keepdims=True)
            rest = rest * factors * jnp.sqrt(jnp.sum(squares, -2, keepdims=True) / jnp.maximum(even, 1e-30))
        return _times(m, carry) + rest * s, rows

    def _balance(self, updates: list[jax.Array], lr: Any) -> jax.Array:
        """(f, 1, 1) factors that give both factors of a pair one norm; 1 where one is zero or lr is 0."""
        norms = self._norms([x + u for x, u in zip(self.x, updates, strict=True)])
        others = self._partners(norms)
        ratio = jnp.sqrt((others + 1e-6) / (norms + 1e-6))  # 1e-6 as in the authors' code
        return jnp.where((norms > 0) & (others > 0) & (lr != 0), ratio, 1)

    def state(self) -> FactorState:
        matrix, scalar = lambda m: m.astype(self.dtype), lambda m: m[:, 0, 0].astype(self.dtype)
        return FactorState(
            second_moment=matrix(self.second_moment),
            escaped_mass=scalar(self.escaped),
            basis=matrix(self.basis.basis),
            root=matrix(self.root),
            warm_basis=matrix(self.warm),
            step=matrix(self.step),
            moment_norm=scalar(self.moment_norm),
            update_norm=scalar(self.update_norm),
            count=(self.small.count + self.moves)[:, 0, 0],
            damped=self.damped[:, 0, 0],
        )


def _new_factor_state(factors: list[_Factor], rank: int, dtype: jnp.dtype) -> FactorState:
    f = sum(factor.slices for factor in factors)
    matrices = {"second_moment", "basis", "root", "warm_basis", "step"}
    shapes = {key: (f, rank, rank) if key in matrices else (f,) for key in FactorState._fields}
    dtypes = {"count": jnp.int32, "damped": bool}
    return FactorState(**{key: jnp.zeros(shape, dtypes.get(key, dtype)) for key, shape in shapes.items()})


def _auto(function: Callable[..., Any], outputs: Any, *arguments: Any) -> Any:
    """``function(*arguments)``, whose result is sharded as ``outputs`` are. Where their mesh has explicit axes
    (jax.make_mesh), the compiler shards what is computed in between, as it does where they are Auto."""
    types = jax.tree.map(jax.typeof, outputs)
    mesh = next((x.sharding.mesh for x in jax.tree.leaves(types) if x.sharding.mesh.explicit_axes), None)
    if mesh is None:
        return function(*arguments)
    placed = jax.tree.map(lambda x: jax.sharding.NamedSharding(mesh, x.sharding.spec), types)
    return jax.sharding.auto_axes(function, out_sharding=placed)(*arguments)


def _transformation(learning_rate: Any, layouts: Sequence[Layout], **options: Any) -> Any:
    """Both transformations. ``learning_rate`` None: the update is M·Dᵀ itself."""
    layouts = tuple(layouts)
    _check(learning_rate, layouts, options)
    hyperparameters, form = jax.tree.flatten((learning_rate, options))

    def init(params: optax.Params) -> LoRARiteState:
        leaves = jax.tree.leaves(params)
        dtype = jnp.promote_types(jnp.float32, jnp.result_type(*leaves)) if leaves else jnp.float32
        small, rows = {}, list(leaves)
        for key, factors in _pairs(params, layouts).items():
            small[key] = _new_factor_state(factors, leaves[factors[0].leaf].shape[factors[0].axis], dtype)
            for f in factors:
                x = leaves[f.leaf]
                if not isinstance(x, jax.Array):  # a shape
                    x = jnp.zeros_like(x)
                rows[f.leaf] = jnp.zeros_like(x.max(f.axis, keepdims=True), dtype)  # sharded as the rows
        moment = jax.tree.map(lambda x: jnp.zeros_like(x, dtype), params)
        # (each array is one of its own: a caller may donate the state, and a buffer can be donated once)
        return LoRARiteState(
            count=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            previous=jax.tree.map(jnp.zeros_like, params),
            first_moment=moment,
            row_moment=jax.tree.unflatten(jax.tree.structure(params), rows),
            factors=small,
        )

    def moved(
        arrays: dict[int, jax.Array], updates: optax.Updates, state: Any, params: optax.Params
    ) -> tuple[optax.Updates, LoRARiteState]:
        learning_rate, options = form.unflatten(arrays.get(i, x) for i, x in enumerate(hyperparameters))
        structure = jax.tree.structure(params)
        trees = {"params": params, "gradients": updates} | {
            key: getattr(state, key) for key in ("previous", "first_moment", "row_moment")
        }
        leaves = {key: structure.flatten_up_to(tree) for key, tree in trees.items()}
        pairs = _pairs(params, layouts)
        batches = {key: _Batch(pairs[key], leaves, state.factors[key], options) for key in pairs}
        lr: Any = -1.0
        if learning_rate is not None:
            lr = learning_rate(state.count + state.skipped) if callable(learning_rate) else learning_rate
        key = None if learning_rate is None else jax.random.fold_in(jax.random.key(0), state.count)
        for batch in batches.values():
            batch.rebase(state.count == 0)
        norm = jnp.sqrt(sum(batch.measure(lr) for batch in batches.values()))
        new = {key: list(leaves[key]) for key in ("gradients", "first_moment", "row_moment")}
        for batch in batches.values():
            batch.precondition(norm)
            for f, moved in batch.move(lr, key):
                for tree, value in zip(new.values(), moved, strict=True):
                    tree[f.leaf] = value
        moves, first_moment, row_moment = (structure.unflatten(tree) for tree in new.values())
        finite = jnp.stack([batch.finite() for batch in batches.values()]).all()
        keep = lambda new, old: jax.tree.map(partial(jnp.where, finite), new, old)
        return jax.tree.map(lambda u, x: jnp.where(finite, u, 0).astype(x.dtype), moves, params), LoRARiteState(
            count=state.count + finite,
            skipped=state.skipped + ~finite,
            previous=keep(params, state.previous),
            first_moment=keep(first_moment, state.first_moment),
            row_moment=keep(row_moment, state.row_moment),
            factors=keep({key: batch.state() for key, batch in batches.items()}, state.factors),
        )

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, LoRARiteState]:
        del extra_args
        if params is None:
            raise LoRARiteValueError("LoRA-RITE needs the parameters: call update(gradients, state, params)")
        arrays = {i: x for i, x in enumerate(hyperparameters) if isinstance(x, jax.Array)}
        return _auto(moved, (params, state), arrays, updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def _is(value: Any, number: float) -> bool:
    """Whether a hyperparameter has this value for good: not where it is an array, as optax.inject_hyperparams makes of
    it."""
    return not isinstance(value, jax.Array) and value == number


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
    return _transformation(
        None, layouts, betas=betas, eps=eps, weight_decay=0.0, damping=0.0, row_equilibration=row_equilibration,
        row_beta=row_beta, relative_eps=relative_eps, clip_unmagnified_grad=clip_unmagnified_grad,
        update_skipping=update_skipping, update_capping=update_capping, apply_escape=apply_escape, balance_param=False,
        maximize=False, scaled_later=True,
    )  # fmt: skip


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
        learning_rate: the learning rate, a number or a schedule (of the number of updates, skipped ones too). 2e-4 is
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
        layouts: where the factors are and which axis is the rank, see :class:`Layout`.

    All numbers may be arrays; those of jax (under :func:`optax.inject_hyperparams`, say) change without recompilation.

    Raises:
        LoRARiteValueError, LoRARiteTypeError: hyperparameters out of range; from ``init`` and ``update``, leaves that
            do not form pairs.
    """
    return _transformation(
        learning_rate, layouts, betas=betas, eps=eps, weight_decay=weight_decay, damping=damping,
        row_equilibration=row_equilibration, row_beta=row_beta, relative_eps=relative_eps,
        clip_unmagnified_grad=clip_unmagnified_grad, update_skipping=update_skipping, update_capping=update_capping,
        apply_escape=apply_escape, balance_param=balance_param, maximize=maximize, scaled_later=False,
    )  # fmt: skip
