"""Crashes, signals, failing disks and changed runs. Ids (F1, …) are those of the project's list of tortures."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

if not hasattr(signal, "SIGHUP"):
    pytest.skip("signals as POSIX has them", allow_module_level=True)
pytest.importorskip("peft")
pytest.importorskip("jsonargparse")

from transformers import Trainer

from lora_rite.cli import main
from lora_rite.errors import CheckpointError, InterruptedRunError
from lora_rite.finetune import train as train_module
from lora_rite.finetune.callbacks import CLOCK
from lora_rite.run import checkpoints as checkpoint
from lora_rite.run import failpoints
from lora_rite.run.files import write_json
from lora_rite.run.run import Run
from lora_rite.run.settings import read_settings

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "default::UserWarning")
TOOL = Path(__file__).parents[1] / "tools" / "crash_test.py"
#: 12 windows, 2 batches of 2 in a step: 3 steps an epoch, 2 epochs.
OPTIONS = {
    "steps": 6, "batch_size": 2, "accumulation": 2, "max_length": 16, "rank": 2, "lr": 0.01, "dropout": 0.1,
    "warmup": 0.4, "save_every": 2, "target_modules": "[q_proj, v_proj]",
}  # fmt: skip
WORDS = [str(word) for key, value in OPTIONS.items() for word in (f"--{key}", value)] + ["--no_progress"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [json.dumps({"prompt": "int ", "completion": f"f{i}(int a);"}) for i in range(13)]
    path.write_text("\n".join(lines))
    return path


def run(data, out, *words):
    return main(["train", "--data", str(data), "--out", str(out), *WORDS, *map(str, words)])


def ends_as(out, golden):
    """Adapter, optimizer and losses, bitwise."""
    for name in ("adapter/adapter_model.safetensors", "checkpoints/checkpoint-6/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (golden / name).read_bytes()
    states = [checkpoint.read_manifest(folder / "checkpoints" / "checkpoint-6")["state"] for folder in (out, golden)]
    assert states[0] == states[1]
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, golden)]
    for key in ("losses", "held_out_losses", "held_out", "inputs"):
        assert results[0][key] == results[1][key]
    return True


@pytest.fixture(scope="module")
def golden(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("golden") / "run"
    assert run(data, out) == 0
    assert [p.name for p in checkpoint.checkpoints(out / "checkpoints")] == ["checkpoint-6", "checkpoint-4"]
    return out


@pytest.fixture
def killed(golden, tmp_path):
    """The golden run as a kill after its last checkpoint would have left it."""
    out = tmp_path / "killed"
    shutil.copytree(golden, out)
    shutil.rmtree(out / "adapter")
    (out / "result.json").unlink()
    return out


@pytest.fixture(autouse=True)
def _signals():
    """As in a foreground process: a shell has its background jobs ignore SIGINT."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    defaults = (signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL)
    before = [signal.signal(number, handler) for number, handler in zip(numbers, defaults, strict=True)]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def at_step(monkeypatch, step, act):
    """Calls ``act`` within each step from ``step`` on, before its gradient is there."""
    original = Trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step + 1 >= step:
            act(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)


