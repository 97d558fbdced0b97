"""``lora-rite train --optimizer``: every name, and import paths."""

import re
import sys

import pytest

pytest.importorskip("peft")

import torch

import lora_rite
from lora_rite.finetune.optimizers import PRESETS, check_arguments, create_optimizer
from lora_rite.invariance.problems import Adapter
from lora_rite.plan.pairs import Shape

NAMES = [
    pytest.param(n, marks=pytest.mark.filterwarnings("ignore")) if p.path.startswith("pytorch_optimizer") else n
    for n, p in PRESETS.items()
]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_trains_both_factors_and_decays_as_told(name):
    """A few steps down a quadratic lower it; with gradients of zero, weight decay alone moves the factors, and the
    default of it is none (Muon's own is 0.1)."""
    if PRESETS[name].path.startswith("pytorch_optimizer"):
        pytest.importorskip("pytorch_optimizer")

    def factors():
        torch.manual_seed(0)
        adapter = Adapter([Shape(12, 8, 4)], torch.float32, "cpu")
        return adapter, list(adapter.parameters())

    adapter, (a, b) = factors()
    target = torch.randn(8, 12)
    optimizer = create_optimizer(adapter, name, 1e-2)
    loss = lambda: ((b @ a - target) ** 2).mean()
    before, start = loss().item(), [a.detach().clone(), b.detach().clone()]
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < before
    assert all(not torch.equal(p, q) for p, q in zip(start, (a, b), strict=True))

    for weight_decay in (0.0, 0.5):
        adapter, params = factors()
        start = [p.detach().clone() for p in params]
        optimizer = create_optimizer(adapter, name, 1e-2, weight_decay)
        for p in params:
            p.grad = torch.zeros_like(p)
        for _ in range(3):
            optimizer.step()
        moved = [not torch.equal(p, q) for p, q in zip(start, params, strict=True)]
        assert moved == [bool(weight_decay)] * 2


def test_the_help_of_train_has_every_name():
    pytest.importorskip("jsonargparse")
    from lora_rite.finetune.train import train

    text = train.__doc__.partition(" optimizer: ")[2].partition(" optimizer_args: ")[0]
    assert [name for name in PRESETS if not re.search(rf"\b{name}\b", text)] == []


def test_published_is_the_authors_step_and_options_go_over_it():
    adapter = Adapter([Shape(12, 8, 4)], torch.float32, "cpu")
    group = create_optimizer(adapter, "lora-rite-published", 1e-2, options={"update_capping": 1.0}).param_groups[0]
    assert {key: group[key] for key in lora_rite.PUBLISHED} == lora_rite.PUBLISHED
    assert group["update_capping"] == 1.0


def test_lora_plus_gives_b_the_larger_rate():
    adapter = Adapter([Shape(12, 8, 4)], torch.float32, "cpu")
    optimizer = create_optimizer(adapter, "lora-plus", 1e-2, options={"loraplus_lr_ratio": 16.0})
    (a, b) = adapter.parameters()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(b)] == pytest.approx(16 * rates[id(a)])


def test_state_in_lists_counts():
    """SOAP keeps its preconditioners in lists: two m×m and two r×r matrices beside AdamW's two moments."""
    pytest.importorskip("pytorch_optimizer")
    from lora_rite.optim.optimizer import state_bytes

    adapter = Adapter([Shape(12, 8, 4)], torch.float32, "cpu")
    optimizer = create_optimizer(adapter, "soap", 1e-2)
    for p in adapter.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    moments = 2 * 4 * (12 + 8)
    preconditioners = 2 * (12**2 + 4**2 + 8**2 + 4**2)
    assert state_bytes(optimizer) == 4 * (moments + preconditioners)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("sgd", lora_rite.LoRARiteValueError, "no optimizer sgd; there are lora-rite, "),
        ("lorarite", lora_rite.LoRARiteValueError, "no optimizer lorarite, did you mean lora-rite?"),
        ("torch.optim:Nothing", lora_rite.LoRARiteValueError, "cannot import torch.optim:Nothing: "),
        ("no_such_package:X", lora_rite.LoRARiteValueError, "No module named 'no_such_package'"),
        ("torch.optim:Adam W", lora_rite.LoRARiteValueError, "'torch.optim:Adam W' is not an import path like"),
        ("torch.no_such:X", lora_rite.LoRARiteValueError, "torch.no_such"),
    ],
)
def test_what_is_not_there_is_named(name, error, message):
    with pytest.raises(error, match=message):
        create_optimizer(Adapter([Shape(12, 8, 4)], torch.float32, "cpu"), name, 1e-2)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match=r'soap needs pytorch_optimizer: pip install "lora-rite\[study\]"'):
        create_optimizer(Adapter([Shape(12, 8, 4)], torch.float32, "cpu"), "soap", 1e-2)


