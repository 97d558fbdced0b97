"""Steps on unusual gradients, parameters and settings. Ids (B1, …) are those of the project's list of tortures."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from problems import factors, gradients_of_w, relative, set_gradients, train, w
from reference import Reference

from lora_rite import LoRARite, NonFiniteError
from lora_rite.algebra.basis import initial_basis
from lora_rite.algebra.linalg import eigh, trace
from lora_rite.algebra.rounding import stochastic_round
from lora_rite.bench.shapes import formula
from lora_rite.bench.watch import Watch
from lora_rite.optim.optimizer import state_bytes
from lora_rite.plan.pairs import Shape


def start(*, zero_b=False, dtype=torch.float32, pairs=2, **options):
    params = [
        [torch.nn.Parameter(x) for x in factors(4, 9, 7, zero_b=zero_b, dtype=dtype, seed=i)] for i in range(pairs)
    ]
    return params, LoRARite([p for pair in params for p in pair], **{"lr": 1e-2, **options})


def advance(params, optimizer, steps=1, seed=0, scale=0.1):
    for g in gradients_of_w(steps, 7, 9, seed=seed, scale=scale):
        for a, b in params:
            set_gradients(a, b, g)
        optimizer.step()


def snapshot(params, optimizer):
    """Bitwise comparable copies of parameters and state, without the counter of skipped steps."""
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.pop("skipped")
    return [p.detach().clone() for pair in params for p in pair], state


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal(x, y) for x, y in zip(one, other, strict=True))
    return one == other


def test_first_step_from_zero(engine):
    """B1: A stays bitwise, B moves, no warning; then A moves."""
    params, optimizer = start(zero_b=True, pairs=1)
    a, b = params[0]
    before = a.detach().clone()
    advance(params, optimizer)
    assert torch.equal(a, before)
    assert b.norm() > 0
    advance(params, optimizer, seed=1)
    assert not torch.equal(a, before)


def test_dead_pair_is_a_finite_no_op(engine):
    """B2: counted in the report."""
    a, b = torch.nn.Parameter(torch.zeros(2, 5)), torch.nn.Parameter(torch.zeros(4, 2))
    optimizer = LoRARite([a, b], lr=0.1)
    for _ in range(3):
        a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
        optimizer.step()
    assert not a.any()
    assert not b.any()
    assert optimizer.report()["dead_pairs"] == 1


@pytest.mark.parametrize("missing", [(0, 0), (0, 1), None], ids=["A", "B", "pair"])
def test_missing_gradients(missing, engine):
    """B3: the pair is passed over, and the others move as without it."""
    params, optimizer = start(pairs=3)
    alone, alone_optimizer = start(pairs=3)
    advance(params, optimizer)
    advance(alone, alone_optimizer)
    frozen = snapshot(params[:1], optimizer)
    for pairs in (params, alone):
        for (a, b), g in zip(pairs, gradients_of_w(3, 7, 9, seed=5), strict=True):
            set_gradients(a, b, g)
    for side in (0, 1) if missing is None else missing[1:]:
        params[0][side].grad = None
    alone_optimizer.param_groups[0]["params"] = [p for pair in alone[1:] for p in pair]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    said = [str(w.message) for w in caught]
    assert [m.startswith("parameter 0 and its partner: one has a gradient") for m in said] == [True] * (
        missing is not None
    )
    alone_optimizer.step()
    assert optimizer.report()["pairs_preconditioned"] == 2
    assert equal([p.detach() for p in params[0]], frozen[0])
    assert all(equal(optimizer.state_dict()["state"][i], frozen[1]["state"][i]) for i in (0, 1))
    for pair, other in zip(params[1:], alone[1:], strict=True):
        torch.testing.assert_close(pair, other, rtol=1e-6, atol=1e-7)
    optimizer.zero_grad()
    before = snapshot(params, optimizer)
    optimizer.step()
    assert equal(snapshot(params, optimizer), before)
    assert optimizer.report()["pairs_preconditioned"] == 0


def test_zero_gradients():
    """B4: nothing moves without moments; with them, factors coast as Adam's do."""
    params, optimizer = start()
    before = [p.detach().clone() for pair in params for p in pair]
    for a, b in params:
        a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    optimizer.step()
    assert equal([p.detach() for pair in params for p in pair], before)
    advance(params, optimizer)
    before = [p.detach().clone() for pair in params for p in pair]
    for a, b in params:
        a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    optimizer.step()
    assert not equal([p.detach() for pair in params for p in pair], before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 3, 5], ids=["first", "middle", "last"])
