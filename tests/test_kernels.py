"""The step by Triton's kernels against that of the eager engine: in Triton's interpreter on a CPU, and on a GPU where
one is to be seen (`make test-gpu`)."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engines import ENGINES, use
from interpreter import use_interpreter
from problems import factors, gradients_of_w, random_matrix, regauged, relative, set_gradients, train, w
from reference import Reference
from test_device import stacked

from lora_rite import PUBLISHED, LoRARite, NonFiniteError, kernels
from lora_rite.algebra.rounding import stochastic_round
from lora_rite.bench.watch import Watch
from lora_rite.optim.selection import alike
from lora_rite.plan.plan import make_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton = use_interpreter() if DEVICE == "cpu" else pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from lora_rite.kernels.small import decide_kernel  # noqa: E402
from lora_rite.kernels.tables import DTYPES  # noqa: E402
from lora_rite.kernels.tall import _hash, _rounded  # noqa: E402

SHAPE = (3, 9, 7)


def problem(shapes, steps=3, dtype=torch.float32, zero_b=True, rank=None):
    """Pairs and gradients of W."""
    pairs = [factors(*shape, zero_b=zero_b, condition=3.0, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    gradients = [gradients_of_w(steps, m, n, rank=rank, seed=i) for i, (_, n, m) in enumerate(shapes)]
    return [[x.to(DEVICE) for x in pair] for pair in pairs], [g.to(DEVICE) for g in gradients]


def both(pairs, gradients, **options):
    """Parameters and optimizer of each engine."""
    runs = [train(pairs, gradients, engine=engine, **{"lr": 1e-2, **options}) for engine in ("triton", "eager")]
    assert [optimizer.report()["engine"] for _, optimizer in runs] == ["triton", "eager"]
    return runs


def assert_alike(runs, tolerance=1e-5):
    """Parameters, states and reports."""
    (params, optimizer), (others, other) = runs
    for pair, expected in zip(params, others, strict=True):
        for p, q in zip(pair, expected, strict=True):
            assert (p.detach().double() - q.detach().double()).norm() <= tolerance * q.detach().double().norm() + 1e-12
        for p, q in zip(pair, expected, strict=True):
            assert_same_state(optimizer.state[p], other.state[q], tolerance)
    report, expected = optimizer.report(), other.report()
    assert report.keys() == expected.keys()
    for key in report.keys() - {"engine"}:
        value = expected[key]
        if isinstance(value, float):
            value = pytest.approx(value, rel=100 * tolerance, abs=1e-9)
        assert report[key] == value, key


def assert_same_state(state, expected, tolerance):
    """What of a state does not depend on which basis it is in."""
    assert state.keys() == expected.keys()
    for key in ("step", "damped"):
        if key in state:
            assert torch.equal(state[key], expected[key])
    r = state["matrices"].shape[-1]
    for key in ("first_moment", "row_moment"):
        length = expected[key].norm().item()
        assert state[key].norm().item() == pytest.approx(length, rel=1000 * tolerance, abs=1e-9)
    numbers, others = state["numbers"].view(-1, r + 2), expected["numbers"].view(-1, r + 2)
    assert (numbers - others).norm() <= 1000 * tolerance * others.norm() + 1e-9


OPTIONS = {
    "ours": {},
    "published": {**PUBLISHED, "update_skipping": 0.0},
    "skipping": {"update_skipping": 0.1, "clip_unmagnified_grad": 0.0},
    "summed": {"betas": (0.5, 1.0), "row_equilibration": False},
    "maximize": {"maximize": True, "weight_decay": 0.3, "betas": (0.0, 0.95), "row_beta": 0.9, "eps": 1e-3},
    "scaling": {"scaling": 2.0, "update_skipping": 0.05, "weight_decay": 0.1, "eps": 1e-2},
    "capturable": {"capturable": True},
}


@pytest.mark.parametrize("zero_b", [True, False], ids=["zero_b", "dense"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_eager_engine(options, zero_b):
    assert_alike(both(*problem([SHAPE], zero_b=zero_b), **options))


def test_equals_the_eager_engine_at_several_ranks_and_shapes_at_once():
    """Odd rows, rank 1, dimensions below the rank, more rows than a program works on; clipped by the norm of all."""
    shapes = [(1, 5, 6), (3, 9, 7), (3, 9, 7), (5, 40, 11), (2, 5, 1030)]
    assert_alike(both(*problem(shapes, steps=2), clip_unmagnified_grad=0.5))


@pytest.mark.parametrize("zero_b", [True, False], ids=["zero_b", "dense"])
def test_dimensions_below_the_rank(zero_b):
    """Directions that are null in a factor are cut; what is left of them is noise, other noise in each engine. K is T⁺:
    another right inverse of T would move the other factor into them."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)
    pairs = [(draw(5, n), draw(m, 5) * (not zero_b)) for n, m in ((3, 8), (8, 2))]
    gradients = [gradients_of_w(3, m, n).to(DEVICE) for n, m in ((3, 8), (8, 2))]
    (params, optimizer), (others, _) = both(pairs, gradients)
    for got, expected, start in zip(params, others, pairs, strict=True):
        assert relative(w(got) - w(start), w(expected) - w(start)) < 1e-3
        for p in got:
            k, t = optimizer.state[p]["matrices"][2:4].double()
            assert relative((k @ t).mT, k @ t) < 1e-3
            assert relative(t @ k @ t, t) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("algebra_dtype", [None, "float32"])
