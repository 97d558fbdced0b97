"""The command line, on the embedded model, in this process and offline."""

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("jsonargparse")

import torch  # noqa: E402

from lora_rite.cli import main  # noqa: E402
from lora_rite.finetune import prepare as prepare_module  # noqa: E402
from lora_rite.study import demo as demo_module  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
OPTIONS = {"--steps": 3, "--batch_size": 2, "--max_length": 32, "--rank": 4, "--lr": 0.01}
SMALL = [str(word) for option in OPTIONS.items() for word in option] + ["--no_progress"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": f"int add_{i}(int a, int b) {{ return a + b + {i}; }}\n" * 3}) for i in range(20)]
    path.write_text("\n".join(lines))
    return path


def run(*words):
    return main([str(word) for word in words])


@pytest.mark.parametrize("optimizer", ["lora-rite", "adamw"])
def test_train_writes_an_adapter_and_the_figures(optimizer, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", "--data", data, "--out", out, "--optimizer", optimizer, "--eval_every", 1, *SMALL) == 0
    printed = capsys.readouterr().out
    assert "held-out loss" in printed
    assert "perplexity" in printed
    result = json.loads((out / "result.json").read_text())
    assert result["settings"]["optimizer"] == optimizer
    assert [entry["step"] for entry in result["losses"]] == [1, 2, 3]
    assert [entry["step"] for entry in result["held_out_losses"]] == [1, 2, 3]
    assert result["held_out"]["after"] < result["held_out"]["before"]
    assert result["held_out_losses"][-1]["held_out_loss"] == result["held_out"]["after"]
    assert result["versions"]["torch"] == torch.__version__
    assert result["versions"]["processor"]
    assert 0 < result["seconds"]["optimizer_share"] < 1
    assert result["optimizer"]["name"] == {"lora-rite": "LoRARite", "adamw": "AdamW"}[optimizer]
    if optimizer == "lora-rite":
        assert result["optimizer"]["report"]["pairs_preconditioned"] == result["optimizer"]["report"]["pairs"] == 35
        assert "lora_rite/damped_share" in result["log"][1]
    network, _ = prepare_module.load_model("tiny")
    network = peft.PeftModel.from_pretrained(network, str(out / "adapter"))
    loaded = [p for n, p in network.named_parameters() if "lora_B" in n]
    assert all(p.any() for p in loaded)


@pytest.mark.filterwarnings("default:.*is not used")
@pytest.mark.filterwarnings("default:.*is finished already")
def test_a_stopped_run_resumes_bitwise_and_a_finished_one_is_not_run_again(data, tmp_path, capsys, monkeypatch):
    words = ["train", "--data", data, *SMALL[2:], "--steps", 6, "--save_every", 2]
    assert run(*words, "--out", tmp_path / "whole") == 0
    from transformers import Trainer

    save = Trainer._save_checkpoint

    def save_and_stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self.state.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_checkpoint", save_and_stop)
    assert run(*words, "--out", tmp_path / "parts") == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "parts" / "result.json").exists()
    monkeypatch.setattr(Trainer, "_save_checkpoint", save)
    assert run(*words, "--out", tmp_path / "parts") == 2
    assert "choose another --out, or --resume" in capsys.readouterr().err
    assert run(*words, "--out", tmp_path / "parts", "--resume", "--rank", 8) == 2
    assert "rank: 4 → 8" in capsys.readouterr().err
    assert run(*words, "--out", tmp_path / "parts", "--resume") == 0
    assert "checkpoint-4 is not used: no manifest: half-written; removed" in capsys.readouterr().err
    whole, parts = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts")
    )
    assert whole == parts
    whole, parts = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "parts"))
    assert whole["losses"] == parts["losses"]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").rglob("*")}
    assert run(*words, "--out", tmp_path / "parts", "--resume") == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").rglob("*")} == before


