"""lora_rite.optax against the authors' trajectories and the torch optimizer; what users of optax and flax expect.

The factors of tests/problems.py are laid out as PEFT does: A (r, n), B (m, r). Tolerances of float32 are without
jax_enable_x64, so r×r matrices are float32 too.
"""

import json
import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import factors, gradients_of_w, random_matrix, regauged, relative, set_gradients, train, w
from reference import Reference
from test_import import loaded_after
from test_reference import CASES, FOLDER

import lora_rite
from lora_rite import LoRARite
from lora_rite.algebra import basis

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
nnx = pytest.importorskip("flax.nnx")
import jax.numpy as jnp  # noqa: E402

from lora_rite import optax as ours  # noqa: E402
from lora_rite.optax import algebra  # noqa: E402

TX, PUBLISHED = ours.lora_rite(1e-2), ours.lora_rite(1e-2, **ours.PUBLISHED)
PEFT_NAMES = ("lora_A", "lora_B")
NUMBERS = (
    "eps", "weight_decay", "damping", "row_beta", "relative_eps", "clip_unmagnified_grad", "update_skipping",
    "update_capping",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quick_compilation():
    with jax.enable_x64(False):
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def tree(pairs, dtype=None):
    """{"0": {"lora_A", "lora_B"}, …} of jax arrays, from torch tensors [(A, B), …]."""
    dtype = dtype or jnp.result_type(float)
    array = lambda x: jnp.asarray(x.double().numpy().astype(np.float64 if dtype == np.float64 else np.float32), dtype)
    return {str(k): {"lora_A": array(a), "lora_B": array(b)} for k, (a, b) in enumerate(pairs)}


def pairs_of(params):
    """[(A, B), …] in float64 torch, from such a tree."""
    to = lambda x: torch.tensor(np.asarray(x, dtype=np.float64))
    return [(to(p["lora_A"]), to(p["lora_B"])) for p in params.values()]


def gradients_of(params, gs):
    """Of the factors, from those of each W, [(m, n), …]."""
    both = lambda a, b, g: {"lora_A": (b.T @ g).astype(a.dtype), "lora_B": (g @ a.T).astype(b.dtype)}
    return {k: both(p["lora_A"], p["lora_B"], g) for (k, p), g in zip(params.items(), gs, strict=True)}


def a_step(tx, params, state, gs):
    updates, state = tx.update(gradients_of(params, gs), state, params)
    return optax.apply_updates(params, updates), state


@cache
def compiled(tx):
    return jax.jit(partial(a_step, tx))


@cache
def compiled_update(tx):
    return jax.jit(tx.update)


def steps(tx, params, gradients, *, state=None):
    """Trains on gradients of W, one (steps, m, n) a pair. Returns parameters, state."""
    state = tx.init(params) if state is None else state
    for gs in zip(*(jnp.asarray(g.numpy()) for g in gradients), strict=True):
        params, state = compiled(tx)(params, state, gs)
    return params, state


def equal(one, other):
    """Bitwise."""
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool(jnp.array_equal(x, y)), one, other)
    return all(jax.tree.leaves(same))


@partial(jax.jit, static_argnames="static")
def step_with(params, state, gs, lr, numbers, static):
    """One step; numeric hyperparameters are traced, so that one compilation serves cases that differ in those."""
    return a_step(ours.lora_rite(lr, **numbers, **dict(static)), params, state, gs)


def trajectory(case):
    """Yields (expected A, B), (got A, B), in torch float64, after each step and for each pair."""
    settings = {**ours.PUBLISHED, **CASES[case]}
    count, pairs, _, lr, betas = (settings.pop(key) for key in ("steps", "pairs", "rank", "lr", "betas"))
    data = {k: v for k, v in np.load(FOLDER / "trajectories.npz").items() if k.startswith(f"{case}/")}
    load = lambda k, what: torch.tensor(data[f"{case}/pair{k}/{what}"])
    numbers = {k: jnp.asarray(float(v)) for k, v in settings.items() if k in NUMBERS}
    static = (("betas", tuple(betas)), *sorted((k, v) for k, v in settings.items() if k not in NUMBERS))
    params = tree([(load(k, "A0"), load(k, "B0")) for k in range(pairs)])
    state = ours.lora_rite(lr).init(params)
    for t in range(count):
        gs = [jnp.asarray(load(k, "G")[t].numpy()) for k in range(pairs)]
        params, state = step_with(params, state, gs, jnp.asarray(lr), numbers, static)
        for k, got in enumerate(pairs_of(params)):
            yield (load(k, "A")[t], load(k, "B")[t]), got


