"""``lora-rite train`` in several processes (gloo), as torchrun starts them: one batch, one run, one voice."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import relative

if not hasattr(os, "fork"):
    pytest.skip("forked processes", allow_module_level=True)
pytest.importorskip("peft")
pytest.importorskip("jsonargparse")

from launch import Launch
from safetensors.torch import load_file
from task_files import make_mt5
from test_crash import ends_as, send_once
from torch.utils.data import SequentialSampler

from lora_rite.cli import main
from lora_rite.errors import LoRARiteValueError
from lora_rite.finetune.batches import Completed, Rows, divides_by_items
from lora_rite.finetune.windows import IGNORED
from lora_rite.inputs import resolve
from lora_rite.run import checkpoints as checkpoint
from lora_rite.run import processes

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "default::UserWarning")
#: 26 windows to train on, 8 in a step: the last step of an epoch has 2, so that one process of two has none.
OPTIONS = {
    "steps": 6, "batch_size": 2, "accumulation": 2, "max_length": 64, "rank": 4, "lr": 0.01, "save_every": 2,
    "eval_every": 2, "target_modules": "q_proj,v_proj",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"prompt": "int ", "completion": f"f{i}(int a) {{ return {'a + ' * (i % 5)}{i}; }}"} for i in range(29)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def words(data, out, **options):
    """Of the command line; an option that is True stands without a value, one that is None not at all."""
    given = {"data": data, "out": out, **OPTIONS, **options}
    pairs = [(f"--{key}", *([] if value is True else [value])) for key, value in given.items() if value is not None]
    return ["train", *(str(word) for pair in pairs for word in pair)]


def launch(data, out, size=2, before=None, variables=None, **options):
    return Launch(
        words(data, out, **options), out.with_name(f"{out.name}-log"), size, before, **(variables or {})
    ).wait()


def figures(out):
    return json.loads((out / "result.json").read_text())


def adapter(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


def assert_same_run(out, other, tolerance=1e-4):
    """Losses of the steps, held-out losses, learning rates and the adapter, up to rounding in float32."""
    results = [figures(folder) for folder in (out, other)]
    for key in ("losses", "held_out_losses"):
        assert [e["step"] for e in results[0][key]] == [e["step"] for e in results[1][key]]
        for one, two in zip(*(result[key] for result in results), strict=True):
            assert one == pytest.approx(two, rel=tolerance)
    assert results[0]["held_out"] == pytest.approx(results[1]["held_out"], rel=tolerance)
    a, b = adapter(out), adapter(other)
    assert a.keys() == b.keys()
    for name in a:
        assert relative(a[name], b[name]) < 100 * tolerance, name


@pytest.fixture(scope="module")
def golden(data, tmp_path_factory):
    """A run of two processes, and what they have printed."""
    out = tmp_path_factory.mktemp("golden") / "run"
    return out, launch(data, out)


def test_two_processes_are_one_with_their_batches_joined(golden, data, tmp_path):
    """Batches of 2 in two processes are batches of 4 in one, the incomplete one at the end of an epoch too; the first
    process alone writes and speaks."""
    out, (first, second) = golden
    assert (first.code, second.code) == (0, 0), first.stderr
    assert second.stdout == second.stderr == ""
    assert "in 2 processes on cpu" in first.stderr
    assert "6 steps of 8 windows, 2 processes × 2 × 2" in first.stderr
    assert main(words(data, tmp_path / "one", batch_size=4, no_progress=True)) == 0
    assert_same_run(out, tmp_path / "one")
    result = figures(out)
    assert (result["run"]["processes"], result["run"]["windows_per_step"]) == (2, 8)
    tokens = [figures(folder)["log"][-1]["num_input_tokens_seen"] for folder in (out, tmp_path / "one")]
    assert abs(tokens[0] - tokens[1]) <= 4 * 2 * 2  # two tokens of a window that completes a batch
    saved = sorted(p.name for p in (out / "checkpoints" / "checkpoint-6").glob("rng_state*"))
    assert saved == ["rng_state_0.pth", "rng_state_1.pth"]


def in_training_step(act):
    """Calls ``act(trainer)`` before each batch of this process."""
    from transformers import Trainer

    original = Trainer.training_step

    def training_step(self, *args, **kwargs):
        act(self)
        return original(self, *args, **kwargs)

    Trainer.training_step = training_step


def sigterm_to_the_second_in_step_3(rank):
    def act(trainer):
        if rank == 1 and trainer.state.global_step == 2 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    sent = []
    in_training_step(act)


def said(done):
    """What is ours on stderr, without the header."""
    return re.findall("lora-rite(?: train)?: (?!tiny in).*", done.stderr)


def test_a_signal_to_one_stops_all_and_the_run_goes_on_bitwise(golden, data, tmp_path):
    """SIGTERM reaches the second process alone; both finish the same step and save it, and the resumed run ends as the
    one that was never stopped."""
    out = tmp_path / "run"
    stopped = launch(data, out, before=sigterm_to_the_second_in_step_3)
    assert [done.code for done in stopped] == [143, 143]
    (line,) = said(stopped[0])
    assert "stopped by SIGTERM after step 3, which is saved" in line
    assert stopped[1].stderr == ""
    assert [checkpoint.step_of(p) for p in checkpoint.checkpoints(out / "checkpoints")] == [3, 2]
    resumed = launch(data, out, resume=True)
    assert [done.code for done in resumed] == [0, 0], resumed
    assert ends_as(out, golden[0])


@pytest.mark.parametrize(
    ("fault", "code", "message", "options", "failpoint"),
    [
        pytest.param("there", 2, "is not an empty folder", {}, "", marks=pytest.mark.slow),
        pytest.param("value", 2, "--lr must be a finite number", {"lr": -1}, "", marks=pytest.mark.slow),
        pytest.param("word", 2, "no option --steps_", {"steps_": 1}, "", marks=pytest.mark.slow),
        pytest.param("in use", 5, "is in use by another process", {}, "", marks=pytest.mark.slow),
        ("full", 4, "cannot write the checkpoint of step 2 .*No space left", {}, "manifest.json written=ENOSPC"),
        pytest.param(
            "result", 4, "cannot write the result .*quota", {}, "adapter written=EDQUOT", marks=pytest.mark.slow
        ),
        pytest.param(
            "NaN", 3, "No adapter was written", {"optimizer": "adamw", "lr": 1e30}, "", marks=pytest.mark.slow
        ),
    ],
)
def test_errors_are_told_once_and_end_all(fault, code, message, options, failpoint, golden, data, tmp_path):
    """Also where the first process alone can see what is wrong, as that the disk is full."""
    from filelock import FileLock

    out = golden[0] if fault == "there" else tmp_path / "run"
    lock = FileLock(out / ".lock")
    if fault == "in use":
        out.mkdir()
        lock.acquire()
        (out / ".lock").write_text("1\n")
    log = tmp_path / "log"
    done = Launch(words(data, out, **options), log, LORA_RITE_FAILPOINT=failpoint).wait()
    lock.release()
    assert [process.code for process in done] == [code, code], done
    (line,) = said(done[0])
    assert re.search(message, line)
    assert "error: " in line
    assert done[1].stderr == done[1].stdout == ""


class Random(torch.optim.SGD):
    """Draws noise of its own in each process."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad += torch.randn_like(p)
        return super().step(closure)


