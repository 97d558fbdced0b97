"""The benchmark measures what it says; nothing here is timed."""

import json
import re

import pytest
import torch

from lora_rite import LoRARite
from lora_rite.bench import cases as bench
from lora_rite.bench import host as bench_host
from lora_rite.bench.contenders import BASELINE, optimizers
from lora_rite.bench.shapes import linear_maps
from lora_rite.bench.watch import Watch
from lora_rite.invariance.problems import Adapter
from lora_rite.plan.pairs import Shape
from lora_rite.plan.plan import make_plan

pytest.importorskip("jsonargparse")
pytest.importorskip("peft")

from lora_rite.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

GEMMA_2B = [(2048, 2048), (2048, 256), (2048, 256), (2048, 2048), (2048, 16384), (2048, 16384), (16384, 2048)]
GEMMA_7B = [(3072, 4096)] * 3 + [(4096, 3072), (3072, 24576), (3072, 24576), (24576, 3072)]
FEED_FORWARD = [(4096, 10240), (4096, 10240), (10240, 4096)]
MT5_XXL = [(4096, 4096)] * 4 + FEED_FORWARD + [(4096, 4096)] * 8 + FEED_FORWARD  # a layer of each, encoder first
SHAPES = {"gemma-2b": (GEMMA_2B, 18), "gemma-7b": (GEMMA_7B, 28), "mt5-xxl": (MT5_XXL, 24)}


def run(*words):
    return main(["bench", *(str(word) for word in words)])


@pytest.mark.parametrize("model", SHAPES)
def test_shapes_of_the_known_models(model):
    layer, depth = SHAPES[model]
    layer = [Shape(*maps, 1) for maps in layer]
    assert linear_maps(model, 1) == layer
    assert sorted(linear_maps(model)) == sorted(layer * depth)


def test_shapes_of_a_configuration_file(tmp_path):
    from transformers import Qwen2Config

    Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    ).save_pretrained(tmp_path)  # fmt: skip
    maps = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    layer = [Shape(*shape, 1) for shape in maps]
    assert linear_maps(str(tmp_path / "config.json")) == layer * 3
    assert linear_maps(str(tmp_path), layers=1) == layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_share_the_memory_of_their_temporaries(dtype):
    """A group for each of eight pairs, as with a learning rate for each layer, takes no more than one for all."""
    shapes, peaks = [(4, 999), (999, 4)] * 8, []
    for pairs_of_a_group in (8, 1):
        params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
        for p in params:
            p.grad = torch.ones_like(p)
        size = 2 * pairs_of_a_group
        optimizer = LoRARite([{"params": params[i : i + size], "kind": "lora"} for i in range(0, 16, size)])
        optimizer.step()
        with Watch() as watch:
            optimizer.step()
        peaks.append(watch.peak)
    assert peaks[1] < peaks[0]
    assert peaks[1] < 0.75 * 4 * sum(p.numel() for p in params)


def test_extra_memory_is_the_peak_of_what_lives_at_once():
    x = torch.zeros(1000)  # 4,000 bytes
    with Watch() as watch:
        y = x + 1
        z = y * 2
        del y
        w = z - 1
        v = w[:10]
        assert watch.now == 8000
        del z, w
        assert watch.now == 4000  # the view holds the storage
        del v
        x.add_(1)
    assert watch.now == 0
    assert watch.peak == 8000
    with Watch() as watch:
        float(x.sum())
    assert watch.synchronisations == 1
    with Watch("cuda") as watch:
        float(x.sum())
    assert watch.synchronisations == 0  # a counter on the CPU does not stop a GPU


