"""Every recipe: its options are valid, its command works, its model, pairs and memory are known from shapes alone."""

import itertools
import math
import shlex
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("jsonargparse")
pytest.importorskip("pytorch_optimizer")

from lora_rite.bench.shapes import linear_maps
from lora_rite.cli import main
from lora_rite.finetune.tasks import find_task
from lora_rite.run.files import write_json
from lora_rite.study import check as module
from lora_rite.study.compare import RECIPE, _check_folder
from lora_rite.study.recipe import HEADERS, load_recipe
from lora_rite.study.results import plain
from lora_rite.study.search import Study

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
GEMMA = {
    "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 256,
}  # fmt: skip
#: What tools/fetch_model.py and prune_vocabulary.py write: transformers' model type and settings, and the number of
#: pairs.
FETCHED = {
    "models/gemma3-270m": ("gemma3_text", {**GEMMA, "vocab_size": 262144}, 18 * 7),
    "models/gemma3-270m-cpp": ("gemma3_text", {**GEMMA, "vocab_size": 16227}, 18 * 7),
    "models/smollm2-135m": (
        "llama",
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True},
        30 * 7,
    ),
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml"))
pytestmark = pytest.mark.filterwarnings("ignore")


def test_there_are_recipes():
    """An empty list would pass every other test."""
    assert len(RECIPES) >= 14
    models = {load_recipe(ROOT / path).train["model"] for path in RECIPES}
    hub = {"google/gemma-2b", "google/gemma-2-2b", "google/gemma-7b", "google/gemma-7b-it", "google/mt5-xxl"}
    assert models == {"tiny", MINILM, *hub, *FETCHED}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as a user has it who runs recipes: with these, and with the configurations of models that were
    fetched."""
    from transformers import AutoConfig

    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for name, (kind, sizes, _) in FETCHED.items():
        AutoConfig.for_model(kind, **sizes).save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_recipe(path, folder, capsys):
    """The first line is a command that works (its plan is printed here); the adapter pairs completely; the memory is
    that of its weights at least; the tasks exist."""
    command = shlex.split((ROOT / path).read_text().splitlines()[0].removeprefix("#"))
    assert command[:3] == ["lora-rite", "compare", str(path)]
    assert main([*command[1:], "--dry-run"]) == 0
    study = Study(load_recipe(path))
    assert f"{study.planned({})} runs, 0 of them finished" in capsys.readouterr().out
    model = study.recipe.train["model"]
    expected = {"tiny": 35, "google/gemma-7b-it": 28 * 7, MINILM: 6 * 6 + 1}
    expected |= {name: pairs for name, (_, _, pairs) in FETCHED.items()}
    for rank in study.recipe.ranks:
        needs = module.needs(study, rank)
        name = model.removeprefix("google/")
        assert needs.pairs == (expected.get(model) or len(linear_maps(name)))
        assert needs.total > needs.weights > 2 * needs.parameters - 1
        adamw = next(iter(study.recipe.optimizers))
        assert study.recipe.optimizers[adamw].optimizer == "adamw"
        # two moments in float32 beside the factor and its gradient, and a counter
        assert needs.state[adamw] == pytest.approx(needs.adapter, rel=0.01)
        assert set(needs.state) == set(study.recipe.optimizers)
    for task in study.recipe.tasks.values():
        if task.task not in (None, HEADERS):
            find_task(task.task)
    for contender in study.recipe.optimizers.values():
        ratios = [b / a for a, b in itertools.pairwise(contender.lr)]
        assert all(math.isclose(math.log(r), math.log(ratios[0]), rel_tol=0.1) for r in ratios), "no geometric grid"


@pytest.mark.parametrize("model", ["gemma3-270m", "smollm2-135m"])
def test_a_real_model_s_recipes_go_on_with_one_study(model, tmp_path):
    """Those that add ranks and optimizers name the same folder, and compare takes the finished runs of it."""
    base = load_recipe(ROOT / f"recipes/real/{model}.yaml")
    write_json(tmp_path / RECIPE, plain(asdict(base)))
    for more in ("ranks", "rivals"):
        path = ROOT / f"recipes/real/{model}-{more}.yaml"
        recipe = load_recipe(path)
        _check_folder(tmp_path, recipe)
        runs = [set(Study(r).due({})) for r in (base, recipe)]
        assert runs[0] < runs[1]
        assert path.read_text().splitlines()[0].endswith(f"--out runs/{model}")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gemma-2b", 2.506e9), ("gemma-2-2b", 2.614e9), ("gemma-7b", 8.538e9), ("mt5-xxl", 11.90e9)],
)
def test_configurations_are_those_of_the_models(name, parameters):
    """Their published numbers of parameters (mT5 has 12.92e9 with an output layer of its own, which transformers ties
    to the embedding), and the adapter shapes that `lora-rite bench` has from the same models."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from lora_rite import find_pairs
    from lora_rite.finetune.load import attach_adapter
    from lora_rite.finetune.models import configuration

    config = configuration(f"google/{name}", "train.model")
    build = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        network = build.from_config(config)
        count = sum(p.numel() for p in network.parameters())
        network = attach_adapter(network, rank=2)
    assert count == pytest.approx(parameters, rel=0.001)
    assert Counter(pair.shape for pair in find_pairs(network).pairs) == Counter(linear_maps(name, rank=2))


def test_a_model_or_target_that_is_not_there_is_named(tmp_path, capsys):
    text = (ROOT / "recipes/small/gsm8k.yaml").read_text()
    for old, new, message in (
        ("model: tiny", f"model: {tmp_path}/nothing", f"train.model {tmp_path}/nothing: "),
        ("model: tiny", "model: tiny\n  target_modules: [no_such_layer]", "no_such_layer"),
        (
            "{optimizer: adamw,",
            "{optimizer: adamw, optimizer_args: {no_such: 1},",
            "optimizers.AdamW.optimizer_args.no_such: ",
        ),
        ("{optimizer: adamw,", "{optimizer: adamw, optimizer_args: {beta: 1},", "did you mean betas?"),
    ):
        path = tmp_path / "recipe.yaml"
        path.write_text(text.replace(old, new))
        assert main(["compare", str(path), "--check"]) == 2
        assert message in capsys.readouterr().err


def test_check_reads_the_data(tmp_path, capsys):
    """Bad local data is found before anything is trained."""
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text('{"question": "1 + 1?"}\n')
    assert main(["compare", str(ROOT / "recipes/small/gsm8k.yaml"), "--check", "--data-dir", str(tmp_path)]) == 2
    assert "train.jsonl" in capsys.readouterr().err
