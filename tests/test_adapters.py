"""LoRARite on every PEFT layer that holds a product B·A: the count of pairs that each step preconditioned."""

import re
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")

import adapters  # noqa: E402
from adapters import ADAPTERS, STACKED, adapted, linear, loss, numbers  # noqa: E402
from problems import random_matrix, regauged, relative  # noqa: E402

from lora_rite import LoRARite, create_lora_rite, find_pairs  # noqa: E402


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def named(kinds):
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.name)


@named(ADAPTERS)
def test_every_pair_is_preconditioned_in_every_step(kind):
    """And every other trainable parameter moves, by AdamW; on one batch the loss falls."""
    model = kind.build()
    optimizer = create_lora_rite(model, lr=1e-2, damping=1.0, **({"adamw_lr": 1e-3} if kind.others else {}))
    before, x, losses = trained(model), kind.inputs(0), []
    for _ in range(8):
        optimizer.zero_grad()
        value = loss(model, x)
        value.backward()
        optimizer.step()
        losses.append(value.item())
        report = optimizer.report()
        assert (report["pairs"], report["pairs_preconditioned"]) == (kind.pairs, kind.pairs)
        assert report["other_parameters"] == kind.others
    assert {n for n, p in trained(model).items() if torch.equal(p, before[n])} == set()
    assert losses[-1] < losses[0]


@named(STACKED)
def test_blocks_multiply_as_written(kind):
    """What PEFT's layer adds to its base layer is what the blocks of ``tests/adapters.py`` give, pair by pair."""
    model = kind.build()
    adapters.randomise(model)
    x = kind.inputs(0)
    with torch.no_grad():
        added = model(x)
        with model.disable_adapter():
            added = added - model(x)
        torch.testing.assert_close(added, kind.delta(model, x), rtol=1e-4, atol=1e-4)
    assert len(kind.products(model)) == kind.pairs


@named(STACKED)
def test_each_block_is_a_pair(kind):
    """Experts, groups of a convolution, blocks of a factor: the step equals that on the same products as separate
    pairs, and does not depend on their factorisation. An expert without tokens stays as it is, with its state, bit by
    bit."""
    after = []
    for turned in (False, True):
        model = kind.build().double()
        adapters.randomise(model)
        if turned:
            for i, (a, b) in enumerate(kind.products(model)):
                new = regauged(a.detach().flatten(1), b.detach().flatten(1), random_matrix(len(a), 10.0, seed=i))
                for block, value in zip((a, b), new, strict=True):
                    block.data.copy_(value.view_as(block))
        apart = [[torch.nn.Parameter(p.detach().clone()) for p in product] for product in kind.products(model)]
        optimizer = create_lora_rite(model, lr=1e-2, scaling=None)
        other = LoRARite([p for pair in apart for p in pair], lr=1e-2)
        for t in range(3):
            optimizer.zero_grad()
            loss(model, kind.inputs(t).double()).backward()
            gradients = [p.grad for p in adapters.whole(model)]
            blocks = [p.detach().clone() for p in adapters.whole(model)]
            for p, g in zip(adapters.whole(model), gradients, strict=True):
                p.data.copy_(g)
            for pair, product in zip(apart, kind.products(model), strict=True):
                for p, g in zip(pair, product, strict=True):
                    p.grad = g.detach().clone()
            for p, x in zip(adapters.whole(model), blocks, strict=True):
                p.data.copy_(x)
            optimizer.step()
            other.step()
            assert optimizer.report()["pairs_preconditioned"] == kind.pairs
        got = [b.flatten(1) @ a.flatten(1) for a, b in kind.products(model)]
        expected = [b.flatten(1) @ a.flatten(1) for a, b in apart]
        assert relative(torch.stack(got).detach(), torch.stack(expected).detach()) < 1e-9
        after.append(torch.stack(got).detach())
    assert relative(*after) < 1e-8
    if "experts" in kind.name:
        adapters.lora_layer(model).get_base_layer().idle = True
        before = [p.detach().clone() for p in kind.products(model)[2]]
        states = [
            {k: v[2].clone() for k, v in optimizer.state[p].items() if k != "first_moment"}
            for p in adapters.whole(model)
        ]
        optimizer.zero_grad()
        loss(model, kind.inputs(3).double()).backward()
        optimizer.step()
        assert all(torch.equal(p, x) for p, x in zip(kind.products(model)[2], before, strict=True))
        for p, state in zip(adapters.whole(model), states, strict=True):
            assert all(torch.equal(optimizer.state[p][key][2], value) for key, value in state.items())