@pytest.mark.parametrize("steps", [5, 0])
def test_non_finite_gradient_skips_the_whole_step(bad, position, steps, engine):
    """B5: parameters, state and step counters bitwise as they were, one warning with the name, and it goes on as if
    the step had never been."""
    params, optimizer = start(pairs=3)
    unharmed, unharmed_optimizer = start(pairs=3)
    for pairs, o in ((params, optimizer), (unharmed, unharmed_optimizer)):
        advance(pairs, o, engine.choose(steps, kernels=min(steps, 1)))
    before = snapshot(params, optimizer)
    for a, b in params:
        set_gradients(a, b, gradients_of_w(1, 7, 9)[0])
    optimizer.param_groups[0]["params"][position].grad[1, 1] = bad
    with pytest.warns(UserWarning, match=rf"non-finite gradient of parameter {position}: step skipped \(1 so far\)"):
        optimizer.step()
    assert equal(snapshot(params, optimizer), before)
    assert optimizer.report()["skipped"] == 1
    for pairs, o in ((params, optimizer), (unharmed, unharmed_optimizer)):
        advance(pairs, o, engine.choose(2, kernels=1), seed=8)
    assert equal(snapshot(params, optimizer), snapshot(unharmed, unharmed_optimizer))


def test_three_non_finite_steps_in_a_row_raise():
    """B5; two are forgiven by a good one between."""
    params, optimizer = start()
    advance(params, optimizer)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for good in (False, False, True, False, False):
            advance(params, optimizer, scale=0.1 if good else float("nan"))
    before = snapshot(params, optimizer)
    with pytest.raises(NonFiniteError, match="non-finite gradient of parameter 0 and 3 more, 3 steps in a row"):
        advance(params, optimizer, scale=float("nan"))
    assert equal(snapshot(params, optimizer), before)
    assert optimizer.report()["skipped"] == 5


def test_non_finite_gradient_of_an_adamw_parameter_skips_too():
    (a, b), other = (torch.nn.Parameter(x) for x in factors(4, 9, 7)), torch.nn.Parameter(torch.ones(3))
    named = [("x.lora_A.weight", a), ("x.lora_B.weight", b), ("head", other)]
    optimizer = LoRARite(named, adamw_lr=0.1)
    set_gradients(a, b, gradients_of_w(1, 7, 9)[0])
    other.grad = torch.tensor([1.0, torch.nan, 1.0])
    with pytest.warns(UserWarning, match="non-finite gradient of head: step skipped"):
        optimizer.step()
    assert torch.equal(other, torch.ones(3))
    assert not optimizer.state


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("steps", [0, 3])
def test_non_finite_parameter_is_an_error(bad, steps):
    """B6: before anything is written."""
    params, optimizer = start()
    advance(params, optimizer, steps)
    with torch.no_grad():
        params[1][0][2, 3] = bad
    for a, b in params:
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    before = snapshot(params[:1], optimizer)
    with pytest.raises(NonFiniteError, match="parameter 2 contains NaN or Inf: restore a checkpoint"):
        optimizer.step()
    assert equal(snapshot(params[:1], optimizer), before)


@pytest.mark.parametrize("scale", [1e12, 1e-8, 1e-12])
def test_the_step_does_not_depend_on_the_scale_of_the_gradient(scale, engine):
    """B7: with relative_eps, and eps itself below the gradient's scale."""
    gradients = gradients_of_w(engine.choose(10, kernels=3), 7, 9)
    options = {"lr": 1e-2, "clip_unmagnified_grad": 0.0, "eps": 1e-24}
    pair = factors(4, 9, 7, zero_b=True, dtype=torch.float32)
    expected, got = (w(train([pair], [gradients * s], **options)[0][0]) for s in (1, scale))
    assert relative(got, expected) < 1e-4


@pytest.mark.parametrize("scale", [1.0, 1e-8], ids=["O(1)", "small"])
@pytest.mark.parametrize("zero_b", [False, True], ids=["dense", "zero_b"])
def test_rows_of_rounding_noise_are_not_equilibrated_to_full_size(zero_b, scale, engine):
    """Inputs that are zero but for rounding: what that rounding was is not seen in W, whatever the gradient's scale."""
    dtype, steps, tolerance = engine.choose((torch.float64, 10, 1e-7), kernels=(torch.float32, 3, 1e-5))
    gradients = scale * gradients_of_w(steps, 30, 40)
    noise = [1e-11 * scale * gradients_of_w(steps, 30, 20, seed=seed) for seed in (1, 2)]
    pair = factors(4, 40, 30, zero_b=zero_b, dtype=dtype)
    options = {"lr": 1e-2, "clip_unmagnified_grad": 0.0, "eps": 1e-24}
    one, other = (
        w(train([pair], [torch.cat([gradients[..., :20], small], -1)], **options)[0][0]) - w(pair) for small in noise
    )
    assert relative(one, other) < tolerance


