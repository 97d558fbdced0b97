"""What LoRARite accepts, and how it refuses. Ids (A1, …) are those of the project's list of tortures."""

import pytest
import torch
from torch import nn

from lora_rite import LoRARite, LoRARiteError, find_pairs, param_groups


def parameter(*shape, **kwargs):
    return nn.Parameter(torch.randn(*shape, **kwargs))


def flat(r=2, n=6, m=5):
    return [parameter(r, n), parameter(m, r)]


def named(prefix="layer", r=2, n=6, m=5):
    a, b = flat(r, n, m)
    return [(f"{prefix}.lora_A.default.weight", a), (f"{prefix}.lora_B.default.weight", b)]


def test_bare_tensor_empty_list_generator_and_model():
    """A1."""
    with pytest.raises(TypeError, match="iterable"):
        LoRARite(parameter(2, 3))
    with pytest.raises(ValueError, match="no LoRA pairs: params is empty"):
        LoRARite([])
    assert LoRARite(p for p in flat()).report()["pairs"] == 1
    with pytest.raises(LoRARiteError, match=r"named_parameters\(\)"):
        LoRARite(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="no LoRA pairs"):
        LoRARite([("head.weight", parameter(3, 3))], adamw_lr=1e-3)


def test_the_same_tensor_twice():
    """A2: in one group, in two groups, A is B."""
    a, b = flat()
    c, d = flat()
    with pytest.raises(ValueError, match="parameter 0 and parameter 2"):
        LoRARite([a, b, a, d])
    with pytest.raises(ValueError, match="parameter 0 and parameter 2"):
        LoRARite([{"params": [a, b]}, {"params": [a, d]}])
    square = parameter(3, 3)
    with pytest.raises(ValueError, match="cannot tell A from B"):
        LoRARite([square, square])
    optimizer = LoRARite([a, b])
    with pytest.raises(ValueError, match="parameter 1 and parameter 3"):
        optimizer.add_param_group({"params": [c, b]})
    assert len(optimizer.param_groups) == 1


def test_shared_storage_is_refused():
    """A14: one A for two B is unpaired; two parameters on one storage are updated twice."""
    a, b = flat()
    twin = nn.Parameter(a.detach())
    with pytest.raises(ValueError, match="share storage"):
        LoRARite([a, b, twin, parameter(5, 2)])


@pytest.mark.parametrize("left", [0, 1])
def test_orphans(left):
    """A3."""
    pairs = named("layers.0.q_proj") + named("layers.1.q_proj")[left : left + 1]
    with pytest.raises(ValueError, match=r"unpaired factor layers.1.q_proj.lora_[AB].*no layers.1.q_proj"):
        LoRARite(pairs)
    with pytest.raises(ValueError, match="unpaired"):
        LoRARite([*flat(), parameter(2, 3)])


def test_a_frozen_half_must_be_given_too():
    """A15, see test_one_sided.py."""
    pair = named()
    pair[0][1].requires_grad_(False)
    assert LoRARite(pair).report()["pairs"] == 1
    with pytest.raises(ValueError, match=r"unpaired factor layer.lora_B.*also where one is frozen"):
        LoRARite([(name, p) for name, p in pair if p.requires_grad])


def test_order():
    """A4: names decide; shapes decide where they can; squares of the rank's size are ambiguous."""
    q, k = named("q"), named("k", n=7, m=9)
    for shuffled in ([q[1], k[0], k[1], q[0]], [k[1], k[0], q[1], q[0]]):
        optimizer = LoRARite(shuffled)
        for a, b in zip(*[iter(optimizer.param_groups[0]["param_names"])] * 2, strict=True):
            assert "lora_A" in a
            assert b == a.replace("lora_A", "lora_B")
    with pytest.raises(ValueError, match="cannot tell A from B"):
        LoRARite([q[1][1], q[0][1]])
    with pytest.raises(ValueError, match="cannot tell A from B"):
        LoRARite(flat(4, 4, 4))
    assert LoRARite(named(r=4, n=4, m=4)).report()["pairs"] == 1
    assert LoRARite(flat(2, 8, 8)).report()["pairs"] == 1
    with pytest.raises(ValueError, match="cannot tell A from B"):
        LoRARite(flat(2, 8, 8)[::-1])


