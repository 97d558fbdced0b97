"""Every example, on the embedded model: all pairs are preconditioned, and a resumed run ends bitwise where the
uninterrupted one does."""

import math
import re
import shutil
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from lora_rite import LoRARite

EXAMPLES = Path(__file__).parents[1] / "examples"
#: Example → the checkpoint that it writes after step 3, and a package that it needs.
CHECKPOINTS = {
    "plain": ("checkpoint-3.pt", "peft"),
    "accelerate_loop": ("checkpoint-3", "accelerate"),
    "trainer": ("checkpoint-3", "transformers"),
    "trl_sft": ("checkpoint-3", "trl"),
    "trl_dpo": ("checkpoint-3", "trl"),
    "trl_grpo": ("checkpoint-3", "trl"),
    "lightning_module": ("step=3.ckpt", "lightning"),
    "diffusers_style": ("checkpoint-3.pt", "peft"),
}
PAIRS = 35  # 5 layers of 7 linear maps


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch, tmp_path):
    """As ``python examples/….py``: beside common.py, in a folder of its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("common", *CHECKPOINTS):
        sys.modules.pop(name, None)


def run(name, **options):
    """The example's optimizer, and the messages of warnings that lora_rite gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = import_module(name).main(steps=6, save_every=3, **options)
    return optimizer, [str(w.message) for w in caught if "lora_rite" in w.filename or "LoRARite" in str(w.message)]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_example_runs_and_resumes_bitwise(name, tmp_path):
    checkpoint, package = CHECKPOINTS[name]
    pytest.importorskip(package)
    whole, warned = run(name, out=tmp_path / "whole")
    assert not warned
    assert isinstance(whole, LoRARite)
    report = whole.report()
    assert (report["pairs"], report["pairs_preconditioned"], report["steps"]) == (PAIRS, PAIRS, 6)
    (tmp_path / "parts").mkdir()
    source = tmp_path / "whole" / checkpoint
    copy = shutil.copytree if source.is_dir() else shutil.copy
    copy(source, tmp_path / "parts" / checkpoint)
    torch.manual_seed(123)  # what was drawn before must not matter
    resumed, _ = run(name, out=tmp_path / "parts", resume=tmp_path / "parts" / checkpoint)
    assert resumed.report()["steps"] == 6
    adapters = [next((tmp_path / part).rglob("adapter_model.safetensors")).read_bytes() for part in ("whole", "parts")]
    assert adapters[0] == adapters[1]
    states = [optimizer.state_dict()["state"] for optimizer in (whole, resumed)]
    for ours, theirs in zip(states[0].values(), states[1].values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_accelerate_loop_reads_several_epochs_and_resumes_bitwise(tmp_path, monkeypatch):
    """Of 4 batches; the step after the checkpoint is the last one of an epoch."""
    pytest.importorskip("accelerate")
    module = import_module("accelerate_loop")
    windows = module.windows
    monkeypatch.setattr(module, "windows", lambda tokenizer: windows(tokenizer)[:16])
    for out, resume in (("whole", None), ("parts", tmp_path / "whole" / "checkpoint-3")):
        optimizer, _ = run("accelerate_loop", out=tmp_path / out, resume=resume)
        assert optimizer.report()["steps"] == 6
    adapters = [(tmp_path / out / "adapter/adapter_model.safetensors").read_bytes() for out in ("whole", "parts")]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize("name", [*CHECKPOINTS, "common"])
def test_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 60


def test_every_example_is_tested():
    elsewhere = {"common", "fsdp2", "jax_finetune"}  # the latter two below and in test_optax.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} - elsewhere == set(CHECKPOINTS)


@pytest.mark.parametrize("name", ["plain", pytest.param("diffusers_style", marks=pytest.mark.slow)])
def test_an_example_runs_without_arguments_and_says_what_happened(name, tmp_path):
    """As a script, into a folder of its name."""
    done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step 20 loss " in done.stdout
    (folder,) = re.findall(r"20 steps of 35 pairs; the adapter is in (\S+)\. ", done.stdout)
    assert list((tmp_path / folder).glob("adapter_model.safetensors"))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_example_has_a_folder_to_write_into(name):
    assert re.search(r'set_defaults=\{"out": "runs/\w+"\}\)\n$', (EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))


def test_what_needs_several_processes_says_so(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match=r"torchrun --nproc-per-node 2 examples/fsdp2\.py"):
        import_module("fsdp2").main(out=Path("out"))
    sys.modules.pop("fsdp2")


def torchrun(name, *words):
    """What the example prints on two processes (gloo)."""
    command = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", str(EXAMPLES / f"{name}.py")]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'pairs_preconditioned': 35" in done.stdout
    return done.stdout


@pytest.mark.slow
def test_fsdp2_trains_on_two_processes_and_resumes(tmp_path):
    """The losses of a resumed run are those of the whole one (but for dropout's random numbers)."""
    losses = []
    for words in ([], ["--resume", str(tmp_path / "checkpoint-2")]):
        printed = torchrun("fsdp2", "--out", str(tmp_path), "--steps", "4", "--save_every", "2", *words)
        losses.append([float(x) for x in re.findall(r"step [34] loss (\S+)", printed)])
    assert losses[0] == pytest.approx(losses[1], abs=0.05)


@pytest.mark.slow
def test_accelerate_loop_has_the_same_schedule_on_two_processes(tmp_path):
    pytest.importorskip("accelerate")
    printed = torchrun("accelerate_loop", "--out", str(tmp_path), "--steps", "4")
    rates = [float(x) for x in re.findall(r"next lr (\S+)", printed)]
    assert rates == pytest.approx([2e-2 * (1 + math.cos(math.pi * t / 4)) / 2 for t in (1, 2, 3, 4)], abs=1e-4)