#: What other tests have too, for one compilation each takes time.
ELSEWHERE = ("no_clip_no_skip", "betas", "capping", "balance", "rank_8")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in ELSEWHERE)) for c in CASES])
def test_float64_equals_the_authors_code(case, x64):
    for expected, got in trajectory(case):
        assert relative(got[0], expected[0]) < 1e-10
        assert relative(got[1], expected[1]) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_float32_is_near_in_w(case):
    for expected, got in trajectory(case):
        assert relative(w(got), w(expected)) < (1e-2 if case == "ill_conditioned" else 1e-5)


@pytest.mark.parametrize(("condition", "tolerance"), [(0, 5e-6), (1e3, 2e-6), (1e5, 1e-4)])
def test_float32_is_near_the_reference(condition, tolerance):
    """30 steps of the published settings, B = 0 or dense factors of that condition, r×r matrices in float32 too."""
    pair, gradients = factors(8, 50, 40, zero_b=not condition, condition=condition or 1.0), gradients_of_w(30, 40, 50)
    reference = Reference([[x.clone() for x in pair]], lr=1e-2, update_skipping=1.0)
    for g in gradients:
        a, b = reference.pairs[0]
        reference.step([(b.mT @ g, g @ a.mT)])
    params, _ = steps(PUBLISHED, tree([pair]), [gradients])
    assert relative(w(pairs_of(params)[0]), w(reference.pairs[0])) < tolerance


EVERYTHING = {
    "apply_escape": True, "balance_param": True, "update_capping": 0.5, "update_skipping": 1.0, "relative_eps": 0.0,
    "maximize": True, "betas": (0.0, 0.99),
}  # fmt: skip
SUMMED = {"betas": (0.0, 1.0), "apply_escape": True, "relative_eps": 0.0}
PROBLEMS = {  # (r, n, m) and the zero factor of each pair; options; the gradients' rank
    "defaults": ([((4, 9, 7), "B"), ((4, 20, 7), "B"), ((8, 30, 40), None)], {"weight_decay": 0.1}, None),
    "low_rank": ([((8, 50, 40), "B"), ((8, 40, 50), "A")], {}, 2),
    "everything": ([((4, 9, 7), None), ((4, 9, 7), "B")], EVERYTHING, None),
    "scaled": (
        [((4, 9, 7), "B"), ((8, 30, 40), None)],
        {"scaling": 3.0, "weight_decay": 0.1, "eps": 1e-2, "update_skipping": 4.0, "clip_unmagnified_grad": 5.0},
        None,
    ),
    "summed": ([((4, 9, 7), None), ((4, 20, 7), "B")], SUMMED, None),
    "wide": ([((16, 12, 20), None), ((16, 12, 20), "B"), ((6, 30, 4), None)], {}, None),
}


@pytest.mark.parametrize(("name", "x"), [*((name, 64) for name in PROBLEMS), ("low_rank", 32)])
def test_equals_the_torch_optimizer(name, x):
    """15 steps; relative to the change of W. Rounding grows where directions are null (low rank, high r)."""
    problems, options, rank = PROBLEMS[name]
    pairs, gradients = [], []
    for i, ((r, n, m), zero) in enumerate(problems):
        if r <= min(n, m):
            a, b = factors(r, n, m, zero_b=zero == "B", seed=i)
        else:
            a, b = gradients_of_w(1, r, n, seed=i)[0], gradients_of_w(1, m, r, seed=i)[0] * (zero != "B")
        pairs.append((torch.zeros_like(a) if zero == "A" else a, b))
        gradients.append(gradients_of_w(15, m, n, rank=rank, seed=i))
    dtype, tolerance = (torch.float64, 1e-3 if name == "wide" else 1e-9) if x == 64 else (torch.float32, 1e-3)
    expected, _ = train([tuple(p.to(dtype) for p in pair) for pair in pairs], gradients, lr=1e-2, **options)
    with jax.enable_x64(x == 64):
        params, state = steps(ours.lora_rite(1e-2, **options), tree(pairs), gradients)
    assert int(state.count) == 15
    assert int(state.skipped) == 0
    for got, want, pair in zip(pairs_of(params), expected, pairs, strict=True):
        assert (w(got) - w(want)).norm() < tolerance * (w(want) - w(pair)).norm()


DECAYED = ours.lora_rite(1e-2, weight_decay=0.1)