def test_other_trainable_parameters():
    """A5: to AdamW with adamw_lr, an error that lists them without; counted in the report."""
    others = [
        ("layer.lora_magnitude_vector.default.weight", parameter(5)),
        ("layer.lora_B.default.bias", parameter(5)),
        ("score.modules_to_save.default.weight", parameter(3, 5)),
        ("norm.weight", parameter(5)),
    ]
    mixed = [others[0], named()[0], others[1]]
    with pytest.raises(ValueError, match="unpaired"):
        LoRARite(mixed)
    pair = named()
    mixed = [others[0], pair[0], others[1], others[2], pair[1], others[3]]
    with pytest.raises(ValueError, match=r"4 trainable parameters are not LoRA factors.*magnitude.*adamw_lr"):
        LoRARite(mixed)
    optimizer = LoRARite(mixed, lr=1e-2, adamw_lr=1e-3, adamw_weight_decay=0.1)
    assert (optimizer.report()["pairs"], optimizer.report()["other_parameters"]) == (1, 4)
    adamw = optimizer.param_groups[1]
    assert (adamw["kind"], adamw["lr"], adamw["weight_decay"]) == ("adamw", 1e-3, 0.1)
    torch_adamw = torch.optim.AdamW([nn.Parameter(p.detach().clone()) for _, p in others], lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        for _, p in mixed:
            p.grad = torch.randn_like(p)
        for (_, p), q in zip(others, torch_adamw.param_groups[0]["params"], strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        torch_adamw.step()
    for (_, p), q in zip(others, torch_adamw.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


def test_two_adapters_on_one_layer():
    """A6."""
    a1, a2 = named()
    b1, b2 = ((name.replace("default", "other"), parameter(*p.shape)) for name, p in named())
    optimizer = LoRARite([a1, b1, a2, b2])
    names = optimizer.param_groups[0]["param_names"]
    assert [name.split(".")[2] for name in names] == ["default", "default", "other", "other"]


def test_frozen_factors_are_left_out():
    """A7."""
    frozen = named("frozen")
    for _, p in frozen:
        p.requires_grad_(False)
    assert LoRARite(named() + frozen).report()["pairs"] == 1
    assert LoRARite([*flat(), *(p for _, p in frozen)]).report()["pairs"] == 1
    assert find_pairs(named() + frozen).frozen == [name for name, _ in frozen]


def test_ranks():
    """A8: mismatch, rank 1, rank above the dimensions, no rows."""
    with pytest.raises(ValueError, match="rank mismatch 8 vs 4"):
        LoRARite([parameter(8, 9), parameter(7, 4)])
    with pytest.raises(ValueError, match=r"shape \(2, 0\)"):
        LoRARite(named(n=0))
    for shape in ((1, 6, 5), (8, 4, 3)):
        pair = named("layer", *shape)
        optimizer = LoRARite(pair, lr=1e-2)
        for _ in range(3):
            for _, p in pair:
                p.grad = torch.randn_like(p)
            optimizer.step()
        assert all(p.isfinite().all() for _, p in pair)


@pytest.mark.parametrize("lr", [-1, float("nan"), float("inf"), "1e-3", True, torch.ones(2), torch.tensor(-1.0), None])
def test_bad_lr(lr):
    """A10."""
    with pytest.raises(ValueError, match="lr must be"):
        LoRARite(flat(), lr=lr)


def test_tensor_lr_is_read_at_each_step():
    """A10."""
    results = []
    for lr in (0.01, torch.tensor(0.01), torch.tensor([0.01])):
        torch.manual_seed(0)
        a, b = flat()
        optimizer = LoRARite([a, b], lr=lr)
        for factor in (1, 3):
            optimizer.param_groups[0]["lr"] = lr * factor
            a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
            optimizer.step()
        results.append((a.detach(), b.detach()))
    for a, b in results[1:]:
        torch.testing.assert_close(a, results[0][0])
        torch.testing.assert_close(b, results[0][1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (1.0, 0.9)}, r"\(1.0, 0.9\)"),
        ({"betas": (0.9, 1.1)}, r"\(0.9, 1.1\)"),
        ({"betas": (0.9,)}, "betas"),
        ({"betas": (float("nan"), 0.9)}, "nan"),
        ({"betas": 0.9}, "betas"),
        ({"eps": 0}, "eps must be .* got 0"),
        ({"eps": -1e-8}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"clip_unmagnified_grad": -1}, "clip_unmagnified_grad must be .* got -1"),
        ({"update_skipping": -1}, "update_skipping"),
        ({"update_capping": float("nan")}, "update_capping"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"damping": -1}, "damping"),
        ({"damping": "10"}, "damping"),
        ({"relative_eps": float("inf")}, "relative_eps"),
        ({"row_beta": 1.0}, "row_beta"),
        ({"row_equilibration": 1}, "row_equilibration must be True or False"),
    ],
)
def test_bad_hyperparameters(options, message):
    """A11; for the constructor and for a group."""
    with pytest.raises(ValueError, match=message):
        LoRARite(flat(), **options)
    with pytest.raises(ValueError, match=message):
        LoRARite([{"params": flat(), **options}])


