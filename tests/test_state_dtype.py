"""First moments in bfloat16 (``first_moment_dtype``): what is kept, for how long, and what depends on it."""

import copy
import pickle
import warnings

import pytest
import torch
from engines import ENGINES, use
from problems import factors, gradients_of_w, random_matrix, regauged, relative, set_gradients, train, w
from test_numerics import equal
from test_state import _addresses, _storages, advance, copied, load_into

from lora_rite import LoRARite, create_lora_rite, layer_report
from lora_rite.optim.optimizer import state_bytes

BF16 = {"first_moment_dtype": "bfloat16"}


def start(dtype=torch.float32, seed=0, **options):
    """As that of test_state: three named pairs, the first from B = 0, and a bias for AdamW."""
    named = []
    for i in range(3):
        a, b = (torch.nn.Parameter(x.to(dtype)) for x in factors(4, 9, 7, zero_b=i == 0, seed=i + seed))
        named += [(f"l{i}.lora_A.weight", a), (f"l{i}.lora_B.weight", b)]
    named.append(("bias", torch.nn.Parameter(torch.ones(5, dtype=dtype))))
    return dict(named), LoRARite(named, lr=1e-2, adamw_lr=1e-2, **options)


def first_moments(optimizer):
    return [state["first_moment"] for state in optimizer.state.values() if "first_moment" in state]


def dtypes(optimizer):
    return {moment.dtype for moment in first_moments(optimizer)}


def change(before, after):
    return w(after) - w(before)


# ------------------------------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"])
def test_the_rest_of_the_state_stays_and_so_does_the_first_step(dtype, eager_engine):
    """M begins at zero and is rounded after it has been used: one step is bitwise the same, and all that it leaves but
    M; the memory is 2 bytes an element instead of 4, or of 8."""
    (params, optimizer), (others, plain) = start(dtype, **BF16), start(dtype)
    for run in ((params, optimizer), (others, plain)):
        advance(*run, 1, seed=1)
    assert dtypes(optimizer) == {torch.bfloat16}
    saved, elements = state_bytes(plain) - state_bytes(optimizer), sum(m.numel() for m in first_moments(plain))
    assert saved == (6 if dtype == torch.float64 else 2) * elements
    for (p, state), (other, expected) in zip(optimizer.state.items(), plain.state.items(), strict=True):
        assert torch.equal(p, other)
        assert equal(
            {key: t for key, t in state.items() if key != "first_moment"},
            {key: t for key, t in expected.items() if key != "first_moment"},
        )


def test_rounding_is_to_a_neighbour_without_bias_and_by_other_noise_than_the_factors():
    pairs = [factors(16, 300, 200, dtype=torch.bfloat16)]
    gradients = [gradients_of_w(1, 200, 300)]
    (pair,), optimizer = train(pairs, gradients, lr=1e-2, **BF16)
    _, plain = train(pairs, gradients, lr=1e-2)
    exact, kept = (torch.cat([m.flatten().double() for m in first_moments(o)]) for o in (plain, optimizer))
    unit = 2.0 ** (torch.frexp(exact).exponent - 8)  # from one neighbour to the other
    error = (kept - exact) / unit
    assert error.abs().max() < 1
    assert not torch.equal(kept, exact.bfloat16().double())
    # Rounded up with the probability p of what is above the lower neighbour, the error has variance p(1 − p), 1/6 in
    # the mean: √(n/6) of the sum is one standard deviation.
    assert abs(error.sum()) < 4 * (len(error) / 6) ** 0.5
    # Where the factor was rounded away from zero, M is so as often as elsewhere.
    single, _ = train([tuple(x.float() for x in pairs[0])], gradients, lr=1e-2)
    x = torch.cat([p.detach().flatten().double() for p in single[0]])
    of_factor = (torch.cat([p.detach().flatten().double() for p in pair]) - x).sign() * x.sign()
    both = torch.stack([error.sign() * exact.sign(), of_factor])
    assert abs(torch.corrcoef(both)[0, 1]) < 4 / len(error) ** 0.5


def test_moments_follow_small_gradients():
    """β₁ near 1 changes M by less than half of the distance to its neighbour: rounded to nearest it would stay."""
    pair, betas = factors(4, 60, 50), (0.999, 0.999)
    gradients = gradients_of_w(1, 50, 60).expand(50, -1, -1)
    gradients = torch.cat([gradients] + [0 * gradients] * 5)  # then M falls to a sixth
    norms = []
    for options in ({}, BF16):
        _, optimizer = train([pair], [gradients], lr=0.0, betas=betas, **options)
        norms.append(torch.stack([m.double().norm() for m in first_moments(optimizer)]))
    assert (norms[1] / norms[0] - 1).abs().max() < 0.05


