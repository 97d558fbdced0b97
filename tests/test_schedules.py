"""``--scheduler`` and its arguments, optimizers that a Trainer cannot step, and errors that name their cause."""

import json
import sys
import textwrap

import pytest

pytest.importorskip("peft")
pytest.importorskip("jsonargparse")

import torch

from lora_rite import LoRARiteValueError
from lora_rite.cli import main
from lora_rite.finetune import train as train_module
from lora_rite.finetune.optimizers import PRESETS, check_optimizer
from lora_rite.finetune.schedules import check_schedule
from lora_rite.plan.pairs import Shape
from lora_rite.study.recipe import load_recipe

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "default::UserWarning")
SMALL = ["--batch_size", 2, "--max_length", 32, "--rank", 2, "--no_progress"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"line {i}, {i * i} is a number."}) for i in range(40)))
    return path


def run(*words):
    return main([str(word) for word in words])


def refused(capsys, data, out, *words):
    """The one line that the run ends in, before anything is there."""
    capsys.readouterr()
    assert run("train", "--data", data, "--out", out, "--steps", 2, *SMALL, *words) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert not out.exists()
    return errors


WORK = [
    ("linear", None),
    ("constant", None),
    ("cosine_with_restarts", {"num_cycles": 2}),
    ("polynomial", {"lr_end": 1e-5, "power": 2.0}),
    ("inverse_sqrt", {"timescale": 5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr": 1e-3}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-3, "warmup_lr_rate": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 3}),
    ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "linear", "min_lr_ratio": 0.1}),
]
FAIL = [
    ("cosinus", None, "no such schedule, did you mean cosine?"),
    ("steps", None, "no such schedule; there are linear, cosine,"),
    ("reduce_lr_on_plateau", None, "follows a metric"),
    ("greedy", {"factor": 0.9}, "follows a metric"),
    ("warmup_stable_decay", None, "it needs --scheduler_args.num_decay_steps"),
    ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "steep"}, "steep"),
    ("cosine_with_min_lr", None, "One of min_lr or min_lr_rate should be set"),
    ("cosine_with_min_lr", {"min_lr": "small"}, "--scheduler_args {'min_lr': 'small'}"),
    ("polynomial", {"lr_end": -0.5}, "lr would be -"),
    ("cosine", {"num_cycle": 2}, "--scheduler_args.num_cycle: no such argument, did you mean num_cycles?"),
    ("constant", {"min_lr": 0.1}, "--scheduler_args.min_lr: no such argument; it takes none"),
    ("linear", {"num_warmup_steps": 3}, "--scheduler_args.num_warmup_steps: the run decides it"),
    ("cosine", {"last_epoch": 3}, "--scheduler_args.last_epoch: the run decides it"),
    ("polynomial", {"lr_end": 1.0}, "lr_end"),
    ("cosine", {"num_cycles": "two"}, "--scheduler_args {'num_cycles': 'two'}"),
]


def name_of(value):
    return "-".join(map(str, value)) if isinstance(value, dict) else None


@pytest.mark.parametrize(("name", "args"), WORK, ids=name_of)
def test_schedules_that_work(name, args):
    check_schedule(name, args, 1e-2, 10, 0.2)


@pytest.mark.parametrize(("name", "args", "message"), FAIL, ids=name_of)
def test_schedules_that_cannot_are_refused(name, args, message):
    with pytest.raises(LoRARiteValueError) as caught:
        check_schedule(name, args, 1e-2, 10, 0.2)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_schedule_of_transformers_is_offered_or_follows_a_metric():
    """What the error for a wrong name offers works, with nothing or with what it says that it needs."""
    from transformers import SchedulerType

    with pytest.raises(LoRARiteValueError) as caught:
        check_schedule("?", None, 1e-2, 10, 0.2)
    offered = set(str(caught.value).partition("there are ")[2].split(", "))
    assert offered == {kind.value for kind in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}
    assert offered == {"constant_with_warmup", "cosine", *(name for name, _ in WORK)}


def test_train_follows_the_arguments_and_resumes_with_the_same_alone(data, tmp_path, capsys):
    """cosine_with_min_lr ends at the rate that it was given; both forms of options give it."""
    words = ["train", "--data", data, "--out", tmp_path / "run", "--steps", 4, "--warmup", 0, "--lr", 0.01, *SMALL]
    words += ["--scheduler", "cosine_with_min_lr"]
    assert run(*words, "--scheduler_args", '{"min_lr_rate": 0.5}') == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["settings"]["scheduler_args"] == {"min_lr_rate": 0.5}
    rates = [entry["learning_rate"] for entry in result["losses"]]
    assert min(rates) >= 0.005
    assert rates[-1] < 0.007
    assert run(*words, "--scheduler_args.min_lr_rate", 0.5, "--resume") == 0
    capsys.readouterr()
    assert run(*words, "--scheduler_args.min_lr_rate", 0.4, "--resume") == 2
    assert "scheduler_args" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cosinus", "greedy", "reduce_lr_on_plateau", "warmup_stable_decay"])