@pytest.mark.parametrize(
    ("key", "meant"),
    [("learning_rate", "lr"), ("LR", "lr"), ("lrs", "lr"), ("weigth_decay", "weight_decay"), ("wd", "weight_decay"),
     ("beta2", "betas"), ("weightdecay", "weight_decay"), ("epsilon", "eps"), ("maximise", "maximize"),
     ("block", "blocks"), ("clip_unmagnified", "clip_unmagnified_grad"), ("eps_", "eps"), ("param", "params")],
)  # fmt: skip
def test_misspelt_keys_of_a_group_are_named(key, meant):
    """A learning rate that nobody reads would be lost without a word."""
    with pytest.raises(ValueError, match=f"unknown key '{key}' in a parameter group: did you mean '{meant}'"):
        LoRARite([{"params": flat(), key: 1}])
    optimizer = LoRARite(flat())
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        optimizer.add_param_group({"params": flat(), key: 1})
    assert len(optimizer.param_groups) == 1


def test_options_of_the_optimizer_are_not_for_groups():
    with pytest.raises(ValueError, match=r"adamw_lr is an option of the optimizer; in a parameter group .* called lr"):
        LoRARite([{"params": flat(), "adamw_lr": 1}])
    with pytest.raises(ValueError, match="a parameter group without 'params'"):
        LoRARite([{"name": "first"}])


def test_keys_of_others_stay_in_the_groups():
    """Those of a SAM around it, of Lightning, of timm, of schedulers, as with torch's optimizers: kept by the
    constructor, by add_param_group in each group that it makes, and through states."""
    import copy

    extra = {
        "rho": 0.05, "adaptive": True, "name": "first", "lr_scale": 0.5, "weight_decay_mult": 2, "initial_lr": 1e-3,
        "decoupled_weight_decay": True, "foreach": None, "layer": [1, 2], "momentum": 0.9,
    }  # fmt: skip
    kept = lambda optimizer: [{key: group.get(key, "none") for key in extra} for group in optimizer.param_groups]
    head = ("head.weight", parameter(3, 3))
    optimizer = LoRARite([{"params": [*named(), head], **extra}], adamw_lr=1e-3)
    assert kept(optimizer) == [extra, extra]
    optimizer.add_param_group({"params": named("other"), **extra, "name": "second"})
    assert kept(optimizer)[2]["name"] == "second"
    plain = LoRARite([{"params": [*named(), head]}, {"params": named("other")}], adamw_lr=1e-3)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert kept(plain) == kept(optimizer)


def test_an_optimizer_around_it_finds_its_keys():
    """As SAM does: it puts its own defaults into the groups and makes the optimizer from them."""
    outer = torch.optim.SGD([{"params": [*named(), ("head.weight", parameter(3, 3))]}], lr=0.1)
    groups = [{"params": g["params"], "param_names": g["param_names"], "rho": 0.05} for g in outer.param_groups]
    inner = LoRARite(groups, adamw_lr=1e-3)
    assert [group["rho"] for group in inner.param_groups] == [0.05, 0.05]


def test_unknown_kinds():
    with pytest.raises(ValueError, match="kind is"):
        LoRARite([{"params": flat(), "kind": "muon"}])
    with pytest.raises(TypeError):
        LoRARite(flat(), foreach=True)


