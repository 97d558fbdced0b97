"""Pairs of which one factor is frozen, as in LoRA-FA (A) and MiCA (B)."""

import warnings

import pytest
import torch
from problems import factors, gradients_of_w, random_matrix, regauged, relative, w
from reference import Reference

from lora_rite import PUBLISHED, LoRARite, audit, layer_report
from lora_rite.plan.state import FROZEN_KEYS, STATE_KEYS

#: (r, n, m, which factor is frozen, whether the other one starts at zero).
KINDS = {"lora_fa": (4, 18, 13, 0, True), "mica": (4, 18, 13, 1, True), "dense": (3, 7, 12, 0, False)}
OPTIONS = {
    "ours": {},
    "published": {**PUBLISHED, "update_skipping": 0.0},
    "all": {"weight_decay": 0.1, "update_capping": 0.3, "balance_param": True, "apply_escape": True, "maximize": True},
    "capturable": {"capturable": True},
}
named_kinds = pytest.mark.parametrize("kind", KINDS)


def one_sided(kind, dtype=torch.float64):
    r, n, m, frozen, zero = KINDS[kind]
    pair = [torch.nn.Parameter(x) for x in factors(r, n, m, dtype=dtype)]
    if kind == "mica":
        pair[1].data.copy_(torch.linalg.qr(pair[1].detach().double())[0])
    if zero:
        torch.nn.init.zeros_(pair[1 - frozen])
    pair[frozen].requires_grad_(False)
    return pair


def optimizer_of(pairs, lr=0.02, **options):
    names = ("lora_A", "lora_B")
    params = [(f"{i}.{name}", p) for i, pair in enumerate(pairs) for name, p in zip(names, pair, strict=True)]
    return LoRARite(params, lr=lr, **options)


def gradient_of_w(pair, t, i=0):
    return gradients_of_w(1, len(pair[1]), pair[0].shape[1], seed=10 * t + i)[0]


def advance(pairs, optimizer, steps, first=0):
    """Steps with the same gradients of W, of which frozen factors get none. Gives the products."""
    for t in range(first, first + steps):
        for i, (a, b) in enumerate(pairs):
            g = gradient_of_w((a, b), t, i)
            a.grad = b.detach().mT @ g.to(b.dtype) if a.requires_grad else None
            b.grad = g.to(a.dtype) @ a.detach().mT if b.requires_grad else None
        optimizer.step()
    return [w(pair) for pair in pairs]


def bits(pairs, optimizer):
    params = [p for pair in pairs for p in pair]
    return [p.detach().clone() for p in params] + [t.clone() for p in params for t in optimizer.state[p].values()]


def equal(one, other):
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@named_kinds
def test_equals_the_slow_reference(kind, options, engine):
    """float64, by the kernels float32, beside an ordinary pair, with which it is clipped: W after each step. The frozen
    factor stays, bit by bit, without a gradient; both pairs count as preconditioned."""
    dtype, steps, tolerance = engine.choose((torch.float64, 20, 1e-9), kernels=(torch.float32, 3, 1e-5))
    other = [torch.nn.Parameter(x) for x in factors(4, 9, 11, zero_b=True, seed=1, dtype=dtype)]
    pairs = [one_sided(kind, dtype), other]
    frozen = KINDS[kind][3]
    before = pairs[0][frozen].detach().clone()
    plain = {k: v for k, v in options.items() if k != "capturable"}
    own = [[p.detach().double() for p in pair] for pair in pairs]
    slow = Reference(
        own, lr=0.02, frozen=[frozen, None],
        **{"damping": 20.0, "row_equilibration": True, "relative_eps": 1e-3, **plain},
    )  # fmt: skip
    optimizer = optimizer_of(pairs, **options)
    for t in range(steps):
        gradients = [gradient_of_w(pair, t, i) for i, pair in enumerate(slow.pairs)]
        slow.step([(b.mT @ g, g @ a.mT) for (a, b), g in zip(slow.pairs, gradients, strict=True)])
        got = advance(pairs, optimizer, 1, t)
        assert optimizer.report()["pairs_preconditioned"] == 2
        for x, pair in zip(got, slow.pairs, strict=True):
            assert relative(x, w(pair)) < tolerance
    assert torch.equal(pairs[0][frozen], before)