@pytest.mark.parametrize("scale", [1e30, 1e-40, 0.0])
@pytest.mark.parametrize("options", [{}, {"clip_unmagnified_grad": 0.0}], ids=["clipped", "unclipped"])
def test_extreme_gradients_are_finite_or_counted(scale, options):
    """B7: 1e30 overflows when it is squared, 1e-40 is subnormal; mixed with an ordinary pair."""
    params, optimizer = start(**options)
    for g in gradients_of_w(3, 7, 9):
        set_gradients(*params[0], g)
        set_gradients(*params[1], g)
        for p in params[0]:
            p.grad *= scale
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                optimizer.step()
            except NonFiniteError:
                assert scale > 1
    assert all(p.isfinite().all() for pair in params for p in pair)
    report = optimizer.report()
    assert report["steps"] + report["skipped"] == 3
    assert report["skipped"] == 0 or scale > 1


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("r", [8, 64])
def test_low_rank_gradients_move_both_factors_as_the_reference(rank, r, engine):
    """B8: rows may repeat, tokens may be few; the update of each factor points where the float64 reference's does."""
    pair = factors(r, 90, 70, condition=3.0, dtype=torch.float32)
    gradients = gradients_of_w(3, 70, 90, rank=rank)
    reference = Reference(
        [[x.double() for x in pair]], lr=1e-2, damping=20.0, row_equilibration=True, relative_eps=1e-3
    )
    params = [torch.nn.Parameter(x.clone()) for x in pair]
    optimizer = LoRARite(params, lr=1e-2)
    for g in gradients:
        old = [p.detach().double() for p in params], [x.clone() for x in reference.pairs[0]]
        set_gradients(*params, g)
        optimizer.step()
        a, b = reference.pairs[0]
        reference.step([(b.mT @ g, g @ a.mT)])
        for p, x, p_old, x_old in zip(params, reference.pairs[0], *old, strict=True):
            update, expected = p.detach().double() - p_old, x - x_old
            assert update.norm() > 1e-4
            assert (update * expected).sum() / update.norm() / expected.norm() > 0.999