def crash_test(*words):
    done = subprocess.run([sys.executable, TOOL, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    return json.loads(done.stdout)


# ------------------------------------------------------------------------------------------------------------- kills


def test_killed_runs_resume_bitwise():
    """F1, F6, F7: killed at every second failpoint of saving, rotating and exporting, and at a few random moments;
    always a checkpoint that verifies, and the end of the uninterrupted run bit for bit. The long form is below."""
    figures = crash_test("--kills", "4", "--failpoints", "2", "--seed", "1")
    assert figures["kills"] == 4
    assert figures["failpoints"] == 8


@pytest.mark.slow
def test_two_hundred_random_kills_and_every_failing_write():
    """F1, F7, E12."""
    figures = crash_test("--kills", "200", "--failpoints", "--disk")
    assert figures["kills"] == 200
    assert figures["of these within a save"] >= 50
    assert figures["faults"] == 11


@pytest.mark.parametrize("step", [1, 3, 4, 6], ids=["warm-up", "epoch border", "in an epoch", "last step"])
def test_resume_anywhere(step, data, golden, tmp_path, monkeypatch):
    """F5, E18: stopped by SIGTERM in the first of two batches of a step; the step is finished and saved."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_once(patch, step, signal.SIGTERM)
        assert run(data, out) == 143
    assert not (out / "result.json").exists()
    saved, _ = checkpoint.newest_verified(out / "checkpoints", read_settings(out)["id"])
    assert checkpoint.step_of(saved) == step
    assert run(data, out, "--resume") == 0
    assert ends_as(out, golden)


def send_once(monkeypatch, step, number):
    """Sends this process a signal within the step: in its first batch alone, for the second signal stops at once."""
    sent = []
    at_step(monkeypatch, step, lambda trainer: sent or (sent.append(1), os.kill(os.getpid(), number)))


def test_a_finished_run_is_left_alone(data, golden):
    """F5."""
    before = {p: p.stat().st_mtime_ns for p in golden.rglob("*")}
    assert run(data, golden, "--resume") == 0
    assert {p: p.stat().st_mtime_ns for p in golden.rglob("*")} == before


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"settings": {'])
def test_a_damaged_result_is_named(text, data, golden, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(golden, out)
    (out / "result.json").write_text(text)
    assert run(data, out, "--resume") == 2
    assert f"{out / 'result.json'} is damaged" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- damaged checkpoints


def edit_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def to_link(path):
    path.rename(path.parents[1] / "elsewhere")
    path.symlink_to(path.parents[1] / "elsewhere")


DAMAGE = {
    "truncated": (lambda f: os.truncate(f / "optimizer.pt", 1000), "optimizer.pt has 1000 bytes instead of"),
    "bit": (lambda f: flip(f / "adapter_model.safetensors"), "adapter_model.safetensors has other bytes"),
    "file missing": (lambda f: (f / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "extra file": (lambda f: (f / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin is not in the manifest"),
    "link": (lambda f: to_link(f / "optimizer.pt"), "optimizer.pt is a link"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest: half-written"),
    "empty": (lambda f: (shutil.rmtree(f), f.mkdir()), "no manifest: half-written"),
    "manifest cut": (lambda f: os.truncate(f / "manifest.json", 50), "the manifest is damaged"),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[]"), "the manifest is damaged"),
    "newer schema": (lambda f: edit_manifest(f, lambda m: m.update(schema=2)), "has schema 2, this version reads 1"),
    "another run": (lambda f: edit_manifest(f, lambda m: m.update(run="x")), "it is of another run"),
    "another step": (lambda f: edit_manifest(f, lambda m: m.update(step=2)), "its manifest is of step 2"),
    "outside": (lambda f: edit_manifest(f, lambda m: m["files"].update({"../x": {"size": 1, "sha256": ""}})),
                "names a file outside the checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(kind, killed):
    """F2; E3 for paths in the manifest."""
    folder, run_id = killed / "checkpoints", read_settings(killed)["id"]
    assert checkpoint.newest_verified(folder, run_id) == (folder / "checkpoint-6", {})
    DAMAGE[kind][0](folder / "checkpoint-6")
    chosen, problems = checkpoint.newest_verified(folder, run_id)
    assert chosen == folder / "checkpoint-4"
    assert DAMAGE[kind][1] in problems[folder / "checkpoint-6"]


def test_resume_from_the_one_before_cleans_up(data, golden, killed, capsys):
    """F2, E13: left-overs are removed, the damaged one is put aside and written anew; steps decide, not clocks."""
    folder = killed / "checkpoints"
    flip(folder / "checkpoint-6" / "optimizer.pt")
    os.utime(folder / "checkpoint-6", (0, 0))
    shutil.copytree(folder / "checkpoint-4", folder / ".deleted-checkpoint-2")
    (folder / "checkpoint-7").mkdir()
    (killed / ".result.json.tmp").write_text("{")
    (killed / ".adapter.tmp").mkdir()
    assert run(data, killed, "--resume") == 0
    assert ends_as(killed, golden)
    assert "optimizer.pt has other bytes than were written; it is damaged-checkpoint-6 now" in capsys.readouterr().err
    names = {p.name for p in folder.iterdir()}
    assert names == {"checkpoint-4", "checkpoint-6", "damaged-checkpoint-6"}
    assert not list(killed.glob(".*.tmp"))


def test_times_are_those_of_all_steps(data, golden, killed):
    """Of the sessions before a kill too, also where that came after the last checkpoint and no step is left."""
    folder = killed / "checkpoints"
    times = lambda step: json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    before = times(4)["stateful_callbacks"][CLOCK]
    seconds = lambda out: json.loads((out / "result.json").read_text())["seconds"]
    assert run(data, killed, "--resume") == 0
    assert seconds(killed) == seconds(golden)
    assert 0 < before["training"] < seconds(killed)["training"]
    (killed / "result.json").unlink()
    shutil.rmtree(folder / "checkpoint-6")
    assert run(data, killed, "--resume") == 0
    after = times(6)["stateful_callbacks"][CLOCK]
    assert after["steps"][:4] == before["steps"]
    assert len(after["steps"]) == len(after["optimizer"]) == 6
    assert before["training"] < after["training"] == seconds(killed)["training"]


def test_no_checkpoint_that_can_be_trusted(data, killed, capsys):
    """F3: exit code 6, the list, and nothing is touched; never from the beginning again in silence."""
    for name in ("checkpoint-6", "checkpoint-4"):
        flip(killed / "checkpoints" / name / "rng_state.pth")
    before = sorted(killed.rglob("*"))
    assert run(data, killed, "--resume") == 6
    error = capsys.readouterr().err
    assert "checkpoint-6: rng_state.pth has other bytes" in error
    assert "checkpoint-4: rng_state.pth has other bytes" in error
    for folder in (killed / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-6: no manifest.*checkpoint-4: no manifest"):
        checkpoint.newest_verified(killed / "checkpoints", "")
    assert (
        not set(before)
        - set(killed.rglob("*"))
        - set(killed.rglob("manifest.json"))
        - {killed / "checkpoints" / name / "manifest.json" for name in ("checkpoint-6", "checkpoint-4")}
    )


def test_rotation_counts_only_checkpoints_that_verify(killed):
    """F7: with a damaged one among three, all stay."""
    folder, run_id = killed / "checkpoints", read_settings(killed)["id"]
    for step in (8, 10):
        shutil.copytree(folder / "checkpoint-6", folder / f"checkpoint-{step}")
        edit_manifest(folder / f"checkpoint-{step}", lambda m, step=step: m.update(step=step))
    flip(folder / "checkpoint-8" / "optimizer.pt")
    checkpoint.rotate(folder, run_id)
    assert [checkpoint.step_of(p) for p in checkpoint.checkpoints(folder)] == [10, 8, 6]


def test_what_was_saved_is_what_is_loaded(data, killed, monkeypatch, capsys):
    """A library that silently loads nothing must not go unnoticed."""
    shutil.rmtree(killed / "checkpoints" / "checkpoint-6")
    monkeypatch.setattr("peft.PeftModel.load_adapter", lambda *args, **kwargs: None)
    assert run(data, killed, "--resume") == 6
    assert "does not give back the adapter and the optimizer that were saved" in capsys.readouterr().err


def test_everything_reaches_the_disk_before_its_name(data, tmp_path, monkeypatch):
    """F9, the power-loss model: writes that were not synced may be lost. Each rename comes after the fsync of what it
    renames and before that of its folder, and a manifest after the fsync of all files that it names."""
    events, fsync, replace = [], os.fsync, os.replace
    name_of = lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}")
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("sync", name_of(fd))), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("rename", str(a), str(b))), replace(a, b))[1])
    out = tmp_path.resolve() / "run"
    assert run(data, out) == 0
    renames = [
        (i, *event[1:]) for i, event in enumerate(events) if event[0] == "rename" and ".deleted-" not in event[2]
    ]
    assert len(renames) == 1 + 3 + 1 + 1  # settings, three manifests, adapter, result
    for i, source, target in renames:
        assert ("sync", source) in events[:i]
        assert ("sync", str(Path(target).parent)) in events[i:]
        if target.endswith("manifest.json"):
            files = json.loads(Path(target).read_text())["files"] if Path(target).exists() else ["optimizer.pt"]
            assert all(("sync", str(Path(target).parent / name)) in events[:i] for name in files)
        if target.endswith("adapter"):
            assert ("sync", source + "/adapter_model.safetensors") in events[:i]


# ---------------------------------------------------------------------------------------------------- changed runs


def test_a_changed_run_is_refused_with_a_diff(data, killed, tmp_path, capsys, monkeypatch):
    """F4: settings, data, base weights, threads, versions; --allow_changed goes on, says so and records it."""
    refused = lambda *words: (run(data, killed, "--resume", *words), capsys.readouterr().err)
    code, error = refused("--lr", 0.02, "--seed", 1)
    assert code == 2
    assert "lr: 0.01 → 0.02; seed: 0 → 1" in error
    text = data.read_text()
    try:
        data.write_text(text.replace("f12(int a)", "f12(int b)"))
        code, error = refused()
        assert code == 2
        assert "tokens: " in error
        assert "base_weights" not in error
    finally:
        data.write_text(text)
    load = train_module.load_model

    def other_weights(*args, **kwargs):
        network, tokenizer = load(*args, **kwargs)
        network.get_input_embeddings().weight.data[3, 3] += 1e-3
        return network, tokenizer

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "load_model", other_weights)
        code, error = refused()
        assert code == 2
        assert "base_weights: " in error
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        code, error = refused()
        assert code == 2
        assert "threads: 1 → 7" in error
    stored = read_settings(killed)
    stored["environment"]["torch"] = "2.10.0"
    write_json(killed / "settings.json", stored)
    code, error = refused()
    assert code == 2
    assert "torch: '2.10.0' → " in error
    code, error = refused("--allow_changed", "torhc")
    assert code == 2
    assert "--allow_changed torhc: no such" in error
    code, error = refused("--allow_changed", "torch", "lr", "--lr", 0.02)
    assert code == 0
    assert "changed since the run was interrupted: lr, torch; it is no longer bitwise" in error
    (change,) = json.loads((killed / "result.json").read_text())["changes"]
    assert change == {"after_step": 6, "changed": {"lr": [0.01, 0.02], "torch": ["2.10.0", torch.__version__]}}


def test_a_moved_run_goes_on(data, golden, killed, tmp_path):
    """Only its folder is another, and where the data are; what they say is compared. A finished one is of the file that
    it names."""
    shutil.rmtree(killed / "checkpoints" / "checkpoint-6")
    moved = killed.rename(tmp_path / "moved")
    moved_data = shutil.copy(data, tmp_path / "moved.jsonl")
    assert run(moved_data, moved, "--resume") == 0
    assert ends_as(moved, golden)
    assert run(data, moved, "--resume") == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"id": 3}', "\0", "[" * 100_000])
def test_damaged_settings_are_an_error(text, data, killed, capsys):
    (killed / "settings.json").write_text(text)
    assert run(data, killed, "--resume") == 2
    assert "settings.json is damaged" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- signals, lock, NaN


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signals_save_even_without_save_every(number, code, data, tmp_path, monkeypatch, capfd):
    """E18."""
    out = tmp_path / "run"
    send_once(monkeypatch, 2, number)
    assert run(data, out, "--save_every", 0) == code
    error = capfd.readouterr().err
    assert f"{number.name}: finishing the step and saving it; once more stops at once" in error
    assert f"stopped by {number.name} after step 2, which is saved; go on with --resume" in error
    assert checkpoint.damage(out / "checkpoints" / "checkpoint-2", read_settings(out)["id"]) is None


def test_an_interruption_comes_through_from_a_worker():
    """It is pickled there; what could not be would break the pool."""
    error = InterruptedRunError("stopped", signal.SIGTERM)
    copied = pickle.loads(pickle.dumps(error))
    assert (type(copied), str(copied), copied.exit_code) == (InterruptedRunError, "stopped", 143)


def test_the_second_signal_stops_at_once(data, tmp_path, monkeypatch, capsys):
    """E18: in the step, and in the middle of a save; what was saved before verifies."""
    out = tmp_path / "run"
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    save = Trainer._save_checkpoint

    def save_and_interrupt(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            while signal.getsignal(signal.SIGINT) is not handlers[0]:
                time.sleep(0.001)  # the first has not arrived yet
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    monkeypatch.setattr(Trainer, "_save_checkpoint", save_and_interrupt)
    assert run(data, out) == 130
    assert capsys.readouterr().err.endswith("lora-rite: interrupted\n")
    saved, problems = checkpoint.newest_verified(out / "checkpoints", read_settings(out)["id"])
    assert saved == out / "checkpoints" / "checkpoint-2"
    assert list(problems.values()) == ["no manifest: half-written"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


def test_an_ignored_signal_stays_ignored(data, tmp_path, monkeypatch):
    """nohup: SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 2, lambda trainer: os.kill(os.getpid(), signal.SIGHUP))
        assert run(data, tmp_path / "run") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_two_processes_on_one_folder(data, killed, capsys):
    """E13: the second ends with code 5 and the id of the first; a lock whose process is dead is none."""
    script = """
import filelock, os, sys
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print(os.getpid(), flush=True)
input()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", script, killed / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pid = holder.stdout.readline().strip()
    (killed / ".lock").write_text(pid)
    assert run(data, killed, "--resume") == 5
    assert f"is in use by another process (id {pid})" in capsys.readouterr().err
    holder.kill()
    holder.communicate()
    assert run(data, killed, "--resume") == 0


def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path, monkeypatch, capsys):
    """E11: exit code 3, no adapter, the last good checkpoint stays, and another learning rate goes on from it."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, 4, 10)
        assert run(data, out, "--optimizer", "adamw") == 3
    error = capsys.readouterr().err
    assert (
        "the loss is nan at step 4: lower --lr. No adapter was written; the last good checkpoint is that of step 2"
        in error
    )
    assert not (out / "adapter").exists()
    assert not (out / "result.json").exists()
    failed = json.loads((out / "failed.json").read_text())
    assert (failed["status"], failed["step"], failed["last_checkpoint"]) == ("failed", 4, 2)
    words = ("--optimizer", "adamw", "--resume", "--lr", 0.001, "--allow_changed", "[lr]")
    assert run(data, out, *words) == 0
    assert not (out / "failed.json").exists()
    assert (out / "adapter").exists()


def test_an_adapter_that_is_not_finite_is_not_saved(data, tmp_path, monkeypatch, capsys):
    """E11: also where no loss was logged in between."""
    from transformers import TrainerCallback

    monkeypatch.setattr(Run, "_checks", lambda self, trainer: TrainerCallback())
    poison(monkeypatch, 3, 3)
    assert run(data, tmp_path / "run", "--optimizer", "adamw") == 3
    assert "contains NaN or Inf at step 4: lower --lr. No adapter was written; the last" in capsys.readouterr().err
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run" / "checkpoints")] == ["checkpoint-2"]


def poison(monkeypatch, first, last):
    """The loss is NaN in the steps from ``first`` to ``last``."""
    original = Trainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if first <= self.state.global_step + 1 <= last else loss

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)