def test_groups_of_another_optimizer_and_numbers_of_numpy():
    import copy

    import numpy as np

    optimizer = LoRARite(flat(), lr=np.float32(0.01))
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
    again = LoRARite(copy.deepcopy(optimizer.param_groups))
    assert again.param_groups[0]["max_lr"] == 0.1
    pair = named()
    with pytest.raises(ValueError, match="rank mismatch"):
        LoRARite([{"params": pair[::-1], "kind": "lora"}])
    with pytest.raises(ValueError, match="comes before"):
        LoRARite([{"params": named(r=2, n=5, m=5)[::-1], "kind": "lora"}])


def test_groups_after_a_schedule_and_a_copy():
    import copy

    optimizer = LoRARite(flat())
    torch.optim.swa_utils.SWALR(optimizer, 1e-3)
    copied = copy.deepcopy(optimizer)
    copied.add_param_group({"params": flat()})
    assert [group["swa_lr"] for group in LoRARite(copied.param_groups[:1]).param_groups] == [1e-3]
    assert len(LoRARite(copied.param_groups).param_groups) == 2


def test_settings_that_cannot_be_are_refused_at_the_step():
    """What a schedule or a caller makes of the groups; nothing is written."""
    for options, change, message in (
        ({}, {"lr": float("nan")}, "lr=nan is not finite"),
        ({"weight_decay": 10.0}, {"lr": 0.1}, "lr=0.1 with weight_decay=10.0 wipes out"),
        ({}, {"capturable": True}, "capturable is not the same in all"),
    ):
        params = flat()
        optimizer = LoRARite([{"params": params, "kind": "lora"}, {"params": flat(), "kind": "lora"}], **options)
        optimizer.param_groups[0].update(change)
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_what_adamw_cannot_take_is_refused_before_anything_is_written():
    pair, table = named(), parameter(10, 4)
    optimizer = LoRARite([*pair, ("table", table)], adamw_lr=1e-3)

    def step(gradient):
        for _, p in pair:
            p.grad = torch.ones_like(p)
        table.grad = gradient
        optimizer.step()

    step(torch.ones(10, 4))
    before = [p.detach().clone() for _, p in pair]
    with pytest.raises(ValueError, match="gradient of table is sparse"):
        step(torch.ones(10, 4).to_sparse())
    table.grad, table.data = None, torch.zeros(12, 4)
    with pytest.raises(ValueError, match=r"table changed its shape from \(10, 4\) to \(12, 4\)"):
        step(torch.ones(12, 4))
    assert all(torch.equal(p, old) for (_, p), old in zip(pair, before, strict=True))


def test_layers_of_any_kinds_are_batched():
    """A (1, 8) of a linear layer and A (1, 8, 1, 1) of a convolution: shapes of which one begins like the other."""
    shapes = ((1, 8), (1, 1)), ((1, 8, 1, 1), (5, 1, 1, 1))
    named = [(f"l{i}.lora_{'AB'[k]}.w", parameter(*pair[k])) for i, pair in enumerate(shapes) for k in (0, 1)]
    optimizer = LoRARite(named)
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.report()["pairs_preconditioned"] == 2


def test_unusable_tensors():
    """A12."""
    a, b = flat()
    for bad in (parameter(2, 6, dtype=torch.complex64), torch.ones(2, 6, dtype=torch.int32)):
        with pytest.raises(TypeError, match="real floating-point"):
            LoRARite([bad, b])
    with pytest.raises(ValueError, match="meta"):
        LoRARite([parameter(2, 6, device="meta"), parameter(5, 2, device="meta")])
    with pytest.raises(ValueError, match="layout"):
        LoRARite([nn.Parameter(torch.eye(6)[:2].to_sparse()), b])
    with pytest.raises(ValueError, match="not a leaf"):
        LoRARite([a * 2, b])
    with pytest.raises(TypeError, match="str"):
        LoRARite(["a", b])


def test_flattened_factors_are_refused():
    """D3: FSDP1 and ZeRO give one-dimensional pieces, or empty ones."""
    for a, b in ((parameter(12), parameter(10)), (parameter(0), parameter(0))):
        with pytest.raises(ValueError, match=r"non-empty matrix or convolution .*ZeRO"):
            LoRARite([a, b])