@pytest.mark.parametrize("r", [16, 17, 63, 64])
def test_large_ranks(r, algebra_dtype):
    assert_alike(both(*problem([(r, 101, 90)], steps=2), algebra_dtype=algebra_dtype), 1e-4)


@pytest.mark.parametrize(
    ("zero_b", "rank", "tolerance"),
    [(True, None, 1e-5), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((False, None, 1e-5), (True, 1, 1e-3)))],
)
def test_algebra_in_float32(zero_b, rank, tolerance):
    """One group with it and one without, in launches of their own: W as float64 throughout has it; the first also from
    other factors of it, as exactly as rounding factors of their condition allows."""
    r, n, m = 3, 9, 7
    gradients = gradients_of_w(3, m, n, rank=rank)
    pair = factors(r, n, m, zero_b=zero_b, condition=3.0, dtype=torch.float32)
    other = [x.contiguous() for x in regauged(*pair, random_matrix(r, 1e2, seed=5))]
    pairs = [[torch.nn.Parameter(x.clone().to(DEVICE)) for x in start] for start in (pair, pair, other)]
    single = {"params": [*pairs[1], *pairs[2]], "kind": "lora", "algebra_dtype": "float32"}
    groups = [{"params": pairs[0], "kind": "lora"}, single]
    optimizer = LoRARite(groups, lr=1e-2, engine="triton", clip_unmagnified_grad=0.0)
    for g in gradients:
        for x in pairs:
            set_gradients(*x, g.to(DEVICE))
        optimizer.step()
    assert optimizer.report()["engine"] == "triton"
    exact = tuple(x.double() for x in pair)
    (expected,), _ = train([exact], [gradients], lr=1e-2, clip_unmagnified_grad=0.0)
    double, single, turned = (relative(w(x).cpu() - w(pair), w(expected) - w(exact)) for x in pairs)
    assert double < tolerance
    assert single < tolerance
    assert turned < 10 * tolerance


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [*(o for o in OPTIONS.values() if o.get("scaling") is None), {"damping": 3.0}, {"relative_eps": 0.1}]
)
def test_equals_the_slow_reference(options):
    """In float64, over 12 steps. (The reference has no scaling.)"""
    pairs, gradients = problem([(4, 18, 13), (2, 9, 11)], steps=12, zero_b=False)
    settings = {"damping": 20.0, "row_equilibration": True, "relative_eps": 1e-3, **options}
    settings.pop("capturable", None)
    reference = Reference([[x.double().cpu() for x in pair] for pair in pairs], lr=1e-2, **settings)
    for t in range(12):
        own = [g[t].cpu() for g in gradients]
        reference.step([(b.mT @ g, g @ a.mT) for (a, b), g in zip(reference.pairs, own, strict=True)])
    params, _ = train(pairs, gradients, lr=1e-2, engine="triton", **options)
    for got, expected in zip(params, reference.pairs, strict=True):
        assert relative(w(got).cpu(), w(expected)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("condition", [1e2, 1e3])
def test_w_does_not_depend_on_the_factorisation(condition):
    """(B, A) and (B·K, K⁻¹·A), from B = 0, where the first steps have factors that lack rank. (On a GPU too; test_step
    has it in the interpreter.)"""
    r, n, m = 3, 20, 15
    plain = factors(r, n, m, zero_b=True, condition=3.0, dtype=torch.float32)
    other = regauged(*plain, random_matrix(r, condition, seed=5))
    gradients = [gradients_of_w(6, m, n, seed=3).to(DEVICE)]
    results = [
        w(train([[x.contiguous().to(DEVICE) for x in pair]], gradients, lr=0.01, engine="triton")[0][0])
        for pair in (plain, other)
    ]
    assert relative(results[1], results[0]) < 1e-4


def test_gradients_of_low_rank_from_zero():
    """Directions of B without gradient are rounding noise, and are not inverted."""
    pairs, gradients = problem([(4, 12, 10)], steps=4, rank=1)
    (params, _), (others, _) = both(pairs, gradients)
    assert relative(w(params[0]), w(others[0])) < 1e-3
    assert params[0][0].norm() < 3 * pairs[0][0].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_by_the_same_noise(dtype):
    """Almost all elements are the same, bit by bit: where the noise decides between two results, these differ by less
    than float32 does."""
    (params, _), (others, _) = both(*problem([SHAPE], dtype=dtype))
    for p, q in zip(params[0], others[0], strict=True):
        assert p.dtype == dtype
        assert (p == q).double().mean() > 0.95
        assert relative(p.detach(), q.detach()) < 1e-2


@pytest.mark.parametrize(
    ("shapes", "layout"),
    [(((2, 3, 3, 3), (4, 2, 1, 1)), {}), (((6, 9), (7, 6)), {"blocks": 3, "columns": "interleaved"}),
     pytest.param(((6, 9), (7, 6)), {"blocks": 3, "columns": "side by side"}, marks=pytest.mark.slow),
     pytest.param(((6, 9), (21, 2)), {"blocks": 3}, marks=pytest.mark.slow)],
    ids=["convolution", "interleaved", "side_by_side", "one_below_the_other"],
)  # fmt: skip
def test_the_noise_belongs_to_the_elements_of_a_parameter(shapes, layout):
    """Of any shape, and however it holds several factors: two steps in bfloat16 are those of the eager engine, but for
    elements that float32 decides."""
    draw = torch.Generator().manual_seed(0)
    start, *gradients = ([torch.randn(s, generator=draw).bfloat16().to(DEVICE) for s in shapes] for _ in range(3))
    runs = []
    for engine in ("triton", "eager"):
        pair = [torch.nn.Parameter(x.clone()) for x in start]
        optimizer = LoRARite([{"params": pair, "kind": "lora", **layout}], lr=1e-2, engine=engine)
        for grads in gradients:
            for p, g in zip(pair, grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
        assert optimizer.report()["engine"] == engine
        runs.append(torch.cat([p.detach().flatten() for p in pair]))
    assert not torch.equal(runs[0], torch.cat([x.flatten() for x in start]))
    assert (runs[0] == runs[1]).double().mean() > 0.95


def test_parameters_and_gradients_that_are_views_at_odd_addresses():
    """Also gradients that are not contiguous, and those that move and change their kind from step to step."""
    (start,), (gradients,) = problem([(4, 16, 12)], steps=3)
    expected, _ = train([start], [gradients], lr=1e-2, engine="triton")

    def placed(x, offset=1):
        memory = torch.zeros(x.numel() + offset, device=DEVICE)
        return memory[offset:].view(x.shape).copy_(x.detach())

    params = [torch.nn.Parameter(placed(x)) for x in start]
    optimizer = LoRARite(params, lr=1e-2, engine="triton")
    for t, g in enumerate(gradients):
        set_gradients(*params, g)
        if t == 1:
            params[0].grad = params[0].grad.t().contiguous().t()
        else:
            params[1].grad = placed(params[1].grad, t + 1)
        optimizer.step()
    for p, q in zip(params, expected[0], strict=True):
        assert torch.equal(p, q)


def test_parameters_that_are_moved_are_followed():
    """Whose data are put elsewhere between steps."""
    runs = []
    for moves in (False, True):
        (start,), (gradients,) = problem([SHAPE], steps=2)
        params = [torch.nn.Parameter(x) for x in start]
        optimizer = LoRARite(params, lr=1e-2, engine="triton")
        for g in gradients:
            set_gradients(*params, g)
            optimizer.step()
            if moves:
                for p in params:
                    p.data = p.data.clone()
        runs.append([p.detach().clone() for p in params])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("columns", ["interleaved", "side by side", ""])
def test_several_pairs_in_one_parameter(columns):
    """One gets no gradient in the second step: it and its state stay, bit by bit."""
    count, (r, n, m) = 2, (2, 9, 7)
    runs = []
    for engine in ("triton", "eager"):
        pairs = [factors(r, n, m, zero_b=e == 0, seed=e, dtype=torch.float32) for e in range(count)]
        a, b = (torch.nn.Parameter(x.contiguous().to(DEVICE)) for x in stacked(pairs, columns))
        group = {"params": [a, b], "kind": "lora", "blocks": count, "columns": columns}
        optimizer = LoRARite([group], lr=0.02, weight_decay=0.1, engine=engine)
        for t in range(3):
            draw = torch.Generator().manual_seed(t)
            gradients = [[0.1 * torch.randn(x.shape, generator=draw) * (t != 1 or e) for x in pair]
                         for e, pair in enumerate(pairs)]  # fmt: skip
            a.grad, b.grad = (x.contiguous().to(DEVICE) for x in stacked(gradients, columns))
            before = [copy.deepcopy(optimizer.state[p]) for p in (a, b)]
            optimizer.step()
            for p, state in zip((a, b), before, strict=True):
                for key in ("step", "matrices", "numbers", "row_moment") if t == 1 else ():
                    assert torch.equal(state[key][0], optimizer.state[p][key][0])
                    assert not torch.equal(state[key][1], optimizer.state[p][key][1])
        runs.append(([(a, b)], optimizer))
        assert optimizer.report()["engine"] == engine
    assert_alike(runs)


@pytest.mark.parametrize("frozen", [0, 1], ids=["lora_fa", "mica"])
def test_a_frozen_partner(frozen):
    runs = []
    for engine in ("triton", "eager"):
        (start,), (gradients,) = problem([SHAPE], zero_b=frozen == 0)
        pair = [torch.nn.Parameter(x) for x in start]
        if frozen:
            torch.nn.init.zeros_(pair[0])
        pair[frozen].requires_grad_(False)
        optimizer = LoRARite(zip(("l.lora_A", "l.lora_B"), pair, strict=True), lr=0.02, engine=engine)
        for g in gradients:
            set_gradients(*pair, g)
            pair[frozen].grad = None
            optimizer.step()
        runs.append(([[pair[1 - frozen]]], optimizer))
        assert torch.equal(pair[frozen], start[frozen])
        with torch.no_grad():
            pair[frozen].mul_(2)
        with pytest.warns(UserWarning, match="1 pairs were changed from outside"):
            optimizer.step()
    assert_alike(runs)


def test_groups_with_their_own_hyperparameters_share_the_launches():
    own = [{"lr": 0.02, "weight_decay": 0.1, "clip_unmagnified_grad": 0.1}, {"betas": (0.5, 0.9), "maximize": True},
           {"damping": 0.0, "row_equilibration": False, "relative_eps": 0.0}]  # fmt: skip
    runs, counted = [], []
    for engine in ("triton", "eager"):
        pairs, gradients = problem([SHAPE] * 3, steps=3)
        params = [[torch.nn.Parameter(x.clone()) for x in pair] for pair in pairs]
        groups = [{"params": pair, **options} for pair, options in zip(params, own, strict=True)]
        optimizer = LoRARite(groups, engine=engine)
        for t in range(3):
            for (a, b), g in zip(params, gradients, strict=True):
                set_gradients(a, b, g[t])
            optimizer.param_groups[1]["lr"] = 1e-2 / (t + 1)
            with Launches() as launches:
                optimizer.step()
        counted.append(launches.count)
        runs.append((params, optimizer))
    assert_alike(runs)
    assert counted == [10, 0]


def test_options_that_change_between_steps():
    """Reports follow them too."""
    runs = []
    for engine in ("triton", "eager"):
        (start,), (gradients,) = problem([SHAPE], steps=4)
        params = [torch.nn.Parameter(x.clone()) for x in start]
        optimizer = LoRARite(params, lr=1e-2, damping=0.0, engine=engine)
        changes = ({}, {"damping": 9.0, "row_equilibration": False}, {"scaling": 3.0, "eps": 0.1, "maximize": True},
                   {"damping": 0.0, "row_equilibration": True, "betas": (0.5, 1.0)})  # fmt: skip
        reports = []
        for g, change in zip(gradients, changes, strict=True):
            optimizer.param_groups[0].update(change)
            set_gradients(*params, g)
            optimizer.step()
            report = optimizer.report()
            reports.append([report["sigma_over_delta"], report["damped_share"]])
        runs.append(([params], optimizer))
        assert [ratio is None for ratio, _ in reports] == [True, False, False, True]
    assert_alike(runs)


def test_a_rate_of_zero_takes_the_place_of_one_that_is_a_tensor():
    """Where nothing else has changed, gradients lie where they did."""
    params, optimizer, _ = started()
    for lr, moves in ((torch.tensor(1e-2, device=DEVICE), True), (0.0, False)):
        optimizer.param_groups[0]["lr"] = lr
        before = params[1].detach().clone()
        optimizer.step()
        assert torch.equal(params[1], before) == (not moves)


class Launches:
    """Counts launches of kernels."""

    def __enter__(self):
        self.count = 0
        self.where = triton.runtime.interpreter.InterpretedFunction if DEVICE == "cpu" else triton.runtime.JITFunction
        self.run = run = self.where.run

        def counted(function, *args, **kwargs):
            self.count += 1
            return run(function, *args, **kwargs)

        self.where.run = counted
        return self

    def __exit__(self, *_):
        self.where.run = self.run


@pytest.mark.parametrize("capturable", [False, True])
def test_ten_launches_and_one_read_by_the_host(capturable):
    """None with capturable. The table of addresses is sent when gradients have moved, and not otherwise."""
    (start,), (gradients,) = problem([SHAPE], steps=4)
    params = [torch.nn.Parameter(x) for x in start]
    optimizer = LoRARite(params, lr=1e-2, engine="triton", capturable=capturable)
    sent = []
    for t, g in enumerate(gradients):
        if t != 2:
            params[0].grad = params[1].grad = None
            set_gradients(*params, g)
            kept = [p.grad for p in params]  # so that the next ones are elsewhere
        with Launches() as launches, Watch(DEVICE) as watch:
            optimizer.step()
        assert launches.count == 10
        if t > 0:  # the first step makes states and tables
            assert watch.synchronisations == (0 if capturable else 1)
        sent.append(kernels._kernels[optimizer._plan].table[2])
    assert sent[1] is sent[2]
    assert sent[3] is not sent[2], kept


def test_steps_are_deterministic():
    pairs, gradients = problem([SHAPE, (3, 20, 600)], steps=2)
    results = [train(pairs, gradients, lr=1e-2, engine="triton")[0] for _ in range(2)]
    for pair, other in zip(*results, strict=True):
        assert all(map(torch.equal, pair, other))


@pytest.mark.parametrize("pairs", [1, pytest.param(2, marks=pytest.mark.slow)], ids=["all", "one of two"])
def test_gradients_of_zero(pairs):
    start, gradients = problem([SHAPE] * pairs, steps=2)
    assert_alike(both(start, [g * (i > 0) for i, g in enumerate(gradients)], weight_decay=0.1))


def test_no_gradients_at_all():
    """In the first and in a later step, beside a parameter without elements, which AdamW steps: nothing is changed."""
    runs = []
    for engine in ("triton", "eager"):
        (start,), (gradients,) = problem([SHAPE], steps=2)
        params = [torch.nn.Parameter(x.clone()) for x in start]
        empty = torch.nn.Parameter(torch.zeros(0, device=DEVICE))
        named = zip(("l.lora_A", "l.lora_B", "empty"), (*params, empty), strict=True)
        optimizer = LoRARite(named, lr=1e-2, adamw_lr=1e-2, engine=engine)
        optimizer.step()
        assert all(map(torch.equal, params, start))
        for g in gradients:
            set_gradients(*params, g)
            empty.grad = torch.zeros_like(empty)
            optimizer.step()
            before = bits(params, optimizer)
            optimizer.zero_grad()
            optimizer.step()
            assert all(map(torch.equal, bits(params, optimizer), before))
        runs.append(([params], optimizer))
        assert optimizer.report()["engine"] == engine
    assert_alike(runs)


@pytest.mark.slow
def test_two_thousand_pairs():
    """One step: tables, flags and sums longer than what a program loads at a time."""
    shapes = [(1, 3, 2), (1, 2, 4)] * 1000
    assert_alike(both(*problem(shapes, steps=1, zero_b=False), clip_unmagnified_grad=0.5))


@pytest.mark.parametrize("down", [None, 0, 1024, 3999, 4001])
def test_the_flags_and_the_norm_of_two_thousand_pairs(down):
    """One flag of 4,000, or of 3 others, stops the step, wherever it is; the norm is that of all."""
    zeros = lambda *shape, dtype: torch.zeros(shape, dtype=dtype, device=DEVICE)
    flags = torch.ones(4003, dtype=torch.int8, device=DEVICE)
    traces = torch.rand(4000, dtype=torch.float64).to(DEVICE)
    counts, clip = zeros(4, dtype=torch.float32), torch.tensor([1.0], dtype=torch.float64, device=DEVICE)
    ok, norm = zeros(1, dtype=torch.int8), zeros(1, dtype=torch.float32)
    if down is not None:
        flags[down] = 0
    decide_kernel[(1,)](flags, 4000, flags[4000:], 3, traces, 4000, clip, counts, ok, norm, CAPTURABLE=True)
    fine = down is None
    assert ok.item() == fine
    assert counts.tolist() == [fine, fine, not fine, not fine]
    assert norm.item() == pytest.approx(traces.sum().sqrt().item(), rel=1e-6)


@triton.jit
def rounding_kernel(x, key, out, N: tl.constexpr, DTYPE: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, _rounded(tl.load(x + i), i, _hash(tl.load(key).to(tl.uint32)), DTYPE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_as_the_eager_engine_does(dtype):
    """Bit for bit, which is tested for its bias: large, small and subnormal numbers, zero and infinity."""
    x = torch.randn(1024) * torch.logspace(-9, 4, 1024)
    x[:6] = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf])
    x, key = x.to(DEVICE), torch.tensor([3 * 0x1000003 + 7], device=DEVICE)
    got = torch.zeros_like(x)
    rounding_kernel[(1,)](x, key, got, N=1024, DTYPE=DTYPES[dtype])
    assert torch.equal(got.to(dtype), stochastic_round(x[None], dtype, key)[0])


def test_groups_of_several_dtypes():
    """Each in launches of its own, clipped by the norm of all; one is rounded, the other not."""
    runs = []
    for engine in ("triton", "eager"):
        pairs, gradients = problem([SHAPE] * 2, steps=2)
        dtypes = (torch.float32, torch.bfloat16)
        params = [[torch.nn.Parameter(x.to(d)) for x in pair] for pair, d in zip(pairs, dtypes, strict=True)]
        optimizer = LoRARite([{"params": pair} for pair in params], lr=1e-2, clip_unmagnified_grad=0.1, engine=engine)
        for t in range(2):
            for (a, b), g in zip(params, gradients, strict=True):
                set_gradients(a, b, g[t])
            optimizer.step()
        assert optimizer.report()["engine"] == engine
        runs.append(params)
    for (one, other), tolerance in zip(zip(*runs, strict=True), (1e-5, 1e-2), strict=True):
        for p, q in zip(one, other, strict=True):
            assert relative(p.detach(), q.detach()) < tolerance


def test_a_warm_up_from_lr_zero():
    """Where neither X = 0 nor its step says how long K_w should be, it stays as long as it is."""
    runs = []
    for engine in ("triton", "eager"):
        (start,), (gradients,) = problem([(1, 3, 2)], steps=8)
        params = [torch.nn.Parameter(x.clone()) for x in start]
        optimizer = LoRARite(params, lr=0.0, engine=engine)
        for t, g in enumerate(gradients):
            optimizer.param_groups[0]["lr"] = 1e-2 * (t == 7)
            set_gradients(*params, g)
            optimizer.step()
            assert optimizer.state[params[1]]["matrices"].isfinite().all()
        runs.append(([params], optimizer))
    assert_alike(runs)


def started(engine="triton", **options):
    (start,), (gradients,) = problem([SHAPE], steps=6)
    params = [torch.nn.Parameter(x.clone()) for x in start]
    optimizer = LoRARite(params, lr=1e-2, engine=engine, **options)
    advance(params, optimizer, gradients[:1])
    return params, optimizer, gradients[1:]


def advance(params, optimizer, gradients):
    for g in gradients:
        set_gradients(*params, g)
        optimizer.step()


def bits(params, optimizer):
    return [t.detach().clone() for p in params for t in (p, *optimizer.state[p].values())]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_step_with_a_non_finite_gradient_is_skipped(value):
    """As a whole; the third in a row is an error; the report is about the last step that was made."""
    params, optimizer, gradients = started()
    before, report = bits(params, optimizer), optimizer.report()
    for t in range(3):
        set_gradients(*params, gradients[0])
        params[1].grad[2, 1] = value
        if t < 2:
            with pytest.warns(UserWarning, match="non-finite gradient of parameter 1: step skipped"):
                optimizer.step()
        else:
            with pytest.raises(NonFiniteError, match="3 steps in a row"):
                optimizer.step()
        assert all(map(torch.equal, bits(params, optimizer), before))
    assert optimizer.report() == {**report, "skipped": 3}
    advance(params, optimizer, gradients[:1])
    others, other, _ = started()
    advance(others, other, gradients[:1])
    assert all(map(torch.equal, bits(params, optimizer), bits(others, other)))


def test_the_device_skips_with_capturable_and_lr_is_followed():
    """lr as a tensor that a scheduler changes; AdamW beside the factors, whose gradients count too."""
    runs = []
    for engine in ("triton", "eager"):
        (start,), (gradients,) = problem([SHAPE], steps=3)
        params = [torch.nn.Parameter(x.clone()) for x in start]
        bias = torch.nn.Parameter(torch.ones(5, device=DEVICE))
        named = [("l.lora_A", params[0]), ("l.lora_B", params[1]), ("bias", bias)]
        lr = torch.tensor(1e-2, device=DEVICE)
        optimizer = LoRARite(named, lr=lr, adamw_lr=1e-2, capturable=True, engine=engine)
        for t, g in enumerate(gradients):
            set_gradients(*params, g)
            bias.grad = torch.full_like(bias, torch.nan if t == 1 else 0.1)
            before = bits(params, optimizer)
            optimizer.step()
            assert (t == 1) == (t > 0 and all(map(torch.equal, before, bits(params, optimizer))))
            lr.mul_(0.5)
        runs.append(([params], optimizer))
        assert optimizer.report()["skipped"] == 1
    assert_alike(runs)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_change_from_outside_is_noticed(capturable):
    """The moments start anew: at once, or with capturable when the report has said so."""
    params, optimizer, gradients = started(capturable=capturable)
    with torch.no_grad():
        params[0].mul_(1.5)
    before = bits(params, optimizer)
    if capturable:
        advance(params, optimizer, gradients[:1])
        assert all(map(torch.equal, bits(params, optimizer), before))
        with pytest.warns(UserWarning, match="changed from outside since the last step .parameter 0"):
            optimizer.report()
        advance(params, optimizer, gradients[:1])
    else:
        with pytest.warns(UserWarning, match="changed from outside since the last step .parameter 0"):
            advance(params, optimizer, gradients[:1])
    assert optimizer.report()["steps"] == 1
    assert not torch.equal(params[0], before[0])
    with torch.no_grad():
        params[0][0, 0] = torch.nan
    then = optimizer.report if capturable else optimizer.step
    if capturable:
        optimizer.step()
    with pytest.raises(NonFiniteError, match="parameter 0 contains NaN"):
        then()


@pytest.mark.parametrize(("first", "then"), [("triton", "triton"), ("triton", "eager"), ("eager", "triton")])
def test_a_state_goes_on_by_either_engine(first, then):
    """Bit by bit where it is the same one."""
    params, optimizer, gradients = started(first)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = LoRARite(others, lr=1e-2, engine=then)
    other.load_state_dict(optimizer.state_dict())
    for run in ((params, optimizer), (others, other)):
        advance(*run, gradients[:2])
    if first == then:
        assert all(map(torch.equal, bits(params, optimizer), bits(others, other)))
    for p, q in zip(params, others, strict=True):
        assert relative(p.detach(), q.detach()) < 1e-5


def test_a_step_of_some_pairs_alone():
    """Whose states are not those of the plan."""
    runs = []
    for engine in ("triton", "eager"):
        pairs, gradients = problem([SHAPE] * 2, steps=3)
        params = [[torch.nn.Parameter(x.clone()) for x in pair] for pair in pairs]
        optimizer = LoRARite([p for pair in params for p in pair], lr=1e-2, engine=engine)
        for t in range(3):
            for (a, b), g in zip(params, gradients, strict=True):
                set_gradients(a, b, g[t])
            if t == 1:
                params[0][0].grad = params[0][1].grad = None
            optimizer.step()
        runs.append((params, optimizer))
    assert_alike(runs)


def test_the_engine_is_kept_by_copies():
    _, optimizer, _ = started()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        pair = other.param_groups[0]["params"]
        set_gradients(*pair, gradients_of_w(1, 7, 9)[0].to(DEVICE))
        other.step()
        assert other.report()["engine"] == "triton"


# ----------------------------------------------------------------------------------------------- what engine steps what


@pytest.mark.skipif(DEVICE != "cpu", reason="tests of properties run on a CPU")
def test_a_property_that_the_eager_engine_steps_is_not_one_of_the_kernels(monkeypatch):
    """The fixture ``engine`` fails then."""
    use(monkeypatch, ENGINES["triton"])
    (start,), gradients = problem([SHAPE], steps=1)
    train([start], gradients)
    for pair, options in (([x.double() for x in start], {}), (start, {"update_capping": 1.0})):
        with pytest.raises(AssertionError, match="the eager engine stepped: "):
            train([pair], gradients, **options)


def plan_of(pair, **options):
    for p in pair:
        p.grad = torch.zeros_like(p)
    optimizer = LoRARite(pair, **options)
    stepped = alike(optimizer.param_groups, optimizer.state, lambda a, b: True)
    return make_plan(stepped, optimizer.state, optimizer._limits)


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({}, lambda x: x, None),
        ({"apply_escape": True}, lambda x: x, "apply_escape"),
        ({"update_capping": 1.0}, lambda x: x, "update_capping"),
        ({"balance_param": True}, lambda x: x, "balance_param"),
        ({"algebra_dtype": "float32"}, lambda x: x, None),
        ({"first_moment_dtype": "bfloat16"}, lambda x: x, "first_moment_dtype"),
        ({}, lambda x: x.double(), "factors of torch.float64"),
        ({}, lambda x: x.t().contiguous().t(), "factors that are not contiguous"),
        ({}, lambda x: x.to(torch.bfloat16 if len(x) == 3 else torch.float32), "factors of several dtypes in a group"),
    ],
)
def test_what_the_kernels_do_not_step_the_eager_engine_does(options, change, reason):
    """With a warning that says why, once; and the report says by which engine."""
    (start,), _ = problem([SHAPE])
    pair = [torch.nn.Parameter(change(x)) for x in start]
    assert kernels.supports(plan_of(pair, **options)) == reason
    optimizer = LoRARite(pair, engine="triton", **options)
    if reason is None:
        optimizer.step()
    else:
        with pytest.warns(UserWarning, match=f'engine="triton" does not step {reason}'):
            optimizer.step()
        optimizer.step()
    assert optimizer.report()["engine"] == ("eager" if reason else "triton")