def test_lora_rite_skips_two_bad_steps_and_stops_at_the_third(data, tmp_path, monkeypatch, capsys):
    """E11: as its documentation says; state and parameters are those of the last good step."""
    with monkeypatch.context() as patch:
        poison(patch, 3, 4)
        assert run(data, tmp_path / "two") == 0
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["optimizer"]["report"]["skipped"] == 2
    poison(monkeypatch, 3, 5)
    assert run(data, tmp_path / "three") == 3
    assert "3 steps in a row" in capsys.readouterr().err
    assert not (tmp_path / "three" / "adapter").exists()
    saved, _ = checkpoint.newest_verified(tmp_path / "three" / "checkpoints", read_settings(tmp_path / "three")["id"])
    assert checkpoint.step_of(saved) == 4


def test_a_lost_cuda_context_names_the_last_checkpoint(data, tmp_path, monkeypatch, capsys):
    """B13: not retried."""
    calls = []

    def lose(trainer):
        calls.append(trainer.state.global_step)
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")

    at_step(monkeypatch, 4, lose)
    assert run(data, tmp_path / "run") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the GPU's context is lost (CUDA error: an illegal memory access was encountered)" in error
    assert "the last good checkpoint is that of step 2" in error
    assert calls == [3]


# -------------------------------------------------------------------------------------------------------------- disks