def test_train_refuses_schedules_before_anything_is_there(name, data, tmp_path, capsys):
    assert f"--scheduler {name}: " in refused(capsys, data, tmp_path / "run", "--scheduler", name)


RECIPE = """
    title: A study
    train: {{steps: 2, {train}}}
    tasks:
      one: {{data: {data}, train: {{{one}}}}}
    optimizers:
      first: {{optimizer: adamw, lr: [0.01]}}
      second: {{optimizer: "{optimizer}", lr: [0.01, 0.02], optimizer_args: {{{args}}}}}
    function: {function}
"""


def recipe(data, tmp_path, train="", one="", optimizer="adamw", args="", function="null"):
    path = tmp_path / "study.yaml"
    text = RECIPE.format(data=data, train=train, one=one, optimizer=optimizer, args=args, function=function)
    path.write_text(textwrap.dedent(text))
    return path


@pytest.mark.parametrize("function", ["null", "'lora_rite.finetune.choices:train_choices'"])
def test_recipes_have_schedules_with_arguments(function, data, tmp_path):
    model = "" if function == "null" else ", model: tiny"
    given = "scheduler: cosine_with_min_lr, scheduler_args: {min_lr: 0.001}" + model
    load_recipe(recipe(data, tmp_path, train=given, function=function))
    for where, key in (("train", "train"), ("one", "tasks.one.train")):
        bad = {"train": model[2:], where: "scheduler: warmup_stable_decay" + model, "function": function}
        with pytest.raises(LoRARiteValueError) as caught:
            load_recipe(recipe(data, tmp_path, **bad))
        assert f"study.yaml: {key}.scheduler warmup_stable_decay: it needs scheduler_args.num_decay" in str(
            caught.value
        )


# ------------------------------------------------------------------------------------------------------- optimizers

MINE = """
    import torch

    def nothing(model, lr):
        return None

    def clothed(model, lr):
        class Outside:
            def __init__(self, optimizer): self.optimizer = optimizer
            def step(self): self.optimizer.step()
        return Outside(torch.optim.SGD(model.parameters(), lr=lr))

    class NoRate(torch.optim.Optimizer):
        def __init__(self, params, lr): super().__init__(params, {})
        def step(self, closure=None): pass

    class NoneRate(torch.optim.Optimizer):
        def __init__(self, params, lr): super().__init__(params, {"lr": None})
        def step(self, closure=None): pass

    def second_order(model, lr):
        class Hessian(torch.optim.SGD):
            def step(self, closure=None):
                for group in self.param_groups:
                    for p in group["params"]:
                        torch.autograd.grad(p.grad.sum(), p)
        return Hessian([p for p in model.parameters() if p.requires_grad], lr=lr)

    def particular(model, lr):
        "Wants a real model."
        assert model.get_base_model().config.vocab_size
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
"""
CANNOT = [
    ("torch.optim:SparseAdam", {}, "dense gradients"),
    ("torch.optim:LBFGS", {}, "closure"),
    ("pytorch_optimizer:AdaHessian", {}, "grad_fn"),
    ("pytorch_optimizer:SophiaH", {}, "grad_fn"),
    ("pytorch_optimizer:SAM", {"base_optimizer": "torch.optim:SGD"}, "closure"),
    ("pytorch_optimizer:GSAM", {"base_optimizer": "torch.optim:SGD"}, "--optimizer_args"),
    ("pytorch_optimizer:AliG", {}, "lr"),
    ("pytorch_optimizer:A2Grad", {}, "lr"),
    ("pytorch_optimizer:LOMO", {}, "parameters"),
    ("torch.nn:Linear", {}, "weight_decay"),
    ("mine_test:nothing", {}, "NoneType, which is no torch.optim.Optimizer"),
    ("mine_test:clothed", {}, "Outside, which is no torch.optim.Optimizer"),
    ("mine_test:NoRate", {}, "no schedule can set its lr"),
    ("mine_test:NoneRate", {}, "no schedule can set its lr"),
    ("mine_test:second_order", {}, "cannot be stepped"),
    ("torch.optim:AdamW", {"betas": 3}, "--optimizer_args {'betas': 3}"),
]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    pytest.importorskip("pytorch_optimizer")
    (tmp_path / "mine_test.py").write_text(textwrap.dedent(MINE))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mine_test", None)


@pytest.mark.parametrize(("name", "args", "message"), CANNOT, ids=lambda v: v if isinstance(v, str) else None)
def test_optimizers_that_a_trainer_cannot_step_are_one_line(name, args, message, mine):
    """Where a weight decay is given that the optimizer has no name for, that is the message."""
    from lora_rite.invariance.problems import Adapter

    with pytest.raises(LoRARiteValueError) as caught:
        check_optimizer(
            Adapter([Shape(12, 8, 2)], torch.float32, "cpu"), name, 1e-2, float(name == "torch.nn:Linear"), args
        )
    assert f"--optimizer {name}" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*PRESETS, "pytorch_optimizer:ScheduleFreeAdamW", "pytorch_optimizer:Lion"])