def test_config_file_and_optimizer_args(data, tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text(
        f"data: {data}\noptimizer_args:\n  damping: 3.0\n  row_equilibration: false\nsteps: 2\nrank: 2\nlr: 1e-3\n"
        "batch_size: 2\nmax_length: 32\nprogress: false\n"
    )
    out = tmp_path / "run"
    assert run("train", "--config", config, "--out", out, "--steps", 1) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["settings"]["lr"] == 1e-3
    assert result["optimizer"]["options"]["damping"] == 3.0
    assert result["optimizer"]["options"]["row_equilibration"] is False
    assert len(result["losses"]) == 1


def test_the_other_options(data, tmp_path):
    """bfloat16, accumulation, dropout, weight decay, another schedule, a reporter, a validation file, text as data."""
    pytest.importorskip("tensorboard")
    text = tmp_path / "text.txt"
    text.write_text("".join(json.loads(line)["text"] for line in data.read_text().splitlines()))
    out = tmp_path / "run"
    words = ["--bf16", "--accumulation", 2, "--dropout", 0.1, "--weight_decay", 0.1, "--scheduler", "linear"]
    words += ["--report_to", "tensorboard", "--validation", data, "--alpha", 8, "--warmup", 0, "--seed", 3]
    assert run("train", "--data", text, "--out", out, *words, *SMALL) == 0
    result = json.loads((out / "result.json").read_text())
    assert [round(entry["learning_rate"], 5) for entry in result["losses"]] == [0.01, 0.00667, 0.00333]
    assert result["optimizer"]["options"]["weight_decay"] == 0.1
    assert result["settings"]["alpha"] == 8
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = out.rglob("events.out.tfevents.*")
    assert events.parent == out / "tensorboard"
    tags = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert {"train/loss", "train/lora_rite/damped_share"} <= set(tags)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["lora_dropout"]) == (8, 0.1)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--dtypes", "float64", "float32"], {"dtypes": ["float64", "float32"]}),
        (["--dtypes", "float64", "--steps", 2], {"dtypes": ["float64"], "steps": 2}),
        (["--dtypes=float64"], {"dtypes": ["float64"]}),
        (["--dtypes", '["float64", "float32"]'], {"dtypes": ["float64", "float32"]}),
        (["--dtypes", "null"], {"dtypes": None}),
        (["--conditions", "10", "1e2"], {"conditions": [10.0, 100.0]}),
        (["--target-modules", "q_proj", "v_proj"], {"target_modules": ["q_proj", "v_proj"]}),
        (["--target_modules", "[q_proj]"], {"target_modules": ["q_proj"]}),
        (["--target_modules", ".*q_proj"], {"target_modules": ".*q_proj"}),
    ],
)
def test_lists_are_words_or_json(words, found, monkeypatch):
    from lora_rite.study import audit

    calls = []
    monkeypatch.setattr(audit, "audit_command", lambda **options: calls.append(options))
    assert run("audit", *words) == 0
    assert {key: calls[0][key] for key in found} == found


def test_a_list_of_numbers_ends_where_something_else_comes(tmp_path, capsys):
    """A recipe after --devices 0 1 is the recipe."""
    assert run("compare", "--devices", "0", "1", tmp_path / "no.yaml", "--out", tmp_path / "out") == 2
    assert "no.yaml" in capsys.readouterr().err.replace("\n", "").split("cannot read")[1]