@named_kinds
def test_the_step_does_not_depend_on_the_factorisation(kind, engine):
    """(BK, K⁻¹A), the frozen factor turned as the other one is: the same W."""
    single = (torch.float32, 10.0, 1e-4)
    for dtype, condition, tolerance in engine.choose([(torch.float64, 1e3, 1e-8), single], kernels=[single]):
        results = []
        for turned in (False, True):
            pair = one_sided(kind, dtype)
            if turned:
                new = regauged(*(p.detach() for p in pair), random_matrix(KINDS[kind][0], condition, seed=1))
                for p, value in zip(pair, new, strict=True):
                    p.data.copy_(value)
            results += advance([pair], optimizer_of([pair]), engine.choose(30, kernels=4))
        assert relative(results[1], results[0]) < tolerance


def test_the_audit_turns_frozen_factors_and_leaves_the_model_as_it_is():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_B = one_sided("lora_fa")

    layer = Layer()
    before = [p.detach().clone() for p in layer.parameters()]
    loss = lambda model, step: (model.lora_B @ model.lora_A - 1).square().mean()
    for optimizer, passes in (("lora_rite:LoRARite", True), ("torch.optim:AdamW", False)):
        assert audit(optimizer, layer, loss, options={"lr": 1e-2}, steps=5)["passed"] == passes
    assert equal([p.detach() for p in layer.parameters()], before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@named_kinds
def test_resume_is_bit_exact(kind, dtype, tmp_path, engine):
    """The state belongs to the factor that is trained; there is none under the frozen one."""
    pairs, steps = [one_sided(kind, dtype)], engine.choose(5, kernels=2)
    optimizer = optimizer_of(pairs)
    advance(pairs, optimizer, steps)
    frozen, moving = pairs[0][KINDS[kind][3]], pairs[0][1 - KINDS[kind][3]]
    assert set(optimizer.state_dict()["state"]) == {1 - KINDS[kind][3]}
    assert set(optimizer.state[moving]) == {*STATE_KEYS, *FROZEN_KEYS}
    r, size = KINDS[kind][0], 8 if dtype == torch.float64 else 4
    rows = moving.numel() // r
    assert optimizer.report()["state_bytes"] == size * (rows * (r + 1) + 10 * r * r + 2 * (r + 2)) + 4 + 1
    torch.save({"pair": [p.detach() for p in pairs[0]], "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    advance(pairs, optimizer, steps, first=5)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    others = [
        [torch.nn.Parameter(x, requires_grad=p.requires_grad) for x, p in zip(saved["pair"], pairs[0], strict=True)]
    ]
    other = optimizer_of(others)
    other.load_state_dict(saved["optimizer"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing looks like a change from outside
        advance(others, other, steps, first=5)
    assert equal(bits(others, other), bits(pairs, optimizer))
    assert frozen.grad is None


def test_experts_with_a_frozen_factor_equal_separate_pairs(engine):
    """Of three experts in two matrices, A frozen; the last gets no gradient, and stays as it is."""
    dtype, steps, tolerance = engine.choose((torch.float64, 4, 1e-9), kernels=(torch.float32, 2, 1e-5))
    experts = [one_sided("dense", dtype) for _ in range(3)]
    for i, (a, b) in enumerate(experts):
        a.data.add_(i)
        b.data.mul_(1 + i)
    whole = [
        torch.nn.Parameter(torch.cat([a.detach() for a, _ in experts]), requires_grad=False),
        torch.nn.Parameter(torch.stack([b.detach() for _, b in experts], 2).flatten(1)),
    ]
    group = {"params": whole, "kind": "lora", "blocks": 3, "columns": "interleaved"}
    together, apart = LoRARite([group], lr=0.02), optimizer_of(experts[:2])
    before = experts[2][1].detach().clone()
    for t in range(steps):
        gradient = torch.zeros(12, 3, 3, dtype=dtype)
        for i in range(2):
            gradient[..., i] = gradient_of_w(experts[i], t, i).to(dtype) @ experts[i][0].detach().mT
        whole[1].grad = gradient.flatten(1)
        together.step()
        advance(experts[:2], apart, 1, t)
    got = whole[1].detach().unflatten(1, (3, 3))
    for i in range(2):
        assert relative(got[..., i], experts[i][1].detach()) < tolerance
    assert torch.equal(got[..., 2], before)
    assert together.state[whole[1]]["step"].tolist() == [steps, steps, 0]


def test_reports():
    pairs = [one_sided("lora_fa", torch.float32)]
    optimizer = optimizer_of(pairs)
    advance(pairs, optimizer, 3)
    report, (layer,) = optimizer.report(), layer_report(optimizer)
    assert (report["pairs"], report["dead_pairs"], report["steps"]) == (1, 0, 3)
    assert (report["sigma_over_delta"], report["damped_share"]) == (None, 0.0)  # undamped
    assert layer["product_norm"] == pytest.approx(float(w(pairs[0]).norm()), rel=1e-5)
    before = w(pairs[0])
    optimizer.param_groups[0]["clip_unmagnified_grad"] = 0.0
    advance(pairs, optimizer, 1, first=3)
    moved = float((w(pairs[0]) - before).norm())
    assert optimizer.report()["update_norm"] == pytest.approx(moved, rel=1e-4)
    dead = one_sided("lora_fa")
    torch.nn.init.zeros_(dead[0])
    other = optimizer_of([dead])
    advance([dead], other, 1)
    assert other.report()["dead_pairs"] == 1


def test_a_change_of_the_frozen_factor_from_outside_is_noticed():
    pairs = [one_sided("lora_fa")]
    optimizer = optimizer_of(pairs)
    advance(pairs, optimizer, 2)
    pairs[0][0].data.mul_(2)
    with pytest.warns(UserWarning, match="1 pairs were changed from outside"):
        advance(pairs, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advance(pairs, optimizer, 1)


def test_freezing_and_unfreezing_need_a_new_state():
    """In a run, and between runs; an adapter that is switched off as a whole keeps its state."""
    pairs = [[torch.nn.Parameter(x) for x in factors(4, 18, 13, zero_b=True)]]
    optimizer = optimizer_of(pairs)
    advance(pairs, optimizer, 2)
    two_sided, before = optimizer.state_dict(), bits(pairs, optimizer)
    pairs[0][0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.lora_A is frozen, and was not when its state was made.*state\.pop"):
        advance(pairs, optimizer, 1)
    assert equal(bits(pairs, optimizer), before)
    for p in pairs[0]:
        optimizer.state.pop(p)
    advance(pairs, optimizer, 2)
    one_state = optimizer.state_dict()
    for p in pairs[0]:
        p.requires_grad_(False)
    optimizer.step()
    assert optimizer.report()["pairs_preconditioned"] == 0
    pairs[0][1].requires_grad_(True)
    advance(pairs, optimizer, 2)
    for state, frozen in ((two_sided, True), (one_state, False)):
        other = [[torch.nn.Parameter(p.detach().clone()) for p in pairs[0]]]
        other[0][0].requires_grad_(not frozen)
        with pytest.raises(ValueError, match=r"0\.lora_A or its partner is frozen in the model and not in the state"):
            optimizer_of(other).load_state_dict(state)
    pairs[0][0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"0\.lora_A is trained, and was not when its state was made"):
        advance(pairs, optimizer, 1)


def test_a_non_finite_gradient_names_the_factor_that_is_trained():
    pairs = [one_sided("lora_fa")]
    optimizer = optimizer_of(pairs)
    advance(pairs, optimizer, 2)
    before = bits(pairs, optimizer)
    pairs[0][1].grad = torch.full_like(pairs[0][1], torch.nan)
    with pytest.warns(UserWarning, match=r"non-finite gradient of 0\.lora_B: step skipped"):
        optimizer.step()
    assert equal(bits(pairs, optimizer), before)