def test_optimizers_that_train_pass_and_nothing_is_drawn_or_moved(name):
    from lora_rite.invariance.problems import Adapter

    pytest.importorskip("pytorch_optimizer")
    adapter = Adapter([Shape(12, 8, 2)], torch.float32, "cpu")
    before, state = [p.detach().clone() for p in adapter.parameters()], torch.get_rng_state()
    check_optimizer(adapter, name, 1e-2)
    check_optimizer(None, name, 1e-2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(adapter.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["torch.optim:LBFGS", "pytorch_optimizer:AdaHessian", "mine_test:nothing"])
def test_train_refuses_them_before_anything_is_there(name, data, tmp_path, capsys, mine):
    line = refused(capsys, data, tmp_path / "run", "--optimizer", name, "--lr", 0.01)
    assert line.startswith(f"lora-rite train: error: --optimizer {name}")


def test_a_factory_that_wants_a_real_model_has_it(data, tmp_path, mine):
    words = ["--optimizer", "mine_test:particular", "--lr", 0.01, "--steps", 1, *SMALL]
    assert run("train", "--data", data, "--out", tmp_path / "run", *words) == 0


@pytest.mark.parametrize(
    ("name", "args"), [("torch.optim:SparseAdam", ""), ("pytorch_optimizer:SAM", "base_optimizer: 'torch.optim:SGD'")]
)
def test_compare_refuses_them_before_anything_is_there(name, args, data, tmp_path, capsys, mine):
    study = recipe(data, tmp_path, optimizer=name, args=args)
    assert run("compare", study, "--out", tmp_path / "study", "--no_progress") == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert f"study.yaml: optimizers.second: optimizer {name}" in errors
    assert not (tmp_path / "study").exists()


# ------------------------------------------------------------------------------------------ errors name their cause


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 is set, .* without RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        (
            {"LOCAL_RANK": "1", "WORLD_SIZE": "1", "RANK": "0"},
            "LOCAL_RANK=1 is set, .* without MASTER_ADDR, MASTER_PORT",
        ),
        ({"WORLD_SIZE": "2"}, r"there are 2 (processes )?\(WORLD_SIZE"),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"},
            r"there are 4 (processes )?\(OMPI_COMM_WORLD_SIZE",
        ),
        ({"PMI_SIZE": "3"}, r"there are 3 (processes )?\(PMI_SIZE"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, r"there are 2 (processes )?\(MV2_COMM_WORLD_SIZE"),
    ],
)
def test_launchers_are_named_by_their_variables(variables, message, data, tmp_path, capsys, monkeypatch):
    import re

    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    line = refused(capsys, data, tmp_path / "run")
    assert re.search(message, line)
    assert "--scheduler" not in line
    study = recipe(data, tmp_path)
    assert run("compare", study, "--out", tmp_path / "study", "--no_progress") == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "study").exists()


def test_one_process_of_a_launcher_and_a_rank_that_is_none_are_fine(data, tmp_path, monkeypatch):
    for key in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.setenv(key, "1")
    monkeypatch.setenv("LOCAL_RANK", "-1")
    assert run("train", "--data", data, "--out", tmp_path / "run", "--steps", 1, *SMALL) == 0


def test_a_reporter_that_is_not_there_is_named_before_anything_is_there(data, tmp_path, capsys, monkeypatch):
    from transformers import integrations

    assert "--report_to nowhere: " in refused(capsys, data, tmp_path / "run", "--report_to", "nowhere")

    def missing():
        raise RuntimeError("pip install it")

    monkeypatch.setattr(integrations, "get_reporting_integration_callbacks", lambda names: [missing] * len(names))
    assert "--report_to wandb: pip install it" in refused(capsys, data, tmp_path / "run", "--report_to", "wandb")


@pytest.mark.parametrize("where", ["Trainer", "TrainingArguments"])
def test_what_the_trainer_raises_blames_no_option(where, data, tmp_path, monkeypatch):
    import transformers

    def fail(self, *args, **kwargs):
        raise ValueError("something else")

    monkeypatch.setattr(getattr(transformers, where), "__init__", fail)
    with pytest.raises(ValueError, match="something else") as caught:
        train_module.train(tmp_path / "run", data=data, steps=1, rank=2, max_length=32, progress=False)
    assert "--" not in str(caught.value)


def test_a_weight_decay_that_is_not_taken_is_named(data, tmp_path, capsys):
    words = ["--optimizer", "torch.optim:Rprop", "--lr", 0.01, "--weight_decay", 0.1]
    assert "takes no weight_decay, and --weight_decay is 0.1" in refused(capsys, data, tmp_path / "run", *words)
