"""LoRARite on every PEFT layer that holds a product B·A: the count of pairs that each step preconditioned."""

import pytest
import torch

peft = pytest.importorskip("peft")

import adapters  # noqa: E402
from adapters import ADAPTERS, STACKED, adapted, linear, loss  # noqa: E402
from problems import random_matrix, regauged, relative  # noqa: E402

from lora_rite import create_lora_rite, find_pairs  # noqa: E402


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