def test_errors_are_blamed_on_options_with_their_kind():
    from lora_rite.errors import LoRARiteValueError, NonFiniteError
    from lora_rite.inputs import blame

    with pytest.raises(LoRARiteValueError, match="--settings: KeyError: 'rank'"), blame("--settings"):
        raise KeyError("rank")
    with pytest.raises(NonFiniteError, match=r"^diverged$"), blame("--settings"):
        raise NonFiniteError("diverged")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "missing.jsonl"], "cannot read missing.jsonl"),
        (["--rank", "0"], "--rank must be at least 1, got 0"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--lr", "-1"], "--lr must be a finite number"),
        (["--lr", ".nan"], "--lr must be a finite number"),
        (["--warmup", "2"], "--warmup must be between 0 and 1"),
        (["--holdout", "0"], "--holdout"),
        (["--seed", "-1"], "--seed"),
        (["--model", "no/such-model"], "cannot load --model no/such-model"),
        (["--target_modules", "nothing_like_it"], "--target_modules nothing_like_it"),
        (["--resume"], "holds no run to resume"),
        (["--optimizer_args", '{"lr": 1}'], "give the learning rate by --lr"),
        (["--optimizer_args", '{"dampin": 1}'], "--optimizer_args.dampin: .*, did you mean damping?"),
        (["--optimizer_args", '{"damping": -1}'], "damping must be a finite number"),
        (["--scheduler", "cosinus"], "--scheduler cosinus"),
        (["--report_to", "nowhere"], "--report_to nowhere"),
        (["--optimizer", "sgd"], "no optimizer sgd; there are lora-rite, "),
        (["--optimizer", "muon", "--lr", "null"], "--lr is needed for --optimizer muon"),
        (["--log_every", "0"], "--log_every must be at least 1"),
    ],
)
def test_errors_are_one_line_that_names_the_option(words, message, data, tmp_path, capsys):
    options = {"--data": data, "--out": tmp_path / "run", **OPTIONS}
    words = [*(w for option in options.items() if option[0] not in words for w in option), "--no_progress", *words]
    assert run("train", *words) != 0
    error = capsys.readouterr().err.strip()
    assert re.search(message, error)
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("lora-rite train: error: ")


def test_processes_of_no_launcher_are_refused_before_anything_is_written(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run")]) == 2
    assert "there are 2 processes (WORLD_SIZE, as a launcher sets it), without RANK, " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_unknown_options_are_refused(data, tmp_path, capsys):
    config = tmp_path / "bad.yaml"
    config.write_text("learing_rate: 1\n")
    number = tmp_path / "number.yaml"
    number.write_text("rank: 8.5\n")
    cases = [
        (["--learning_rate", 1], "learning_rate"),
        (["--config", config], "learing_rate"),
        (["--config", number], "rank"),
        (["--lr", "fast"], "lr"),
    ]
    for words, name in cases:
        assert run("train", "--data", data, "--out", tmp_path / "run", *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("lora-rite: error: ")
        assert name in line
    assert run("fine-tune") == 2
    assert "fine-tune" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "no verb trian, did you mean train? (there are demo, train, "),
        ("bench stp", "no verb stp, did you mean step? (there are step, "),
        ("train", "--out is missing (see lora-rite train --help)"),
        ("compare", "RECIPE is missing (see lora-rite compare --help)"),
        ("train --out x --rnak 3", "no option --rnak, did you mean --rank? (see lora-rite train --help)"),
        ("train --learning-rate=1", "no option --learning_rate, did you mean --lr? (see"),
        ("train --out x --fp16", "no option --fp16, did you mean --dtype?"),
        ("generate tiny --max_tokens 1", "no option --max_tokens, did you mean --max_new_tokens?"),
        ("train --out x --no_bf17", "no option --no_bf17, did you mean --no_bf16?"),
        ("bench step --dtype float32", "no option --dtype, did you mean --dtypes? (see lora-rite bench step --help)"),
        ("train --out x --qqqqqq", "no option --qqqqqq (see"),
        ("--rank 3 train", "no option --rank (see lora-rite --help)"),
        ("train --out x extra", "nothing takes the word extra"),
        ("train --out x --bf16 no", "--bf16 takes no value, got no; --no_bf16 is its opposite"),
        ("train --out", "--out needs a value"),
        ("eval --tasks", "--tasks needs a value"),
        ("train --out x --rank 8.5", "--rank must be a whole number, got 8.5"),
        ("train --out x --lr fast", "--lr must be a number, got fast"),
        ("train --out x --optimizer_args 3", "--optimizer_args must be a mapping, got 3"),
        ("audit --takes foo", "--takes must be one of params, named, model, got foo"),
        ("bench step --dtypes float32 float16", "--dtypes must be one of float32, bfloat16, got float16"),
        ("compare r.yaml --devices a", "--devices must be a list of whole numbers, got a"),
    ],
)
def test_wrong_words_are_told_in_the_words_of_the_command_line(words, message, capsys):
    """Neither Python's types nor the parser's inner names, and what was meant where that can be guessed."""
    assert run(*words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lora-rite: error: {message}")
    assert not re.search("VERB|<class|Union|Parser|typing|train\\.out", line)


def test_a_value_of_a_config_is_told_with_its_place(data, tmp_path, capsys):
    """Unless the command line gives it too, which is then to blame."""
    config = tmp_path / "run.yaml"
    config.write_text("steps: 3\nrank: many\n")
    words = ["train", "--data", data, "--out", tmp_path / "run", "--config", config]
    assert run(*words) == 2
    assert f"error: {config}:2: rank must be a whole number, got many" in capsys.readouterr().err
    config.write_text("steps: 3\nrank: 2\n")
    assert run(*words, "--rank=few") == 2
    assert "error: --rank must be a whole number, got few" in capsys.readouterr().err
    config.write_text("lora_r: 2\n")
    assert run(*words) == 2
    assert f"{config}:1: no option lora_r, did you mean rank?" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["lora_rite", "lora_rite.cli"])