# ----------------------------------------------------------------------------------------------- what depends on it


@pytest.mark.parametrize("zero_b", [False, True], ids=["dense", "zero_b"])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_the_factorisation_matters_by_the_noise_of_rounding_alone(condition, zero_b, eager_engine):
    """In float64, over 30 steps of white noise, at which W is a random walk. M is kept in the orthonormal basis of the
    other factor, so that the size of the noise (2⁻⁸ of M and less) does not depend on the factorisation; its draw
    does: another factorisation turns the basis. A condition of 10⁴ is no worse than a rotation (1.0); between 3.5e-3
    and 5e-3 were measured."""
    gradients = [gradients_of_w(30, 40, 50, seed=3)]
    plain = factors(8, 50, 40, zero_b=zero_b, condition=3.0)
    other = regauged(*plain, random_matrix(8, condition, seed=5))
    runs = [change(pair, train([pair], gradients, lr=0.01, **BF16)[0][0]) for pair in (plain, other)]
    exact = change(plain, train([plain], gradients, lr=0.01)[0][0])
    assert 1e-4 < relative(runs[1], runs[0]) < 8e-3
    assert relative(runs[0], exact) < 8e-3


@pytest.mark.parametrize("elements", [1, 200], ids=["one_by_one", "chunks"])
def test_noise_does_not_depend_on_the_batch(elements, eager_engine, monkeypatch):
    """In float64: other noise would change W by 1e-3. (The same noise in all engines too.)"""
    shapes = [(4, 9, 7)] * 4 + [(8, 9, 12)] * 3 + [(1, 5, 6)]
    pairs = [factors(*shape, condition=4.0, zero_b=i % 3 == 0, seed=i) for i, shape in enumerate(shapes)]
    gradients = [gradients_of_w(12, m, n, seed=i) for i, (_, n, m) in enumerate(shapes)]
    got, _ = train(pairs, gradients, lr=0.01, **BF16)
    use(monkeypatch, ENGINES["stacked"], segment_elements=elements)
    expected, _ = train(pairs, gradients, lr=0.01, **BF16)
    other, _ = train(pairs[::-1], gradients[::-1], lr=0.01, **BF16)  # other positions: other noise
    for one, two, three in zip(got, expected, other[::-1], strict=True):
        assert relative(w(one), w(two)) < 1e-9
        assert relative(w(three), w(two)) > 1e-6


@pytest.mark.parametrize("columns", ["interleaved", "side by side", ""], ids=["experts", "block_diagonal_a", "groups"])
def test_several_pairs_in_a_parameter(columns, eager_engine):
    """Each as it is alone, to the noise; those without a gradient keep their M bit for bit."""
    pairs = [factors(4, 9, 7, zero_b=i == 1, seed=i) for i in range(3)]
    gradients = [gradients_of_w(8, 7, 9, seed=i) for i in range(3)]

    def join(two):
        b = torch.stack([b for _, b in two], {"interleaved": 2, "side by side": 1, "": 0}[columns])
        return torch.cat([a for a, _ in two]), b.flatten(1) if columns else b.flatten(0, 1)

    def apart(moment):
        if columns == "interleaved":
            return moment.unflatten(1, (-1, 3)).unbind(2)
        return moment.unflatten(1 if columns else 0, (3, -1)).unbind(1 if columns else 0)

    a, b = (torch.nn.Parameter(x) for x in join(pairs))
    group = {"params": [a, b], "kind": "lora", "blocks": 3, "columns": columns}
    optimizer = LoRARite([group], lr=1e-2, clip_unmagnified_grad=0.0, **BF16)
    expected, _ = train(pairs, gradients, lr=1e-2, clip_unmagnified_grad=0.0)
    leaves = [[torch.nn.Parameter(x.clone()) for x in pair] for pair in pairs]

    def step(t, some):
        for i, pair in enumerate(leaves):
            set_gradients(*pair, gradients[i][t] * (i in some))
        a.grad, b.grad = join([(x.grad, y.grad) for x, y in leaves])
        optimizer.step()
        for pair, x, y in zip(leaves, a.detach().chunk(3), apart(b.detach()), strict=True):
            pair[0].data, pair[1].data = x.clone(), y.clone()

    for t in range(8):
        step(t, (0, 1, 2))
    for pair, alone in zip(leaves, expected, strict=True):
        assert relative(w(pair), w(alone)) < 4e-3
    before = [optimizer.state[p]["first_moment"].clone() for p in (a, b)]
    step(0, (0, 2))
    after = [optimizer.state[p]["first_moment"] for p in (a, b)]
    for one, other in ((before[0].chunk(3), after[0].chunk(3)), (apart(before[1]), apart(after[1]))):
        assert [torch.equal(x, y) for x, y in zip(one, other, strict=True)] == [False, True, False]


