"""What ``lora-rite train`` says: before it begins, while it runs, and at its end."""

import json
import re
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("peft")
pytest.importorskip("jsonargparse")

import torch

from lora_rite.cli import main
from lora_rite.finetune import train as train_module
from lora_rite.finetune.header import advice, announce, summary
from lora_rite.finetune.load import attach_adapter, load_model
from lora_rite.finetune.memory import optimizer_state
from lora_rite.plan.pairs import Shape
from lora_rite.run.console import bars
from lora_rite.run.versions import chip

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
WORDS = [
    "--steps", "2", "--batch_size", "2", "--accumulation", "2", "--max_length", "16", "--rank", "2", "--lr", "0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    texts = [*(f"f{i}(int a);" for i in range(12)), "g(" + ", ".join(f"int a{i}" for i in range(20)) + ");"]
    path.write_text("\n".join(json.dumps({"prompt": "int ", "completion": text}) for text in texts))
    return path


def train(data, out, *words):
    code = main(["train", "--data", str(data), "--out", str(out), *WORDS, *words])
    assert code == 0
    return json.loads((out / "result.json").read_text())


def test_a_run_says_what_it_is_before_the_first_loss(data, tmp_path, capsys):
    """On stderr; and the same is in result.json, counted from the model and the data here."""
    result = train(data, tmp_path / "run", "--eval_every", "1")
    printed, error = capsys.readouterr()
    run = result["run"]
    assert error.startswith(f"lora-rite train: tiny on cpu ({chip()}), into {tmp_path / 'run'}")
    assert error.index("trained parameters") < error.index("step 1: held-out loss")
    network = attach_adapter(load_model("tiny")[0], rank=2)
    trained, whole = network.get_nb_trainable_parameters()
    assert (run["trained"], run["parameters"]) == (trained, whole)
    assert run["trained_share"] == trained / whole
    assert run["pairs"] == 35
    assert run["steps"] == run["steps_done"] == 2
    assert run["epochs"] == pytest.approx(2 * 2 * 2 / 12)
    assert run["dtype"] == "float32"
    assert run["windows"] == result["windows"] == {"train": 12, "held_out": 1}
    assert run["tokens"]["train"] > run["tokens_with_loss"]["train"] > 12
    assert run["memory"]["weights"] == sum(p.numel() * 4 for p in network.parameters() if not p.requires_grad)
    assert run["memory"]["adapter"] == 8 * trained
    assert run["memory"]["optimizer"] == result["optimizer"]["state_bytes"]
    parts = [run["memory"][key] for key in ("weights", "adapter", "optimizer", "activations")]
    assert run["memory"]["estimated"] == sum(parts)
    assert run["memory"]["peak"] > run["memory"]["weights"]
    for says in (
        f"{trained:,} trained parameters ({trained / whole:.2%}) in 35 pairs", "2 steps of 4 windows (0.67 epochs)",
        "12 examples", "held out: 1 window", "memory", "float32",
    ):  # fmt: skip
        assert says in error
    assert "GiB of memory" in printed or "MiB of memory" in printed
    assert (", Python and its libraries among it\n" in printed) == (run["device"] == "cpu")


def test_held_out_losses_come_as_they_are_measured(data, tmp_path, capsys, monkeypatch):
    """On a terminal, with bars."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    result = train(data, tmp_path / "run", "--eval_every", "1")
    error = capsys.readouterr().err
    for entry in result["held_out_losses"]:
        assert f"step {entry['step']}: held-out loss {entry['held_out_loss']:.4f} (the lowest so far)" in error
    # Before, and after each of the two steps: the last is not measured again at the end.
    assert error.count("measuring the held-out loss:   0%") == 3
    assert result["held_out"]["after"] == result["held_out_losses"][-1]["held_out_loss"]
    assert "checking the weights" in error
    assert "Loading weights" in error
    assert "2/2 [" in error
    assert "step 1 of 2" not in error


def test_what_is_no_terminal_gets_few_lines(data, tmp_path, capsys):
    """A line for each held-out loss and for each tenth of the steps, whole and with no bar of anybody's."""
    result = train(data, tmp_path / "run", "--eval_every", "9", "--steps", "40")
    error = capsys.readouterr().err
    assert not {"\r", "\x1b", "%|"} & {part for part in ("\r", "\x1b", "%|") if part in error}
    lines = error.splitlines()
    steps = [int(line.split()[1]) for line in lines if re.match(r"step \d+ of 40: ", line)]
    assert steps == [*range(4, 41, 4)]
    losses = {entry["step"]: entry["loss"] for entry in result["losses"]}
    for step in steps:
        figures = rf"step {step} of 40: loss {losses[step]:.3f}, lr \S+, [\d,]+ tokens/s, about \d\d:\d\d left"
        assert sum(re.fullmatch(figures, line) is not None for line in lines) == 1
    held_out = [line for line in lines if "held-out loss" in line and line.startswith("step")]
    assert [line.partition(":")[0] for line in held_out] == ["step 9", "step 18", "step 27", "step 36"]
    assert sum(line.startswith("step") for line in lines) == len(steps) + len(held_out)


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_resumed_run_says_the_tenths_that_are_left(data, tmp_path, capsys):
    out = tmp_path / "run"
    train(data, out, "--steps", "10", "--save_every", "5", "--no_progress")
    train(data, out, "--steps", "20", "--save_every", "5", "--resume")
    found = re.findall(r"^step (\d+) of 20: ", capsys.readouterr().err, re.MULTILINE)
    assert found == [str(n) for n in range(12, 21, 2)]


def test_bars_of_any_library_are_hidden_and_come_back(capsys, monkeypatch):
    """Where they are not wanted or nobody could write over them, and afterwards they are what they were."""
    from huggingface_hub.utils import tqdm as of_the_hub
    from tqdm import tqdm

    kinds = (tqdm, of_the_hub)
    for progress, terminal, shown in ((True, False, False), (False, True, False), (True, True, True)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with bars(progress):
            found = [kind(range(3), disable=False).disable for kind in kinds]
        assert found == [not shown] * len(kinds)
    assert not tqdm(range(3)).disable
    capsys.readouterr()


def test_without_progress_the_end_alone_is_said(data, tmp_path, capsys):
    train(data, tmp_path / "run", "--eval_every", "1", "--no_progress")
    printed, error = capsys.readouterr()
    assert error == ""
    assert "held-out loss" in printed


@pytest.mark.filterwarnings("default:.*held-out examples are in")
def test_a_cap_on_what_is_held_out_is_said(data, tmp_path, capsys):
    train(data, tmp_path / "run", "--validation", str(data), "--eval_limit", "5", "--holdout", "0.5")
    assert "held out: 5 windows of 13 (--eval_limit)" in capsys.readouterr().err


def test_a_loss_that_rose_is_said_with_what_to_try(data, tmp_path, capsys, monkeypatch):
    left = [2.0, 2.5]
    monkeypatch.setattr(train_module, "held_out_loss", lambda *_, **__: left.pop(0))
    train(data, tmp_path / "run", "--no_progress")
    assert "the held-out loss did not fall: try a third of --lr 0.01" in capsys.readouterr().out


def test_a_loss_that_is_not_a_number_is_said_with_what_to_try(data, tmp_path, capsys, monkeypatch):
    left = [2.0, float("nan")]
    monkeypatch.setattr(train_module, "held_out_loss", lambda *_, **__: left.pop(0))
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *WORDS, "--no_progress"]) == 3
    assert "the held-out loss is nan after training: lower --lr" in capsys.readouterr().err