@pytest.mark.slow
def test_an_optimizer_that_draws_apart_is_found(data, tmp_path):
    """Each process would save another adapter."""
    done = launch(data, tmp_path / "run", optimizer="test_processes:Random", no_progress=True)
    assert [process.code for process in done] == [1, 1], done
    assert "after step 2 the processes have adapters that differ" in done[0].stderr
    assert done[1].stderr == ""
    left = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    assert not any((folder / "manifest.json").exists() for folder in left)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_a_killed_run_goes_on_bitwise_with_dropout(size, data, tmp_path):
    """Each process has its own numbers; with three, sums depend on their order. The first one is killed as it has
    saved, and with it the others, as torchrun does."""
    options = {"dropout": 0.2, "batch_size": 1, "group_by_length": True, "optimizer": "adamw"}
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert [done.code for done in launch(data, whole, size, **options)] == [0] * size
    killed = Launch(words(data, out, **options), tmp_path / "log", size, LORA_RITE_FAILPOINT="manifest.json renamed@2")
    killed.processes[0].join()
    for process in killed.processes:
        process.kill()
    assert [done.code for done in launch(data, out, size, resume=True, **options)] == [0] * size
    assert ends_as(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"group_by_length": True}, {"packing": True}, {"bf16": True}], ids=str)
