"""Names of parameters with what wrappers put into them: pairs are found and states loaded, wrapped or not."""

import copy

import pytest
import torch
from problems import factors, gradients_of_w, set_gradients
from test_numerics import equal
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lora_rite import LoRARite, find_pairs, layer_report
from lora_rite.plan.names import plain_names


class Lora(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(9, 4, bias=False), nn.Linear(4, 7, bias=False)
        with torch.no_grad():
            for layer, x in zip((self.lora_A, self.lora_B), factors(4, 9, 7, seed=seed), strict=True):
                layer.weight.copy_(x)

    def forward(self, x):
        return self.lora_B(self.lora_A(x))


def model():
    return nn.Sequential(Lora(), nn.Linear(7, 9, bias=False).requires_grad_(False), Lora(seed=1))


def compiled(net):
    return torch.compile(net, backend="eager")


def checkpointed(net):
    net[2] = checkpoint_wrapper(net[2])
    return net


def one_factor_wrapped(net):
    net[0].lora_A = checkpoint_wrapper(net[0].lora_A)
    return net


def one_block_compiled(net):
    net[0] = compiled(net[0])
    return net


WRAPPERS = [
    checkpointed,
    one_factor_wrapped,
    one_block_compiled,
    compiled,
    nn.DataParallel,
    torch.optim.swa_utils.AveragedModel,
    lambda net: nn.DataParallel(compiled(checkpointed(net))),
]


def trained(net, steps=3, optimizer=None, seed=1):
    optimizer = optimizer or LoRARite(net.named_parameters(), lr=1e-2)
    params = [p for p in net.parameters() if p.requires_grad]
    for g in gradients_of_w(steps, 7, 9, seed=seed):
        for a, b in zip(params[::2], params[1::2], strict=True):
            set_gradients(a, b, g)
        optimizer.step()
    return optimizer


def states(optimizer):
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("saved_wrapped", [True, False])
@pytest.mark.parametrize(
    ("wrap", "how"),
    [(wrap, "load_state_dict") for wrap in WRAPPERS]
    + [(wrap, "distributed checkpoint") for wrap in WRAPPERS[:4]],  # (its functions do not know the others)
)
def test_a_state_goes_from_wrapped_to_plain_and_back(wrap, saved_wrapped, how):
    """The whole state arrives, bit for bit, the names of the optimizer stay its own, and training goes on as if nothing
    had been wrapped."""
    first, second = (wrap(model()), model()) if saved_wrapped else (model(), wrap(model()))
    optimizer = trained(first)
    with torch.no_grad():
        for p, q in zip(second.parameters(), first.parameters(), strict=True):
            p.copy_(q)
    other = LoRARite(second.named_parameters(), lr=1e-2)
    names = other.param_groups[0]["param_names"]
    if how == "load_state_dict":
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        set_optimizer_state_dict(second, other, copy.deepcopy(get_optimizer_state_dict(first, optimizer)))
    assert equal(states(other), states(optimizer))
    assert other.param_groups[0]["param_names"] == names
    trained(first, 2, optimizer, seed=2)
    trained(second, 2, other, seed=2)
    assert equal([p.detach() for p in second.parameters()], [p.detach() for p in first.parameters()])


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_pairs_are_found_under_wrappers(wrap):
    """Under the names that the model gives; the figures of each layer have the plain ones."""
    net = wrap(model())
    pairing = find_pairs(net)
    given = dict(net.named_parameters())
    assert len(pairing.pairs) == 2
    assert all(given[pair.a_name] is pair.a and given[pair.b_name] is pair.b for pair in pairing.pairs)
    assert [row["name"] for row in layer_report(trained(net))] == ["0.lora_A.weight", "2.lora_A.weight"]


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (["module.l.x", "module.k.x"], ["l.x", "k.x"]),
        (["module.module.l.x"], ["l.x"]),
        (["_orig_mod.module.l._orig_mod._checkpoint_wrapped_module.x"], ["l.x"]),
        (["_forward_module.module.l.x"], ["l.x"]),
        (["_fsdp_wrapped_module._checkpoint_wrapped_module.l._fsdp_wrapped_module.x"], ["l.x"]),
        (["base_model.model.model.l.lora_A.default.x"], ["model.l.lora_A.default.x"]),
        (["encoder.module.l.x", "head.x"], ["encoder.l.x", "head.x"]),
        (["module.base_model.model.l.x"], ["l.x"]),
        # a layer of the model's own called module, bare and under DistributedDataParallel
        (["module.x", "x"], ["module.x", "x"]),
        (["module.module.x", "module.x"], ["module.x", "x"]),
        # two models, of which one is compiled, or one by DistributedDataParallel
        (["_orig_mod.x", "x"], ["_orig_mod.x", "x"]),
        (["module.l.x", "k.x"], ["l.x", "k.x"]),
        (["my_module.x", "modules.x", "model.x", "_orig_mod"], ["my_module.x", "modules.x", "model.x", "_orig_mod"]),
        (["x", "x"], ["x", "x"]),
        ([], []),
    ],
)  # fmt: skip
def test_plain_names(given, plain):
    """What wrappers put in goes, where names stay different; names that are plain stay."""
    assert plain_names(given) == plain
    assert plain_names(plain) == plain


