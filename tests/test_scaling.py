"""``scaling``: lr, clipping and eps are those of W = W₀ + scaling·B·A, whatever alpha and the rule for it."""

import math

import pytest
import torch
from torch import nn

from lora_rite import PUBLISHED, LoRARite, LoRARiteValueError, create_lora_rite, find_pairs, param_groups
from lora_rite.options import EXPONENT, RANK

peft = pytest.importorskip("peft")
STEPS = 12


def model(rank=4, **config):
    """Two layers of the same weights whatever the adapter, A as well, in float64."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9)).double()
    adapted = peft.get_peft_model(network, peft.LoraConfig(r=rank, target_modules=["0", "2"], **config)).double()
    with torch.no_grad():
        for pair in find_pairs(adapted).pairs:
            pair.a.copy_(torch.randn(pair.a.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    return adapted


def weights(network):
    """W₀ + scaling·B·A of each layer."""
    layers = [module for module in network.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    return [layer.base_layer.weight + layer.get_delta_weight("default") for layer in layers]


def train(network, optimizer, steps=STEPS):
    """The weights after each step."""
    x, y = torch.randn(2, 64, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        (30 * (network(x) - y[:, :9]).square().mean()).backward()
        optimizer.step()
        seen.append([w.detach().clone() for w in weights(network)])
    return seen


def distance(one, other):
    """The largest ‖W − W'‖ over steps and layers, relative to how far W has come."""
    apart = [(w - v).norm() / (w - one[0][k]).norm() for s, t in zip(one[1:], other[1:], strict=True)
             for k, (w, v) in enumerate(zip(s, t, strict=True))]  # fmt: skip
    return max(apart).item()


SETTINGS = {
    "defaults": {},
    "clipped": {"clip_unmagnified_grad": 0.05},
    "a large eps": {"eps": 0.1, "relative_eps": 0.0},
    "skipping": {"update_skipping": 0.4, "clip_unmagnified_grad": 0.0},
    "weight decay": {"weight_decay": 0.3},
    "undamped, plain rows": {"damping": 0.0, "row_equilibration": False},
    "capped": {"update_capping": 0.2},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_alpha_and_its_rule_do_not_matter(settings):
    """W takes the same way at every alpha and under rsLoRA, whatever the other settings: to rounding, which 12 steps
    carry on."""
    configs = [{"lora_alpha": 4}, {"lora_alpha": 32}, {"lora_alpha": 1}, {"lora_alpha": 6, "use_rslora": True}]
    ways = []
    for config in configs:
        network = model(**config)
        ways.append(train(network, create_lora_rite(network, lr=2e-2, **settings)))
    assert max(distance(ways[0], way) for way in ways[1:]) < 1e-8


def test_raw_it_matters():
    """The test above can fail: without ``scaling`` the ways differ by more than a tenth."""
    ways = []
    for alpha in (4, 32):
        network = model(lora_alpha=alpha)
        ways.append(train(network, create_lora_rite(network, lr=2e-2, scaling=None)))
    assert distance(*ways) > 0.1


def test_alpha_pattern_gives_each_pair_its_own():
    network = model(lora_alpha=4, alpha_pattern={"2": 32})
    groups = param_groups(network)
    assert [group["scaling"] for group in groups] == [1.0, 8.0]
    plain = model(lora_alpha=4)
    own, other = train(network, LoRARite(groups, lr=2e-2)), train(plain, create_lora_rite(plain, lr=2e-2))
    assert distance(own, other) < 1e-8


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_the_first_step_of_w_does_not_grow_with_the_rank(rank):
    """‖ΔW‖ of a step is lr·√(rows·r) in B·A, so lr·√(rows·16) with ``scaling``, at every rank. (Full rank of the
    gradient is needed, so that all r directions are stepped in; the rows are equilibrated to about that.)"""
    assert EXPONENT == 0.5
    network = model(rank=rank, lora_alpha=3)
    start = [layer.base_layer.weight.clone() for layer in network.modules() if hasattr(layer, "lora_A")]
    (step,) = train(network, create_lora_rite(network, lr=1e-3, relative_eps=0.0, eps=1e-30), steps=1)
    for w, w0 in zip(step, start, strict=True):
        assert (w - w0).norm().item() == pytest.approx(1e-3 * math.sqrt(len(w) * RANK), rel=0.05)


def test_figures_are_those_of_w():
    """The norms that ``report()`` gives are of W: they do not depend on alpha."""
    reports = []
    for alpha in (4, 32):
        network = model(lora_alpha=alpha)
        optimizer = create_lora_rite(network, lr=2e-2)
        train(network, optimizer, 5)
        reports.append(optimizer.report())
    for key in ("update_norm", "gradient_norm", "clip_rate", "sigma_over_delta"):
        assert reports[0][key] == pytest.approx(reports[1][key], rel=1e-6), key


def test_who_is_raw():
    """Names tell no alpha; PUBLISHED is the authors' step."""
    network = model(lora_alpha=8)
    assert LoRARite(network.named_parameters()).param_groups[0]["scaling"] is None
    assert create_lora_rite(network, **PUBLISHED).param_groups[0]["scaling"] is None
    assert create_lora_rite(network).param_groups[0]["scaling"] == 2.0
    assert {"scaling": 3.0}.items() <= create_lora_rite(network, scaling=3.0).param_groups[0].items()


def test_a_checkpoint_of_before_stays_raw():
    """A state whose groups know of no ``scaling`` goes on as it was."""
    before, after = model(lora_alpha=8), model(lora_alpha=8)
    raw = create_lora_rite(before, lr=1e-2, scaling=None)
    train(before, raw, 3)
    state = raw.state_dict()
    for group in state["param_groups"]:
        del group["scaling"]
    after.load_state_dict(before.state_dict())
    loaded = create_lora_rite(after, lr=1e-2)
    loaded.load_state_dict(state)
    for own, other in zip(train(before, raw, 3)[-1], train(after, loaded, 3)[-1], strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("scaling", [0, -1.0, math.inf, "2", True])
def test_a_scaling_that_cannot_be(scaling):
    with pytest.raises(LoRARiteValueError, match="scaling must be None or a finite number > 0"):
        create_lora_rite(model(), scaling=scaling)


def test_embeddings_and_convolutions():
    """All kinds of layer that tell it."""
    network = nn.ModuleDict({"embed": nn.Embedding(7, 5), "conv": nn.Conv2d(3, 4, 3), "out": nn.Linear(5, 6)})
    adapted = peft.get_peft_model(network, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["embed", "conv", "out"]))
    assert [pair.scaling for pair in find_pairs(adapted).pairs] == [3.0] * 3