@named([kind for kind in ADAPTERS if kind.name != "montecarlo"])
def test_the_step_does_not_depend_on_the_factorisation(kind):
    """The same products B·A from other factors, (K⁻¹·A, B·K), are the same products after three steps in float64: so
    what is called a pair is one, also where the layer makes something else of B·A than W + B·A. (MonteCLoRA's noise on
    A has no such invariance.)"""
    after = []
    for turned in (False, True):
        model = kind.build().double()
        adapters.randomise(model)
        pairs = find_pairs(model).pairs
        if turned:
            for i, pair in enumerate(pairs):
                a, b = (p.detach().flatten(1) for p in (pair.a, pair.b))
                a, b = regauged(a, b, random_matrix(pair.rank, 10.0, seed=i))
                pair.a.data.copy_(a.view_as(pair.a))
                pair.b.data.copy_(b.view_as(pair.b))
        optimizer = create_lora_rite(model, lr=1e-2, **({"adamw_lr": 1e-3} if kind.others else {}))
        for t in range(3):
            x = kind.inputs(t)
            optimizer.zero_grad()
            loss(model, x.double() if x.is_floating_point() else x).backward()
            optimizer.step()
        after.append([pair.b.detach().flatten(1) @ pair.a.detach().flatten(1) for pair in pairs])
    for plain, turned in zip(*after, strict=True):
        assert relative(turned, plain) < 1e-7


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (peft.AdaLoraConfig, {"total_step": 10}, "lora_E"),
        (peft.LoraConfig, {"kasa_config": peft.KasaConfig()}, "lora_diag"),
        (peft.VeraConfig, {}, "VeRA trains vectors"),
        (peft.PveraConfig, {"r": 4}, "PVeRA trains vectors"),
        (peft.RandLoraConfig, {}, "RandLoRA trains vectors"),
        (peft.VBLoRAConfig, {"vector_length": 4}, "VB-LoRA trains a bank"),
        (peft.DeloraConfig, {}, "DeLoRA normalises"),
        (peft.GraloraConfig, {}, "GraLoRA has the factors of several blocks"),
        (peft.PolyConfig, {"n_tasks": 2, "n_skills": 2, "n_splits": 2}, "Poly has the factors of several skills"),
        (peft.LilyConfig, {}, "Lily shares factors"),
        (peft.GloraConfig, {}, "GLoRA scales and shifts"),
        (peft.IA3Config, {"feedforward_modules": []}, "none of 1 trainable parameters is a factor"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_other_adapters_are_left_to_adamw_with_the_reason(config, options, reason):
    """Nothing is paired; beside LoRA pairs such parameters go to AdamW, alone they are an error that says why."""
    model = adapted(linear, config, target_modules=["0"], **options)()
    pairing = find_pairs(model)
    assert not pairing.pairs
    assert len(pairing.left_out) == len(trained(model))
    with pytest.raises(ValueError, match=f"no LoRA pairs.*{reason}"):
        create_lora_rite(model, adamw_lr=1e-3)


def test_adapters_that_are_not_active_are_left_alone():
    """Both adapters are in the optimizer; a step moves the pairs of the active one only, and its state alone exists."""
    model = adapted(linear)()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    optimizer = create_lora_rite(model, lr=1e-2)
    for active, pairs, states in ((["other"], 1, 2), (["default"], 2, 6), (["default", "other"], 3, 6)):
        model.base_model.set_adapter(active)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in range(2):
            optimizer.zero_grad()
            loss(model, torch.ones(3, 12)).backward()
            optimizer.step()
        assert optimizer.report()["pairs_preconditioned"] == pairs
        assert len(optimizer.state) == states
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert len(moved) == 2 * pairs
        assert {parameter.split(".")[4] for parameter in moved} == set(active)
    model.base_model.set_adapter("default")
    assert len(find_pairs(model).pairs) == 2
    assert len(find_pairs(model).frozen) == 2


def test_tied_embeddings_are_refused_or_trained_once():
    """PEFT's ensure_weight_tying lets the head's A share storage with the embedding's B, with the roles swapped."""
    transformers = pytest.importorskip("transformers")
    size = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 16,
    }
    config = transformers.GemmaConfig(vocab_size=20, num_key_value_heads=1, tie_word_embeddings=True, **size)
    base = lambda: transformers.AutoModelForCausalLM.from_config(config)
    names = ["embed_tokens", "lm_head"]
    tied = adapted(base, target_modules=names, ensure_weight_tying=True)()
    with pytest.raises(ValueError, match="share storage"):
        create_lora_rite(tied)
    assert len(find_pairs(adapted(base, target_modules=names, ensure_weight_tying=False)()).pairs) == 2
    # one whole layer for both ends is one parameter
    saved = adapted(base, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)()
    optimizer = create_lora_rite(saved, adamw_lr=1e-3)
    assert (optimizer.report()["pairs"], optimizer.report()["other_parameters"]) == (1, 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(bits):
    """bitsandbytes on a CPU: the factors are float32, the base is not touched."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt}[bits]
    options = {4: {"quant_type": "nf4", "compute_dtype": torch.float32}, 8: {"has_fp16_weights": False}}[bits]

    def base():
        model = torch.nn.Sequential(layer(64, 64, **options), torch.nn.Tanh(), layer(64, 32, **options)).to("cpu")
        setattr(model, f"is_loaded_in_{bits}bit", True)
        return model

    model = adapted(base)()
    assert LoRARite(model.named_parameters()).report()["pairs"] == 2
    optimizer, x, losses = create_lora_rite(model, lr=1e-2, damping=1.0), torch.randn(6, 64), []
    frozen = lambda: [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    before = frozen()
    assert {4: torch.uint8, 8: torch.int8}[bits] in {p.dtype for p in before}
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(loss(model, x))
        losses[-1].backward()
        optimizer.step()
        assert optimizer.report()["pairs_preconditioned"] == 2
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, q) for p, q in zip(frozen(), before, strict=True))


@pytest.mark.parametrize(
    ("config", "options", "core"),
    [
        (peft.LoHaConfig, {}, "hada_t"),
        (peft.LoKrConfig, {"r": 2, "decompose_factor": 2}, "lokr_t2"),
    ],
)
def test_a_core_between_the_factors_is_no_pair(config, options, core):
    """Tucker's form of a convolution: w_aᵀ, core, w_b."""
    base = lambda: torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3))
    model = adapted(base, config, target_modules=["0"], use_effective_conv2d=True, **options)()
    pairing = find_pairs(model)
    assert not pairing.pairs
    assert any(core in left_out.reason for left_out in pairing.left_out)


