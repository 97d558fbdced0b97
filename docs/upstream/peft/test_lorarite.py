# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import copy
import io

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorarite_optimizer

from .testing_utils import torch_device


class SimpleNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 20)
        self.lin0 = nn.Linear(20, 24)
        self.conv = nn.Conv1d(24, 24, 3, padding=1)
        self.lin1 = nn.Linear(24, 16)

    def forward(self, X):
        X = self.lin0(self.embedding(X)).relu()
        X = self.conv(X.transpose(1, 2)).transpose(1, 2)
        return self.lin1(X)


def make_model(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["embedding", "lin0", "lin1"], **kwargs}
    return get_peft_model(SimpleNet(), LoraConfig(**config), autocast_adapter_dtype=False).to(torch_device, dtype)


def train(model, optimizer, steps=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randint(50, (4, 10), generator=generator).to(torch_device)
        y = torch.randint(16, (4, 10), generator=generator).to(torch_device)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1).float(), y.flatten()).backward()
        optimizer.step()


def lora_layers(model):
    """(A, B, scaling) of each layer, embeddings included."""
    for layer in model.modules():
        for factors in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            a, b = (getattr(layer, name, {}) for name in factors)
            if "default" in a:
                a, b = a["default"], b["default"]
                yield getattr(a, "weight", a), getattr(b, "weight", b), layer.scaling["default"]


def products(model):
    return [(scaling * b @ a).detach().clone() for a, b, scaling in lora_layers(model)]


def distance(xs, ys):
    """The largest distance of two matrices, relative to the second one's norm."""
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(xs, ys))


class TestLoraRite:
    def test_holds_all_trainable_parameters_and_updates_them(self):
        model = make_model()
        optimizer = create_lorarite_optimizer(model, lr=1e-2)
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in trainable}

        before = [p.detach().clone() for p in trainable]
        train(model, optimizer, steps=3)
        assert all(not torch.equal(old, new) for old, new in zip(before, trainable))

    @pytest.mark.parametrize("init_lora_weights", [True, False])
    def test_step_does_not_depend_on_the_factorisation(self, init_lora_weights):
        # (B K, K^-1 A) has the same product as (B, A). Float64, since only rounding may make a difference.
        model = make_model(torch.float64, init_lora_weights=init_lora_weights)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for a, b, _ in lora_layers(other):
                k = torch.randn(4, 4, dtype=torch.float64, device=a.device) + 3 * torch.eye(4, device=a.device)
                a.copy_(torch.linalg.solve(k, a))
                b.copy_(b @ k)
        before = products(model)
        for each in (model, other):
            train(each, create_lorarite_optimizer(each, lr=1e-2))
        moved = [[new - old for new, old in zip(products(each), before)] for each in (model, other)]
        assert distance(*moved) < 1e-8

    def test_learning_rate_is_that_of_the_weight(self):
        # W = W0 + scaling * B @ A, so half of B at twice the alpha is the same W.
        one, two = make_model(torch.float64, init_lora_weights=False), make_model(torch.float64, lora_alpha=16)
        two.load_state_dict(one.state_dict())
        with torch.no_grad():
            for _, b, _ in lora_layers(two):
                b.mul_(0.5)
        for model in (one, two):
            train(model, create_lorarite_optimizer(model, lr=1e-2))
        assert distance(products(one), products(two)) < 1e-10

    def test_gradients_are_clipped_together(self):
        models = [make_model(torch.float64, init_lora_weights=False) for _ in range(3)]
        for model, clip in zip(models, (0.0, 1e9, 1e-9)):
            train(model, create_lorarite_optimizer(model, lr=1e-2, clip_unmagnified_grad=clip), steps=2)
        assert distance(products(models[0]), products(models[1])) == 0.0
        assert distance(products(models[0]), products(models[2])) > 1e-6

    @pytest.mark.parametrize("kwargs", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["conv"]}])
    def test_other_parameters_need_and_get_adamw(self, kwargs):
        model = make_model(**kwargs)
        with pytest.raises(ValueError, match="Pass `adamw_lr`"):
            create_lorarite_optimizer(model, lr=1e-2)

        optimizer = create_lorarite_optimizer(model, lr=1e-2, adamw_lr=1e-3)
        others = optimizer.param_groups[-1]["params"]
        reference = copy.deepcopy(model)
        names = {name for name, p in model.named_parameters() if any(p is other for other in others)}
        expected = [p for name, p in reference.named_parameters() if name in names]
        train(model, optimizer, steps=1)
        train(reference, torch.optim.AdamW(expected, lr=1e-3, weight_decay=0.0), steps=1)
        torch.testing.assert_close([p.data for p in others], [p.data for p in expected])

    @pytest.mark.parametrize("layer", ["conv", "target_parameters"])
    def test_what_is_no_pair_of_matrices_is_named(self, layer):
        kwargs = {"target_modules": ["lin0", "conv"]}
        if layer == "target_parameters":
            kwargs = {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"]}
        with pytest.raises(ValueError, match="not part of a pair.*lora_A"):
            create_lorarite_optimizer(make_model(**kwargs), lr=1e-2)

    def test_raises_without_lora(self):
        with pytest.raises(ValueError, match="did not find any trainable pairs"):
            create_lorarite_optimizer(SimpleNet(), lr=1e-2)

    @pytest.mark.parametrize("kwargs", [{"lr": -1.0}, {"damping": -1.0}, {"betas": (0.9, 1.0)}, {"row_beta": 1.0}])
    def test_raises_for_hyperparameters_out_of_range(self, kwargs):
        with pytest.raises(ValueError, match="Invalid"):
            create_lorarite_optimizer(make_model(), **{"lr": 1e-2, **kwargs})

    def test_resumes_bitwise(self):
        model = make_model(use_dora=True)
        optimizer = create_lorarite_optimizer(model, lr=1e-2, adamw_lr=1e-3)
        train(model, optimizer, steps=3)
        resumed = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        restored = create_lorarite_optimizer(resumed, lr=1.0, adamw_lr=1.0)
        restored.load_state_dict(torch.load(file, weights_only=True))
        for each, of_each in ((model, optimizer), (resumed, restored)):
            train(each, of_each, steps=3, seed=2)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters()))

    def test_schedulers_reach_all_groups(self):
        model = make_model(use_dora=True)
        optimizer = create_lorarite_optimizer(model, lr=1e-2, adamw_lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
        before = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, steps=2)
        scheduler.step()
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters()))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_factors_stay_finite(self, dtype):
        model = make_model(dtype)
        optimizer = create_lorarite_optimizer(model, lr=1e-2)
        train(model, optimizer)
        assert all(p.isfinite().all() and p.dtype == dtype for p in model.parameters())
        assert all(state["first_moment"].dtype == torch.float32 for state in optimizer.state.values())