def test_what_is_advised():
    """Nothing where the loss fell to its lowest; fewer steps where it was lower before; which adapter was kept."""
    result = {
        "held_out": {"before": 3.0, "after": 2.0},
        "settings": {"lr": 0.01},
        "held_out_losses": [{"step": 1, "held_out_loss": 2.5}, {"step": 2, "held_out_loss": 2.0}],
    }
    assert advice(result) == []
    result["held_out_losses"][0]["held_out_loss"] = 1.5
    assert advice(result) == ["it was lower at step 1, 1.5000: try fewer steps, a lower --lr, or --keep_best"]
    result["best"] = {"step": 1, "held_out_loss": 1.5, "last": 2.0, "last_step": 2}
    assert advice(result) == ["the adapter is that of step 1, the lowest held-out loss (the last, 2.0000, at step 2)"]


def test_a_model_that_memory_cannot_be_told_of_is_no_error(data, tmp_path, monkeypatch, capsys):
    """An optimizer that wants a real model, and a config without the sizes."""
    from lora_rite.finetune import memory

    def fails(*_, **__):
        raise AttributeError("no sizes")

    monkeypatch.setattr(memory, "activations", fails)
    monkeypatch.setattr(memory, "optimizer_state", fails)
    result = train(data, tmp_path / "run")
    assert result["run"]["memory"]["activations"] is result["run"]["memory"]["optimizer"] is None
    assert "memory" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lora-rite", "adamw", "muon"])
def test_an_estimate_draws_no_random_numbers(name):
    """Batches and dropout of a run follow from what its seed has set before."""
    before = torch.random.get_rng_state()
    assert optimizer_state({Shape(24, 16, 2): 3}, name, 0.01) > 0
    assert torch.equal(torch.random.get_rng_state(), before)


def test_results_of_before_have_a_summary():
    """They do not say what the run was."""
    result = {
        "settings": {"out": "runs/a", "lr": 0.1, "model": "tiny", "task": None, "validation": None, "bf16": False,
                     "trust_remote_code": False},
        "held_out": {"before": 2.0, "after": 1.0, "tokens": 1}, "held_out_losses": [],
        "perplexity": {"before": 2.0, "after": 1.0}, "examples": {"cut": {"train": 0, "held_out": 0}},
        "seconds": {"training": 1.0, "step": 1.0, "optimizer_step": 0.1, "optimizer_share": 0.1},
    }  # fmt: skip
    assert "held-out loss 2.0000 → 1.0000" in summary(result)


def test_gpus_that_are_left_idle_are_said(monkeypatch):
    """One process takes one of them; a launcher's takes each its own."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.warns(UserWarning, match="one of 4 GPUs is used: torchrun --nproc_per_node 4 -m lora_rite train"):
        announce(SimpleNamespace(model="tiny", out="run"))