def test_plain_products_on_a_grouped_convolution_are_single_pairs():
    """LoHa's factors there are of the whole weight; LoRA's hold a pair for each group."""
    base = lambda: torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=2))
    pairs = find_pairs(adapted(base, peft.LoHaConfig, target_modules=["0"])()).pairs
    assert [pair.blocks for pair in pairs] == [1, 1]
    assert [pair.blocks for pair in find_pairs(adapted(base, target_modules=["0"])()).pairs] == [2]


def test_lr_times_alpha_over_rank_is_what_counts():
    """Without ``scaling``, twice alpha at half the lr is the same fine-tune (clipping and eps apart)."""
    products = []
    for alpha, lr in ((4, 1e-2), (8, 5e-3)):
        model = adapted(linear, lora_alpha=alpha)().double()
        optimizer = create_lora_rite(model, lr=lr, scaling=None, clip_unmagnified_grad=0.0, eps=1e-12)
        for t in range(10):
            optimizer.zero_grad()
            loss(model, numbers(6, 12)(t).double()).backward()
            optimizer.step()
        products.append([alpha * (pair.b @ pair.a).detach() for pair in find_pairs(model).pairs])
    for one, other in zip(*products, strict=True):
        assert relative(other, one) < 1e-6


def test_the_table_names_tests_that_exist():
    """docs/adapters.md."""
    text = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    named_tests = set(re.findall(r"`(test_\w+)", text))
    assert len(named_tests) > 10
    assert [name for name in named_tests if f"def {name}(" not in sources] == []
    cases = set(re.findall(r"(?:…|every_step|is_a_pair)\[(\w+)\]|`\[(\w+)\]`", text))
    kinds = {one or other for one, other in cases}
    assert kinds == {kind.name for kind in (*ADAPTERS, *STACKED)} - {"experts_transposed"}


def test_one_frozen_factor_is_a_pair_of_its_own_kind():
    """MiCA trains A, from zero; B is frozen and has orthonormal columns. LoRA-FA trains B, from zero; A is frozen. What
    is frozen stays, bit by bit; `find_pairs` says which it is; switching adapters does not confuse them."""
    for name, still, moving in (("mica", "lora_B", "lora_A"), ("lorafa", "lora_A", "lora_B")):
        model = next(kind for kind in ADAPTERS if kind.name == name).build()
        factors = {n: p for n, p in model.named_parameters() if "lora_" in n}
        assert {n for n, p in factors.items() if p.requires_grad} == {n for n in factors if moving in n}
        assert all(p.any() == (still in n) for n, p in factors.items())
        if name == "mica":
            frozen = next(p for n, p in factors.items() if still in n)
            torch.testing.assert_close(frozen.mT @ frozen, torch.eye(4))
        pairing = find_pairs(model)
        assert str(pairing).count(f", {still[-1]} frozen") == 2
        assert pairing.frozen == []
        before = {n: p.detach().clone() for n, p in factors.items()}
        optimizer = create_lora_rite(model, lr=1e-2)
        for t in range(3):
            optimizer.zero_grad()
            loss(model, numbers(6, 12)(t)).backward()
            optimizer.step()
            assert optimizer.report()["pairs_preconditioned"] == 2
        assert {n for n, p in factors.items() if not torch.equal(p, before[n])} == {n for n in factors if moving in n}
        assert {id(p) for p in optimizer.state} == {id(p) for n, p in factors.items() if moving in n}
