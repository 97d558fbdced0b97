"""``lora-rite train --optimizer``: every name, and import paths."""

import re
import sys

import pytest

pytest.importorskip("peft")

import torch

import lora_rite
from lora_rite.finetune.optimizers import PRESETS, create_optimizer
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
        ("adam", lora_rite.LoRARiteValueError, "no optimizer adam; there are lora-rite, "),
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
