"""Options of ``lora-rite train``, each by what it does to a run of the embedded model."""

import json
import math
import signal

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("jsonargparse")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers.models.gemma.modeling_gemma import GemmaMLP  # noqa: E402

from lora_rite.cli import main  # noqa: E402
from lora_rite.finetune import load as load_module  # noqa: E402
from lora_rite.finetune import train as train_module  # noqa: E402
from lora_rite.finetune.callbacks import Clock, HeldOut  # noqa: E402
from lora_rite.finetune.load import attach_adapter, load_model, module_names  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "default::UserWarning")
SMALL = {"batch_size": 2, "max_length": 16, "rank": 2, "lr": 0.01, "target_modules": "q_proj,v_proj"}
WORDS = [str(word) for key, value in SMALL.items() for word in (f"--{key}", value)] + ["--no_progress"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [json.dumps({"prompt": "int ", "completion": f"f{i}(int a);"}) for i in range(13)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def train(data, tmp_path):
    """Trains by the command line into tmp_path/NAME; gives the result, or the exit code where it is not 0."""

    def run(*words, name="run"):
        out = tmp_path / name
        code = main(["train", "--data", str(data), "--out", str(out), *WORDS, *map(str, words)])
        return code or json.loads((out / "result.json").read_text())

    return run


def adapter(tmp_path, name="run"):
    return load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def refused(train, capsys, tmp_path):
    """The line of a run that is refused, before anything is written."""

    def run(*words):
        assert train(*words) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    return run


def test_epochs_are_steps_of_the_windows(train):
    """12 windows, 2 batches of 2 in a step: 3 steps an epoch; a half of one more is two steps more."""
    result = train("--epochs", 1.5, "--accumulation", 2)
    assert result["settings"]["epochs"] == 1.5
    assert result["settings"]["steps"] == result["run"]["steps"] == len(result["losses"]) == 5
    assert result["run"]["epochs"] == pytest.approx(5 * 4 / 12)


def test_options_that_contradict_each_other(refused, tmp_path):
    for words, says in [
        (("--steps", 3, "--epochs", 1), "give either --steps or --epochs"),
        (("--load_in_4bit", "--load_in_8bit"), "give either --load_in_4bit or --load_in_8bit"),
        (("--bf16", "--dtype", "float32"), "--bf16 is --dtype bfloat16, and --dtype is float32"),
        (("--early_stopping", 2), "--early_stopping needs the held-out loss of some steps: give --eval_every"),
        (("--keep_best",), "--keep_best needs the held-out loss of some steps: give --eval_every"),
        (("--max_grad_norm", 1), "--max_grad_norm 1 clips raw gradients"),
        (("--max_grad_norm", 1, "--optimizer", "lora_rite:LoRARite"), "--max_grad_norm 1 clips raw gradients"),
        (("--packing", "--attn_implementation", "flash_attention_2"), "--packing keeps examples apart by a mask"),
        (("--adapter", tmp_path / "none"), "there is no such folder"),
        (("--epochs", 0), "--epochs must be a finite number > 0, got 0.0"),
        (("--limit", 0), "--limit must be at least 1, got 0"),
        (("--eval_limit", -1), "--eval_limit must be at least 0, got -1"),
        (("--max_grad_norm", -1), "--max_grad_norm must be at least 0, got -1"),
        (("--early_stopping", -1), "--early_stopping must be at least 0, got -1"),
        (("--dtype", "int8"), "dtype"),
        (("--attn_implementation", "somebody/kernel"), "attn_implementation"),
        (
            ("--target_modules", "q_proj,v_porj"),
            "--target_modules v_porj: no module of the model is named so, did you mean v_proj?",
        ),
        (("--modules_to_save", "nothing"), "--modules_to_save nothing: no module of the model is named so; there are"),
        (("--modules_to_save", ".*head"), "give names of modules"),
    ]:
        assert says in refused(*words)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="of a CPU")
def test_float16_is_for_gpus(refused):
    assert "--dtype float16 trains on a GPU alone" in refused("--dtype", "float16")


def test_dtype_of_the_weights(train, tmp_path):
    """float32 where nothing is said, also of a bfloat16 checkpoint, auto what the checkpoint has, and --bf16 is the
    same run as --dtype bfloat16."""
    network, tokenizer = load_model("tiny", dtype="bfloat16")
    for part in (network, tokenizer):
        part.save_pretrained(tmp_path / "model")
    model = ("--model", tmp_path / "model", "--steps", 2)
    dtypes = {"plain": (), "auto": ("--dtype", "auto"), "short": ("--bf16",), "long": ("--dtype", "bfloat16")}
    found = {name: train(*model, *words, name=name) for name, words in dtypes.items()}
    assert [result["run"]["dtype"] for result in found.values()] == ["float32", "bfloat16", "bfloat16", "bfloat16"]
    losses = [[entry["loss"] for entry in result["losses"]] for result in found.values()]
    assert losses[0] != losses[1]
    assert losses[1] == losses[2] == losses[3]
    assert {p.dtype for p in adapter(tmp_path, "auto").values()} == {torch.float32}


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_models_train(bits, train, tmp_path):
    """The linear maps are quantised, loss and adapter near those in float32, and what learns is in float32."""
    pytest.importorskip("bitsandbytes")
    plain = train("--steps", 3, name="plain")
    result = train("--steps", 3, f"--load_in_{bits}bit")
    assert result["run"]["quantised_bits"] == bits
    assert result["run"]["memory"]["weights"] < 0.7 * plain["run"]["memory"]["weights"]
    assert result["held_out"]["before"] != plain["held_out"]["before"]
    assert result["held_out"]["before"] == pytest.approx(plain["held_out"]["before"], rel=0.1)
    assert result["held_out"]["after"] < result["held_out"]["before"]
    assert all(p.any() for name, p in adapter(tmp_path).items() if "lora_B" in name)  # of all layers
    assert {p.dtype for p in adapter(tmp_path).values()} == {torch.float32}


def test_the_held_out_loss_is_measured_alike_before_and_after(train, tmp_path):
    """Of an adapter that does not change, in bfloat16, for which the Trainer leaves its autocast on the model."""
    train("--steps", 2, "--bf16", name="first")
    still = train("--steps", 1, "--bf16", "--lr", 0, "--adapter", tmp_path / "first" / "adapter", name="second")
    assert still["held_out"]["before"] == still["held_out"]["after"]


def test_bitsandbytes_that_is_missing_is_said(train, tmp_path, monkeypatch, capsys):
    find = load_module.importlib.util.find_spec
    monkeypatch.setattr(
        load_module.importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    assert train("--load_in_4bit") == 1
    assert "--load_in_4bit needs bitsandbytes: pip install bitsandbytes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_gradient_checkpointing_changes_nothing_but_what_is_kept(train, monkeypatch):
    """Losses are bitwise the same, with dropout too; and the layers are computed again in the backward pass."""
    plain = train("--steps", 2, "--dropout", 0.1, name="first")
    calls, forward = [], GemmaMLP.forward
    monkeypatch.setattr(GemmaMLP, "forward", lambda s, x: (calls.append(torch.is_grad_enabled()), forward(s, x))[1])
    counts = {}
    for name, words in {"plain": (), "checkpointed": ("--gradient_checkpointing",)}.items():
        calls.clear()
        result = train("--steps", 2, "--dropout", 0.1, *words, name=name)
        counts[name] = sum(calls)
    assert result["losses"] == plain["losses"]
    assert counts["checkpointed"] == 2 * counts["plain"] > 0
    assert result["run"]["memory"]["activations"] < plain["run"]["memory"]["activations"]


def test_attention_is_the_one_that_is_given(train, capsys):
    eager, sdpa = (train("--steps", 1, "--attn_implementation", name, name=name) for name in ("eager", "sdpa"))
    assert [result["run"]["attention"] for result in (eager, sdpa)] == ["eager", "sdpa"]
    assert eager["held_out"]["before"] == pytest.approx(sdpa["held_out"]["before"], rel=1e-5)
    capsys.readouterr()
    assert train("--attn_implementation", "flash_attention_2", name="flash") == 2
    assert "--attn_implementation flash_attention_2: " in capsys.readouterr().err


def test_names_of_modules():
    """Names with commas are a list; what may be a regular expression stays one."""
    assert module_names("q_proj") == ["q_proj"]
    assert module_names("q_proj, layers.0.mlp.up_proj,") == ["q_proj", "layers.0.mlp.up_proj"]
    for given in ("all-linear", r".*\.q_proj", "(q|v)_proj", ["q_proj"], None):
        assert module_names(given) == given
    network = load_model("tiny")[0]
    attached = attach_adapter(network, rank=2, target_modules="q_proj,v_proj")
    adapted = {
        name.split(".lora_A")[0].rpartition(".")[2] for name, _ in attached.named_parameters() if "lora_A" in name
    }
    assert adapted == {"q_proj", "v_proj"}


def test_dora_and_whole_modules_are_trained_by_adamw(train, tmp_path):
    """At lr 2e-4, or at another adamw_lr; what the pairs do not hold is counted apart."""
    result = train("--steps", 2, "--dora", "--modules_to_save", "norm", name="both")
    found = adapter(tmp_path, "both")
    assert any("lora_magnitude_vector" in name for name in found)
    whole = [p for name, p in found.items() if name.endswith("model.norm.weight")]
    assert len(whole) == 1
    assert not torch.equal(whole[0], load_model("tiny")[0].model.norm.weight)
    vectors = sum(p.numel() for name, p in found.items() if "lora_A" not in name and "lora_B" not in name)
    assert result["run"]["trained_outside_pairs"] == vectors
    assert result["run"]["trained"] == sum(p.numel() for p in found.values())
    train("--steps", 2, "--modules_to_save", "norm", "--optimizer_args.adamw_lr", "0.0", name="still")
    kept = next(p for name, p in adapter(tmp_path, "still").items() if name.endswith("model.norm.weight"))
    assert torch.equal(kept, load_model("tiny")[0].model.norm.weight)


def test_learning_rates_by_name(train, refused, tmp_path, capsys):
    """Of pairs and of whole modules; in JSON or as a further option. The settings and the header have them."""
    by_name = {r"layers\.[01]\..*_proj": 0.0, r"^model\.norm$": 0.0}
    words = ["--steps", 2, "--modules_to_save", "norm", "--optimizer_args.lr_by_name"]
    assert "norms' matches no trainable parameter" in refused(*words, '{"norms": 1e-4}')
    result = train(*words, json.dumps(by_name), "--progress")
    assert result["settings"]["optimizer_args"]["lr_by_name"] == by_name
    said = " ".join(capsys.readouterr().err.split())
    assert r"by lora-rite, lr 0.01, layers\.[01]\..*_proj 0.0, ^model\.norm$ 0.0" in said
    assert "in no pair by AdamW, lr 0.0002 or by name" in said
    found = adapter(tmp_path)
    still = {int(name.split("layers.")[1][0]) for name, p in found.items() if "lora_B" in name and not p.any()}
    assert still == {0, 1}
    (whole,) = (p for name, p in found.items() if name.endswith("model.norm.weight"))
    assert torch.equal(whole, load_model("tiny")[0].model.norm.weight)


def test_rslora_scales_by_the_root_of_the_rank(train, tmp_path):
    train("--steps", 1, "--rslora")
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["use_rslora"] is True
    network = attach_adapter(load_model("tiny")[0], rank=4, alpha=8, rslora=True)
    assert network.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 4.0


def test_an_adapter_is_gone_on_with(train, tmp_path, capsys):
    """The loss begins where it ended, the adapter has its own rank and modules, and is known by its content."""
    first = train("--steps", 3, "--rslora", name="first")
    folder = tmp_path / "first" / "adapter"
    words = ("--steps", 2, "--rank", 16, "--target_modules", "all-linear", "--adapter", folder)  # as if not given
    second = train(*words, name="second")
    assert second["held_out"]["before"] == first["held_out"]["after"]
    assert second["held_out"]["after"] < second["held_out"]["before"]
    assert adapter(tmp_path, "second").keys() == adapter(tmp_path, "first").keys()
    assert second["settings"]["rank"] == 2
    assert len(second["inputs"]["adapter"]) == 64
    capsys.readouterr()
    assert train(*words, "--rank", 3, name="third") == 2
    assert f"--rank 3: --adapter {folder} has 2, and is gone on with" in capsys.readouterr().err


def test_an_adapter_to_go_on_with_is_checked(train, tmp_path, capsys):
    """As everywhere: no pickles, whole tensors."""
    train("--steps", 1, name="first")
    folder = tmp_path / "first" / "adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: v * float("nan") for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    words = ("--rank", 16, "--target_modules", "all-linear", "--adapter", folder)
    capsys.readouterr()
    assert train(*words, name="second") == 2
    assert f"--adapter {folder}" in capsys.readouterr().err
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert train(*words, name="second") == 2
    assert "is a pickle" in capsys.readouterr().err


def test_limit_leaves_what_is_held_out(train):
    whole, some = train("--steps", 1, name="whole"), train("--steps", 1, "--limit", 4)
    assert (whole["examples"]["train"], some["examples"]["train"]) == (12, 4)
    assert whole["held_out"]["before"] == some["held_out"]["before"]


def test_eval_limit_is_256_windows_the_same_for_all_seeds(train, tmp_path, monkeypatch):
    """0 takes all; what is left of 300 is a sample."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(json.dumps({"prompt": f"{i} ", "completion": f"{i % 7}"}) for i in range(300)))
    words = ("--validation", held_out, "--steps", 1, "--batch_size", 32)
    rows = {}
    measure = train_module.held_out_loss

    def measured(network, part, *args, **kwargs):
        rows[len(rows)] = [row["input_ids"] for row in part]
        return measure(network, part[:8], *args, **kwargs)

    monkeypatch.setattr(train_module, "held_out_loss", measured)
    for seed in (0, 1):
        result = train(*words, "--seed", seed, name=f"seed{seed}")
        assert result["windows"]["held_out"] == 256
        assert result["examples"]["held_out"] == 300
    assert rows[0] == rows[2]  # before training with the one seed and with the other
    assert len({tuple(row) for row in rows[0]}) == 256
    assert train(*words, "--eval_limit", 0, name="all")["windows"]["held_out"] == 300


def test_max_grad_norm_of_other_optimizers(train, monkeypatch):
    """1 where nothing is said, else what is given; 0 and LoRARite do not clip."""
    from transformers import Trainer

    norms = []
    clip = Trainer._clip_grad_norm
    monkeypatch.setattr(Trainer, "_clip_grad_norm", lambda s, m: (norms.append(s.args.max_grad_norm), clip(s, m))[1])
    for n, words in enumerate([("adamw",), ("adamw", "--max_grad_norm", 0.5), ("adamw", "--max_grad_norm", 0), ()]):
        optimizer = ("--optimizer", *words) if words else ()
        result = train("--steps", 1, *optimizer, name=str(n))
        assert result["run"]["max_grad_norm"] == [1.0, 0.5, 0.0, 0.0][n]
    assert norms == [1.0, 0.5]


# ------------------------------------------------------------------------------- the lowest loss, and stopping at it


def scripted(monkeypatch, losses):
    """The held-out losses of a run: before, at each measurement, and after training where that was not one."""
    left = list(losses)
    monkeypatch.setattr(train_module, "held_out_loss", lambda *_, **__: left.pop(0))
    return left


def test_the_adapter_of_the_lowest_loss_is_kept(train, tmp_path, monkeypatch):
    """It is bitwise that of a run that ends there (with a schedule that does not look ahead)."""
    constant = ("--scheduler", "constant", "--warmup", 0)
    train("--steps", 2, *constant, name="short")
    scripted(monkeypatch, [5.0, 4.0, 3.0, 3.5, 3.2])
    words = ("--steps", 4, "--eval_every", 1, *constant)
    result = train(*words, "--keep_best", name="best")
    assert result["best"] == {"step": 2, "held_out_loss": 3.0, "last": 3.2, "last_step": 4}
    assert result["held_out"]["after"] == 3.0
    for name, p in adapter(tmp_path, "short").items():
        assert torch.equal(adapter(tmp_path, "best")[name], p)
    scripted(monkeypatch, [5.0, 4.0, 3.0, 3.5, 3.2])
    result = train(*words, name="last")
    assert "best" not in result
    assert result["held_out"]["after"] == 3.2
    assert any(not torch.equal(adapter(tmp_path, "last")[k], p) for k, p in adapter(tmp_path, "best").items())


def test_a_run_stops_where_the_loss_has_not_fallen(train, monkeypatch):
    """After two measurements in a row without a new lowest one; nan is none. The last is the loss after training."""
    left = scripted(monkeypatch, [5.0, 4.0, 4.5, 3.0, math.nan, 3.0, 1.0])
    result = train("--steps", 9, "--eval_every", 1, "--early_stopping", 2)
    assert result["run"]["steps_done"] == len(result["losses"]) == 5
    assert result["run"]["steps"] == 9
    assert result["best"]["step"] == 3
    assert left == [1.0]


def test_stopping_and_the_lowest_loss_survive_a_resume(train, tmp_path, monkeypatch):
    """A run that is stopped by a signal goes on to the same end; one that was killed after its last checkpoint, when it
    had stopped by itself, trains no further."""
    words = ("--steps", 9, "--eval_every", 1, "--early_stopping", 2, "--save_every", 1)
    losses = [5.0, 4.0, 3.0, 3.5, 3.6, 3.6]
    scripted(monkeypatch, losses)
    train(*words, name="whole")
    scripted(monkeypatch, losses)
    measured = HeldOut.on_step_end

    def stop_at_three(self, args, state, control, **kwargs):
        measured(self, args, state, control, **kwargs)
        if state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(HeldOut, "on_step_end", stop_at_three)
        assert train(*words, name="parts") == 143
    scripted(monkeypatch, [5.0, 3.6, 3.6])
    result = train(*words, "--resume", name="parts")
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["best"] == whole["best"]
    assert result["run"]["steps_done"] == 4
    for name, p in adapter(tmp_path, "whole").items():
        assert torch.equal(adapter(tmp_path, "parts")[name], p)
    (tmp_path / "parts" / "result.json").unlink()
    scripted(monkeypatch, [5.0, 3.6])
    again = train(*words, "--resume", name="parts")
    assert again["best"] == whole["best"]
    assert len(again["losses"]) == 4


# ----------------------------------------------------------------------------------------- resuming what is finished


def test_a_finished_run_says_so(train, tmp_path, capsys):
    train("--steps", 2)
    train("--steps", 2, "--resume")
    assert f"{tmp_path / 'run'} is finished already: nothing was trained" in capsys.readouterr().err


def test_a_finished_run_goes_on_to_more_steps(train, tmp_path, capsys):
    """To the run that it would have been, where the schedule does not look ahead; killed on the way, it goes on."""
    words = ("--scheduler", "constant", "--warmup", 0, "--save_every", 2)
    train("--steps", 6, *words, name="whole")
    train("--steps", 2, *words, name="parts")
    capsys.readouterr()
    result = train("--steps", 6, *words, "--resume", "--progress", name="parts")
    said = capsys.readouterr()
    assert "goes on to --steps 6" in said.err
    assert "going on after step 2, " in said.out
    assert result["changes"] == [{"after_step": 2, "changed": {"steps": [2, 6]}}]
    assert result["settings"]["steps"] == len(result["losses"]) == 6
    for name, p in adapter(tmp_path, "whole").items():
        assert torch.equal(adapter(tmp_path, "parts")[name], p)
    assert train("--steps", 4, *words, "--resume", name="parts") == 2
    assert "steps: 6 → 4" in capsys.readouterr().err


def test_more_steps_that_were_interrupted_go_on(train, tmp_path, monkeypatch):
    """The result of the shorter run stays until the longer one is done, and is not taken for its."""
    words = ("--save_every", 1, "--resume")
    train("--epochs", 0.5, *words[:2])
    with monkeypatch.context() as patch:
        end = Clock.on_step_end

        def stop_at_four(self, args, state, control, **kwargs):
            end(self, args, state, control, **kwargs)
            if state.global_step == 4:
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(Clock, "on_step_end", stop_at_four)
        assert train("--epochs", 1, *words) == 143
    assert json.loads((tmp_path / "run" / "result.json").read_text())["settings"]["epochs"] == 0.5
    result = train("--epochs", 1, *words)
    assert result["settings"]["epochs"] == 1
    assert len(result["losses"]) == 6


def test_more_steps_need_a_checkpoint(train, tmp_path, capsys):
    train("--steps", 1)
    assert train("--steps", 2, "--resume") == 2
    error = capsys.readouterr().err
    assert "has no checkpoint to go on from to more --steps" in error
    assert f"--adapter {tmp_path / 'run' / 'adapter'}" in error


# ------------------------------------------------------------------------------------------------------------ studies


def test_studies_measure_all_that_is_held_out_and_choose_nothing_by_it(tmp_path):
    """Their figures are those of before there was an ``eval_limit``."""
    import inspect

    from lora_rite.errors import LoRARiteValueError
    from lora_rite.study import runner
    from lora_rite.study.recipe import load_recipe

    seen = {}
    original = runner.train
    runner.train = lambda **options: seen.update(options) or {"held_out": {"after": 1.0}}
    try:
        assert runner.run_one(None, {"out": tmp_path / "run"}, {"tasks": []})[0] == 1.0
    finally:
        runner.train = original
    assert seen["eval_limit"] == 0
    assert inspect.signature(original).parameters["eval_limit"].default == 256
    text = "title: t\ntasks: {a: {data: a.jsonl}}\noptimizers: {adamw: {optimizer: adamw, lr: [1e-3]}}\n"
    for line in ("epochs: 1", "limit: 3", "early_stopping: 1", "keep_best: true", "adapter: some"):
        path = tmp_path / "recipe.yaml"
        path.write_text(f"{text}train: {{{line}}}\n")
        with pytest.raises(LoRARiteValueError, match=f"train.{line.partition(':')[0]}: the study decides it"):
            load_recipe(path)
