"""``lora-rite compare``: what it runs follows from the results that there are; runs are paired, and never run twice."""

import errno
import functools
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("jsonargparse")
pytest.importorskip("filelock")

import torch

from lora_rite import LoRARiteValueError, NonFiniteError
from lora_rite.cli import main
from lora_rite.finetune import prepare as prepare_module
from lora_rite.finetune import train as train_module
from lora_rite.finetune.load import load_model
from lora_rite.run.files import write_json
from lora_rite.run.run import Run
from lora_rite.study import compare as compare_module
from lora_rite.study import data as data_module
from lora_rite.study import results, runner, workers
from lora_rite.study.recipe import SPLITS, in_words_of_a_study, load_recipe
from lora_rite.study.search import FINALISTS, MAX_EXTENSIONS, Line, Study, Trial

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
RECIPE = """
title: A small study
train: {steps: 2, batch_size: 2, max_length: 32, eval_every: 1}
tasks:
  sums: {data: DATA}
ranks: [2]
seeds: [0, 1]
sweep_seeds: [100]
optimizers:
  AdamW: {optimizer: adamw, lr: [0.01, 0.02, 0.04]}
  LoRA-RITE: {optimizer: lora-rite, lr: [0.02]}
"""


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": f"{i} plus {i} is ", "completion": f"{2 * i}, sure"}) for i in range(40)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def recipe(tmp_path, data):
    def write(text=RECIPE, **replaced):
        for old, new in {**replaced, "DATA": str(data)}.items():
            text = text.replace(old, new)
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def fake_train(monkeypatch):
    """Runs cost nothing: the loss is a parabola over log(lr) with its minimum at 0.02, plus a little for the seed."""
    calls = []

    @functools.wraps(train_module.train)
    def train(**options):
        calls.append(options["out"])
        loss = (math.log(options["lr"]) - math.log(0.02)) ** 2 + options["seed"] / 1000
        result = {"settings": json.loads(json.dumps(options, default=str)), "held_out": {"before": 9.0, "after": loss}}
        for key in ("resume", "progress"):
            result["settings"].pop(key)
        result.update(
            held_out_losses=[],
            seconds={"step": 1.0, "optimizer_share": 0.1},
            optimizer={"state_bytes": 100},
            versions=train.versions,
        )
        options["out"].mkdir(parents=True)
        write_json(options["out"] / "settings.json", {"settings": result["settings"]})
        if len(calls) == train.interrupt_at:
            raise KeyboardInterrupt
        if options["lr"] > train.diverge_above:
            raise NonFiniteError("the loss is nan")
        write_json(options["out"] / "result.json", result)
        return result

    train.interrupt_at, train.diverge_above, train.calls, train.versions = 0, math.inf, calls, {}
    monkeypatch.setattr(runner, "train", train)
    return train


def run(*words):
    return main([str(word) for word in words])


def play(study, loss):
    """Gives each run that is due the loss that ``loss`` says, until none is; returns the losses."""
    losses = {}
    while due := study.due(losses):
        losses.update({r: loss(r) for r in due})
    return losses


@pytest.mark.parametrize("optimum", [0.003, 0.01, 0.02, 0.04, 0.15])
def test_each_optimizer_gets_a_learning_rate_inside_its_grid(recipe, optimum):
    """Where the optimum lies outside the grid, the grid is extended until the best rate has neighbours that are worse;
    the final runs have that rate and all seeds, on the test split alone."""
    study = Study(load_recipe(recipe()))
    line = Line("sums", 2, "AdamW")
    losses = play(study, lambda r: (math.log(r.lr) - math.log(optimum)) ** 2)
    grid, _, _, best = study.search(line, losses)
    assert grid[0] < best < grid[-1]
    assert abs(math.log2(best / optimum)) < 0.51
    assert all(math.isclose(b / a, 2, rel_tol=0.01) for a, b in itertools.pairwise(grid))
    finals = [r for r in losses if r.optimizer == "AdamW" and r.split == "test"]
    assert {(r.lr, r.seed) for r in finals} == {(best, 0), (best, 1)}
    sweep = [r for r in losses if r.optimizer == "AdamW" and r.split == "validation"]
    assert {(r.lr, r.seed) for r in sweep} == {(lr, 100) for lr in grid}
    assert study.planned(losses) == len(losses)


def test_a_study_that_is_stopped_has_as_many_seeds_of_each_optimizer(recipe):
    """Case by case: no final run before all learning rates of its case are chosen, then each seed of all optimizers
    before the next seed, in the recipe's order."""
    study = Study(load_recipe(recipe(**{"seeds: [0, 1]": "seeds: [5, 0, 3]", "ranks: [2]": "ranks: [4, 2]"})))
    losses = {}
    while due := study.due(losses):
        losses[due[0]] = (math.log(due[0].lr) - math.log(0.04)) ** 2
    assert [r.rank for r in losses] == [4] * 10 + [2] * 10  # 0.04 is on the edge of a grid of three
    for rank in (4, 2):
        runs = [r for r in losses if r.rank == rank]
        assert [(r.split, r.seed) for r in runs[:5]] == [("validation", 100)] * 4 + [("test", 5)]
        assert [(r.seed, r.optimizer) for r in runs[4:]] == [
            (seed, name) for seed in (5, 0, 3) for name in ("AdamW", "LoRA-RITE")
        ]