@pytest.mark.parametrize("rank", [2, None], ids=["rank2", "full"])
@pytest.mark.parametrize("x", [32, 64])
@pytest.mark.parametrize("when", [0, 8])
def test_w_does_not_depend_on_the_factorisation(rank, x, when):
    """Other factors of the same W from the start, or from step 8 on: the moments are carried over (condition 100)."""
    gradients = gradients_of_w(20, 40, 50, rank=rank)
    results = []
    with jax.enable_x64(x == 64):
        for condition in (1.0, 1e2):
            params = tree([factors(8, 50, 40, zero_b=True, condition=3.0)])
            params, state = steps(DECAYED, params, [gradients[:when]])
            params = tree([regauged(*pairs_of(params)[0], random_matrix(8, condition, seed=5))])
            params, state = steps(DECAYED, params, [gradients[when:]], state=state)
            results.append(w(pairs_of(params)[0]))
    tolerance = 1e-9 if x == 64 else (1e-4 if rank is None else 5e-3)
    assert relative(results[1], results[0]) < tolerance


@pytest.mark.parametrize("x", [32, 64])
@pytest.mark.parametrize("case", ["r above n", "ill-conditioned", "rank-deficient", "ordinary"])
def test_bases_are_orthonormal(case, x):
    """Of factors that were never seen before: X·K has orthonormal columns and null ones, as many as X has no rank for;
    X scaled by 1e-3, to see that scale plays no part."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(8, 5 if case == "r above n" else 30))
    if case == "ill-conditioned":
        a = factors(8, 30, 40, condition=1e4)[0].numpy()
    if case == "rank-deficient":
        a = rng.normal(size=(8, 3)) @ rng.normal(size=(3, 30))
    with jax.enable_x64(x == 64):
        params = tree([(torch.tensor(1e-3 * a), torch.zeros(20, 8))])
        _, state = compiled(TX)(params, TX.init(params), [jnp.ones((20, a.shape[1]))])
        q = np.float64(params["0"]["lora_A"]).T @ np.float64(state.factors["rank_8"].basis[0])
    values = np.linalg.eigvalsh(q.T @ q)
    rank = {"r above n": 5, "rank-deficient": 3}.get(case, 8)
    assert np.abs(values[8 - rank :] - 1).max() < (1e-8 if x == 64 else 1e-2 if case == "ill-conditioned" else 1e-5)
    assert np.abs(values[: 8 - rank]).max(initial=0) < (1e-8 if x == 64 else 1e-5)


@pytest.mark.parametrize("shape", [pytest.param((8, 4, 3), marks=pytest.mark.slow), (16, 8, 4)])
def test_ranks_above_the_dimensions_learn(shape):
    """Least squares in float32; rounding noise in null directions must not be taken for directions."""
    r, n, m = shape
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.normal(size=(m, n)) / n**0.5, jnp.float32)
    params = {"lora_A": jnp.asarray(rng.normal(size=(r, n)) / n**0.5, jnp.float32), "lora_B": jnp.zeros((m, r))}
    tx = ours.lora_rite(optax.linear_schedule(1e-2, 0.0, 150))

    def step(carry, x):
        params, state = carry
        loss = lambda p: jnp.mean(jnp.square(x @ (p["lora_B"] @ p["lora_A"] - target).T))
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    batches = jnp.asarray(rng.normal(size=(150, 8, n)), jnp.float32)
    (params, _), losses = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), batches))(params)
    assert losses[-10:].sum() < 0.1 * losses[:10].sum()
    assert max(jnp.abs(p).max() for p in params.values()) < 50


# -------------------------------------------------------------------------------------------------------------- layouts


def test_layouts_and_batch_axes(x64):
    """nnx's orientation, scanned layers, factors with several axes of rows, paths that end in a variable's name: all
    move as single pairs in PEFT's orientation do."""
    pairs = [factors(4, 12, 10, zero_b=i == 1, seed=i) for i in range(4)]
    gradients = [gradients_of_w(4, 10, 12, seed=i) for i in range(4)]
    expected, _ = steps(TX, tree(pairs), gradients)

    def laid_out(p):
        """Two scanned layers as nnx has them; one of qwix, with heads; one by a layout of its own."""
        stack = lambda key: jnp.stack([p[k][key].T for k in "01"])
        return {
            "layers": [{"lora_a": stack("lora_A"), "lora_b": stack("lora_B")}],
            "attention": {"q": {"w_lora_a": p["2"]["lora_A"].T, "w_lora_b": p["2"]["lora_B"].T.reshape(4, 5, 2)}},
            "last": {"lora": {"down": p["3"]["lora_A"].reshape(4, 3, 4), "up": p["3"]["lora_B"]}},
        }

    layouts = (ours.Layout("w_lora_a", "w_lora_b", -1, 0, batch_axes=0), ours.NNX, ours.Layout("down", "up", 0, 1, 0))
    tx = ours.lora_rite(1e-2, layouts=layouts)
    params = laid_out(tree(pairs))
    state = tx.init(params)
    assert state.factors["rank_4"].basis.shape == (8, 4, 4)
    step = jax.jit(lambda p, s, g: tx.update(g, s, p))
    plain = tree(pairs)
    for t in range(4):
        gs = [jnp.asarray(g[t].numpy()) for g in gradients]
        updates, state = step(params, state, laid_out(gradients_of(plain, gs)))
        params = optax.apply_updates(params, updates)
        plain = {
            "0": {"lora_A": params["layers"][0]["lora_a"][0].T, "lora_B": params["layers"][0]["lora_b"][0].T},
            "1": {"lora_A": params["layers"][0]["lora_a"][1].T, "lora_B": params["layers"][0]["lora_b"][1].T},
            "2": {
                "lora_A": params["attention"]["q"]["w_lora_a"].T,
                "lora_B": params["attention"]["q"]["w_lora_b"].reshape(4, 10).T,
            },
            "3": {"lora_A": params["last"]["lora"]["down"].reshape(4, 12), "lora_B": params["last"]["lora"]["up"]},
        }
    for got, want in zip(pairs_of(plain), pairs_of(expected), strict=True):
        assert relative(got[0], want[0]) < 1e-12
        assert relative(got[1], want[1]) < 1e-12