@pytest.mark.parametrize(
    ("point", "what"),
    [
        ("checkpoint begins@2=EROFS", "cannot write the checkpoint of step 4"),
        ("manifest.json written@2=ENOSPC", "cannot write the checkpoint of step 4"),
        ("result.json written=ENOSPC", "cannot write the result"),
    ],
)
def test_a_failing_write_leaves_what_was_saved(point, what, data, golden, tmp_path, capsys, monkeypatch):
    """E12: exit code 4, nothing half-written stays, the checkpoints before verify, and the run goes on from them. (The
    long form, with every write and with limits of the system, is in tools/crash_test.py.)"""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setenv("LORA_RITE_FAILPOINT", point)
        patch.setattr(failpoints, "_passed", Counter())
        assert run(data, out) == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert what in error
    assert os.strerror(getattr(errno, point.partition("=")[2])) in error
    step = 2 if "@2" in point else 6
    assert f"the last good checkpoint is that of step {step}: go on with --resume" in error
    assert not list(out.rglob("*.tmp"))
    assert checkpoint.step_of(checkpoint.checkpoints(out / "checkpoints")[0]) == step
    assert run(data, out, "--resume") == 0
    assert ends_as(out, golden)


def test_no_space_is_said_before_training(data, tmp_path, monkeypatch, capsys):
    """E12."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10_000})())
    assert run(data, tmp_path / "run") == 4
    assert "has 0 MB free, and 3 checkpoints need about" in capsys.readouterr().err
    assert not (tmp_path / "run" / "settings.json").exists()


def test_a_folder_that_cannot_be_made(data, tmp_path, capsys):
    """E12."""
    (tmp_path / "file").write_text("mine")
    assert run(data, tmp_path / "file" / "run") == 4
    assert "cannot write into" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_secrets_are_in_no_file_and_in_no_line(data, tmp_path, monkeypatch, capfd):
    """E15."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hf_verysecretvalue")
    assert run(data, tmp_path / "run") == 0
    written = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert len(written) > 20
    assert not [p for p in written if b"verysecretvalue" in p.read_bytes()]
    words = [*WORDS, "--model", "https://me:verysecretvalue@example.org/model"]
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "other"), *words]) == 2
    assert "verysecretvalue" not in "".join(capfd.readouterr())