def test_runs_of_a_sweep_measure_no_curve(recipe, tmp_path, fake_train):
    """A rate is chosen by its final loss; a sweep that has curves all the same, from before, is taken as it is."""
    path, out = recipe(), tmp_path / "study"
    assert run("compare", path, "--out", out, "--no_progress") == 0
    every = {
        p.parent.name: json.loads(p.read_text())["settings"]["eval_every"] for p in out.glob("runs/**/result.json")
    }
    assert {name.rpartition("-")[2]: e for name, e in every.items()} == {"validation": 0, "test": 1}
    for result in out.glob("runs/**/*-validation/result.json"):
        content = json.loads(result.read_text())
        content["settings"]["eval_every"] = 1
        write_json(result, content)
    done = len(fake_train.calls)
    assert run("compare", path, "--out", out, "--no_progress") == 0
    assert len(fake_train.calls) == done


def test_an_evaluation_has_the_weights_of_the_run(recipe, tmp_path):
    """Also quantised ones: in others, the adapter would not be judged as it was trained."""
    weights = {"model": "tiny", "dtype": "bfloat16", "load_in_4bit": True}
    more = ", ".join(f"{key}: {str(value).lower()}" for key, value in weights.items())
    text = RECIPE.replace("steps: 2,", f"steps: 2, {more},")
    study = Study(load_recipe(recipe(text)))
    options = study.evaluation(Trial("sums", 2, "AdamW", 0.01, 0, "test"), tmp_path, None)
    assert {key: options.get(key) for key in weights} == weights


def test_the_grid_grows_no_further_than_told_and_one_rate_needs_no_sweep(recipe):
    study = Study(load_recipe(recipe()))
    losses = play(study, lambda r: r.lr)
    assert len(study.search(Line("sums", 2, "AdamW"), losses).grid) == 3 + MAX_EXTENSIONS
    assert {r.split for r in losses if r.optimizer == "LoRA-RITE"} == {"test"}


def test_diverged_rates_are_left_for_lower_ones(recipe):
    study = Study(load_recipe(recipe()))
    losses = play(study, lambda r: math.inf if r.lr > 0.006 else 1 / r.lr)
    assert study.search(Line("sums", 2, "AdamW"), losses).best == 0.005


def test_sweeps_of_several_seeds_decide_by_their_mean(recipe):
    study = Study(load_recipe(recipe(**{"sweep_seeds: [100]": "sweep_seeds: [7, 8, 9]"})))
    line = Line("sums", 2, "AdamW")
    table = {(0.01, 7): 1.1, (0.01, 8): 1.2, (0.02, 7): 1.0, (0.02, 8): 3.0, (0.04, 7): 5.0, (0.005, 7): 1.15}
    losses = play(study, lambda r: table.get((r.lr, r.seed), 1.2))
    tried = {(r.lr, r.seed) for r in losses if r.optimizer == "AdamW" and r.split == "validation"}
    first = {(lr, 7) for lr in (0.01, 0.02, 0.04)}
    # 0.02 is best with seed 7; over three seeds 0.01 is, on the edge; 0.005 becomes a finalist and is no better
    assert tried == first | {(0.005, 7)} | {(lr, seed) for lr in (0.005, 0.01, 0.02) for seed in (8, 9)}
    assert study.search(line, losses).best == 0.01
    assert FINALISTS == 2


def test_a_stopped_study_goes_on_and_no_run_is_run_twice(recipe, tmp_path, fake_train, capsys):
    path, out = recipe(), tmp_path / "study"
    fake_train.interrupt_at = 4
    assert run("compare", path, "--out", out, "--no-progress") == 130
    finished = {p: p.read_bytes() for p in out.rglob("result.json")}
    assert len(finished) == 3
    assert run("compare", path, "--out", out) == 0
    assert len(fake_train.calls) == 3 + 1 + 4  # three sweeps, the one that was stopped, four final ones
    assert len(set(fake_train.calls)) == 7
    assert {p: p.read_bytes() for p in finished} == finished
    study = json.loads((out / "study.json").read_text())
    assert study["complete"]
    assert len(study["runs"]) == 7
    assert (out / "report.html").is_file()
    assert run("compare", path, "--out", out, "--no-progress") == 0
    assert len(fake_train.calls) == 8
    printed = capsys.readouterr().out
    assert "━" not in printed  # the bar is for terminals
    lines = printed.splitlines()
    begun = [n for n, line in enumerate(lines) if line.endswith(": begins")]
    assert len(begun) == len(fake_train.calls)  # what a run of hours is at work on is told before it ends
    assert "AdamW, lr 0.01, seed 100: begins" in lines[begun[0]]
    assert "AdamW, lr 0.01, seed 100: validation loss" in lines[begun[0] + 1]
    assert lines[begun[0] + 1].endswith("left)")