def test_other_batches_are_those_of_one_process_too(options, data, tmp_path):
    assert [done.code for done in launch(data, tmp_path / "two", 3, batch_size=1, **options)] == [0] * 3
    assert main(words(data, tmp_path / "one", batch_size=3, no_progress=True, **options)) == 0
    assert_same_run(tmp_path / "two", tmp_path / "one", 1e-2 if "bf16" in options else 1e-3)


@pytest.mark.slow
def test_an_encoder_decoder_whose_loss_is_the_mean_of_its_tokens(data, tmp_path):
    """T5 divides by the tokens of its own process; what a process counts for is its share of them."""
    options = {"model": make_mt5(tmp_path / "mt5"), "target_modules": "q,v"}
    config = tmp_path / "mt5" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dropout_rate": 0.0}))
    assert [done.code for done in launch(data, tmp_path / "two", **options)] == [0, 0]
    assert main(words(data, tmp_path / "one", batch_size=4, no_progress=True, **options)) == 0
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_another_number_of_processes_is_said_and_goes_on(data, golden, tmp_path, capsys):
    """To one process with the batches of both."""
    out = tmp_path / "run"
    assert launch(data, out, before=sigterm_to_the_second_in_step_3)[0].code == 143
    one = words(data, out, batch_size=4, resume=True, no_progress=True)
    assert main(one) == 2
    assert "batch_size: 2 → 4" in capsys.readouterr().err
    assert main([*one, "--allow_changed", "batch_size"]) == 2
    assert "processes: 2 → 1" in capsys.readouterr().err
    assert main([*one, "--allow_changed", "batch_size", "processes"]) == 0
    assert_same_run(out, golden[0])


@pytest.mark.slow
def test_all_stop_early_and_keep_the_lowest_loss(data, tmp_path):
    """The held-out loss is shared out, and the same number in all: where one went on, it would wait for the others."""
    options = {"lr": 0.3, "steps": 40, "early_stopping": 2, "eval_every": 1, "holdout": 0.5}
    done = launch(data, tmp_path / "run", **options)
    assert [process.code for process in done] == [0, 0], done
    result = figures(tmp_path / "run")
    lowest = min(result["held_out_losses"], key=lambda entry: entry["held_out_loss"])
    assert (result["best"]["step"], result["best"]["held_out_loss"]) == (lowest["step"], lowest["held_out_loss"])
    assert result["best"]["last_step"] == lowest["step"] + 2 < 40


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29555"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "bf16",
         "--main_process_port", "29556"],
    ],
    ids=["torchrun", "accelerate"],
)  # fmt: skip
def test_launchers(launcher, data, golden, tmp_path):
    """The user changes nothing else."""
    out = tmp_path / "run"
    run = lambda: subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "lora_rite", *words(data, out, no_progress=True)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter and result.json in") == 1
    assert ("mixed_precision: bf16 of accelerate's config is not used" in done.stderr) == ("accelerate" in launcher[0])
    assert_same_run(out, golden[0], 1e-6)
    done = run()
    assert done.returncode == 1
    assert done.stderr.count("lora-rite train: error: ") == 1


# ------------------------------------------------------------------------------------------------------------- FSDP2


#: As ``accelerate launch --use_fsdp --fsdp_version 2`` sets it.
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_OFFLOAD_PARAMS": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false",
}  # fmt: skip


def on_an_accelerator(rank):
    """Accelerate shards on accelerators alone."""
    from test_fsdp_trainers import as_on_an_accelerator

    as_on_an_accelerator()


def launch_sharded(data, out, **options):
    done = launch(data, out, before=on_an_accelerator, variables=FSDP, **options)
    assert [process.code for process in done] == [0, 0], done
    return done