def test_python_runs_it_as_a_module(module):
    done = subprocess.run([sys.executable, "-m", module, "pairs", "--rank", "0"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "lora-rite pairs: error: --rank must be at least 1, got 0\n"


def test_the_entry_point_is_where_installers_look_for_it():
    (script,) = metadata.entry_points(group="console_scripts", name="lora-rite")
    assert script.value == "lora_rite.cli:main"
    assert script.load() is main


@pytest.mark.parametrize(("words", "shown"), [([], "pairs"), (["bench"], "scaling")])
def test_without_a_verb_there_is_help(words, shown, capsys):
    """As --help prints it, and the exit code of wrong usage."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.err == ""
    assert shown in printed.out
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out == printed.out


def complete(script, *words):
    """What bash offers in the place of the last word."""
    function = "_shtab_lora_rite"
    code = f'''source {script}
COMP_WORDS=({" ".join(f"'{word}'" for word in words)}); COMP_CWORD={len(words) - 1}
{function} lora-rite '{words[-1]}' '{words[-2]}'; printf '%s\n' "${{COMPREPLY[@]}}"'''
    shell = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    return shell.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_verbs_options_and_choices(tmp_path, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit):
        main(["--print_completion", "shtab-bash"])
    script = tmp_path / "lora-rite.bash"
    script.write_text(capsys.readouterr().out)
    assert complete(script, "lora-rite", "tr") == ["train"]
    assert complete(script, "lora-rite", "train", "--opt") == ["--optimizer", "--optimizer_args"]
    assert complete(script, "lora-rite", "bench", "sc") == ["scaling"]
    assert complete(script, "lora-rite", "bench", "step", "--device", "") == ["cpu", "cuda"]


def test_a_file_cannot_print_a_completion(data, tmp_path, capsys):
    """A config or a recipe has no key print_completion, which would end the process."""
    path = tmp_path / "file.yaml"
    path.write_text("print_completion: jsonschema\n")
    assert run("train", "--data", data, "--out", tmp_path / "run", "--config", path) == 2
    assert run("compare", path) == 2
    path.write_text("title: x\ntasks: {a: {task: gsm8k}}\noptimizers: {b: {optimizer: adamw, lr: [1]}}\n"
                    "train: {print_completion: jsonschema}\n")  # fmt: skip
    assert run("compare", path) == 2
    assert capsys.readouterr().err.count("print_completion") == 3


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        run("train", "--data", tmp_path / "missing.txt", "--out", tmp_path / "run", "--debug")


def test_pairs(tmp_path, capsys):
    """A line for each kind of layer, of a new adapter and of one in a folder."""
    assert run("pairs", "--target_modules", "[q_proj, v_proj]", "--rank", 2) == 0
    layer = "model.layers.*.self_attn.{}_proj.lora_A.default.weight (2, 192) with B ({}, 2)"
    assert capsys.readouterr().out.splitlines() == [
        "10 pairs",
        f"  5 × {layer.format('q', 192)}",
        f"  5 × {layer.format('v', 96)}",
    ]
    network = prepare_module.attach_adapter(prepare_module.load_model("tiny")[0], rank=2)
    network.save_pretrained(str(tmp_path / "adapter"))
    assert run("pairs", "--adapter", tmp_path / "adapter") == 0
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], len(lines)) == ("35 pairs", 1 + 7)
    assert run("pairs", "--target_modules", ".*0.self_attn.q_proj") == 0
    assert capsys.readouterr().out.startswith("1 pair\n  1 × ")
    assert run("pairs", "--adapter", tmp_path) == 2
    assert "adapter_config.json" in capsys.readouterr().err


def test_pairs_need_no_weights(monkeypatch, capsys):
    """Of a model with weights beyond this machine's memory, and a licence that nobody here has."""
    allocated = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocated.append(made := empty(*a, **k)) or made)
    assert run("pairs", "--model", "google/gemma-7b", "--rank", 4) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], len(lines)) == ("196 pairs", 1 + 7)
    assert sum(p.numel() for p in allocated) > 8e9
    assert all(p.is_meta for p in allocated)