def test_pair_on_two_devices():
    """A13 (by the check itself: one machine has one device)."""
    from lora_rite.plan.checks import check_pair

    with pytest.raises(ValueError, match="A is on cpu and B on meta"):
        check_pair(torch.ones(2, 3), torch.ones(4, 2, device="meta"), "A", "B")


def test_pair_of_two_dtypes():
    """A13: computed in float32, each written back in its own dtype."""
    a, b = flat()
    low, optimizers = nn.Parameter(a.detach().bfloat16()), []
    exact = [nn.Parameter(low.detach().float()), nn.Parameter(b.detach().clone())]
    for pair in ([low, b], exact):
        optimizers.append(LoRARite(pair, lr=1e-2))
        for p, g in zip(pair, (torch.ones(2, 6), torch.ones(5, 2)), strict=True):
            p.grad = g.to(p.dtype)
        optimizers[-1].step()
    assert (low.dtype, b.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(b, exact[1])
    torch.testing.assert_close(low.float(), exact[0], atol=2**-7, rtol=2**-7)


def test_convolutions_are_flattened():
    """A9: A (r, n, k, k), B (m, r, 1, 1) move as the flattened matrices do."""
    a, b = parameter(3, 4, 2, 2), parameter(5, 3, 1, 1)
    flat_pair = [nn.Parameter(a.detach().flatten(1).clone()), nn.Parameter(b.detach().flatten(1).clone())]
    names = ("lora_A.weight", "lora_B.weight")
    conv, linear = (
        LoRARite(zip(names, (a, b), strict=True), lr=0.1),
        LoRARite(zip(names, flat_pair, strict=True), lr=0.1),
    )
    for _ in range(3):
        for p, q in zip((a, b), flat_pair, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.flatten(1).clone()
        conv.step()
        linear.step()
    assert torch.equal(a.flatten(1), flat_pair[0])
    assert torch.equal(b.flatten(1), flat_pair[1])
    with pytest.raises(ValueError, match="grouped convolution"):
        LoRARite(zip(names, (parameter(4, 2, 3, 3), parameter(6, 2, 1, 1)), strict=True))
    with pytest.raises(ValueError, match=r"unpaired factor lora_A\.weight"):
        LoRARite([("lora_A.weight", parameter(4)), *named()])


@pytest.mark.parametrize(
    ("a_name", "b_name"),
    [
        ("base.q.lora_A.default.weight", "base.q.lora_B.default.weight"),
        ("emb.lora_embedding_A.default", "emb.lora_embedding_B.default"),
        ("unet.attn.to_q.lora_down.weight", "unet.attn.to_q.lora_up.weight"),
        ("layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"),
    ],
)
def test_names_of_other_libraries(a_name, b_name):
    a, b = flat()
    pairing = find_pairs([(b_name, b), (a_name, a)])
    assert [(p.a_name, p.b_name) for p in pairing.pairs] == [(a_name, b_name)]
    assert pairing.pairs[0].a is a
    assert pairing.pairs[0].rank == 2


def test_a_diagonal_between_the_factors_goes_to_adamw():
    """AdaLoRA, KaSA, LyCORIS' Tucker form: ΔW = B·diag·A has not the invariance of a product."""
    for between in ("layer.lora_E.default", "layer.lora_diag.default", "layer.lora_mid.weight"):
        pairing = find_pairs([*named(), (between, parameter(2, 1)), *named("plain")])
        assert [p.a_name for p in pairing.pairs] == ["plain.lora_A.default.weight"]
        assert between in str(pairing)
        assert "stands between" in str(pairing)
        assert len(pairing.left_out) == 3


def test_param_groups_of_parts():
    q, k = named("q"), named("k")
    optimizer = LoRARite([*param_groups(q, lr=1e-3), *param_groups(k, lr=1e-2, damping=0.0)])
    assert [(g["lr"], g["damping"]) for g in optimizer.param_groups] == [(1e-3, 20.0), (1e-2, 0.0)]
    assert optimizer.report()["pairs"] == 2


def test_nameless_groups_of_a_trainer():
    """transformers' Trainer gives an optimizer class two nameless groups, the second of which may be empty."""
    optimizer = LoRARite([{"params": flat() + flat(3), "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}])
    assert len(optimizer.param_groups) == 1
    assert optimizer.report()["ranks"] == {2: 1, 3: 1}
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
