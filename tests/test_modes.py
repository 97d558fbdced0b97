"""Optimizers with a mode to train in and one to evaluate in: what is measured, saved and exported is of the latter."""

import json
import signal
import sys
import textwrap

import pytest

pytest.importorskip("peft")
pytest.importorskip("jsonargparse")

import torch
from safetensors.torch import load_file

import lora_rite
from lora_rite.cli import main
from lora_rite.finetune import outcome as outcome_module
from lora_rite.optim.modes import evaluating, two_modes
from lora_rite.run.checkpoints import TRAINING

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "default::UserWarning")
#: As the package schedulefree does, it begins in no mode and refuses to step where train() was not called; its way back
#: rounds, and so its mistakes are seen. A wrapper has it as .optimizer, with state of its own.
CODE = """
    import torch

    class Averaging(torch.optim.Optimizer):
        def __init__(self, params, lr, momentum=0.9):
            super().__init__(params, {"lr": lr, "momentum": momentum, "train_mode": False, "k": 0})

        def _move(self, training):
            for group in self.param_groups:
                if group["train_mode"] != training:
                    weight = 1 - group["momentum"] if training else 1 - 1 / group["momentum"]
                    for p in group["params"]:
                        if "z" in self.state[p]:
                            p.lerp_(self.state[p]["z"], weight)
                    group["train_mode"] = training

        @torch.no_grad()
        def train(self):
            self._move(True)

        @torch.no_grad()
        def eval(self):
            self._move(False)

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                if not group["train_mode"]:
                    raise RuntimeError("not in train mode")
                group["k"] += 1
                for p in group["params"]:
                    z = self.state[p].setdefault("z", p.clone())
                    p.lerp_(z, 1 / group["k"])
                    p.sub_(p.grad, alpha=group["lr"] * (1 - group["momentum"] * (1 - 1 / group["k"])))
                    z.sub_(p.grad, alpha=group["lr"])

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer, self.steps = optimizer, torch.zeros(())
            self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

        param_groups = property(lambda self: self.optimizer.param_groups)
        state = property(lambda self: self.optimizer.state)
        defaults = property(lambda self: self.optimizer.defaults)

        def zero_grad(self, set_to_none=True):
            self.optimizer.zero_grad(set_to_none)

        def step(self, closure=None):
            self.steps += 1
            self.optimizer.step()

        def state_dict(self):
            return {"inner": self.optimizer.state_dict(), "steps": self.steps.clone()}

        def load_state_dict(self, state):
            self.optimizer.load_state_dict(state["inner"])
            self.steps = state["steps"].clone()

    def wrapped(model, lr):
        return Wrapper(Averaging([p for p in model.parameters() if p.requires_grad], lr))
"""
NAMES = [
    "pytorch_optimizer:ScheduleFreeAdamW",
    "pytorch_optimizer:SPlus",
    "averaging_test:Averaging",
    "averaging_test:wrapped",
]


@pytest.fixture(autouse=True)
def averaging(tmp_path, monkeypatch):
    pytest.importorskip("pytorch_optimizer")
    (tmp_path / "averaging_test.py").write_text(textwrap.dedent(CODE))
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("averaging_test")
    sys.modules.pop("averaging_test", None)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "int ", "completion": f"f{i}(int a);"}) for i in range(13)))
    return path


def train(data, out, name, *words):
    given = ["--optimizer", name, "--lr", 0.05, "--steps", 6, "--batch_size", 2, "--max_length", 16, "--rank", 2]
    given += ["--scheduler", "constant", "--target_modules", "[q_proj, v_proj]", "--dropout", 0.1, "--no_progress"]
    return main(["train", "--data", str(data), "--out", str(out), *map(str, given), *map(str, words)])


def stepped(make, steps=5):
    params = [torch.nn.Parameter(torch.randn(4, 6)), torch.nn.Parameter(torch.randn(5, 4))]
    optimizer = make(params)
    if (inner := two_modes(optimizer)) is not None:
        inner.train()
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return params, optimizer