def test_a_study_can_grow_but_not_change(recipe, tmp_path, fake_train, capsys):
    out = tmp_path / "study"
    assert run("compare", recipe(), "--out", out) == 0
    before = len(fake_train.calls)
    assert run("compare", recipe(**{"[0, 1]": "[0, 1, 2]"}), "--out", out) == 0
    assert len(fake_train.calls) == before + 2
    # a further seed of the sweep comes before the final runs, which are there already and are not run again
    assert run("compare", recipe(**{"[0, 1]": "[0, 1, 2]", "[100]": "[100, 101]"}), "--out", out) == 0
    before = len(fake_train.calls) - 2
    assert len(set(fake_train.calls)) == len(fake_train.calls)
    for change, key in (
        ({"steps: 2": "steps: 3"}, "train.steps"),
        ({"{data: DATA}": "{data: DATA, limit: {test: 2}}"}, "tasks.sums"),
        ({"adamw,": "muon,"}, "optimizers.AdamW"),
        ({"title:": "function: lora_rite.finetune.train:train\ntitle:"}, "function"),
    ):
        assert run("compare", recipe(**change), "--out", out) == 2
        assert f"holds a study with another {key}" in capsys.readouterr().err
    assert len(fake_train.calls) == before + 2


def test_runs_of_other_versions_are_pointed_out(recipe, tmp_path, fake_train, monkeypatch, capsys):
    """Of another torch, not of another number of threads; and in the report."""
    now, small = train_module.versions(), {"lr: [0.01, 0.02, 0.04]": "lr: [0.01]"}
    for torch_version, seeds, said in (
        ("2.12.0", "[0]", False),
        ("2.12.0", "[0, 1]", False),
        ("2.13.0", "[0, 1, 3]", True),
    ):
        now.update(torch=torch_version, threads=now["threads"] + 1)
        monkeypatch.setattr(results, "versions", lambda: dict(now))
        monkeypatch.setattr(fake_train, "versions", dict(now))
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            assert run("compare", recipe(**small, **{"[0, 1]": seeds}), "--out", tmp_path / "study") == 0
        assert ("are of different torch, which may be" in capsys.readouterr().err) == said
    assert "| torch | 2.12.0, 2.13.0 |" in (tmp_path / "study" / "report.md").read_text()


def test_folders_that_are_no_study_or_in_use_are_left_alone(recipe, tmp_path, fake_train, capsys):
    from filelock import FileLock

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    assert run("compare", recipe(), "--out", tmp_path / "other") == 2
    assert "not an empty folder or a study" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["mine.txt"]
    out = tmp_path / "study"
    assert run("compare", recipe(), "--out", out) == 0
    with FileLock(out / ".lock"):
        assert run("compare", recipe(), "--out", out) == 2
    assert "another compare is at work" in capsys.readouterr().err


def test_a_typo_in_a_path_leaves_the_folder_usable(recipe, tmp_path, fake_train, monkeypatch, capsys):
    """The data are read before the folder becomes the study's; --dry-run says what is missing."""
    out, right, typo = tmp_path / "study", "  sums: {data: DATA}", "  sums: {data: DATA}\n  more: {data: no/such.jsonl}"
    small = {"lr: [0.01, 0.02, 0.04]": "lr: [0.01]", "[0, 1]": "[0]"}
    monkeypatch.setattr(compare_module, "report", lambda out: out)
    assert run("compare", recipe(**small, **{right: typo}), "--out", out, "--dry-run") == 0
    assert "missing: tasks.more.data is no/such.jsonl" in capsys.readouterr().out
    assert run("compare", recipe(**small, **{right: typo}), "--out", out) == 2
    assert "cannot read no/such.jsonl" in capsys.readouterr().err
    assert not fake_train.calls
    more = typo.replace("no/such.jsonl", "DATA, limit: {train: 9}")
    assert run("compare", recipe(**small, **{right: more}), "--out", out) == 0
    assert {r["task"] for r in json.loads((out / "study.json").read_text())["runs"]} == {"sums", "more"}


