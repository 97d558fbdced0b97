"""The optimizer under fire: ids (A1, …, C11) of the project's list of tortures that no other test names."""

import copy
import warnings

import pytest
import torch
from problems import factors, gradients_of_w, relative, set_gradients, train, w
from test_numerics import advance, equal, snapshot, start

from lora_rite import LoRARite, NonFiniteError
from lora_rite.plan.state import MATRICES

# --------------------------------------------------------------------------------------------------- step numerics

SECOND_MOMENT = MATRICES.index("second_moment")
MOMENTS = {
    "zero": torch.zeros(4, 4),
    "c·I": 3e-3 * torch.eye(4),
    "repeated": torch.tensor([1e-2, 1e-2, 1e-4, 1e-4]).diag(),
    "gap 1e-12": torch.tensor([1e-2, 1e-2 * (1 + 1e-12), 1e-4, 0.0]).diag(),
    "negative": torch.tensor([1e-2, 1e-3, 1e-4, -1e-9]).diag(),
    "rank 1": torch.ones(4, 4),
}


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_moments_of_any_spectrum(kind, dtype):
    """B9: finite steps of the size of any other, and V stays symmetric."""
    params, optimizer = start(dtype=dtype, pairs=1)
    advance(params, optimizer, 2)
    for p in params[0]:
        optimizer.state[p]["matrices"][SECOND_MOMENT] = MOMENTS[kind]
    before = [p.detach().clone() for p in params[0]]
    advance(params, optimizer, 1, seed=1)
    for p, old in zip(params[0], before, strict=True):
        assert 0 < (p - old).norm() < 1
        v = optimizer.state[p]["matrices"][SECOND_MOMENT]
        assert (v - v.mT).abs().max() <= 1e-6 * v.abs().max()
        assert torch.linalg.eigvalsh(v.double()).min() >= -1e-6 * v.abs().max()


def degenerate(kind, dtype):
    a, b = factors(4, 9, 7, dtype=torch.float64)
    if kind == "zero column":
        b[:, 2] = 0
    elif kind == "equal columns":
        b[:, 2] = b[:, 1]
    else:
        b = b @ torch.logspace(0, -8, 4, dtype=torch.float64).diag()
    return [torch.nn.Parameter(x.to(dtype)) for x in (a, b)]