def test_experts_without_a_gradient_stay_as_they_are(x64):
    """Pairs stacked in one parameter, one of which has no gradient in some steps, from the first on: as the torch
    optimizer with pairs of which one is given none, bias correction too."""
    options = {"weight_decay": 0.1, "apply_escape": True, "balance_param": True}
    tx, pairs = ours.lora_rite(1e-2, **options), [factors(4, 9, 7, seed=i) for i in range(2)]
    theirs = [[torch.nn.Parameter(x.clone()) for x in pair] for pair in pairs]
    optimizer = LoRARite([p for pair in theirs for p in pair], lr=1e-2, **options)
    params = {key: jnp.stack([jnp.asarray(pair[i].numpy()) for pair in pairs]) for i, key in enumerate(PEFT_NAMES)}
    state = tx.init(params)
    for t, gs in enumerate(zip(*(gradients_of_w(6, 7, 9, seed=i) for i in range(2)), strict=True)):
        seen = [True, t not in (0, 3)]
        optimizer.zero_grad()
        for (a, b), g, present in zip(theirs, gs, seen, strict=True):
            if present:
                set_gradients(a, b, g)
        optimizer.step()
        g = jnp.asarray(torch.stack(gs).numpy()) * jnp.asarray(seen)[:, None, None]
        gradient = {"lora_A": params["lora_B"].mT @ g, "lora_B": g @ params["lora_A"].mT}
        updates, state = compiled_update(tx)(gradient, state, params)
        assert all(u[1].any() == seen[1] for u in jax.tree.leaves(updates))
        params = optax.apply_updates(params, updates)
    assert state.factors["rank_4"].count.tolist() == [6, 4, 6, 4]
    for i, pair in enumerate(theirs):
        assert relative(w([torch.tensor(np.asarray(params[key][i])) for key in PEFT_NAMES]), w(pair)) < 1e-9


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.LoRALinear(6, 16, lora_rank=3, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.second = nnx.LoRA(16, 3, 2, base_module=nnx.Linear(16, 2, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.norm(self.first(x))))


@pytest.mark.parametrize("others", [False, True], ids=["factors", "norms_too"])
def test_flax_nnx(others):
    """nnx.Optimizer under nnx.jit, factors alone and with others by optax.partition: the loss falls, the rest stays."""
    model, rng = Model(nnx.Rngs(0)), np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(64, 6)), jnp.float32), jnp.asarray(rng.normal(size=(64, 2)), jnp.float32)
    wrt = nnx.LoRAParam
    tx = ours.lora_rite(1e-2, damping=5.0)
    if others:
        wrt = nnx.Any(nnx.LoRAParam, nnx.PathContains("norm"))
        tx = optax.partition({"lora": tx, "other": optax.adamw(1e-2)}, ours.labels)
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda m: jnp.mean(jnp.square(m(x) - y)), argnums=nnx.DiffState(0, wrt))(
            model
        )
        optimizer.update(model, gradients)
        return loss

    before = nnx.to_pure_dict(nnx.state(model))
    losses = [float(step(model, optimizer)) for _ in range(30)]
    after = nnx.to_pure_dict(nnx.state(model))
    assert losses[-1] < 0.75 * losses[0]
    assert equal(before["first"]["kernel"], after["first"]["kernel"])
    assert equal(before["norm"], after["norm"]) != others
    for one, other in ((before["first"]["lora"], after["first"]["lora"]), (before["second"], after["second"])):
        assert not equal(one["lora_a"], other["lora_a"])
        assert not equal(one["lora_b"], other["lora_b"])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"x": {"lora_A": (4, 9)}}, r"unpaired factor x/lora_A: there is no x/lora_B"),
        ({"x": {"lora_b": (4, 9)}, "y": {"lora_a": (9, 4)}}, r"unpaired factor x/lora_b: there is no x/lora_a"),
        ({"x": {"lora_A": (4, 9), "lora_B": (7, 8)}}, r"rank mismatch 4 vs 8: x/lora_A has shape \(4, 9\), x/lora_B"),
        ({"x": {"lora_a": (2, 9, 4), "lora_b": (3, 4, 7)}}, r"rank mismatch 4 vs 4: x/lora_a has shape \(2, 9, 4\)"),
        ({"x": {"lora_A": (4,), "lora_B": (7, 4)}}, r"x/lora_A has shape \(4,\); a factor is a non-empty matrix"),
        ({"x": {"lora_A": (0, 9), "lora_B": (7, 0)}}, r"x/lora_A has shape \(0, 9\); a factor is a non-empty matrix"),
        ({"x": {"lora_A": (4, 9), "lora_B": (7, 4), "bias": (7,)}}, r"x/bias \(7,\) is not a LoRA factor: .*partition"),
        ({"x/lora_B": {"weight": (7, 4), "bias": (7,)}}, r"x/lora_B/bias \(7,\) is not a LoRA factor: .*partition"),
        ({}, "no LoRA pairs"),
    ],
)  # fmt: skip
def test_trees_that_are_not_pairs_are_errors(params, message):
    params = {k: {name: jnp.ones(shape) for name, shape in layer.items()} for k, layer in params.items()}
    with pytest.raises(ValueError, match=message):
        ours.lora_rite(1e-3).init(params)