@pytest.mark.parametrize("words", ["pairs --rank 0", "audit --rank 0", "audit --model tiny --rank -1"])
def test_a_rank_that_cannot_be_is_blamed_on_rank(words, capsys):
    assert run(*words.split()) == 2
    assert "error: --rank must be at least 1, got " in capsys.readouterr().err


def test_demo(tmp_path, capsys, monkeypatch):
    """Ten steps instead of 200: what it writes, that it replaces itself and nothing else. Without a terminal, a run is
    one line, and there are no bars."""
    small = {"steps": 10, "batch_size": 2, "max_length": 32, "rank": 4}
    monkeypatch.setattr(demo_module, "CHARACTERS", {"train": 20_000, "validation": 4_000, "test": 4_000})
    monkeypatch.setattr(demo_module, "EVAL_EVERY", 5)
    for progress in (False, True):
        result = demo_module.demo(tmp_path / "demo", seeds=1, progress=progress, settings=small)
        printed, said = capsys.readouterr()
        assert "it/s]" not in said
        assert [line.partition(" → ")[0] for line in printed.splitlines()[1:3]] == [
            f"{name}, seed 0: held-out loss {result['runs'][0]['held_out']['before']:.3f}"
            for name in ("AdamW, lr 0.01", "LoRA-RITE, lr 0.02")
        ]
    assert "LoRA-RITE" in printed
    assert "curves.png" in printed
    assert (tmp_path / "demo" / "curves.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "demo" / "result.json").read_text())["table"] == result["table"]
    assert [row["optimizer"] for row in result["table"]] == ["AdamW", "LoRA-RITE"]
    before = {run["held_out"]["before"] for run in result["runs"]}
    assert len(before) == 1
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    assert run("demo", "--out", mine) == 2
    assert (mine / "thesis.txt").read_text() == "precious"


def test_a_demo_clears_what_it_made_and_nothing_else(tmp_path, monkeypatch):
    """Also where its folder is the present one, which cannot be removed."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        demo_module._clear(Path())
        assert [p.name for p in tmp_path.iterdir() if p.name != "notes.txt"] == ["MADE-BY-LORA-RITE-DEMO.txt"]
        (tmp_path / "runs" / "adamw-seed0").mkdir(parents=True)
        for name in ("result.json", "curves.png", "notes.txt"):
            (tmp_path / name).write_text("x")
    assert (tmp_path / "notes.txt").is_file()


def test_demo_data_is_split_by_file_without_overlap(tmp_path):
    info = demo_module.write_data(tmp_path)
    texts = {}
    for name in ("train", "validation", "test"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        texts[name] = [json.loads(line)["text"] for line in lines]
        assert len(lines) == info["files"][name] > 10
        assert sum(map(len, texts[name])) == info["characters"][name]
    everything = [text for group in texts.values() for text in group]
    assert len(set(everything)) == len(everything)