def test_one_frozen_factor(eager_engine):
    a, b = factors(4, 30, 20)
    runs = []
    for options in (BF16, {}):
        pair = torch.nn.Parameter(a.clone(), requires_grad=False), torch.nn.Parameter(b.clone())
        optimizer = LoRARite(zip(("x.lora_A", "x.lora_B"), pair, strict=True), lr=1e-2, **options)
        for g in gradients_of_w(8, 20, 30):
            pair[1].grad = g @ pair[0].mT
            optimizer.step()
        runs.append(change((a, b), pair))
        assert dtypes(optimizer) == {torch.bfloat16 if options else torch.float64}
    assert 0 < relative(*runs) < 8e-3


def skip(optimizer):
    """How many steps are not made, of one that is not; with ``capturable``, the report says so."""
    optimizer.step()
    return optimizer.report()["skipped"]


@pytest.mark.parametrize("capturable", [False, True])
def test_a_skipped_step_leaves_moments_as_they_are(capturable):
    """Where the device decides, values are rounded again, and stay: bfloat16 has them."""
    params, optimizer = start(capturable=capturable, **BF16)
    advance(params, optimizer, 3, seed=1)
    before = copied(params, optimizer)
    params["l1.lora_B.weight"].grad = torch.full_like(params["l1.lora_B.weight"], torch.nan)
    with pytest.warns(UserWarning, match=r"non-finite gradient of l1\.lora_B\.weight"):
        skipped = skip(optimizer)
    assert skipped == 1
    assert equal(copied(params, optimizer), before)


def test_a_change_from_outside_starts_moments_anew_in_their_dtype():
    params, optimizer = start(**BF16)
    advance(params, optimizer, 3, seed=1)
    with torch.no_grad():
        params["l1.lora_A.weight"].mul_(2)
    with pytest.warns(UserWarning, match="1 pairs were changed from outside"):
        advance(params, optimizer, 1, seed=2)
    assert dtypes(optimizer) == {torch.bfloat16}
    assert [int(optimizer.state[params[f"l{i}.lora_A.weight"]]["step"]) for i in range(3)] == [4, 1, 4]


# ------------------------------------------------------------------------------------------- saving, loading, copying


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["load", "deepcopy", "pickle"])
def test_resume_is_bitwise(dtype, how, tmp_path, eager_engine):
    params, optimizer = start(dtype, **BF16)
    advance(params, optimizer, 5, seed=1)
    if how == "load":
        torch.save({"weights": params, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
        saved = torch.load(tmp_path / "state.pt", weights_only=True)
        other, twin = start(dtype, seed=5, **BF16)
        load_into(other, twin, saved["weights"], saved["optimizer"])
    else:
        duplicate = copy.deepcopy if how == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
        other, twin = duplicate((params, optimizer))
    assert equal(copied(other, twin), copied(params, optimizer))
    advance(params, optimizer, 8, seed=2)
    advance(other, twin, 8, seed=2)
    assert equal(copied(other, twin), copied(params, optimizer))
    assert dtypes(twin) == {torch.bfloat16}
    assert twin.report()["update_norm"] == optimizer.report()["update_norm"]
    assert layer_report(twin) == layer_report(optimizer)


@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "stepped"])
@pytest.mark.parametrize(("saved", "loads"), [(None, "bfloat16"), ("bfloat16", None), ("without", "bfloat16")])
def test_a_state_of_the_other_dtype_is_converted_and_the_option_stays(saved, loads, steps):
    """The rule: ``first_moment_dtype`` is the loading optimizer's, all other settings are the state's. To the nearest
    value, or, to more precision, the same. (A state of before has no such key.)"""
    params, optimizer = start(first_moment_dtype=None if saved == "without" else saved)
    advance(params, optimizer, 4, seed=1)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["lr"] = 0.123
    if saved == "without":
        for group in state_dict["param_groups"]:
            del group["first_moment_dtype"]
    others, other = start(first_moment_dtype=loads, seed=5)
    advance(others, other, steps, seed=3)
    load_into(others, other, params, state_dict)
    assert [group["first_moment_dtype"] for group in other.param_groups] == [loads] * 2
    assert other.param_groups[0]["lr"] == 0.123
    target = getattr(torch, loads or "float32")
    for p, q in zip(params.values(), others.values(), strict=True):
        moment = other.state[q].get("first_moment")
        if moment is not None:
            assert torch.equal(moment, optimizer.state[p]["first_moment"].to(target))
            assert moment.dtype == target
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing looks like a change from outside
        advance(others, other, 2, seed=2)
    assert dtypes(other) == {target}
    assert state_bytes(other) == _storages(other)