def test_the_bias_of_a_factor_is_another_parameter():
    """PEFT's lora_bias=True: ``labels`` gives it to the other transformation, as torch does to AdamW."""
    params = {"lora_A": {"weight": jnp.ones((4, 9))}, "lora_B": {"weight": jnp.ones((7, 4)), "bias": jnp.ones(7)}}
    assert ours.labels(params) == {"lora_A": {"weight": "lora"}, "lora_B": {"weight": "lora", "bias": "other"}}
    optax.partition({"lora": TX, "other": optax.adamw(1e-3)}, ours.labels).init(params)


def test_other_wrong_arguments_are_errors():
    params = tree([factors(2, 5, 4)])
    tx = ours.lora_rite(1e-3)
    with pytest.raises(ValueError, match=r"needs the parameters: call update\(gradients, state, params\)"):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match=r"0/lora_A is of int32"):
        tx.init(jax.tree.map(lambda x: x.astype(jnp.int32), params))
    for wrong in (
        {"learning_rate": -1.0}, {"learning_rate": "1e-3"}, {"learning_rate": float("nan")}, {"eps": 0.0},
        {"betas": (1.0, 0.9)}, {"betas": (0.9, 1.1)}, {"betas": 0.9}, {"damping": -1.0}, {"row_beta": 1.0},
        {"weight_decay": float("inf")},
        {"row_equilibration": 1}, {"clip_unmagnified_grad": None}, {"update_capping": jnp.ones(2)},
        {"learning_rate": np.array(-1.0)}, {"damping": np.ones(1)}, {"row_beta": np.array(True)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be "):
            ours.lora_rite(**{"learning_rate": 1e-3, **wrong})
    with pytest.raises(TypeError, match="layouts must be Layouts, got 'lora_A'"):
        ours.lora_rite(1e-3, layouts=("lora_A",))


# ------------------------------------------------------------------------------------------------- what optax users do


def test_init_takes_shapes():
    params = tree([factors(4, 9, 7)])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    shape = lambda x: (x.shape, x.dtype)
    assert jax.tree.map(shape, TX.init(shapes)) == jax.tree.map(shape, TX.init(params))


def test_no_retrace_under_a_changing_learning_rate():
    """inject_hyperparams: every number is an array, changed between steps by hand; one trace, and the same result as
    with constants."""
    traces = []
    tx = optax.inject_hyperparams(ours.lora_rite)(learning_rate=1e-2, weight_decay=0.1)
    params = tree([factors(4, 9, 7)])
    state = tx.init(params)
    assert {"learning_rate", "damping", "clip_unmagnified_grad"} <= set(state.hyperparams)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gs):
        traces.append(1)
        return a_step(tx, params, state, gs)

    schedule = lambda t: 1e-2 / (1 + t)
    gradients = gradients_of_w(4, 7, 9)
    expected, _ = steps(ours.lora_rite(schedule, weight_decay=0.1), params, [gradients])
    for t, g in enumerate(gradients):
        state.hyperparams["learning_rate"] = jnp.asarray(schedule(t))
        params, state = step(params, state, [jnp.asarray(g.numpy())])
    assert len(traces) == 1
    for got, want in zip(pairs_of(params)[0], pairs_of(expected)[0], strict=True):
        assert relative(got, want) < 1e-6


def test_numbers_may_be_arrays_of_numpy():
    params, gradients = tree([factors(4, 9, 7)]), gradients_of_w(1, 7, 9)
    of_numpy = ours.lora_rite(np.array(1e-2), betas=(np.float32(0.9), np.array(0.999)), damping=np.array(20))
    (got, state), (want, _) = (steps(tx, params, [gradients]) for tx in (of_numpy, TX))
    assert {x.dtype for x in jax.tree.leaves(state.factors["rank_4"].second_moment)} == {jnp.dtype(jnp.float32)}
    for one, other in zip(pairs_of(got)[0], pairs_of(want)[0], strict=True):
        assert relative(one, other) < 1e-6


def test_chain_equals_the_whole(x64):
    """scale_by_lora_rite, weight decay and a learning rate in a chain; what follows scales by a number (the size of
    the last step is measured), and extra arguments pass through."""
    pairs, gradients = [factors(4, 9, 7, zero_b=i == 0, seed=i) for i in range(2)], [gradients_of_w(8, 7, 9)] * 2
    options = {"row_beta": 0.9, "update_skipping": 2.0, "update_capping": 0.8, "apply_escape": True}
    chain = optax.chain(
        ours.scale_by_lora_rite(**options), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-2)
    )
    got, _ = steps(chain, tree(pairs), gradients)
    want, _ = steps(ours.lora_rite(1e-2, weight_decay=0.1, damping=0.0, **options), tree(pairs), gradients)
    for one, other in zip(pairs_of(got), pairs_of(want), strict=True):
        assert relative(w(one), w(other)) < 1e-10
    params = tree(pairs)
    with_extra = jax.jit(lambda p, value: chain.update(p, chain.init(p), p, value=value)[0])
    assert jax.tree.structure(with_extra(params, 1.0)) == jax.tree.structure(params)


