"""``lora-rite train --torch_compile``: the same run, by other kernels."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("jsonargparse")

from safetensors.torch import load_file
from torch._dynamo.utils import counters

import lora_rite
from lora_rite.cli import main
from lora_rite.finetune.load import load_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "default::UserWarning")
WORDS = ["--batch_size", 2, "--max_length", 16, "--rank", 2, "--lr", 0.01, "--steps", 4, "--no_progress"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The first layer of the embedded model, which compiles four times as fast as all."""
    folder = tmp_path_factory.mktemp("model")
    network, tokenizer = load_model("tiny")
    network.model.layers = network.model.layers[:1]
    network.config.num_hidden_layers = 1
    network.config.layer_types = None
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A text, whose windows are all of one length, and prompts with completions of several lengths."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("\n\n".join(f"int f{i}(int a) {{ return a + {i}; }}" for i in range(60)))
    lines = [json.dumps({"prompt": "int ", "completion": f"f{i}(int {'a' * (i % 4)});"}) for i in range(13)]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def train(model, data, tmp_path, tmp_path_factory, monkeypatch):
    """Trains by the command line into tmp_path/NAME; gives the result, or the exit code where it is not 0."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))

    def run(*words, name="run", text="text.txt", anew=True):
        out = tmp_path / name
        if anew:
            torch._dynamo.reset()
            counters.clear()
        given = ["train", "--model", model, "--data", data / text, "--out", out, *WORDS, *words]
        return main([str(word) for word in given]) or json.loads((out / "result.json").read_text())

    yield run
    torch._dynamo.reset()


@pytest.fixture(params=["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    """Graphs run as PyTorch runs them without a compiler, which takes seconds, or compiled, as users have it."""
    if request.param == "eager":
        compiles = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model, **given: compiles(model, backend="eager"))
    return request.param


def assert_alike(result, plain, tolerance=1e-4):
    for key in ("losses", "held_out_losses"):
        for one, two in zip(result[key], plain[key], strict=True):
            assert one == pytest.approx(two, rel=tolerance)
    assert result["held_out"] == pytest.approx(plain["held_out"], rel=tolerance)


def test_a_compiled_run_is_the_same_run(train, tmp_path, backend):
    """In one graph for all steps, with the losses up to rounding, and the pairs and names of the adapter; resumed, it
    is bitwise the whole run."""
    words = ("--save_every", 2, "--eval_every", 2)
    plain = train(*words, name="plain")
    assert not counters["stats"]
    result = train(*words, "--torch_compile", "default")
    assert counters["stats"]["unique_graphs"] == 2  # the model's, and the sum's that was compiled to try it
    assert (result["losses"] == plain["losses"]) == (backend == "eager")
    assert result["held_out"]["before"] == plain["held_out"]["before"]  # measured without it
    assert_alike(result, plain)
    assert result["run"]["pairs"] == plain["run"]["pairs"] > 0
    whole, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "plain"))
    assert whole.keys() == other.keys()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    (tmp_path / "run" / "result.json").unlink()
    resumed = train(*words, "--torch_compile", "default", "--resume")
    assert resumed["losses"] == result["losses"]
    again = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize("backend", ["eager"], indirect=True)
def test_the_next_run_of_a_process_has_its_graphs(train, backend):
    """As the runs of a study have them, of other optimizers, rates and seeds: nothing is compiled anew."""
    words = ("--bf16", "--torch_compile", "default", "--eval_limit", 4)
    train(*words, name="first")
    graphs = counters["stats"]["unique_graphs"]
    train(*words, "--optimizer", "adamw", "--seed", 1, name="second", anew=False)
    assert counters["stats"]["unique_graphs"] == graphs


def test_other_lengths_are_compiled_once_more(train, backend):
    """Batches of several lengths, of which some tokens carry loss: two graphs of the model, the second for all lengths.
    With gradient checkpointing too, which does not break them up."""
    words = ("--gradient_checkpointing", "--eval_every", 2)
    plain = train(*words, name="plain", text="pairs.jsonl")
    result = train(*words, "--torch_compile", "default", text="pairs.jsonl")
    assert counters["stats"]["unique_graphs"] <= 3
    assert not [reason for reason in counters["graph_break"] if "requires_grad" in reason]
    assert_alike(result, plain)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forked processes")
def test_processes_compile_the_run_of_one(train, model, data, tmp_path):
    from launch import Launch

    plain = train("--eval_every", 2, name="plain", text="pairs.jsonl")
    words = ["train", "--model", model, "--data", data / "pairs.jsonl", "--out", tmp_path / "run", *WORDS]
    words += ["--batch_size", 1, "--eval_every", 2, "--torch_compile", "default"]
    cache = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    done = Launch(words, tmp_path / "log", TORCHINDUCTOR_CACHE_DIR=cache).wait(600)
    assert [one.code for one in done] == [0, 0], done[0].stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["run"]["processes"] == 2
    assert_alike(result, plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "tolerance"),
    [
        (("--bf16",), 2e-2),
        (("--dora", "--modules_to_save", "norm"), 1e-4),
        (("--packing", "--accumulation", 2), 1e-4),
        (("--load_in_4bit",), 1e-4),
        (("--load_in_8bit",), 2e-2),
        (("--optimizer", "adamw"), 1e-4),
    ],
    ids=str,
)
def test_other_kinds_of_runs_compile(words, tolerance, train):
    if any("load_in" in str(word) for word in words):
        pytest.importorskip("bitsandbytes")
    plain = train(*words, "--eval_every", 2, name="plain", text="pairs.jsonl")
    result = train(*words, "--eval_every", 2, "--torch_compile", "reduce-overhead", text="pairs.jsonl")
    assert counters["stats"]["unique_graphs"] >= 2
    assert_alike(result, plain, tolerance)


def test_what_torch_compile_says_is_said_before_anything_is_written(train, tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise RuntimeError("no compiler\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", fails)
    assert train("--torch_compile", "default") == 2
    assert "--torch_compile default: torch.compile does not work here: no compiler Set" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_compiler_that_is_missing_is_said(data, tmp_path):
    """In a process of its own: this one may have compiled already."""
    words = ["train", "--data", data / "text.txt", "--out", tmp_path / "run", "--torch_compile", "default"]
    environment = {
        **os.environ, "CXX": str(tmp_path / "nothing"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "PYTHONPATH": str(Path(lora_rite.__file__).parents[1]),
    }  # fmt: skip
    command = [sys.executable, "-m", "lora_rite", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    error = [line for line in done.stderr.splitlines() if line.startswith("lora-rite train: error: ")]
    assert len(error) == 1
    assert error[0].startswith("lora-rite train: error: --torch_compile default: torch.compile does not work here: ")
    assert "compiler" in error[0]
    assert not (tmp_path / "run").exists()


def test_modes_are_two(train, capsys):
    assert train("--torch_compile", "fast") == 2
    assert "torch_compile must be one of default, reduce-overhead" in capsys.readouterr().err