def optimizer_of(*layers, seed=0):
    """Of pairs of one shape, all different, under these layers' names."""
    named = []
    for i, layer in enumerate(layers):
        a, b = (nn.Parameter(x) for x in factors(4, 9, 7, seed=seed + i))
        for g in gradients_of_w(1, 7, 9, seed=seed + i):
            set_gradients(a, b, g)
        named += [(f"{layer}lora_A.weight", a), (f"{layer}lora_B.weight", b)]
    return LoRARite(named, lr=1e-2)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (("module.", ""), ("", "module.")),
        (("module.", "module.module."), ("", "module.")),
        (("_orig_mod.", ""), ("_orig_mod.", "")),
        (("a.module.", "a."), ("module.a.module.", "module.a.")),
    ],
)
def test_names_that_would_become_equal_are_told_apart(saved, loaded):
    """Where stripping made one name of two, one pair would get the moments of the other."""
    optimizer, other = optimizer_of(*saved), optimizer_of(*loaded, seed=7)
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    ours = {plain: optimizer.state[p] for plain, p in by_name(optimizer)}
    theirs = {plain: other.state[p] for plain, p in by_name(other)}
    assert equal(theirs, ours)
    assert not equal(*[state["first_moment"] for state in states(other)[::2]])


def by_name(optimizer):
    group = optimizer.param_groups[0]
    return zip(plain_names(group["param_names"]), group["params"], strict=True)


def test_names_that_cannot_be_told_apart_are_refused():
    optimizer, other = optimizer_of("a.module.", "a."), optimizer_of("a.", "module.b.a.")
    optimizer.step()
    with pytest.raises(ValueError, match="the state is of other parameters"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_another_adapter_is_another_parameter():
    """The adapter's name is no wrapper's."""
    optimizer, other = optimizer_of("x.default."), optimizer_of("x.other.")
    optimizer.step()
    with pytest.raises(ValueError, match=r"x\.other\.lora_A\.weight is not in the state"):
        other.load_state_dict(optimizer.state_dict())


def test_two_models_of_the_same_names():
    """In one list one would be lost; as groups they are kept apart, and a state is loaded in their order, wrapped or
    not."""
    with pytest.raises(
        ValueError, match=r"two parameters are named 0\.lora_A\.weight: pass each model's parameters as"
    ):
        LoRARite([*model().named_parameters(), *model().named_parameters()])

    def both(wrap, models=2):
        nets = nn.ModuleList(wrap(model()) for _ in range(models))
        return nets, LoRARite([{"params": net.named_parameters()} for net in nets], lr=1e-2)

    nets, optimizer = both(lambda net: net)
    with torch.no_grad():
        next(nets[1].parameters()).mul_(3)
    trained(nets, optimizer=optimizer)
    _, other = both(compiled)
    other.load_state_dict(optimizer.state_dict())
    assert equal(states(other), states(optimizer))
    assert not equal(states(other)[0], states(other)[4])
    assert other.param_groups[0]["param_names"][0] == "_orig_mod.0.lora_A.weight"
    _, third = both(lambda net: net)
    third.param_groups[1]["param_names"].reverse()
    with pytest.raises(
        ValueError, match=r"two parameters are named 0\.lora_A\.weight, so the state has to be in their"
    ):
        third.load_state_dict(optimizer.state_dict())


def test_parametrized_factors_are_no_factors():
    """What is trained under a parametrization is not the factor, so it goes to AdamW, with its partner; LoRA as a
    parametrization of a weight (its factors are plain) is a pair."""
    for parametrize in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal):
        net = Lora()
        parametrize(net.lora_A)
        pairing = find_pairs(net)
        assert not pairing.pairs
        assert {o.reason.partition(":")[0] for o in pairing.left_out} == {"ΔW is not a plain product B·A"}
        assert "a factor is computed from lora_A.parametrizations.weight.original" in str(pairing)
    assert len(find_pairs([("lora_A.weight_v", nn.Parameter(torch.ones(2, 3)))]).left_out) == 1

    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_B = nn.Parameter(torch.ones(2, 9)), nn.Parameter(torch.zeros(7, 2))

        def forward(self, weight):
            return weight + self.lora_B @ self.lora_A

    layer = nn.Linear(9, 7, bias=False).requires_grad_(False)
    nn.utils.parametrize.register_parametrization(layer, "weight", Adapter())
    (pair,) = find_pairs(layer).pairs
    assert pair.a_name == "parametrizations.weight.0.lora_A"


def test_a_state_goes_from_a_peft_model_to_the_model_inside():
    """As where the adapter was injected (transformers' add_adapter) in one run and not in the other."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = peft.get_peft_model(nn.Sequential(nn.Linear(9, 7)), peft.LoraConfig(r=2, target_modules=["0"]))
    optimizer, inside = LoRARite(net.named_parameters()), LoRARite(net.get_base_model().named_parameters())
    net(torch.ones(2, 9)).sum().backward()
    optimizer.step()
    inside.load_state_dict(optimizer.state_dict())
    assert inside.param_groups[0]["param_names"][0] == "0.lora_A.default.weight"
    assert equal(states(inside), states(optimizer))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer")
def test_layers_of_several_pairs_are_recognised_under_wrappers():
    """By their module, which the wrapper hides: a grouped convolution, checkpointed, compiled and both."""
    peft = pytest.importorskip("peft")
    for wrap in (checkpoint_wrapper, compiled, lambda layer: compiled(checkpoint_wrapper(layer))):
        net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
        net = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))
        plain = find_pairs(net).pairs[0]
        net.base_model.model[0] = wrap(net.base_model.model[0])
        (pair,) = find_pairs(net).pairs
        assert (pair.blocks, pair.columns, pair.a) == (plain.blocks, plain.columns, plain.a)
        assert pair.blocks == 2