def test_multi_steps_equal_the_mean_gradient(x64):
    pairs, gradients = [factors(4, 9, 7, zero_b=True)], [gradients_of_w(6, 7, 9)]
    tx = optax.MultiSteps(TX, every_k_schedule=2, accumulator_dtype=jnp.float64)
    got, state = steps(tx, tree(pairs), gradients)
    want, _ = steps(TX, tree(pairs), [(gradients[0][::2] + gradients[0][1::2]) / 2])
    assert int(state.inner_opt_state.count) == 3
    for one, other in zip(pairs_of(got)[0], pairs_of(want)[0], strict=True):
        assert relative(one, other) < 1e-12


def test_scan_equals_the_loop():
    pairs, g = [factors(4, 9, 7, zero_b=True)], gradients_of_w(5, 7, 9)
    params = tree(pairs)
    step = lambda carry, gs: (a_step(TX, *carry, [gs]), None)
    scanned = jax.jit(lambda p: jax.lax.scan(step, (p, TX.init(p)), jnp.asarray(g.numpy(), jnp.float32))[0])(params)
    looped = steps(TX, params, [g])
    assert jax.tree.structure(scanned) == jax.tree.structure(looped)
    for one, other in zip(jax.tree.leaves(scanned[0]), jax.tree.leaves(looped[0]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


SKIPPING = ours.lora_rite(1e-2, update_skipping=1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("good", [0, 2])
def test_a_non_finite_gradient_skips_the_whole_step(bad, good):
    """No update, the state bitwise as it was but for ``skipped``, and it goes on as if the step had never been."""
    pairs, gradients = [factors(4, 9, 7, seed=i) for i in range(2)], [gradients_of_w(4, 7, 9)] * 2
    params, state = steps(SKIPPING, tree(pairs), [g[:good] for g in gradients])
    gradient = gradients_of(params, [jnp.asarray(g[0].numpy()) for g in gradients])
    gradient["1"]["lora_A"] = gradient["1"]["lora_A"].at[2, 3].set(bad)
    updates, after = compiled_update(SKIPPING)(gradient, state, params)
    assert not any(u.any() for u in jax.tree.leaves(updates))
    assert int(after.skipped) == 1
    assert equal(after._replace(skipped=state.skipped), state)
    rest = [g[2:] for g in gradients]
    results = [steps(SKIPPING, params, rest, state=s)[0] for s in (after, state)]
    assert equal(*results)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_learning_rate_skips_the_step(bad):
    """Without damping, lr is in none of the matrices."""
    tx = ours.lora_rite(lambda count: jnp.where(count == 1, bad, 1e-2), **ours.PUBLISHED)
    pairs, gradients = tree([factors(4, 9, 7)]), gradients_of_w(2, 7, 9)
    params, state = steps(tx, pairs, [gradients[:1]])
    after, skipped = steps(tx, params, [gradients[1:]], state=state)
    assert equal(after, params)
    assert equal(skipped, state._replace(skipped=state.skipped + 1))


def test_zero_gradients_and_lr_zero_move_nothing():
    params = tree([factors(4, 9, 7, zero_b=True)])
    for tx, g in (
        (TX, torch.zeros(2, 7, 9)),
        (ours.lora_rite(0.0, balance_param=True, weight_decay=0.1), gradients_of_w(2, 7, 9)),
    ):
        after, state = steps(tx, params, [g])
        assert equal(after, params)
        assert int(state.count) == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_low_precision_factors_learn_as_float32_ones(dtype):
    """State float32, updates of the parameters' dtype, loss after 500 steps within 2% of float32's."""
    target = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, 3)), jnp.float32)
    target = target[0] @ jnp.asarray(np.random.default_rng(2).normal(size=(3, 9)), jnp.float32)
    tx = ours.lora_rite(optax.linear_schedule(2e-2, 0.0, 500))

    @jax.jit
    def fit(params):
        def step(carry, _):
            params, state = carry
            wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
            g = (wide["0"]["lora_B"] @ wide["0"]["lora_A"] - target) / 10
            return a_step(tx, params, state, [g]), None

        params, state = jax.lax.scan(step, (params, tx.init(params)), None, 500)[0]
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        return params, state, jnp.mean(jnp.square(wide["0"]["lora_B"] @ wide["0"]["lora_A"] - target))

    start = factors(2, 9, 7, zero_b=True)
    losses = []
    for kind in (jnp.float32, dtype):
        params, state, loss = fit(tree([start], kind))
        losses.append(float(loss))
        assert {x.dtype for x in jax.tree.leaves((params, state.previous))} == {jnp.dtype(kind)}
        floats = [x for x in jax.tree.leaves(state._replace(previous=None)) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_stochastic_rounding(dtype):
    """Unbiased, to a neighbour, exact for values that the dtype has."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.concatenate([rng.normal(size=20), 1e-6 * rng.normal(size=20), [0.0, 1.0, -2.5]]), jnp.float32)
    many = jnp.tile(x, (4000, 1))
    rounded = np.asarray(algebra.stochastic_round(many, jnp.dtype(dtype), jax.random.key(7)))
    assert np.array_equal(rounded, np.asarray(jnp.asarray(rounded).astype(dtype).astype(jnp.float32)))
    exact = np.asarray(x.astype(dtype).astype(jnp.float32) == x)
    assert exact.sum() >= 3
    assert np.array_equal(rounded[:, exact], np.asarray(many)[:, exact])
    spacing = (rounded.max(0) - rounded.min(0))[~exact]
    error = rounded[:, ~exact] - np.asarray(many)[:, ~exact]
    assert (np.abs(error) < spacing).all()
    assert np.abs(error.astype(np.float64).mean(0) / spacing).max() < 5 * 0.5 / 4000**0.5


def test_orbax_restores_bitwise(tmp_path):
    """The state is arrays only, and a restored run ends as the uninterrupted one."""
    import orbax.checkpoint as ocp

    pairs, gradients = [factors(4, 9, 7)], [gradients_of_w(5, 7, 9)]
    params, state = steps(TX, tree(pairs), [g[:3] for g in gradients])
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        template = jax.tree.map(jnp.zeros_like, {"params": params, "state": TX.init(params)})
        restored = checkpointer.restore(tmp_path / "c", template)
    assert isinstance(restored["state"], ours.LoRARiteState)
    assert equal(restored, {"params": params, "state": state})
    rest = [g[3:] for g in gradients]
    assert equal(steps(TX, restored["params"], rest, state=restored["state"]), steps(TX, params, rest, state=state))


def test_state_is_small():
    """4(m+n)(2r+1) + 40r² bytes and some scalars a pair, at the shapes of Gemma-2B: about AdamW's state."""
    shapes = [(2048, 2048), (2048, 256), (2048, 256), (2048, 2048), (2048, 16384), (2048, 16384), (16384, 2048)]
    params = {str(i): {"lora_a": jnp.ones((n, 16)), "lora_b": jnp.ones((16, m))} for i, (n, m) in enumerate(shapes)}
    size = lambda tx, p: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, p)))
    tx = ours.lora_rite(1e-3)
    formula = lambda m, n, itemsize: (4 * (16 + 1) + itemsize * 16) * (m + n) + 40 * 16**2 + 2 * (4 * 4 + 1)
    assert size(tx, params) == sum(formula(m, n, 4) for n, m in shapes) + 8
    assert size(tx, params) < 1.08 * size(optax.adamw(1e-3), params)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert size(tx, half) == sum(formula(m, n, 2) for n, m in shapes) + 8


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from lora_rite.optax import lora_rite

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)
rng = np.random.default_rng(0)
params = {
    "scanned": {"lora_a": jnp.array(rng.normal(size=(4, 16, 4))), "lora_b": jnp.zeros((4, 4, 8))},
    "single": {"lora_a": jnp.array(rng.normal(size=(16, 4))), "lora_b": jnp.array(rng.normal(size=(4, 24)))},
}
specs = {
    "layers": {"scanned": {"lora_a": P("x"), "lora_b": P("x")}, "single": {"lora_a": P("x"), "lora_b": P(None, "x")}},
    "rows": {"scanned": {"lora_a": P(None, "x"), "lora_b": P(None, None, "x")},
             "single": {"lora_a": P("x"), "lora_b": P(None, "x")}},
    "rank": {"scanned": {"lora_a": P(None, None, "x"), "lora_b": P(None, "x")},
             "single": {"lora_a": P(None, "x"), "lora_b": P("x")}},
}
gradients = [jax.tree.map(lambda x: jnp.array(0.1 * rng.normal(size=x.shape)), params) for _ in range(2)]
tx = optax.inject_hyperparams(lora_rite)(1e-2, apply_escape=True)

