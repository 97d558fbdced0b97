"""Learning rates by name (``lr_by_name``): of pairs and of other parameters, in loops, the Trainer and under ZeRO."""

import copy
import re

import pytest
import torch
from torch import nn

from lora_rite import LoRARite, LoRARiteFactory, ZeroLoRARite, create_lora_rite, param_groups

LR, STEPS = 1e-2, 5


class Layer(nn.Module):
    """A linear map with a pair as PEFT names it."""

    def __init__(self, n, m, rank):
        super().__init__()
        self.scaling = {"default": 2.0 / rank}
        self.base = nn.Linear(n, m).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, m, bias=False)})

    def forward(self, x):
        return self.base(x) + self.scaling["default"] * self.lora_B["default"](self.lora_A["default"](x))


class Network(nn.Module):
    """Two layers in a list, a third of another scaling, and whole parameters."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(6, 6, 2), Layer(6, 6, 2)])
        self.out = Layer(6, 4, 3)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(self.out(x))


def network():
    torch.manual_seed(0)
    return Network()


def trained(model, optimizer, steps=STEPS, start=0, schedule=None):
    """The trainable parameters by name after some steps."""
    for step in range(start, start + steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())


def lrs(optimizer):
    """The learning rate of each parameter, by name."""
    groups = optimizer.param_groups
    return {name: group["lr"] for group in groups for name in group["param_names"]}


BY_NAME = {r"layers\.1$": 3e-2, "^out": 2e-3, r"head\.bias": 4e-4}


def test_it_equals_groups_made_by_hand():
    """With the scalings that the model tells, AdamW's options of the optimizer, and a schedule of every group."""
    theirs = network()
    one, scaled = ({"kind": "lora", "scaling": scaling} for scaling in (1.0, 2 / 3))
    named = dict(theirs.named_parameters())
    of = lambda *layers: [item for item in named.items() if "lora_" in item[0] and item[0].startswith(layers)]
    groups = [
        {"params": of("layers.0"), **one},
        {"params": of("layers.1"), "lr": 3e-2, **one},
        {"params": of("out"), "lr": 2e-3, **scaled},
        {"params": [("head.weight", theirs.head.weight)], "kind": "adamw"},
        {"params": [("head.bias", theirs.head.bias)], "kind": "adamw", "lr": 4e-4},
    ]
    options = {"adamw_lr": 1e-3, "adamw_weight_decay": 0.1, "damping": 5.0}
    by_hand = LoRARite(groups, lr=LR, **options)
    ours = network()
    optimizer = create_lora_rite(ours, lr=LR, lr_by_name=BY_NAME, **options)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (optimizer, by_hand)]
    same(trained(ours, optimizer, schedule=schedules[0]), trained(theirs, by_hand, schedule=schedules[1]))
    assert lrs(optimizer) == lrs(by_hand)
    assert optimizer.report() == by_hand.report()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LR * 0.8**STEPS)  # what trainers log


@pytest.mark.parametrize("expression", ["lora_A", "lora_B", r"layers\.0\.lora_B", "layers", ".", "default.weight$"])
def test_a_pair_is_never_split(expression):
    """Whatever part of it the expression is found in."""
    optimizer = create_lora_rite(network(), lr=LR, adamw_lr=1e-3, lr_by_name={expression: 5e-2})
    found = lrs(optimizer)
    assert 5e-2 in found.values()
    for name, lr in found.items():
        if "lora_A" in name:
            assert found[name.replace("lora_A", "lora_B")] == lr


def test_every_other_option_is_that_of_the_group_without():
    groups = param_groups(network(), lr_by_name=BY_NAME, betas=(0.5, 0.9), lr=LR)
    assert [group.get("betas") for group in groups] == [(0.5, 0.9)] * 3 + [None] * 2
    assert [group.get("scaling") for group in groups] == [1.0, 1.0, 2 / 3, None, None]
    everything = [name for group in param_groups(network()) for name, _ in group["params"]]
    assert sorted(name for group in groups for name, _ in group["params"]) == sorted(everything)


def test_wrappers_and_named_parameters_make_no_difference():
    """The expression is searched in plain names; adamw_lr is not needed where every other parameter has its own."""
    by_name = {r"^layers\.0": 3e-2, "^head": 1e-3}
    expected = lrs(create_lora_rite(network(), lr=LR, lr_by_name=by_name))
    wrapped = nn.Module()
    wrapped.add_module("_orig_mod", network())
    found = lrs(create_lora_rite(wrapped, lr=LR, lr_by_name=by_name))
    assert {name.removeprefix("_orig_mod."): lr for name, lr in found.items()} == expected
    assert lrs(LoRARite(param_groups(network().named_parameters(), lr_by_name=by_name), lr=LR)) == expected


def test_a_tensor_is_followed():
    rate = torch.tensor(3e-2)
    optimizer = create_lora_rite(network(), lr=LR, adamw_lr=1e-3, lr_by_name={r"layers\.1": rate})
    assert lrs(optimizer)["layers.1.lora_A.default.weight"] is rate