@pytest.mark.parametrize("kind", ["zero column", "equal columns", "condition 1e8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_factors_amplify_nothing(kind, dtype):
    """B10: ten steps move W by no more than lr·√(rows·r) a step through each factor (a factor of 2 for the momentum's
    bias correction), not by 1e8 times that along directions in which B is null."""
    lr, pair = 1e-2, degenerate(kind, dtype)
    optimizer = LoRARite(pair, lr=lr)
    for g in gradients_of_w(10, 7, 9):
        before = w(pair)
        set_gradients(*pair, g)
        optimizer.step()
        assert (w(pair) - before).norm() <= 2 * lr * ((7 * 4) ** 0.5 + (9 * 4) ** 0.5)
    assert all(p.isfinite().all() for p in pair)


class Fails:
    """An eigh that raises, or returns NaN, in its ``at``-th call."""

    def __init__(self, at, how):
        self.at, self.how, self.calls, self.original = at, how, 0, torch.linalg.eigh

    def __call__(self, *args, **kwargs):
        self.calls += 1
        values, vectors = self.original(*args, **kwargs)
        if self.calls != self.at:
            return values, vectors
        if self.how == "raises":
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return values * torch.nan, vectors * torch.nan


@pytest.mark.parametrize("steps", [0, 3])
def test_eigenvalues_that_do_not_converge_come_from_singular_values(steps, monkeypatch):
    """B12: wherever LAPACK gives up in a step, the step is what it would have been."""
    for at in range(1, count_calls(steps, monkeypatch) + 1):
        results = []
        for how in ("raises", None):
            params, optimizer = start()
            advance(params, optimizer, steps)
            with monkeypatch.context() as patch:
                patch.setattr(torch.linalg, "eigh", Fails(at if how else 0, how or ""))
                advance(params, optimizer, 1, seed=1)
            results.append([p.detach().clone() for pair in params for p in pair])
            assert not optimizer.report()["skipped"]
        for got, expected in zip(*results, strict=True):
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("how", ["NaN"])
@pytest.mark.parametrize("steps", [0, 3])
def test_failing_algebra_skips_the_step(how, steps, monkeypatch):
    """B12: wherever the eigenvalues of a step fail, all its factors are moved or none is: the step is skipped and
    counted (an error where a first basis cannot be made), or the next one finds it and starts that pair anew."""
    calls = count_calls(steps, monkeypatch)
    unharmed = []
    for at in range(1, calls + 1):
        params, optimizer = start()
        advance(params, optimizer, steps)
        before, refused = snapshot(params, optimizer), False
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(torch.linalg, "eigh", Fails(at, how))
            try:
                advance(params, optimizer, 1, seed=1)
            except NonFiniteError:
                refused = True
        unharmed.append(equal(snapshot(params, optimizer), before))
        assert unharmed[-1] == bool(optimizer.report()["skipped"] or refused)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            advance(params, optimizer, 2, seed=2)
        assert all(p.isfinite().all() for pair in params for p in pair)
    assert any(unharmed)


def count_calls(steps, monkeypatch):
    params, optimizer = start()
    advance(params, optimizer, steps)
    with monkeypatch.context() as patch:
        count = Fails(0, "")
        patch.setattr(torch.linalg, "eigh", count)
        advance(params, optimizer, 1, seed=1)
    assert count.calls
    return count.calls


def test_ten_dropped_gradients_in_a_row_are_said():
    """B20."""
    params, optimizer = start(update_skipping=1e-6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        advance(params, optimizer, 12)
    assert [w for w in caught if "update_skipping" in str(w.message)]


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_accumulated_gradients_step_as_one_batch(micro_batches):
    """B21: 1e-6 in float32; a last window with fewer rows is a step like any other; state changes in steps only."""
    results = []
    for parts in (1, micro_batches):
        a, b = (torch.nn.Parameter(x) for x in factors(4, 9, 7, dtype=torch.float32))
        optimizer = LoRARite([a, b], lr=1e-2)
        g = torch.Generator().manual_seed(0)
        for size in (8, 8, 8, 8, 5):
            x, y = torch.randn(size, 9, generator=g), torch.randn(size, 7, generator=g)
            for piece, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
                before = copy.deepcopy(optimizer.state_dict())
                ((piece @ (b @ a).mT - target).square().sum() / size).backward()
                assert equal(optimizer.state_dict(), before)
            optimizer.step()
            optimizer.zero_grad()
        results.append(w((a, b)))
    assert relative(*results) < 1e-6


def test_grad_scaler():
    """B22: a step whose scaled gradients overflow leaves everything as it was, and the scale of the others is undone;
    relative_eps makes a forgotten unscale_ harmless but for the clip."""
    plain, plain_optimizer = start(pairs=1)
    scaled, scaled_optimizer = start(pairs=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t, g in enumerate(gradients_of_w(4, 7, 9)):
        g = g.float()
        loss = lambda pair, g=g: ((pair[1] @ pair[0]) * g).sum()
        plain_optimizer.zero_grad()
        scaled_optimizer.zero_grad()
        loss(plain[0]).backward()
        scaler.scale(loss(scaled[0])).backward()
        if t == 2:
            scaled[0][0].grad[0, 0] = torch.inf
            before = snapshot(scaled, scaled_optimizer)
            scaler.step(scaled_optimizer)
            assert equal(snapshot(scaled, scaled_optimizer), before)
        else:
            plain_optimizer.step()
            scaler.step(scaled_optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert relative(w(scaled[0]), w(plain[0])) < 1e-6


def test_raw_clipping_is_deterministic():
    """B23: with the clip of torch before ours, two runs are equal (what it does to the invariance, the callback says:
    test_hf.py)."""
    results = []
    for _ in range(2):
        params, optimizer = start()
        for g in gradients_of_w(5, 7, 9):
            for pair in params:
                set_gradients(*pair, g)
            torch.nn.utils.clip_grad_norm_([p for pair in params for p in pair], 0.01)
            optimizer.step()
        results.append(snapshot(params, optimizer))
    assert equal(*results)


def test_state_does_not_grow():
    """B27: 300 steps keep the bytes of the first, no graph, and no gradients. (The formula: test_numerics.py.)"""
    params, optimizer = start()
    advance(params, optimizer, 1)
    size, keys = optimizer.report()["state_bytes"], {id(p): set(s) for p, s in optimizer.state.items()}
    pointers = {t.data_ptr() for pair in params for t in (p.grad for p in pair)}
    advance(params, optimizer, 300)
    assert optimizer.report()["state_bytes"] == size
    assert {id(p): set(s) for p, s in optimizer.state.items()} == keys
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    assert all(t.grad_fn is None and not t.requires_grad for t in tensors)
    assert not pointers & {t.data_ptr() for t in tensors}


@pytest.mark.parametrize("steps", [0, 2])
def test_an_exception_before_the_commit_changes_nothing(steps):
    """B29: KeyboardInterrupt in each operation of a step, one after the other. Until the first one that writes into a
    parameter or into state (the commit), everything is bitwise as it was; from there on, nothing can fail by itself."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Interrupt(TorchDispatchMode):
        def __init__(self, at):
            super().__init__()
            self.at, self.n = at, 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += 1
            if self.n == self.at:
                raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    def step(at):
        params, optimizer = start(pairs=1)
        advance(params, optimizer, steps)
        set_gradients(*params[0], gradients_of_w(1, 7, 9, seed=3)[0])
        before = snapshot(params, optimizer)
        mode = Interrupt(at)
        try:
            with mode:
                optimizer.step()
        except KeyboardInterrupt:
            return equal(snapshot(params, optimizer), before)
        return mode.n

    total = step(0)
    unharmed = [step(at) for at in range(1, total + 1, 7)]
    commit = unharmed.index(False)
    assert all(unharmed[:commit])
    assert commit > len(unharmed) / 3


def test_the_same_seed_gives_the_same_bits_and_other_orders_and_threads_the_same_numbers():
    """B30: bitwise for equal threads; 1e-6 with four threads instead of one, or with the pairs in another order."""
    start_pairs = [factors(8, 200, 300, dtype=torch.float32, zero_b=i == 1, seed=i) for i in range(4)]
    gradients = [gradients_of_w(8, 300, 200, seed=i) for i in range(4)]
    one, again = (train(start_pairs, gradients, lr=1e-2)[0] for _ in range(2))
    torch.set_num_threads(4)
    try:
        threads = train(start_pairs, gradients, lr=1e-2)[0]
    finally:
        torch.set_num_threads(1)
    turned = train(start_pairs[::-1], gradients[::-1], lr=1e-2)[0][::-1]
    for a, b, c, d in zip(one, again, threads, turned, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert relative(w(c), w(a)) < 1e-6
        assert relative(w(d), w(a)) < 1e-6


@pytest.mark.parametrize("options", [{}, {"update_capping": 1.0}], ids=["default", "capped"])
def test_noise_far_above_the_signal_is_bounded(options):
    """B32: gradients as of differentially private training (noise 1,000 times the signal): W stays within the random
    walk of steps of lr·√(rows·r), twice for the two factors."""
    lr, steps = 1e-2, 300
    a, b = (torch.nn.Parameter(x) for x in factors(8, 50, 40, zero_b=True, dtype=torch.float32))
    optimizer = LoRARite([a, b], lr=lr, **options)
    signal = gradients_of_w(1, 40, 50, rank=1, scale=1e-3)[0]
    for noise in gradients_of_w(steps, 40, 50, scale=1.0, seed=1):
        set_gradients(a, b, signal + noise)
        optimizer.step()
    assert w((a, b)).norm() < 2 * lr * (2 * steps * 40 * 8) ** 0.5


# ------------------------------------------------------------------------------------------------------- state dicts


def test_a_state_of_another_version_is_refused_by_name():
    """C6: there is one version of the state so far; a key that is missing is named, and an unknown one is kept out of
    the way."""
    params, optimizer = start()
    advance(params, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for s in state["state"].values():
        s["of_a_later_version"] = torch.zeros(3)
    fresh, fresh_optimizer = start()
    with torch.no_grad():
        for pair, other in zip(fresh, params, strict=True):
            for p, q in zip(pair, other, strict=True):
                p.copy_(q)
    fresh_optimizer.load_state_dict(state)
    for pairs, o in ((params, optimizer), (fresh, fresh_optimizer)):
        advance(pairs, o, 3, seed=2)
    assert equal([p.detach() for pair in fresh for p in pair], [p.detach() for pair in params for p in pair])
    del state["state"][0]["matrices"]
    with pytest.raises(ValueError, match="incomplete: it has no matrices"):
        start()[1].load_state_dict(state)


def nan_in_moment(state):
    state["matrices"][SECOND_MOMENT, 1, 1] = torch.nan


def inf_in_basis(state):
    state["matrices"][MATRICES.index("basis"), 0, 0] = torch.inf


def asymmetric(state):
    state["matrices"][SECOND_MOMENT, 0, 1] += 1.0


def negative_step(state):
    state["step"].fill_(-1)


def half_a_step(state):
    state["step"].fill_(1.5)


@pytest.mark.parametrize("damage", [nan_in_moment, inf_in_basis, asymmetric, negative_step, half_a_step])
def test_a_damaged_state_is_refused(damage):
    """C8: with the name of the parameter; nothing is loaded."""
    params, optimizer = start()
    advance(params, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    damage(state["state"][1])
    before = snapshot(params, optimizer)
    with pytest.raises((ValueError, NonFiniteError), match="parameter 1"):
        optimizer.load_state_dict(state)
    assert equal(snapshot(params, optimizer), before)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_with_the_prefix_of_a_wrapper(prefix):
    """C10: a state of a model under DDP or torch.compile belongs to the same model without. (DCP: test_state.py.)"""
    pair = lambda: zip("AB", map(torch.nn.Parameter, factors(4, 9, 7)), strict=True)
    named = lambda prefix: [(f"{prefix}l.lora_{x}.weight", p) for x, p in pair()]
    wrapped, plain = (LoRARite(named(p)) for p in (prefix, ""))
    params = wrapped.param_groups[0]["params"]
    set_gradients(*params, gradients_of_w(1, 7, 9)[0])
    wrapped.step()
    plain.load_state_dict(wrapped.state_dict())
    assert equal(list(plain.state_dict()["state"].values()), list(wrapped.state_dict()["state"].values()))


def test_what_a_state_dict_shares_with_the_optimizer():
    """C11: as torch's: groups are copies, tensors are the optimizer's own (deepcopy for a snapshot), and a loaded state
    is independent of where it came from."""
    params, optimizer = start()
    advance(params, optimizer, 2)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 123.0
    state["state"].clear()
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert len(optimizer.state) == 4
    state = optimizer.state_dict()
    assert state["state"][0]["first_moment"] is optimizer.state[params[0][0]]["first_moment"]
    other, other_optimizer = start()
    other_optimizer.load_state_dict(state)
    before = snapshot(other, other_optimizer)
    advance(params, optimizer, 1, seed=3)
    assert equal(snapshot(other, other_optimizer), before)