@jax.jit
def step(params, state, gradient):
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

def run(place):
    p = place(params)
    state = tx.init(p)
    assert jax.tree.all(jax.tree.map(lambda m, x: m.sharding == x.sharding, state.inner_state.first_moment, p))
    for g in gradients:
        p, state = step(p, state, place(g))
    return p, state.inner_state

plain = run(lambda tree: tree)
assert int(plain[1].count) == 2
make_mesh = lambda n: jax.make_mesh((n,), ("x",), devices=jax.devices()[:n])  # explicit axes
auto_mesh = lambda n: Mesh(np.array(jax.devices()[:n]), ("x",))
for mesh, name in zip((make_mesh(2), auto_mesh(4)), sys.argv[1:]):
    n = mesh.size
    place = lambda tree: jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs[name])
    sharded, state = run(place)
    assert int(state.count) == 2
    assert all(len(x.sharding.device_set) == n and not x.is_fully_replicated for x in jax.tree.leaves(sharded)), name
    for x, y in zip(jax.tree.leaves(sharded), jax.tree.leaves(plain[0]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11, err_msg=f"{n} devices, {name}")
print("equal")
"""


@pytest.mark.parametrize("axes", [("rows", "layers"), pytest.param(("layers", "rank"), marks=pytest.mark.slow)])
def test_sharded_over_2_and_4_devices_equals_one(axes):
    """Scanned layers, rows or ranks over the devices of a mesh; in a process that simulates four."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", SHARDED, *axes], capture_output=True, text=True, check=False, env=env)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "equal\n"