def test_step_of_small_cases(tmp_path, capsys):
    out, picture = tmp_path / "results" / "step.json", tmp_path / "docs" / "step.png"
    words = ["--layers", 1, "--ranks", 2, 3, "--dtypes", "float32", "bfloat16", "--rounds", 2, "--capturable"]
    assert run("step", "--models", "tiny", *words, "--out", out, "--plot", picture) == 0
    printed = capsys.readouterr().out
    assert picture.stat().st_size > 10_000
    result = json.loads(out.read_text())
    assert result["versions"]["torch"] == torch.__version__
    assert {"cpu", "cpu_capability", "threads", "git_commit", "pytorch_optimizer"} <= set(result["versions"])
    assert [(c["rank"], c["dtype"]) for c in result["cases"]] == [
        (rank, dtype) for rank in (2, 3) for dtype in ("float32", "bfloat16")
    ]
    maps = sum(shape.n + shape.m for shape in linear_maps("tiny", 1))
    for case in result["cases"]:
        rows = {row["optimizer"]: row for row in case["rows"]}
        assert set(rows) | set(case["left_out"]) == set(optimizers(torch.nn.Module(), "cpu"))
        size = {"float32": 4, "bfloat16": 2}[case["dtype"]]
        assert case["parameter_bytes"] == size * case["parameters"] == size * case["rank"] * maps
        assert rows[BASELINE]["ratio"] == 1
        assert rows[BASELINE]["state_bytes"] == 2 * case["parameter_bytes"] + 4 * 14  # and a counter a tensor
        assert rows["LoRARite"]["state_bytes"] == case["formula_bytes"]
        assert rows["LoRARite"]["extra_bytes"] > 0
        assert rows["LoRARite"]["synchronisations"] == 1
        assert rows["LoRARite (capturable)"]["synchronisations"] == 0
        for name, row in rows.items():
            assert name in printed
            low, high = row["ratio_quartiles"]
            assert low <= row["ratio"] <= high
        for name, reason in case["left_out"].items():
            assert f"Left out: {name}, {reason}" in printed
    assert printed.count(f"{result['cases'][0]['formula_bytes'] / 1e6:.2f} MB") == 2  # the formula is for both dtypes


def test_share_of_training_steps(tmp_path, capsys):
    out = tmp_path / "train.json"
    words = ["--layers", 1, "--rank", 2, "--batch_size", 1, "--length", 8, "--rounds", 2]
    assert run("train", *words, "--out", out) == 0
    (case,) = json.loads(out.read_text())["cases"]
    assert [row["optimizer"] for row in case["rows"]] == [BASELINE, "LoRARite"]
    for row in case["rows"]:
        assert 0 < row["share_quartiles"][0] <= row["share"] <= row["share_quartiles"][1] < 1
        assert row["seconds"] > 0
        assert row["model_seconds"] > 0
    assert "share of a step" in capsys.readouterr().out


def test_each_optimizer_trains_its_own_adapter(monkeypatch):
    """Else LoRARite would warn that its factors were changed from outside (warnings are errors here)."""
    made = []
    monkeypatch.setattr(bench, "network", lambda *args, f=bench.network: made.append(f(*args)) or made[-1])
    bench.bench_train(["tiny"], 1, 2, "float32", "cpu", 1, 8, 3)
    factors = {
        adapter: [p for name, p in made[0].named_parameters() if f"lora_B.{adapter}" in name]
        for adapter in ("default", "second")
    }
    assert len(factors["default"]) == len(factors["second"]) == 7
    assert all(p.any() for ps in factors.values() for p in ps)


def test_exponents(tmp_path, capsys, monkeypatch):
    """On times that are known: 3·x^1.5 a step for LoRARite, and a constant for AdamW."""

    def measure(names, shapes, dtype, device, rounds):
        n, _, rank, *_ = shapes[0]
        x = rank if len(shapes) == 8 and n == 2048 else n if len(shapes) == 8 else len(shapes)
        return {"rows": [{"seconds": 1.0 if name == BASELINE else 3 * x**1.5} for name in names]}

    monkeypatch.setattr(bench, "measure", measure)
    out, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    words = ["--pairs", 1, 10, 100, "--widths", 256, 16, 64, "--ranks", 2, 4, 8]
    assert run("scaling", *words, "--out", out, "--plot", picture) == 0
    sweeps = json.loads(out.read_text())["sweeps"]
    assert {name: sweep["x"] for name, sweep in sweeps.items()} == {
        "pairs": [1, 10, 100], "width": [16, 64, 256], "rank": [2, 4, 8]
    }  # fmt: skip
    for sweep in sweeps.values():
        for half in ("all", "upper"):
            assert sweep["exponents"]["LoRARite"][half] == pytest.approx(1.5)
            assert sweep["exponents"][BASELINE][half] == pytest.approx(0)
    assert picture.stat().st_size > 10_000
    assert "1.50" in capsys.readouterr().out


def test_scaling_measures_every_point(monkeypatch):
    result = bench.bench_scaling([1, 2, 3], [4, 8, 16], [1, 2, 3], "float32", "cpu", 1)
    assert [[case["pairs"] for case in sweep["cases"]] for sweep in result["sweeps"].values()] == [
        [1, 2, 3], [8] * 3, [8] * 3
    ]  # fmt: skip
    assert [case["parameters"] for case in result["sweeps"]["width"]["cases"]] == [8 * 16 * 2 * n for n in (4, 8, 16)]
    assert [case["rank"] for case in result["sweeps"]["rank"]["cases"]] == [1, 2, 3]