def makers(averaging):
    import pytorch_optimizer as others
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)  # makes what the wrapper reads
    free = lambda params: others.ScheduleFreeAdamW(params, lr=0.1)
    return {
        "AdamW": free,
        "SGD": lambda params: others.ScheduleFreeSGD(params, lr=0.1),
        "SPlus": lambda params: others.SPlus(params, lr=0.1),
        "strict": lambda params: averaging.Averaging(params, 0.1),
        "in accelerate": lambda params: AcceleratedOptimizer(free(params)),
        "in a wrapper": lambda params: averaging.Wrapper(free(params)),
        "in both": lambda params: AcceleratedOptimizer(averaging.Wrapper(free(params))),
    }


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "SPlus", "strict", "in accelerate", "in a wrapper", "in both"])
def test_within_the_average_and_afterwards_the_training_parameters_to_the_bit(kind, averaging):
    params, optimizer = stepped(makers(averaging)[kind])
    before = [p.detach().clone() for p in params]
    two_modes(optimizer).eval()
    expected = [p.detach().clone() for p in params]
    two_modes(optimizer).train()
    with torch.no_grad():
        for p, value in zip(params, before, strict=True):
            p.copy_(value)
    with evaluating(optimizer):
        within = [p.detach().clone() for p in params]
    assert all(torch.equal(p, q) for p, q in zip(within, expected, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(within, before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    optimizer.step()  # in the mode to train in


def test_optimizers_of_one_mode_have_none_in_any_wrapper(averaging):
    from accelerate.optimizer import AcceleratedOptimizer

    makers(averaging)
    for make in (
        lambda params: torch.optim.AdamW(params),
        lambda params: AcceleratedOptimizer(torch.optim.AdamW(params)),
        lambda params: AcceleratedOptimizer(lora_rite.LoRARite([("x.lora_A.w", params[0]), ("x.lora_B.w", params[1])])),
    ):
        params, optimizer = stepped(make, 1)
        assert two_modes(optimizer) is None
        with evaluating(optimizer):
            assert all(p is q for p, q in zip(params, optimizer.param_groups[0]["params"], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_figures_checkpoints_and_the_export_are_of_the_average(name, data, tmp_path, monkeypatch):
    """The exported adapter has the reported loss and is that of the last checkpoint; the parameters that were trained
    are others. Measuring at every step changes no bit of it."""
    seen, describe = {}, outcome_module.describe_optimizer
    monkeypatch.setattr(outcome_module, "describe_optimizer", lambda o: seen.update(optimizer=o) or describe(o))
    assert train(data, tmp_path / "run", name, "--save_every", 3, "--eval_every", 1, "--validation", data) == 0
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-6"
    at_end = load_file(checkpoint / "adapter_model.safetensors")
    assert all(torch.equal(saved[key], at_end[key]) for key in saved)
    trained = list(load_file(checkpoint / TRAINING).values())
    current = [p for group in seen["optimizer"].param_groups for p in group["params"]]
    assert all(any(torch.equal(p, q) for q in trained) for p in current)
    assert not any(torch.equal(p, q) for p in current for q in saved.values())

    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["held_out_losses"][-1]["held_out_loss"] == result["held_out"]["after"]
    from lora_rite.finetune.evaluate import evaluate

    figures = evaluate(str(data), adapter=tmp_path / "run" / "adapter", max_length=16, progress=False)["results"]
    loss = figures[str(data)]["results"]["loss"]["nat_per_token"]
    assert loss == pytest.approx(result["held_out"]["after"], rel=1e-6)

    assert train(data, tmp_path / "plain", name, "--validation", data) == 0
    plain = load_file(tmp_path / "plain" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(saved[key], plain[key]) for key in saved)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_stopped_run_goes_on_to_the_same_bits(name, step, data, tmp_path, monkeypatch):
    """Saved by a signal after any step, the last one too, and resumed: as the run that saved nothing."""
    from transformers import Trainer

    assert train(data, tmp_path / "whole", name) == 0
    original = Trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    assert train(data, tmp_path / "run", name) == 143
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    assert train(data, tmp_path / "run", name, "--resume") == 0
    adapters = [tmp_path / out / "adapter" / "adapter_model.safetensors" for out in ("whole", "run")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    results = [json.loads((tmp_path / out / "result.json").read_text()) for out in ("whole", "run")]
    assert results[0]["losses"] == results[1]["losses"]
    assert results[0]["held_out"] == results[1]["held_out"]


def test_the_audit_steps_in_one_mode_and_measures_in_the_other(averaging):
    """The strict one raises where it is not trained in its mode; and W is that of the average."""
    result = lora_rite.audit(
        averaging.Averaging, options={"lr": 1e-2}, problems=["linear"], dtypes=["float64"], conditions=[10.0], steps=3
    )
    assert result["rows"]
    assert not result["failures"]