def test_weight_decay_that_cannot_be_passed_on_is_an_error():
    with pytest.raises(lora_rite.LoRARiteValueError, match="takes no weight_decay"):
        create_optimizer(Adapter([Shape(12, 8, 4)], torch.float32, "cpu"), "torch.optim:Rprop", 1e-2, 0.1)


FACTORIES = """
import lora_rite

def swallows(model, lr, damping=1.0, **options):
    return lora_rite.create_lora_rite(model, lr)

def hands_on(model, **options):
    return lora_rite.create_lora_rite(model, **options)

def of_a_real_model(model, lr, damping=1.0, **options):
    return lora_rite.create_lora_rite(model.config.model, lr)
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "some_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_factories", raising=False)


@pytest.mark.parametrize(
    ("name", "key", "meant"),
    [
        ("lora-rite", "dampng", "damping"),
        ("lora-rite", "lr_by_nme", "lr_by_name"),
        ("lora-rite", "wd", "weight_decay"),
        ("lora-rite-published", "dampng", "damping"),
        ("lora_rite:LoRARite", "adamw_ls", "adamw_lr"),
        ("adamw", "epss", "eps"),
        ("adamw", "learning_rate", "--lr"),
        ("muon", "momentm", "momentum"),
        ("lora-plus", "loraplus_lr_rati", "loraplus_lr_ratio"),
        ("lora-plus", "epss", "eps"),  # of the AdamW that it is told to make
        ("riemannian", "rge", "reg"),
        ("soap", "precondition_frequncy", "precondition_frequency"),  # pytorch_optimizer's take any keyword
        ("lamb", "beta", "betas"),
        ("polora", "betass", "betas"),
        ("shampoo", "weight_dcay", "weight_decay"),
        ("lora-muon", "bet", "beta"),
        ("some_factories:swallows", "dampng", "damping"),
        ("some_factories:hands_on", "dampng", "damping"),
        ("some_factories:of_a_real_model", "dampng", "damping"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_misspelt_argument_is_named_with_the_one_that_was_meant(name, key, meant, factories):
    """Of any optimizer, whether or not its signature ends in ``**kwargs``."""
    if PRESETS.get(name, PRESETS["adamw"]).path.startswith("pytorch_optimizer"):
        pytest.importorskip("pytorch_optimizer")
    message = f"--optimizer_args.{key}: --optimizer {name} has no such argument, did you mean {meant}?"
    with pytest.raises(lora_rite.LoRARiteValueError, match=re.escape(message)):
        check_arguments(name, {key: 1.0})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name.values[0] if hasattr(name, "values") else name, None) for name in NAMES),
        ("lora-rite", {"damping": 5, "adamw_lr": 1e-4, "scaling": None, "engine": None, "lr_by_name": {"a": 1.0}}),
        ("lora-rite-published", {"damping": 5, "lr_by_name": {}}),
        ("lora-rite", {"damping": -1}),  # what is wrong with a value is not asked here
        ("lora-plus", {"loraplus_lr_embedding": 1e-3, "betas": (0.9, 0.99)}),
        ("riemannian", {"optimizer_cls": "torch.optim:SGD", "momentum": 0.1}),
        ("some_factories:swallows", {"rank_of_something": 3}),
        ("some_factories:hands_on", {"damping": 4, "lr_by_name": {"a": 1.0}}),
        ("some_factories:of_a_real_model", {"rank_of_something": 3}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_arguments_that_an_optimizer_takes_pass(name, options, factories):
    """Those too that only what its ``**kwargs`` go to knows; and no random number is drawn."""
    if PRESETS.get(name, PRESETS["adamw"]).path.startswith("pytorch_optimizer"):
        pytest.importorskip("pytorch_optimizer")
    state = torch.get_rng_state()
    check_arguments(name, options)
    assert torch.equal(state, torch.get_rng_state())


def test_an_argument_without_a_near_one_says_what_there_is():
    with pytest.raises(lora_rite.LoRARiteValueError, match=r"nothing_like_it: .*; it takes amsgrad, betas, capturable"):
        check_arguments("adamw", {"nothing_like_it": 1})


def test_a_misspelt_argument_ends_a_run_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    """In words and in a config file; nothing is written."""
    pytest.importorskip("jsonargparse")
    from lora_rite.cli import main

    monkeypatch.setattr("lora_rite.finetune.prepare.load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "run.yaml").write_text("optimizer_args:\n  dampng: 5\n")
    words = ["train", "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out")]
    for more in (["--optimizer_args.dampng", "5"], ["--config", str(tmp_path / "run.yaml")]):
        assert main([*words, *more]) == 2
        assert "--optimizer_args.dampng: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