def test_ranks_above_64_and_parameters_without_interpreter_stay_eager(monkeypatch):
    pair = [torch.nn.Parameter(x.to(DEVICE)) for x in factors(65, 70, 80, dtype=torch.float32)]
    assert kernels.supports(plan_of(pair)) == "rank 65, above 64"
    (start,), _ = problem([SHAPE])
    plan = lambda: plan_of([torch.nn.Parameter(x) for x in start])
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        assert kernels.supports(plan()) == "factors on a CPU"
    monkeypatch.setattr(kernels, "installed", lambda: False)
    assert kernels.supports(plan()) == "without triton, which is not installed"
    with pytest.raises(ValueError, match=r"pip install .lora-rite\[kernels\]"):
        LoRARite([torch.nn.Parameter(x) for x in start], engine="triton")


def test_shared_memory_of_a_card(monkeypatch):
    """A consumer card has 99 KiB: enough for rank 64 with float32 algebra alone."""
    card = SimpleNamespace(name="a card", major=8, shared_memory_per_block_optin=99 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    bucket = lambda rank, algebra: SimpleNamespace(device=torch.device("cuda"), rank=rank, algebra=algebra)
    assert kernels._of_card(bucket(32, torch.float64)) is None
    assert kernels._of_card(bucket(64, torch.float32)) is None
    message = r'it takes 128, with algebra_dtype="float32" 96; a card'
    assert message in kernels._of_card(bucket(64, torch.float64))
    card.shared_memory_per_block_optin = 64 * 1024
    assert "it takes 128; a card" in kernels._of_card(bucket(64, torch.float64))
    assert "it takes 96; a card" in kernels._of_card(bucket(33, torch.float32))


def test_none_chooses_eager_until_a_card_has_passed(monkeypatch):
    for passed, expected in ((None, "eager"), ("a card, on a day", "triton")):
        monkeypatch.setattr(kernels, "PASSED", passed)
        params, optimizer, _ = started(engine=None)
        assert optimizer.report()["engine"] == expected
        optimizer.param_groups[0]["update_capping"] = 1.0
        optimizer.step()
        assert optimizer.report()["engine"] == "eager"
    with pytest.raises(ValueError, match='engine must be "eager", "triton" or None, got \'cuda\''):
        LoRARite(params, engine="cuda")


COMPILED = [("whole", 4, "float32", 90), *(
    pytest.param(kind, rank, dtype, capability, marks=pytest.mark.slow)
    for kind, rank, dtype in (
        ("whole", 4, "float32"), ("whole", 16, "float32"), ("whole", 16, "bfloat16"), ("whole", 64, "float32"),
        ("strided", 3, "float32"), ("strided", 3, "float16"), ("single", 16, "float32"), ("single", 64, "float32"),
    )
    for capability in (80, 90) if (rank, capability) != (4, 90)
)]  # fmt: skip


@pytest.mark.parametrize(("kind", "rank", "dtype", "capability"), COMPILED)
def test_kernels_compile_for_gpus_that_are_not_there(kind, rank, dtype, capability, tmp_path):
    """For A100 and H100, in the way of a launch, with registers and shared memory that these have; spills as
    docs/benchmarks.md has them."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, script, kind, str(rank), dtype, str(capability)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == 10
    for kernel in found:
        print(kernel)
        assert kernel["registers"] <= 255
        assert kernel["shared"] <= {80: 163, 90: 227}[capability] * 1024, kernel
        assert kernel["spills"] <= (8192 if rank == 64 else 256), kernel


def test_python_of_a_step_without_a_card(tmp_path):
    """`lora-rite bench host --engine triton`: of a step are all ten launches made, none is measured in the
    interpreter."""
    command = [sys.executable, "-m", "lora_rite", "bench", "host", "--engine", "triton", "--pairs", "2", "--width", "8"]
    command += ["--rounds", "3", "--out", tmp_path / "host.json"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    refused = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert refused.returncode == 2
    assert "unset TRITON_INTERPRET" in refused.stderr
    run = subprocess.run(command, capture_output=True, text=True, env={**environment, "TRITON_INTERPRET": "0"})
    assert run.returncode == 0, run.stderr
    (case,) = json.loads((tmp_path / "host.json").read_text())["cases"]
    assert [row["part"] for row in case["rows"]][3:] == ["LoRARite (triton)", "AdamW (foreach)", "AdamW (fused)"]
    assert all(row["seconds"] > 0 for row in case["rows"])