@pytest.fixture(scope="module")
def sharded(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded") / "run"
    return out, launch_sharded(data, out)


@pytest.mark.slow
def test_a_sharded_run_is_that_of_ddp(sharded, golden):
    """Its adapter is whole, and PEFT loads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lora_rite.finetune.models import TINY

    out, done = sharded
    assert "in 2 processes by FSDP2 on cpu" in done[0].stderr
    assert_same_run(out, golden[0])
    assert figures(out)["run"]["sharded"]
    assert figures(out)["optimizer"]["report"]["pairs_preconditioned"] == 10
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY), out / "adapter").state_dict()
    for name, value in adapter(out).items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], value)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["manifest.json renamed@2", "adapter written"], ids=["in training", "after it"])
def test_a_killed_sharded_run_goes_on_bitwise(moment, sharded, data, tmp_path):
    """Also where its last checkpoint was saved, and the adapter was not yet there."""
    out = tmp_path / "run"
    variables = {**FSDP, "LORA_RITE_FAILPOINT": moment}
    killed = Launch(words(data, out), tmp_path / "log", before=on_an_accelerator, **variables)
    killed.processes[0].join()
    for process in killed.processes:
        process.kill()
    launch_sharded(data, out, resume=True)
    assert ends_as(out, sharded[0])


@pytest.mark.slow
def test_a_sharded_run_goes_on_in_one_process(sharded, golden, data, tmp_path):
    """Its checkpoints are those of DDP."""
    import shutil

    out = tmp_path / "run"
    shutil.copytree(sharded[0], out)
    shutil.rmtree(out / "checkpoints" / "checkpoint-6")
    (out / "result.json").unlink()
    allowed = ["--allow_changed", "batch_size", "processes", "sharded"]
    assert main([*words(data, out, batch_size=4, resume=True, no_progress=True), *allowed]) == 0
    assert_same_run(out, golden[0])


@pytest.mark.slow
def test_a_sharded_run_of_other_kinds(data, tmp_path):
    """DoRA's magnitudes and whole modules by AdamW, in bfloat16, with the adapter of the lowest held-out loss."""
    options = {
        "dora": True,
        "modules_to_save": "post_attention_layernorm",
        "bf16": True,
        "keep_best": True,
        "gradient_checkpointing": True,
        "holdout": 0.2,  # three batches
    }
    launch_sharded(data, tmp_path / "sharded", **options)
    assert [done.code for done in launch(data, tmp_path / "ddp", **options)] == [0, 0]
    assert_same_run(tmp_path / "sharded", tmp_path / "ddp", 2e-2)
    assert adapter(tmp_path / "sharded").keys() == adapter(tmp_path / "ddp").keys()


@pytest.mark.parametrize(
    ("variables", "options", "message"),
    [
        ({"FSDP_VERSION": "1"}, {}, "asks for FSDP1, which flattens factors: fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "asks for fsdp_offload_params: "),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "by --gradient_checkpointing"),
        ({}, {"load_in_4bit": True}, "--load_in_4bit: FSDP2 does not share out quantised weights"),
        ({}, {"torch_compile": "default"}, "--torch_compile: FSDP2's parameters would get other names"),
        ({}, {"modules_to_save": "lm_head"}, "--modules_to_save: FSDP2 takes no copy of base_model.model."),
        ({}, {}, "accelerate shards a model by FSDP2 on GPUs alone: launch without FSDP"),
    ],
)
def test_what_of_fsdp_is_refused(variables, options, message, data, tmp_path, monkeypatch, capsys):
    from accelerate.state import AcceleratorState

    for key, value in {**FSDP, **variables}.items():
        monkeypatch.setenv(key, value)
    try:
        assert main(words(data, tmp_path / "run", **options)) == 2
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("*.json"))


# --------------------------------------------------------------------------------------------- without a second process


@pytest.mark.parametrize(("rows", "multiple"), [(8, 4), (9, 4), (1, 6)])
def test_an_epoch_is_completed_by_a_row_without_loss(rows, multiple):
    """All other rows come once, in the order of the sampler."""
    data = Rows(
        [{"input_ids": [i] * (3 + i), "labels": [i] * (3 + i), "attention_mask": [1] * (3 + i)} for i in range(rows)]
    )
    order = list(Completed(SequentialSampler(data), multiple, seed=0))
    assert order[:rows] == list(range(rows))
    assert len(order) % multiple == 0
    assert len(order) < rows + multiple
    for index in order[rows:]:
        assert data[index] == {"input_ids": [0, 0], "labels": [IGNORED] * 2, "attention_mask": [1, 1]}


def test_batches_by_length_of_a_resumed_run_are_those_of_the_whole_one(data, tmp_path, monkeypatch):
    """In the second epoch, after dropout has drawn from torch's generator."""
    options = {"group_by_length": True, "dropout": 0.1, "no_progress": True, "batch_size": 4, "eval_every": 0}
    assert main(words(data, tmp_path / "whole", **options)) == 0
    with monkeypatch.context() as patch:
        send_once(patch, 5, signal.SIGTERM)
        assert main(words(data, tmp_path / "run", **options)) == 143
    assert main(words(data, tmp_path / "run", resume=True, **options)) == 0
    assert ends_as(tmp_path / "run", tmp_path / "whole")


def test_whether_a_model_divides_by_the_items_of_a_batch(tmp_path):
    """T5 takes the number and gives the mean over its own tokens."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from lora_rite.finetune.models import TINY

    mt5 = make_mt5(tmp_path / "mt5")
    row = {"input_ids": [1, 2, 3, 4], "labels": [IGNORED, 2, 3, 4], "attention_mask": [1] * 4}
    for kind, place, expected in ((AutoModelForCausalLM, TINY, True), (AutoModelForSeq2SeqLM, mt5, False)):
        assert divides_by_items(kind.from_pretrained(place), row) is expected


@pytest.mark.parametrize("words", [["eval", "--tasks", "arc_easy"], ["pairs"], ["generate", "tiny", "--prompt", "a"]])
def test_what_is_one_process_says_so(words, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words) == 2
    assert f"lora-rite {words[0]} is one process, and there are 2 (WORLD_SIZE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("lora_rite.finetune.evaluate:evaluate", {"tasks": "{data}", "out": "{out}"}),
        ("lora_rite.finetune.generate:Writer", {"source": "tiny", "model": None, "options": {}}),
        ("lora_rite.finetune.merge:merge", {"adapter": "{data}", "out": "{out}"}),
        ("lora_rite.study.compare:compare", {"recipe": "{recipe}", "out": "{out}"}),
        ("lora_rite.study.report:report", {"folder": "{out}"}),
        ("lora_rite.study.demo:demo", {"out": "{out}"}),
        ("lora_rite.theory:theory", {"experiment": "regret", "out": "{out}"}),
        ("lora_rite.finetune.choices:train_choices", {"out": "{out}", "data": "{data}", "validation": "{data}",
                                                      "model": "tiny", "optimizer": "adamw", "lr": 1e-3}),
    ],
)  # fmt: skip
def test_the_functions_of_what_is_one_process_say_so_too(path, arguments, data, tmp_path, monkeypatch):
    """Before anything is written, as a script under torchrun calls them."""
    recipe = Path(__file__).parents[1] / "recipes" / "small" / "demo.yaml"
    places = {"{data}": data, "{recipe}": recipe, "{out}": tmp_path / "out"}
    known = lambda value: places.get(value, value) if isinstance(value, str) else value
    function, called = resolve(path), {key: known(value) for key, value in arguments.items()}
    for key, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(LoRARiteValueError, match=r"is one process, and there are 2 \(WORLD_SIZE"):
        function(**called)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "accelerate's config asks for DeepSpeed: lora-rite train runs by DDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "asks for Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "asks for a parallelism config"),
        ("ACCELERATE_DYNAMO_BACKEND", "asks for dynamo (inductor): lora-rite train compiles by --torch_compile"),
    ],
)
def test_what_else_accelerate_launches_is_refused(variable, message, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(variable, "INDUCTOR" if "DYNAMO" in variable else "true")
    assert main(words(data, tmp_path / "run")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_error_that_cannot_be_sent_comes_as_its_text():
    class Odd(OSError):
        def __init__(self, a, b):
            super().__init__(a)
            self.exit_code = 7

    sent = processes._portable(Odd("no such thing", 2))
    assert (str(sent), sent.exit_code) == ("no such thing", 7)