@pytest.mark.slow
def test_the_example_and_the_bench_run(tmp_path):
    root, out = Path(__file__).parents[1], tmp_path / "out.json"
    few = ["--pretraining_steps", "30", "--steps", "30"]
    step = ["step", "--layers", "1", "--rounds", "2", "--dtype", "bfloat16", "--rank", "4", "--out", out]
    for words in (["examples/jax_finetune.py", *few], ["benchmarks/bench_jax.py", *step]):
        run = subprocess.run([sys.executable, root / words[0], *words[1:]], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        result = json.loads(run.stdout)
        if "rows" not in result:
            assert result["held_out_loss"] < result["held_out_loss_before"]
    assert json.loads(out.read_text()) == result
    assert [row["ratio_to_adamw"] for row in result["rows"] if row["optimizer"] == "optax.adamw"] == [1.0]


# ---------------------------------------------------------------------------------------------- torch here, JAX there


def test_imports():
    """Neither library loads the other; a missing extra is named."""
    modules = loaded_after("import lora_rite.optax")
    assert {"jax", "optax"} <= modules
    assert not {"torch", "flax"} & modules
    assert "jax" in loaded_after("import lora_rite; lora_rite.optax.lora_rite")
    code = "import sys\nsys.modules['jax'] = None\nimport lora_rite.optax"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'lora_rite.optax needs jax: pip install "lora-rite[jax]"' in run.stderr


def test_constants_are_those_of_torch():
    assert (ours.PUBLISHED, algebra.LIVE, algebra.NOISE) == (lora_rite.PUBLISHED, basis.LIVE, basis.NOISE)