def test_a_state_of_fewer_or_more_groups_is_still_refused():
    params, optimizer = start(**BF16)
    advance(params, optimizer, 1, seed=1)
    fewer, more = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    fewer["param_groups"].pop()
    more["param_groups"].append({**more["param_groups"][1], "params": [7], "param_names": ["more"]})
    before = copied(params, optimizer)
    for state_dict in (fewer, more):
        with pytest.raises(ValueError, match="not in the"):
            optimizer.load_state_dict(state_dict)
        for group in state_dict["param_groups"]:
            del group["param_names"]
        with pytest.raises(ValueError, match="parameter groups"):
            optimizer.load_state_dict(state_dict)
        assert equal(copied(params, optimizer), before)


@pytest.mark.parametrize(("first", "then"), [(None, "bfloat16"), ("bfloat16", None)])
@pytest.mark.parametrize("some", [range(3), [1]], ids=["all", "some"])
def test_an_option_that_changes_between_steps_converts_what_is_stepped(first, then, some, eager_engine):
    """No memory is kept but the states'; those of other pairs follow with their next step."""
    params, optimizer = start(first_moment_dtype=first)
    advance(params, optimizer, 3, seed=1)
    optimizer.param_groups[0]["first_moment_dtype"] = then
    target = getattr(torch, then or "float32")
    for i in set(range(3)) - set(some):
        params[f"l{i}.lora_A.weight"].grad = params[f"l{i}.lora_B.weight"].grad = None
    optimizer.step()
    for i in range(3):
        for side in "AB":
            moment = optimizer.state[params[f"l{i}.lora_{side}.weight"]]["first_moment"]
            assert (moment.dtype == target) == (i in some)
    assert _storages(optimizer) == state_bytes(optimizer)
    advance(params, optimizer, 1, seed=2)
    assert dtypes(optimizer) == {target}
    assert _storages(optimizer) == state_bytes(optimizer)
    before = _addresses(optimizer)
    advance(params, optimizer, 2, seed=3)
    assert _addresses(optimizer) == before


def test_an_option_that_changes_to_what_there_is_not_is_an_error():
    params, optimizer = start()
    advance(params, optimizer, 1, seed=1)
    before = copied(params, optimizer)
    optimizer.param_groups[0]["first_moment_dtype"] = "float16"
    with pytest.raises(ValueError, match="first_moment_dtype must be None or \"bfloat16\", got 'float16'"):
        optimizer.step()
    assert equal(copied(params, optimizer), before)


def test_groups_have_each_their_own(eager_engine):
    """Also one that is added later."""
    pairs = [[torch.nn.Parameter(x) for x in factors(4, 9, 7, dtype=torch.float32, seed=i)] for i in range(3)]
    optimizer = LoRARite([{"params": pairs[0]}, {"params": pairs[1], **BF16}], lr=1e-2)
    for t, g in enumerate(gradients_of_w(4, 7, 9)):
        if t == 2:
            optimizer.add_param_group({"params": pairs[2], **BF16})
        for pair in pairs[: 2 + (t >= 2)]:
            set_gradients(*pair, g)
        optimizer.step()
    kept = [optimizer.state[a]["first_moment"].dtype for a, _ in pairs]
    assert kept == [torch.float32, torch.bfloat16, torch.bfloat16]
    with pytest.raises(ValueError, match=r"unknown key 'mu_dtype'.*did you mean 'first_moment_dtype'"):
        optimizer.add_param_group({"params": pairs[2], "mu_dtype": "bfloat16"})


@pytest.mark.parametrize(("r", "share"), [(16, 0.5785), (64, 0.5816)])
def test_share_of_the_state_of_an_adamw_in_bfloat16(r, share):
    """Of the seven linear maps of a layer of Gemma-2B, as docs/scaling.md gives it; AdamW has 4 bytes an element."""
    maps = {"q": (2048, 2048), "k": (2048, 256), "v": (2048, 256), "o": (2048, 2048), "gate": (2048, 16384),
            "up": (2048, 16384), "down": (16384, 2048)}  # fmt: skip
    model = torch.nn.ModuleDict()
    for name, (n, m) in maps.items():
        model[name] = torch.nn.Module()
        model[name].lora_A = torch.nn.Linear(n, r, bias=False, dtype=torch.bfloat16)
        model[name].lora_B = torch.nn.Linear(r, m, bias=False, dtype=torch.bfloat16)
    optimizer = create_lora_rite(model, lr=1e-3, **BF16)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    adamw = 4 * sum(p.numel() for p in model.parameters())
    assert optimizer.report()["state_bytes"] / adamw == pytest.approx(share, abs=1e-3)
