"""ZeroLoRARite as far as it needs no DeepSpeed; with it, in test_deepspeed.py."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from problems import factors
from torch import nn

from lora_rite import LoRARite, LoRARiteFactory, LoRARiteTypeError, LoRARiteValueError, ZeroLoRARite


def layer():
    a, b = factors(4, 9, 7)
    net = nn.Module()
    net.lora_A, net.lora_B = nn.Linear(9, 4, bias=False), nn.Linear(4, 7, bias=False)
    net.lora_A.weight, net.lora_B.weight = nn.Parameter(a.float()), nn.Parameter(b.float())
    net.other = nn.Parameter(torch.ones(3))
    return net


def made(net, **options):
    return LoRARite(net.named_parameters(), lr=1e-2, **{"adamw_lr": 1e-3, **options})


def test_the_model_keeps_its_parameters_and_the_optimizer_gets_copies():
    net = layer()
    net.lora_A.weight.requires_grad_(False)
    inner = made(net)
    outer = ZeroLoRARite(inner)
    assert [group["params"] for group in outer.param_groups] == [[net.lora_B.weight], [net.other]]
    assert [group["lr"] for group in outer.param_groups] == [1e-2, 1e-3]
    assert outer.optimizer is inner
    (group,) = inner.param_groups
    for p, copy in zip((net.lora_A.weight, net.lora_B.weight), group["params"], strict=True):
        assert copy is not p
        assert copy.requires_grad == p.requires_grad
        assert torch.equal(copy, p)


def test_what_cannot_be_wrapped():
    with pytest.raises(LoRARiteTypeError, match="optimizer is a AdamW, not a LoRARite"):
        ZeroLoRARite(torch.optim.AdamW(layer().parameters()))
    net = layer()
    stepped = made(net)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    stepped.step()
    with pytest.raises(LoRARiteValueError, match="wrap it before its first step"):
        ZeroLoRARite(stepped)
    with pytest.raises(LoRARiteTypeError, match="before ZeroLoRARite wraps it"):
        ZeroLoRARite(made(layer())).add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_without_deepspeed_a_step_is_an_error():
    net = layer()
    optimizer = ZeroLoRARite(made(net))
    before = net.lora_A.weight.detach().clone()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(LoRARiteValueError, match="stages 1 to 3, which has not taken over these parameters"):
        optimizer.step()
    assert torch.equal(net.lora_A.weight, before)


def test_a_state_of_another_optimizer_is_refused():
    net = layer()
    with pytest.raises(LoRARiteValueError, match="not a state of ZeroLoRARite"):
        ZeroLoRARite(made(net)).load_state_dict(made(layer()).state_dict())


@pytest.mark.parametrize("stage", [0, 2])
def test_the_factory_follows_accelerate(stage, monkeypatch):
    """As the state of Accelerate is after an Accelerator with a DeepSpeedPlugin was made."""
    config = {"zero_optimization": {"stage": stage}, "gradient_clipping": 0.0}
    plugin = SimpleNamespace(deepspeed_config=config)
    state, deepspeed = ModuleType("accelerate.state"), ModuleType("deepspeed")
    state.is_initialized = lambda: True
    state.AcceleratorState = lambda: SimpleNamespace(deepspeed_plugin=plugin)
    deepspeed.runtime = SimpleNamespace(constants=SimpleNamespace(GRADIENT_CLIPPING_DEFAULT=1.0))
    monkeypatch.setitem(sys.modules, "accelerate.state", state)
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    optimizer = LoRARiteFactory()(layer(), lr=1e-2, adamw_lr=1e-3)
    assert type(optimizer) is (ZeroLoRARite if stage else LoRARite)
    assert config.get("zero_force_ds_cpu_optimizer", True) == (not stage)
    if stage:
        del config["gradient_clipping"]
        with pytest.warns(UserWarning, match=r"DeepSpeed's gradient_clipping=1.0 clips raw gradients"):
            LoRARiteFactory()(layer(), lr=1e-2, adamw_lr=1e-3)