def test_a_failed_copy_of_the_data_leaves_nothing_behind(recipe, tmp_path, fake_train, monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(data_module, "as_record", fail)
        assert run("compare", recipe(), "--out", tmp_path / "study") == 4
    assert "No space left" in capsys.readouterr().err
    assert not list((tmp_path / "study").rglob("*.tmp"))
    monkeypatch.setattr(compare_module, "report", lambda out: out)
    assert run("compare", recipe(), "--out", tmp_path / "study") == 0


def test_a_diverged_run_is_a_result(recipe, tmp_path, fake_train):
    out = tmp_path / "study"
    fake_train.diverge_above = 0.03
    assert run("compare", recipe(**{"lr: [0.02]": "lr: [0.04]"}), "--out", out) == 0
    study = json.loads((out / "study.json").read_text())
    assert {r["loss"] for r in study["runs"] if r["lr"] == 0.04} == {math.inf}
    assert "diverged" in (out / "report.md").read_text()
    again = len(fake_train.calls)
    assert run("compare", recipe(**{"lr: [0.02]": "lr: [0.04]"}), "--out", out) == 0
    assert len(fake_train.calls) == again


def test_dry_run_and_check_write_nothing(recipe, tmp_path, fake_train, capsys):
    out = tmp_path / "study"
    assert run("compare", recipe(), "--out", out, "--dry-run", "--check") == 0
    printed = capsys.readouterr().out
    assert "7 runs" in printed
    assert "35 pairs in tiny" in printed
    assert "32 examples to train on, 4 examples to choose lr, 4 examples to test" in printed
    assert not out.exists()
    assert not fake_train.calls


def test_plan_and_check_know_what_each_task_trains_with(recipe, capsys):
    """Steps and window of one task are its own: 7 runs of 2 and 7 of 6 steps, and the memory of the longer window."""
    check = lambda text: (run("compare", recipe(text), "--dry-run", "--check"), capsys.readouterr().out)[1]
    activations = lambda text: float(re.search(r"activations roughly ([\d.]+) MiB", check(text))[1])
    tasks = "  sums: {data: DATA}\n  more: {data: DATA, train: {steps: 6, max_length: 64}}\n"
    text = RECIPE.replace("  sums: {data: DATA}\n", tasks)
    assert "2 to 6 steps a run" in check(text)
    assert "14 runs of 2 to 6 steps, 56 steps in all" in check(text)
    assert activations(text) == activations(RECIPE.replace("max_length: 32", "max_length: 64")) > activations(RECIPE)


@pytest.mark.parametrize("bits", [4, 8])
def test_check_counts_quantised_weights_as_they_are_stored(bits, recipe, capsys):
    """To 1% of what bitsandbytes makes of the model (the constants of LLM.int8's rows are not counted)."""
    pytest.importorskip("bitsandbytes")
    stored = 0
    for p in load_model("tiny", dtype="auto", bits=bits)[0].parameters():
        state = getattr(p, "quant_state", None)
        tensors = [p] if state is None else [p, state.absmax, state.state2.absmax]
        stored += sum(t.numel() * t.element_size() for t in tensors)
    text = RECIPE.replace("max_length: 32", f"max_length: 32, load_in_{bits}bit: true")
    assert run("compare", recipe(text), "--check") == 0
    shown = float(re.search(r"weights ([\d.]+) MiB", capsys.readouterr().out)[1])
    assert shown == pytest.approx(stored / 2**20, rel=0.01)


def test_budgets_are_runs_of_their_own_at_the_chosen_rate(recipe, tmp_path, fake_train, capsys):
    """Each optimizer, at its best rate, with all seeds; the task's own number of steps is not run twice. They can be
    added to a study, and are counted before a rate is known. Evaluations are of the full run alone."""
    out, study = tmp_path / "study", Study(load_recipe(recipe()))
    small = {"[0, 1]": "[0]"}
    assert run("compare", recipe(**small), "--out", out) == 0
    before = len(fake_train.calls)
    text = RECIPE.replace("seeds: [0, 1]", "budgets: [1, 2, 3]\nseeds: [0, 1]")
    study = Study(load_recipe(recipe(text)))
    assert study.planned({}) == 3 + 2 * 2 * 3
    assert study.planned_steps() == 3 * 2 + 2 * 2 * (1 + 2 + 3)
    assert run("compare", recipe(text), "--out", out, "--dry-run", "--check") == 0
    printed = capsys.readouterr().out
    assert "15 runs, 5 of them finished" in printed  # three of the sweep, two final ones
    assert "15 runs of 1 to 3 steps, 30 steps in all" in printed
    assert run("compare", recipe(text), "--out", out) == 0
    assert "seed 0, 3 steps: test loss" in capsys.readouterr().out
    assert len(fake_train.calls) == before + 2 + 2 * 2 * 2
    shorter = [path.name.endswith("steps") for path in fake_train.calls[before:]]
    assert shorter == sorted(shorter)  # after all full ones
    runs = [r for r in json.loads((out / "study.json").read_text())["runs"] if r["split"] == "test"]
    assert {(r["optimizer"], r["lr"], r["seed"], r["steps"]) for r in runs} == {
        (name, 0.02, seed, steps) for name in ("AdamW", "LoRA-RITE") for seed in (0, 1) for steps in (None, 1, 3)
    }
    for r in runs:
        settings = json.loads((out / r["path"]).read_text())["settings"]
        assert settings["steps"] == (r["steps"] or 2)
        evaluation = study.evaluation(Trial(*(r[key] for key in Trial._fields)), out, None)
        assert evaluation["adapter"].parent == (out / r["path"]).parent
    study.recipe.tasks["sums"].evaluate = ["gsm8k"]
    assert study.evaluation(Trial("sums", 2, "AdamW", 0.02, 0, "test"), out, None)["tasks"] == ["gsm8k"]
    assert study.evaluation(Trial("sums", 2, "AdamW", 0.02, 0, "test", 1), out, None)["tasks"] == []


def test_budgets_need_a_function_that_takes_steps(recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "without_steps.py").write_text(
        "def f(data, validation, optimizer, optimizer_args, lr, rank, seed, out): 0"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    text = RECIPE.replace("title:", 'function: "without_steps:f"\nbudgets: [1]\ntitle:')
    text = text.replace("{steps: 2, batch_size: 2, max_length: 32, eval_every: 1}", "{}")
    assert run("compare", recipe(text), "--dry-run") == 2
    assert "budgets: function without_steps:f takes no steps" in capsys.readouterr().err
    assert run("compare", recipe(text.replace("budgets: [1]", "notes: x")), "--dry-run") == 0


def test_a_finished_study_has_the_measures_of_its_report(recipe, tmp_path, fake_train):
    """Figures that others may want to plot; while runs are missing there are none."""
    out = tmp_path / "study"
    fake_train.interrupt_at = 4
    assert run("compare", recipe(), "--out", out) == 130
    assert "measures" not in json.loads((out / "study.json").read_text())
    assert run("compare", recipe(RECIPE.replace("ranks", "budgets: [1]\nranks")), "--out", out) == 0
    adamw, ours = sorted(json.loads((out / "study.json").read_text())["measures"], key=lambda m: m["optimizer"])
    assert (adamw["optimizer"], adamw["task"], adamw["rank"]) == ("AdamW", "sums", 2)
    assert adamw["steps_to_adamw"] is None  # this loss was measured at the ends alone
    assert adamw["loss"]["mean"] == pytest.approx(0.0005)
    assert adamw["budget_to_adamw"] == 1
    assert set(adamw["loss_by_budget"]) == {"1"}
    assert adamw["good_rates"]["best"] == 0.02
    assert 0.01 < adamw["good_rates"]["low"] < 0.02 < adamw["good_rates"]["high"] < 0.04
    assert ours["good_rates"] is None  # of one rate alone


def test_adamw_is_clipped_at_one_and_we_by_ourselves(recipe, tmp_path, monkeypatch):
    """As every trainer does it, and as docs/study.md says."""
    from transformers import Trainer

    norms, original = {}, Trainer.training_step

    def step(self, *args, **kwargs):
        norms[type(self.optimizer.optimizer).__name__] = self.args.max_grad_norm
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", step)
    small = {"lr: [0.01, 0.02, 0.04]": "lr: [0.01]", "[0, 1]": "[0]"}
    assert run("compare", recipe(**small), "--out", tmp_path / "study") == 0
    assert norms == {"AdamW": 1.0, "LoRARite": 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title:": "titel:"}, "recipe.yaml: no key titel, did you mean title?"),
        ({"title: A small study": ""}, "recipe.yaml: title is missing"),
        ({"ranks: [2]": "budgets: [0]\nranks: [2]"}, "budgets: each once, none below 1"),
        ({"ranks: [2]": "budgets: [5, 5]\nranks: [2]"}, "budgets: each once, none below 1"),
        ({"ranks: [2]": "budgets: [5]\nranks: [2]", "adamw,": "muon,"}, "budgets: no optimizer is adamw"),
        ({"steps: 2": "stepps: 2"}, "train.stepps: lora-rite train has no such option, did you mean steps?"),
        ({"steps: 2": "steps: many"}, "train.steps must be a whole number, got many"),
        ({"{data: DATA}": "{data: DATA, train: {steps: many}}"}, "tasks.sums.train.steps must be a whole number"),
        ({"{data: DATA}": "{data: DATA, limit: {test: x}}"}, "tasks.sums.limit must be a whole number, got x"),
        ({"lr: [0.02]": "lr: [x]"}, "optimizers.LoRA-RITE.lr must be a number, got x"),
        ({", lr: [0.02]": ""}, "optimizers.LoRA-RITE.lr is missing"),
        ({"ranks: [2]": "ranks: 2"}, "ranks must be a list, got 2"),
        ({"steps: 2": "steps: 2, seed: 3"}, "train.seed: the study decides it"),
        ({"{data: DATA}": "{}"}, "tasks.sums: give either task or data"),
        ({"{data: DATA}": "{data: DATA, limit: {tset: 3}}"}, "tasks.sums.limit.tset"),
        ({"{data: DATA}": "{data: DATA, limit: {test: -1}}"}, "tasks.sums.limit.test must be at least 1, got -1"),
        ({"{data: DATA}": "{data: DATA, train: {lr: 1}}"}, "tasks.sums.train.lr: the study decides it"),
        ({"sums:": "a/b:"}, "names a folder"),
        ({"lr: [0.02]": "lr: []"}, "optimizers.LoRA-RITE.lr"),
        ({"lr: [0.02]": "lr: [-1]"}, "optimizers.LoRA-RITE.lr"),
        ({"{data: DATA}": "{task: sums}"}, "no task sums"),
        ({"lora-rite,": "lora-write,"}, "no optimizer lora-write, did you mean lora-rite?"),
        ({"seeds: [0, 1]": "seeds: []"}, "seeds is empty"),
        ({"seeds: [0, 1]": "seeds: [0, 0]"}, "seeds: each once"),
        ({"ranks: [2]": "ranks: [0]"}, "ranks: each once, none below 1"),
    ],
)
def test_a_bad_recipe_is_named_by_its_key(recipe, change, message, capsys, tmp_path):
    assert run("compare", recipe(**change), "--out", tmp_path / "study") == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_splits_have_no_example_in_common(recipe, tmp_path):
    study = load_recipe(recipe(**{"{data: DATA}": "{data: DATA, limit: {train: 20, test: 3}}"}))
    sizes = data_module.write_data(study, tmp_path / "d", data_module.read_new_data(study, tmp_path / "d", None))[
        "sums"
    ]
    assert {part: size["examples"] for part, size in sizes.items()} == {"train": 20, "validation": 4, "test": 3}
    parts = [set((tmp_path / "d" / "sums" / f"{part}.jsonl").read_text().splitlines()) for part in SPLITS]
    assert len(set.union(*parts)) == sum(map(len, parts))


NOISY = """
import torch

class Noisy(torch.optim.SGD):
    def __init__(self, params, lr, weight_decay=0.0):
        torch.rand(1000)
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    def step(self, closure=None):
        torch.rand(1000)
        return super().step(closure)

def factory(model, lr, scale):
    return Noisy([p for p in model.parameters() if p.requires_grad], lr * scale)
"""


def test_runs_of_a_seed_have_the_same_adapter_and_batches(recipe, tmp_path, monkeypatch):
    """Also where an optimizer (here a class and a factory by import path) draws random numbers of its own."""
    (tmp_path / "noisy_optimizer.py").write_text(textwrap.dedent(NOISY))
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: dict[tuple[str, int], list] = {}
    original_attach = prepare_module.attach_adapter

    def attach(*args, **kwargs):
        network = original_attach(*args, **kwargs)
        seen[current[0]] = [torch.cat([p.flatten() for n, p in network.named_parameters() if "lora_A" in n])]
        return network

    from transformers import Trainer

    original_step, original_train, current = Trainer.training_step, train_module.train, []

    def step(self, model, inputs, *args, **kwargs):
        seen[current[0]].append(inputs["input_ids"].clone())
        return original_step(self, model, inputs, *args, **kwargs)

    @functools.wraps(original_train)
    def train(**options):
        current[:] = [(options["out"].parts[-2], options["seed"])]
        return original_train(**options)

    monkeypatch.setattr(prepare_module, "attach_adapter", attach)
    monkeypatch.setattr(Trainer, "training_step", step)
    monkeypatch.setattr(runner, "train", train)
    text = RECIPE[: RECIPE.index("optimizers:")] + textwrap.dedent(
        """
        optimizers:
          AdamW: {optimizer: adamw, lr: [0.01]}
          class: {optimizer: "noisy_optimizer:Noisy", lr: [0.01]}
          factory: {optimizer: "noisy_optimizer:factory", lr: [0.01], optimizer_args: {scale: 2.0}}
        """
    )
    assert run("compare", recipe(text), "--out", tmp_path / "study") == 0
    assert len(seen) == 6
    for seed in (0, 1):
        reference = seen["AdamW", seed]
        assert len(reference) == 3
        for name in ("class", "factory"):
            assert all(torch.equal(a, b) for a, b in zip(reference, seen[name, seed], strict=True))
    assert not torch.equal(seen["AdamW", 0][0], seen["AdamW", 1][0])
    result = json.loads((tmp_path / "study/runs/sums/r2/factory/lr0.01-seed0-test/result.json").read_text())
    assert result["optimizer"]["options"]["lr"] == 0.0  # at the end of the schedule
    assert result["settings"]["optimizer_args"] == {"scale": 2.0}


def test_a_killed_run_goes_on_from_its_checkpoint(recipe, tmp_path, monkeypatch, capsys):
    """A study that is stopped within a run comes to the same losses, bitwise, and leaves no checkpoints."""
    from transformers import Trainer

    small = {"lr: [0.01, 0.02, 0.04]": "lr: [0.01]", "steps: 2": "steps: 4, save_every: 2", "[0, 1]": "[0]"}
    assert run("compare", recipe(**small), "--out", tmp_path / "whole") == 0
    save, steps = Run.save, []

    def save_and_stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", save_and_stop)
    assert run("compare", recipe(**small), "--out", tmp_path / "parts") == 130
    monkeypatch.setattr(Run, "save", save)
    original = Trainer.training_step
    monkeypatch.setattr(
        Trainer,
        "training_step",
        lambda self, *args, **kwargs: (steps.append(self.state.global_step), original(self, *args, **kwargs))[1],
    )
    assert run("compare", recipe(**small), "--out", tmp_path / "parts") == 0
    assert steps == [2, 3, 0, 1, 2, 3]
    whole, parts = (json.loads((tmp_path / name / "study.json").read_text())["runs"] for name in ("whole", "parts"))
    assert whole == parts
    assert not list((tmp_path / "parts").rglob("checkpoint-*"))


@pytest.fixture
def stopped(recipe, tmp_path, monkeypatch, capsys):
    """A study with a run of 4 steps that a signal has stopped after the first one; what continues it, which gives the
    numbers of the steps then made; and what was said."""
    from transformers import Trainer

    small = {"lr: [0.01, 0.02, 0.04]": "lr: [0.01]", "steps: 2": "steps: 4", "[0, 1]": "[0]"}
    words = ["compare", recipe(**small).rename(tmp_path / "small.yaml"), "--no-progress", "--out"]
    original = Trainer.training_step

    def stop(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)  # (a shell has its background jobs ignore SIGINT)
        return original(self, *args, **kwargs)

    def go_on(out):
        steps = []
        count = lambda self, *args, **kwargs: (steps.append(self.state.global_step), original(self, *args, **kwargs))[1]
        monkeypatch.setattr(Trainer, "training_step", count)
        return run(*words, out), steps

    monkeypatch.setattr(Trainer, "training_step", stop)
    assert run(*words, tmp_path / "study") == 143
    return tmp_path / "study", go_on, capsys.readouterr().err


def test_paths_in_messages_stay_what_they_are():
    message = in_words_of_a_study("--lr: cannot read my--set/a.jsonl, see --out")
    assert message == "lr: cannot read my--set/a.jsonl, see --out"


def test_a_signal_ends_a_study_in_its_own_words(stopped):
    _, _, error = stopped
    assert "lr0.01-seed0-test: stopped by SIGTERM after step 1, which is saved; the same command goes on" in error
    assert "--resume" not in error


def test_a_moved_study_goes_on_where_it_was(stopped, tmp_path, monkeypatch):
    folder, go_on, _ = stopped
    folder.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert go_on("moved") == (0, [1, 2, 3, 0, 1, 2, 3])


def test_on_another_machine_a_stopped_run_starts_from_its_beginning(stopped, monkeypatch, capsys):
    """Bitwise it could not go on. --jobs, for one, changes the threads."""
    folder, go_on, _ = stopped
    now = train_module.versions()
    for name in (runner, train_module):
        monkeypatch.setattr(name, "versions", lambda: {**now, "threads": 7})
    assert go_on(folder) == (0, [0, 1, 2, 3] * 2)
    assert "starts from the beginning, since it cannot go on bitwise (threads: 1 → 7)" in capsys.readouterr().out


def test_other_weights_under_a_study_are_refused_in_its_own_words(stopped, monkeypatch, capsys):
    folder, go_on, _ = stopped
    load = prepare_module.load_model

    def other_weights(*args, **kwargs):
        network, tokenizer = load(*args, **kwargs)
        network.get_input_embeddings().weight.data[3, 3] += 1e-3
        return network, tokenizer

    monkeypatch.setattr(prepare_module, "load_model", other_weights)
    assert go_on(folder) == (2, [])
    error = capsys.readouterr().err
    assert "base_weights: " in error
    assert error.rstrip().endswith("choose another --out")


SLOW_POINTS = ("adapter written@2", "result.json written@2", "study.json written")


@pytest.mark.parametrize(
    "point", ["manifest.json renamed@3", *(pytest.param(point, marks=pytest.mark.slow) for point in SLOW_POINTS)]
)
def test_a_study_survives_kill_9(point, recipe, tmp_path):
    """Killed in its second run, or while it writes of both: the finished run is not touched, the other one goes on, and
    the losses are bitwise those of a study that was not killed."""
    small = {"lr: [0.01, 0.02, 0.04]": "lr: [0.01]", "steps: 2": "steps: 4, save_every: 2", "[0, 1]": "[0]"}
    words = ["compare", str(recipe(**small)), "--out"]
    assert run(*words, tmp_path / "whole") == 0
    out = tmp_path / "parts"
    killed = subprocess.run(
        [sys.executable, "-m", "lora_rite.cli", *words, str(out)],
        env={**os.environ, "LORA_RITE_FAILPOINT": point, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL
    finished = {p: p.stat().st_mtime_ns for p in out.rglob("result.json")}
    assert len(finished) == 1
    assert run(*words, out) == 0
    assert all(p.stat().st_mtime_ns == time for p, time in finished.items())
    whole, parts = (json.loads((tmp_path / name / "study.json").read_text())["runs"] for name in ("whole", "parts"))
    assert whole == parts
    assert not list(out.rglob("*.tmp"))


@pytest.mark.filterwarnings("ignore:non-finite gradient", "ignore:overflow from the gradient")
def test_a_diverged_run_is_not_run_again(recipe, tmp_path, monkeypatch):
    """Not the one of fake_train: as ``train`` itself records a run that has failed."""
    from transformers import Trainer

    original = Trainer.compute_loss
    monkeypatch.setattr(Trainer, "compute_loss", lambda *args, **kwargs: original(*args, **kwargs) * math.nan)
    small = {"lr: [0.01, 0.02, 0.04]": "lr: [0.01]", "steps: 2": "steps: 4", "[0, 1]": "[0]"}
    assert run("compare", recipe(**small), "--out", tmp_path / "study") == 0
    study = json.loads((tmp_path / "study" / "study.json").read_text())
    assert [r["loss"] for r in study["runs"]] == [math.inf, math.inf]
    results = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}
    assert run("compare", recipe(**small), "--out", tmp_path / "study") == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")} == results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title:": "title: !!python/object/apply:os.getcwd []\nnotes:"}, "recipe.yaml:2: tags (!) are not supported"),
        ({"ranks: [2]": "ranks: &r [2]\nseeds: *r"}, "recipe.yaml:6: anchors (&) and aliases (*)"),
        ({"ranks: [2]": "ranks: [2]\nranks: [3]"}, "recipe.yaml:7: ranks is given twice"),
        ({"steps: 2": "steps: 2, trust_remote_code: true"}, "train.trust_remote_code: not by a file"),
    ],
)
def test_a_recipe_of_a_stranger(recipe, change, message, tmp_path, capsys):
    assert run("compare", recipe(**change), "--out", tmp_path / "study") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"{data: DATA}": "{class_path: hostile.C}"}, "tasks.sums.class_path: there are task, data, "),
        ({"{data: DATA}": "hostile.C"}, "tasks.sums: expected a mapping"),
        ({"{data: DATA}": "null"}, "tasks.sums: expected a mapping, with some of task, data, "),
        ({"  sums: {data: DATA}": "  '{sums: {class_path: hostile.C}}'"}, "tasks: expected lines of “NAME: {task, "),
        ({"lr: [0.02]": "init_args: {}"}, "optimizers.LoRA-RITE.init_args: there are optimizer, lr, optimizer_args"),
        ({"steps: 2": "steps: {class_path: hostile.C}"}, "train.steps must be a whole number, got"),
        ({"steps: 2": 'steps: \'{"class_path": "hostile.C"}\''}, "train.steps must be a whole number, got"),
        (
            {"{data: DATA}": "{data: DATA, limit: 3}"},
            "recipe.yaml: tasks.sums.limit must be a mapping, got 3",
        ),
        ({"lr: [0.02]": "lr: [0.02], optimizer_args: {damping: {class_path: hostile.C}}"}, ""),
    ],
)
def test_a_class_in_a_recipe_is_not_imported(recipe, change, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "hostile.py").write_text("class C: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert run("compare", recipe(**change), "--out", tmp_path / "study", "--dry-run") == (2 if message else 0)
    assert message in capsys.readouterr().err
    assert "hostile" not in sys.modules


def test_final_adapters_are_evaluated_and_a_missing_evaluation_is_made_up_for(recipe, tmp_path, capsys):
    """Accuracies by lm_eval, of final runs alone, in the report; a run without its evaluation is not trained again."""
    pytest.importorskip("lm_eval")
    from task_files import make_task_files

    folder = make_task_files(tmp_path / "data")
    text = RECIPE.replace("{data: DATA}", "{task: arc_challenge, evaluate: [arc_challenge]}").replace("[0, 1]", "[0]")
    words = ["compare", recipe(text), "--out", tmp_path / "study", "--data-dir", folder]
    assert run(*words) == 0
    made = sorted(path.parts[-3] for path in (tmp_path / "study").rglob("evaluation/arc_challenge.json"))
    assert len(made) == 2
    assert all(name.endswith("seed0-test") for name in made)
    assert "| optimizer | arc_challenge, acc_norm | − AdamW |" in (tmp_path / "study" / "report.md").read_text()
    evaluation = next((tmp_path / "study").rglob("evaluation/arc_challenge.json"))
    before, kept = evaluation.read_text(), (evaluation.parents[1] / "result.json").read_bytes()
    evaluation.unlink()
    assert run(*words) == 0
    assert json.loads(evaluation.read_text())["results"] == json.loads(before)["results"]
    assert (evaluation.parents[1] / "result.json").read_bytes() == kept
    assert run("compare", recipe(text.replace("[arc_challenge]", "[no_such_task]")), "--out", tmp_path / "new") == 2
    assert "no_such_task" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_several_processes_come_to_the_same_losses(recipe, tmp_path):
    assert run("compare", recipe(), "--out", tmp_path / "one") == 0
    assert run("compare", recipe(), "--out", tmp_path / "two", "--jobs", 2) == 0
    one, two = (
        {r["path"]: r["loss"] for r in json.loads((tmp_path / name / "study.json").read_text())["runs"]}
        for name in ("one", "two")
    )
    assert one == two


def test_a_worker_takes_its_device_and_its_share_of_the_cores(monkeypatch):
    import queue
    import signal

    devices, threads = queue.Queue(), []
    for device in (3, None):
        devices.put(device)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    workers.start_worker(devices, 5)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    workers.start_worker(devices, 5)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert threads == [5, 5]


def test_gpus_that_are_not_there_are_refused(recipe, tmp_path, fake_train, monkeypatch, capsys):
    """Instead of training on the CPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for count, device in ((0, 0), (2, 2), (2, -1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert run("compare", recipe(), "--out", tmp_path / "study", f"--devices=[1, {device}]") == 2
        assert f", torch sees {count} CUDA devices" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
    workers.check_devices([0, 1])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    workers.check_devices([6, 7])


def test_an_unreadable_recipe_is_an_error(tmp_path):
    with pytest.raises(LoRARiteValueError, match=r"nowhere\.yaml"):
        load_recipe(Path(tmp_path / "nowhere.yaml"))


def test_shorter_prompts_travel_with_the_data(tmp_path):
    """What a task offers for a prompt that does not fit is not lost on the way through the study's files."""
    from lora_rite.finetune.data import Example, read_examples

    examples = [Example("long prompt", "a", ("short", "s")), Example("p", "b"), Example("", "text")]
    lines = [json.dumps(data_module.as_record(example)) for example in examples]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    assert read_examples(tmp_path / "x.jsonl") == examples
    (tmp_path / "x.jsonl").write_text('{"prompt": "p", "completion": "c", "shorter": "no list"}')
    with pytest.raises(LoRARiteValueError, match='"shorter" must be a list of prompts'):
        read_examples(tmp_path / "x.jsonl")
