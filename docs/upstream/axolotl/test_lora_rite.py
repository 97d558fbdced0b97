"""Tests for the LoRA-RITE optimizer: config gates, and its factory on a tiny model."""

import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl.core.builders.causal import HFCausalTrainerBuilder
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.optimizers.lora_rite import LoraRiteOptimizerFactory


def _lora_rite_cfg(min_base_cfg, **overrides):
    return (
        min_base_cfg
        | DictDefault(
            optimizer="lora_rite",
            adapter="lora",
            lora_r=8,
            lora_alpha=16,
            lora_target_linear=True,
        )
        | DictDefault(**overrides)
    )


class TestLoraRiteValidation:
    """Pydantic-level checks for lora_rite."""

    def test_lora_adapter_accepted_and_raw_clipping_turned_off(self, min_base_cfg):
        cfg = validate_config(_lora_rite_cfg(min_base_cfg))
        assert cfg.optimizer == "lora_rite"
        assert cfg.max_grad_norm == 0.0

    def test_raw_clipping_rejected(self, min_base_cfg):
        with pytest.raises(ValueError, match="clip_unmagnified_grad"):
            validate_config(_lora_rite_cfg(min_base_cfg, max_grad_norm=1.0))

    def test_missing_adapter_rejected(self, min_base_cfg):
        cfg = min_base_cfg | DictDefault(optimizer="lora_rite")
        with pytest.raises(ValueError, match="requires adapter: lora or qlora"):
            validate_config(cfg)

    @pytest.mark.parametrize(
        "overrides",
        [
            {"deepspeed": "deepspeed_configs/zero2.json"},
            {"tensor_parallel_size": 2},
        ],
    )
    def test_sharded_backends_rejected(self, min_base_cfg, overrides):
        with pytest.raises(ValueError, match="not compatible with DeepSpeed"):
            validate_config(_lora_rite_cfg(min_base_cfg, **overrides))

    @pytest.mark.parametrize(
        "overrides",
        [
            {"loraplus_lr_ratio": 8},
            {"embedding_lr": 1e-6},
            {"embedding_lr_scale": 0.5},
        ],
    )
    def test_ignored_learning_rates_rejected(self, min_base_cfg, overrides):
        with pytest.raises(ValueError, match="silently ignored"):
            validate_config(_lora_rite_cfg(min_base_cfg, **overrides))

    def test_relora_rejected(self, min_base_cfg):
        cfg = _lora_rite_cfg(min_base_cfg, relora_steps=100, relora_warmup_steps=10)
        with pytest.raises(ValueError, match="relora prunes"):
            validate_config(cfg)


class TestLoraRiteBuilder:
    """From ``optimizer`` and ``optim_args`` to what the trainer is given."""

    @pytest.mark.parametrize(
        "optim_args", [{"damping": 10, "beta2": 0.99}, "damping=10, beta2=0.99"]
    )
    def test_builder_hands_over_factory_and_arguments(self, optim_args):
        builder = HFCausalTrainerBuilder.__new__(HFCausalTrainerBuilder)
        builder.cfg = DictDefault(optimizer="lora_rite", optim_args=optim_args)
        arguments, trainer_kwargs = {"learning_rate": 1e-3, "weight_decay": 0.0}, {}
        builder._configure_optimizer(arguments, trainer_kwargs)
        factory, kwargs = trainer_kwargs["optimizer_cls_and_kwargs"]
        assert factory is LoraRiteOptimizerFactory
        assert (kwargs["lr"], float(kwargs["damping"])) == (1e-3, 10.0)


@pytest.fixture(name="make_model")
def fixture_make_model():
    def make(**kwargs):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        adapter = LoraConfig(r=4, target_modules="all-linear", **kwargs)
        return get_peft_model(LlamaForCausalLM(config), adapter)

    return make


def _train(model, optimizer, steps):
    for step in range(steps):
        torch.manual_seed(step)
        ids = torch.randint(64, (2, 8))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


class TestLoraRiteOptimizer:
    """The optimizer that the factory makes."""

    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("lora_rite")

    def test_every_pair_is_preconditioned(self, make_model):
        model = make_model()
        optimizer = LoraRiteOptimizerFactory()(model, None, lr=1e-3, weight_decay=0.0)
        _train(model, optimizer, steps=3)
        report = optimizer.report()
        assert report["steps"] == 3
        assert report["pairs"] == report["pairs_preconditioned"] == 14

    def test_arguments_may_be_strings(self, make_model):
        optimizer = LoraRiteOptimizerFactory()(
            make_model(),
            None,
            lr=1e-3,
            weight_decay=0.1,
            damping="10",
            beta1="0.8",
            row_equilibration="false",
        )
        group = optimizer.param_groups[0]
        assert (group["damping"], group["betas"]) == (10.0, (0.8, 0.999))
        assert (group["row_equilibration"], group["weight_decay"]) == (False, 0.1)

    def test_unknown_arguments_rejected(self, make_model):
        with pytest.raises(ValueError, match="Unsupported optim_args.*'dampening'"):
            LoraRiteOptimizerFactory()(
                make_model(), None, lr=1e-3, weight_decay=0.0, dampening=1
            )

    def test_learning_rates_by_name(self, make_model):
        model, kwargs = make_model(), {"lr": 1e-3, "weight_decay": 0.0}
        factory = LoraRiteOptimizerFactory()
        by_name = {"q_proj": "1e-4"}
        groups = factory(model, None, lr_by_name=by_name, **kwargs).param_groups
        assert {group["lr"]: len(group["params"]) for group in groups} == {
            1e-3: 24,
            1e-4: 4,
        }
        with pytest.raises(
            ValueError, match="lr_by_name needs optim_args as a mapping"
        ):
            factory(model, None, lr_by_name="q_proj", **kwargs)

    def test_other_parameters_need_a_learning_rate(self, make_model):
        kwargs = {"lr": 1e-3, "weight_decay": 0.0}
        model = make_model(use_dora=True)
        with pytest.raises(ValueError, match="adamw_lr"):
            LoraRiteOptimizerFactory()(model, None, **kwargs)
        optimizer = LoraRiteOptimizerFactory()(model, None, adamw_lr="1e-4", **kwargs)
        held = sum(len(group["params"]) for group in optimizer.param_groups)
        assert held == sum(p.requires_grad for p in model.parameters())

    def test_resumed_run_equals_uninterrupted_one(self, make_model, tmp_path):
        whole, parts = make_model(), make_model()
        kwargs = {"lr": 1e-2, "weight_decay": 0.0}
        optimizer = LoraRiteOptimizerFactory()(whole, None, **kwargs)
        _train(whole, optimizer, steps=3)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        parts.load_state_dict(whole.state_dict())
        resumed = LoraRiteOptimizerFactory()(parts, None, **kwargs)
        resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
        for model, of_model in ((whole, optimizer), (parts, resumed)):
            _train(model, of_model, steps=3)
        pairs = zip(whole.parameters(), parts.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)


def test_missing_package_says_how_to_install(make_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lora_rite", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install lora-rite"):
        LoraRiteOptimizerFactory()(make_model(), None, lr=1e-3, weight_decay=0.0)