def test_a_resumed_run_ends_as_the_whole_one():
    whole, first = network(), network()
    make = lambda model: create_lora_rite(model, lr=LR, adamw_lr=1e-3, lr_by_name=BY_NAME)
    before = make(first)
    trained(first, before)
    second = copy.deepcopy(first)
    after = make(second)
    after.load_state_dict(before.state_dict())
    same(trained(whole, make(whole), 2 * STEPS), trained(second, after, start=STEPS))


@pytest.mark.parametrize(
    ("by_name", "message"),
    [
        ({"embed_tokens": 1e-4}, "'embed_tokens' matches no trainable parameter; they are named like layers.0.lora_A"),
        ({"base": 1e-4}, "'base' matches no trainable parameter"),  # frozen
        ({"out": 1e-4, "lora_B": 1e-3}, "'out' and 'lora_B' both match out.lora_A.default.weight with out.lora_B"),
        ({"lora_A": 1e-4, "lora_B": 1e-3}, "'lora_A' and 'lora_B' both match layers.0.lora_A"),
        ({"head": 1e-4, "bias": 1e-3}, "'head' and 'bias' both match head.bias"),
        ({"(": 1e-4}, "'(' is no regular expression: "),
        ({3: 1e-4}, "3 is no regular expression: "),
        ({"out": -1.0}, "lr_by_name['out']: lr must be a finite number ≥ 0, got -1.0"),
        ({"out": "1e-4"}, "lr_by_name['out']: lr must be a finite number ≥ 0, got '1e-4'"),
        ({"out": None}, "lr_by_name['out']: lr must be"),
        ({"out": torch.tensor([1.0, 2.0])}, "lr must be a number or a tensor of one element"),
        ([("out", 1e-4)], "lr_by_name must map expressions to learning rates, got [('out', 0.0001)]"),
    ],
)
def test_what_is_wrong_is_named(by_name, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        create_lora_rite(network(), lr=LR, adamw_lr=1e-3, lr_by_name=by_name)


def test_a_group_does_not_take_it():
    """It would be a foreign key there, which has no effect."""
    group = {"params": network().named_parameters(), "lr_by_name": {"out": 1e-4}}
    with pytest.raises(ValueError, match="lr_by_name is not for a group: pass it to create_lora_rite or param_groups"):
        LoRARite([group], adamw_lr=1e-3)


@pytest.mark.parametrize("key", ["embedding_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio"])
def test_a_factory_refuses_what_it_would_not_use(key):
    """axolotl's training arguments; None is axolotl's default."""
    arguments = type("Arguments", (), {"learning_rate": LR, key: None})()
    options = {"adamw_lr": 1e-3, "lr_by_name": {"head": 1e-4}}
    assert lrs(LoRARiteFactory()(network(), arguments, **options))["head.weight"] == 1e-4
    setattr(arguments, key, 1e-4)
    with pytest.raises(ValueError, match=f"^{key} of the training arguments is not used by LoRARite: .*lr_by_name="):
        LoRARiteFactory()(network(), arguments, **options)


def test_zero_keeps_the_ratios_only_of_rates_that_have_some():
    """DeepSpeed schedules one lr of the factors, of which those by name are multiples."""
    by_name = {r"layers\.1": 3e-2}
    ZeroLoRARite(create_lora_rite(network(), lr=LR, adamw_lr=1e-3, lr_by_name=by_name))
    with pytest.raises(ValueError, match="lr of the first group of pairs is 0 and that of others is not"):
        ZeroLoRARite(create_lora_rite(network(), lr=0.0, adamw_lr=1e-3, lr_by_name=by_name))


def test_checks_on_other_models_leave_it_out():
    """Commands try an optimizer on small pairs first, and measure its state there: a study's memory is the same."""
    pytest.importorskip("transformers")
    from lora_rite.finetune.memory import optimizer_state
    from lora_rite.finetune.optimizers import check_optimizer
    from lora_rite.plan.pairs import Shape

    options = {"lr_by_name": {"q_proj": 1e-3}}
    sizes = [optimizer_state({Shape(8, 6, 2): 3}, "lora-rite", LR, given) for given in (None, options)]
    assert sizes[0] == sizes[1] > 0
    assert check_optimizer(None, "lora-rite", LR, options=options) is None
    with pytest.raises(ValueError, match="'q_proj' matches no trainable parameter"):
        check_optimizer(network(), "lora-rite", LR, options={"adamw_lr": 1e-3, **options})


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:Model has `tie_word")
def test_trainer_schedules_every_group(tmp_path):
    """Through the factory, on PEFT's model: the Trainer logs the general lr, and each group has its own schedule."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from test_hf import LoRARiteCallback, network, trainer

    options = {"lr": LR, "lr_by_name": {"q_proj": 2e-2, "lm_head": 1e-3}}
    model = network(modules_to_save=["lm_head"])
    run = trainer(tmp_path, steps=4, model=model, factory=(LoRARiteFactory, options), callbacks=[LoRARiteCallback()])
    run.train()
    groups = run.optimizer.optimizer.param_groups
    assert [group["initial_lr"] for group in groups] == [LR, 2e-2, 1e-3]
    assert [len(group["params"]) for group in groups] == [24, 4, 1]
    assert run.state.log_history[1]["learning_rate"] == pytest.approx(LR / 2)  # of two steps of warm-up