def test_non_finite_matrices_give_nan_and_not_an_error():
    bad = torch.eye(3).double().repeat(2, 1, 1)
    bad[0, 0, 1] = torch.nan
    values, vectors = eigh(bad)
    assert values[0].isnan().all()
    assert vectors[0].isnan().all()
    assert torch.equal(values[1], torch.ones(3).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_factors_learn_as_float32_ones(dtype):
    """B14: state float32, loss after 500 steps within 2% of float32's."""
    losses = []
    for kind in (torch.float32, dtype):
        g = torch.Generator().manual_seed(1)
        target = torch.randn(7, 3, generator=g) @ torch.randn(3, 9, generator=g)
        a, b = (torch.nn.Parameter(x.to(kind)) for x in factors(2, 9, 7, zero_b=True))
        optimizer = LoRARite([a, b], lr=2e-2)
        for t in range(500):
            optimizer.param_groups[0]["lr"] = 2e-2 * (1 - t / 500)
            set_gradients(a, b, (b.detach().float() @ a.detach().float() - target) / 10)
            optimizer.step()
        losses.append((w((a, b)) - target).square().mean().item())
        states = [t for state in optimizer.state.values() for t in state.values() if t.is_floating_point()]
        assert {t.dtype for t in states} == {torch.float32}
        assert {p.dtype for p in (a, b)} == {kind}
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_small_updates_of_bfloat16_do_not_vanish():
    """B14: 400 updates of a thousandth of a bfloat16 unit in the last place add up, on average, reproducibly."""
    results = []
    for _ in range(2):
        x = torch.full((1, 100, 20), 1.0, dtype=torch.bfloat16)
        for step in range(400):
            moved = x.float() + 1e-3 * 2**-7
            x = stochastic_round(moved, torch.bfloat16, torch.tensor([step]))
        results.append(x.float())
    assert torch.equal(*results)
    assert results[0].mean().item() == pytest.approx(1 + 0.4 * 2**-7, abs=4 * (0.4 / 2000) ** 0.5 * 2**-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding(dtype):
    """Unbiased, to a neighbour, exact for values that the dtype has; subnormal numbers, zero and infinity included."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(20), torch.randn(20) * 1e-6, torch.tensor([0.0, 1.0, -2.5, torch.inf, -torch.inf])])
    many = x.repeat(4000, 1)
    rounded = stochastic_round(many[None], dtype, torch.tensor([7]))[0].float()
    exact = x.to(dtype).float() == x
    assert torch.equal(rounded[:, exact], many[:, exact])
    assert exact.sum() >= 5
    spacing = (rounded.amax(0) - rounded.amin(0))[~exact]
    near = (rounded[:, ~exact] - many[:, ~exact]).abs()
    assert (near < spacing).all()
    bias = (rounded[:, ~exact].double() - many[:, ~exact].double()).mean(0) / spacing
    assert bias.abs().max() < 5 * 0.5 / 4000**0.5
    keys = [stochastic_round(many[None], dtype, torch.tensor([key])) for key in (7, 8)]
    assert torch.equal(keys[0][0].float(), rounded)
    assert not torch.equal(*keys)


def test_groups_have_their_own_settings_and_can_be_added():
    """B17: two groups with their lr, weight decay, betas and eps; one more at step 10."""
    one, two, three = ([torch.nn.Parameter(x) for x in factors(4, 9, 7, seed=i)] for i in range(3))
    settings = [
        {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.5, 0.9), "eps": 1e-3},
        {"lr": 1e-3, "betas": [0.8, 0.99], "damping": 0.0},
        {"lr": 5e-3, "row_equilibration": False},
    ]
    common = {"clip_unmagnified_grad": 0.0}  # the clip sees all groups together
    optimizer = LoRARite([{"params": one, **settings[0]}, {"params": two, **settings[1]}], **common)
    alone = [[torch.nn.Parameter(p.detach().clone()) for p in pair] for pair in (one, two, three)]
    single = [LoRARite(pair, **common, **options) for pair, options in zip(alone, settings, strict=True)]
    for t, g in enumerate(gradients_of_w(15, 7, 9)):
        if t == 10:
            optimizer.add_param_group({"params": three, **settings[2]})
        for pair in (one, two, three, *alone):
            set_gradients(*pair, g)
        optimizer.step()
        for s in single if t >= 10 else single[:2]:
            s.step()
    for pair, expected in zip((one, two, three), alone, strict=True):
        torch.testing.assert_close(pair, expected, rtol=1e-10, atol=1e-12)


def test_clip_is_one_norm_over_all_groups():
    params, optimizer = start(dtype=torch.float64, clip_unmagnified_grad=0.01)
    split = [[torch.nn.Parameter(p.detach().clone()) for p in pair] for pair in params]
    other = LoRARite([{"params": pair} for pair in split], lr=1e-2, clip_unmagnified_grad=0.01)
    for pairs, o in ((params, optimizer), (split, other)):
        advance(pairs, o, 4)
    for pair, expected in zip(split, params, strict=True):
        torch.testing.assert_close(pair, expected, rtol=1e-10, atol=1e-12)
    assert optimizer.report()["clip_rate"] == 1


def test_lr_zero_moves_nothing_and_moments_go_on():
    """B18; balance_param too."""
    params, optimizer = start(lr=0.0, balance_param=True, weight_decay=0.1)
    before = [p.detach().clone() for pair in params for p in pair]
    advance(params, optimizer, 2)
    assert equal([p.detach() for pair in params for p in pair], before)
    state = optimizer.state[params[0][0]]
    assert state["first_moment"].any()
    assert state["step"] == 2


SCHEDULERS = {
    "OneCycleLR": {"max_lr": 0.02, "total_steps": 6},
    "CosineAnnealingLR": {"T_max": 5},
    "LinearLR": {"start_factor": 0.1},
    "ExponentialLR": {"gamma": 0.5},
    "CyclicLR": {"base_lr": 1e-4, "max_lr": 1e-2},
    "ReduceLROnPlateau": {"patience": 0},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    """B19: also for the group of AdamW."""
    (a, b), other = (torch.nn.Parameter(x) for x in factors(4, 9, 7)), torch.nn.Parameter(torch.ones(3))
    optimizer = LoRARite([("x.lora_A.w", a), ("x.lora_B.w", b), ("o", other)], lr=1e-2, adamw_lr=1e-2)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **SCHEDULERS[name])
    seen = set()
    for g in gradients_of_w(5, 7, 9):
        set_gradients(a, b, g)
        other.grad = torch.ones(3)
        optimizer.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        seen.add(tuple(group["lr"] for group in optimizer.param_groups))
    assert len(seen) > 2
    assert all(lora == adamw for lora, adamw in seen)


def test_a_factor_changed_from_outside_starts_anew_with_a_warning():
    """A stale basis would make the next step wrong silently."""
    params, optimizer = start()
    advance(params, optimizer, 3)
    with torch.no_grad():
        params[0][1].data.mul_(1.5)
    with pytest.warns(UserWarning, match=r"1 pairs were changed from outside.*parameter 0"):
        advance(params, optimizer)
    assert optimizer.state[params[0][0]]["step"] == 1
    assert optimizer.state[params[1][0]]["step"] == 4


@pytest.mark.parametrize("change", ["scaled", "permuted", "antisymmetric"])
def test_changes_that_keep_sums_are_noticed(change, engine):
    """The checksum has signs that look random: neither a permutation of rows nor a sum of zero hides a change."""
    params, optimizer = start()
    with torch.no_grad():
        rows = torch.randn(3, 4)
        params[0][1].copy_(torch.cat([rows, -rows, torch.zeros(1, 4)]))
    advance(params, optimizer, 1)
    b = params[0][1].data
    with torch.no_grad():
        if change == "permuted":
            b.copy_(b.roll(1, 0))
        else:
            b.mul_(100) if change == "antisymmetric" else b.mul_(1.01)
    with pytest.warns(UserWarning, match="changed from outside"):
        advance(params, optimizer)


def test_a_changed_shape_is_an_error_before_anything_is_written():
    """Zero columns keep every sum (B28)."""
    params, optimizer = start()
    advance(params, optimizer, 3)
    a = params[1][0]
    a.data = torch.cat([a.data, torch.zeros(4, 2)], 1)
    a.grad = torch.ones_like(a)
    before = snapshot(params, optimizer)
    with pytest.raises(ValueError, match=r"parameter 2 changed its shape from \(4, 9\) to \(4, 11\)"):
        optimizer.step()
    assert equal(snapshot(params, optimizer), before)


def test_a_sparse_gradient_is_an_error():
    params, optimizer = start()
    for a, b in params:
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b).to_sparse()
    with pytest.raises(ValueError, match="gradient of parameter 1 is sparse"):
        optimizer.step()


def test_values_whose_sum_overflows_are_an_error():
    params, optimizer = start()
    with torch.no_grad():
        params[0][0].fill_(3e38)
    for a, b in params:
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    with pytest.raises(NonFiniteError, match="parameter 0 is too large"):
        optimizer.step()


@pytest.mark.parametrize("shape", [(8, 4, 3), (16, 1, 1), (16, 8, 4), (64, 20, 300)])
@pytest.mark.parametrize("zero_b", [False, True], ids=["dense", "zero_b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_above_the_dimensions_learn(shape, zero_b, dtype):
    """A has a null space that never goes away; rounding noise in it must not be taken for a direction (A8). Least
    squares, 150 steps."""
    r, n, m = shape
    g = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)
    target, a = draw(m, n) / n**0.5, torch.nn.Parameter(draw(r, n) / n**0.5)
    b = torch.nn.Parameter(torch.zeros(m, r, dtype=dtype) if zero_b else 0.1 * draw(m, r))
    optimizer = LoRARite([("x.lora_A.w", a), ("x.lora_B.w", b)], lr=1e-2)
    losses = []
    for t in range(150):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - t / 150)
        optimizer.zero_grad()
        loss = (draw(8, n) @ (b @ a - target).mT).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])
    assert max(a.abs().max(), b.abs().max()) < 50


def test_a_factor_that_starts_at_zero_is_damped_whichever_it_is():
    """Swapping the roles of A and B (W transposed) gives the transposed run."""
    a, b = factors(4, 9, 7, zero_b=True)
    gradients = gradients_of_w(10, 7, 9)
    (one,), _ = train([(a, b)], [gradients], lr=1e-2)
    (other,), optimizer = train([(b.mT.contiguous(), a.mT.contiguous())], [gradients.mT], lr=1e-2)
    assert relative(w(other).mT, w(one)) < 1e-10
    assert [bool(optimizer.state[p]["damped"]) for p in other] == [True, False]


def test_closure():
    """B16: gradients are on inside, the loss comes back, an exception changes nothing."""
    params, optimizer = start()

    def closure():
        optimizer.zero_grad()
        loss = sum((b @ a).square().sum() for a, b in params)
        loss.backward()
        return loss

    with torch.no_grad():
        first = optimizer.step(closure)
    for _ in range(20):
        last = optimizer.step(closure)
    assert last < first
    before = snapshot(params, optimizer)

    def broken():
        raise KeyError("data")

    with pytest.raises(KeyError):
        optimizer.step(broken)
    assert equal(snapshot(params, optimizer), before)


def test_gradients_are_not_modified_and_their_layout_does_not_matter():
    """B15."""
    params, optimizer = start(pairs=1)
    strided, strided_optimizer = start(pairs=1)
    for g in gradients_of_w(3, 7, 9):
        set_gradients(*params[0], g)
        for p, q in zip(strided[0], params[0], strict=True):
            p.grad = q.grad.mT.contiguous().mT
        copies = [p.grad.clone() for p in params[0]]
        optimizer.step()
        strided_optimizer.step()
        assert equal([p.grad for p in params[0]], copies)
    torch.testing.assert_close(strided[0], params[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [4, 16, 64])
def test_state_is_small(r, dtype):
    """B27: the bytes of the formula, whatever the dtype of the factors; at most 0.55 of AdamW's at Gemma-2B's shapes,
    rank 16, float32 (one layer of 18 is enough: all alike)."""
    shapes = [(2048, 2048), (2048, 256), (2048, 256), (2048, 2048), (2048, 16384), (2048, 16384), (16384, 2048)]
    draw = lambda make, *shape: torch.nn.Parameter(make(*shape, dtype=dtype))
    params = [p for n, m in shapes for p in (draw(torch.randn, r, n), draw(torch.zeros, m, r))]
    optimizers = LoRARite(params), torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    for optimizer in optimizers:
        optimizer.step()
    ours, adamw = (
        sum(t.numel() * t.element_size() for state in o.state.values() for t in state.values()) for o in optimizers
    )
    assert ours == optimizers[0].report()["state_bytes"]
    assert ours == sum(4 * (m + n) * (r + 1) + 40 * r**2 + 2 * (4 + 4 + 4 + 1) + 8 * r for n, m in shapes)
    assert ours == formula([Shape(n, m, r) for n, m in shapes])
    if (r, dtype) == (16, torch.float32):
        assert ours <= 0.55 * adamw


@pytest.mark.parametrize("capturable", [False, True])
def test_memory_is_flat(capturable):
    """B27: after 300 steps nothing lives that did not after 10; no gradient is kept, no state has a graph."""
    params, optimizer = start(pairs=2, capturable=capturable)
    with Watch() as watch:
        advance(params, optimizer, 10)
        optimizer.zero_grad()
        gc.collect()
        state, live = state_bytes(optimizer), watch.now
        advance(params, optimizer, 290)
        gradients = [weakref.ref(p.grad) for pair in params for p in pair]
        optimizer.zero_grad()
        gc.collect()
        assert state_bytes(optimizer) == state
        assert watch.now == live
    assert all(gradient() is None for gradient in gradients)
    tensors = [t for s in optimizer.state.values() for t in s.values()]
    assert all(t.grad_fn is None and not t.requires_grad for t in tensors)


def test_at_most_one_host_synchronisation_a_step():
    """B26."""
    params, optimizer = start(pairs=3)
    advance(params, optimizer, 2)
    with Watch() as watch:
        optimizer.step()
    assert watch.synchronisations <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("rows", "r", "rank"), [(18, 4, 4), (18, 8, 3), (12, 16, 12), (4, 6, 4), (1, 8, 1)])
def test_the_first_basis_is_orthonormal(rows, r, rank, dtype):
    """X·K is as many orthonormal directions as X has rank, whatever its scale and shape; X = (X·K)·T; K has no parts in
    the null space of X."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    x = (1e-3 * draw(2, rows, rank) @ draw(2, rank, r)).to(dtype)
    k, t, warm = (m.double() for m in initial_basis(x, torch.float64))
    q, x = x.double() @ k, x.double()
    tolerance = 2000 * torch.finfo(dtype).eps
    live = q.mT @ q
    assert (trace(live) - rank).abs().max() < tolerance
    assert relative(live @ live, live) < tolerance
    assert relative(q @ t, x) < tolerance
    for one in range(2):
        assert relative(k[one], torch.linalg.pinv(x[one], rtol=tolerance) @ q[one]) < 10 * tolerance
    assert torch.linalg.cond(warm).max() < 1e3