WHOLE = ["LoRARite", "AdamW (foreach)", "AdamW (fused)"]


def test_python_of_a_step(tmp_path, capsys):
    """All rows for each number of pairs; no part but the optimizers' arithmetic is run more often for more pairs."""
    out, threads = tmp_path / "host.json", torch.get_num_threads()
    assert run("host", "--pairs", 2, 50, "--width", 8, "--rank", 2, "--rounds", 12, "--out", out) == 0
    assert torch.get_num_threads() == threads
    few, many = json.loads(out.read_text())["cases"]
    printed = capsys.readouterr().out
    for case, pairs in ((few, 2), (many, 50)):
        assert (case["pairs"], case["width"], case["rank"]) == (pairs, 8, 2)
        assert [row["part"] for row in case["rows"]] == ["plan", "checks", "bookkeeping", *WHOLE]
        assert f"{pairs} pairs, width 8, rank 2" in printed
        rows = {row["part"]: row for row in case["rows"]}
        assert rows["AdamW (foreach)"]["ratio"] == 1
        low, high = rows["LoRARite"]["ratio_quartiles"]
        assert 0 < low <= rows["LoRARite"]["ratio"] <= high
        assert all(row["calls"] > 0 for row in case["rows"])
        assert sum(rows[part]["calls"] for part in ("plan", "checks", "bookkeeping")) < rows["LoRARite"]["calls"]
    for part in range(3):
        assert few["rows"][part]["calls"] == many["rows"][part]["calls"]


def test_calls_of_functions_in_python():
    def inner():
        return len([1])

    assert bench_host.python_calls(lambda: [inner() for _ in (1, 2, 3)]) in (3, 4)  # (a comprehension was a call)
    assert bench_host.python_calls(lambda: len([1])) == 0


def test_the_plan_holds_where_the_host_is_measured(monkeypatch):
    """Else what is measured would be planning, and the arithmetic that it needs."""
    shapes, planned = [Shape(8, 8, 2)] * 3, []

    def watched(*args):
        plan = make_plan(*args)
        planned.append(len(plan.pairs))
        return plan

    monkeypatch.setattr("lora_rite.optim.optimizer.make_plan", watched)
    bench_host.measure(shapes, 4, "eager")
    assert planned == [3, 3, 0]  # of two optimizers, and of one without gradients


def test_the_adapter_has_the_names_of_peft():
    optimizer = LoRARite(Adapter([Shape(6, 5, 2), Shape(4, 3, 2)], torch.float32, "cpu").named_parameters())
    assert optimizer.report()["pairs"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step", "--ranks", "4", "0"], "--ranks must be at least 1"),
        (["step", "--rounds", "0"], "--rounds must be at least 1"),
        (["step", "--layers", "0"], "--layers must be at least 1"),
        (["step", "--models", "no-such-model"], "--models no-such-model: "),
        (["step", "--dtypes", "int8"], "int8"),
        (["train", "--length", "0"], "--length must be at least 1"),
        (["scaling", "--widths", "8", "8", "16"], "--widths: an exponent needs three different values"),
        (["host", "--pairs", "0"], "--pairs must be at least 1"),
        (["host", "--width", "0"], "--width must be at least 1"),
        (["step", "--out", "."], "--out: . is a folder; name a file"),
        (["step", "--out", f"{__file__}/a.json"], "test_bench.py is not a folder"),
        (["step", "--plot", "p.foo"], "--plot: p.foo must end in .png or .svg or .pdf"),
        (["train"], "--device cuda: torch sees no CUDA device"),
    ],
)
def test_bad_arguments(words, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "measure", lambda *args: pytest.fail("measured"))
    assert run(*words, *(["--device", "cuda"] if words == ["train"] else [])) == 2
    error = capsys.readouterr().err
    assert re.search(re.escape(message), error)
    assert error.count("\n") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make test-gpu")
def test_on_cuda():
    (case,) = bench.bench_step(["tiny"], 1, [4], ["float32"], "cuda", False, 2)["cases"]
    rows = {row["optimizer"]: row for row in case["rows"]}
    assert rows["LoRARite"]["synchronisations"] <= 1
    assert rows["LoRARite (CUDA graph)"]["synchronisations"] == 0
