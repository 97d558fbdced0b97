"""Models whose experts share parameters, and other layers with several pairs in one: every command and count."""

import json
import re

import pytest
import torch

import lora_rite
from lora_rite import LoRARite, audit, create_lora_rite, find_pairs, param_groups
from lora_rite.plan.pairs import Shape

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")

import adapters  # noqa: E402

from lora_rite.bench import cases as bench  # noqa: E402
from lora_rite.bench import contenders  # noqa: E402
from lora_rite.cli import main  # noqa: E402
from lora_rite.finetune.load import attach_adapter, load_model  # noqa: E402
from lora_rite.finetune.models import TINY  # noqa: E402
from lora_rite.finetune.optimizers import create_optimizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SIZES = {
    "vocab_size": 8192, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS = {
    "qwen3_moe": lambda experts: transformers.Qwen3MoeConfig(num_experts=experts, moe_intermediate_size=20, **SIZES),
    "mixtral": lambda experts: transformers.MixtralConfig(num_local_experts=experts, **SIZES),
    # whose experts are transposed and have biases
    "gpt_oss": lambda experts: transformers.GptOssConfig(
        num_local_experts=experts, layer_types=["full_attention"], **SIZES
    ),
}
#: Beside experts, a layer of rank 3 in one adapter.
MIXED = {
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "rank_pattern": {"v_proj": 3},
    "r": 2,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of each kind with four experts a layer, and the embedded model's tokenizer."""
    made = {}
    for kind, config in CONFIGS.items():
        torch.manual_seed(0)
        made[kind] = tmp_path_factory.mktemp(kind)
        transformers.AutoModelForCausalLM.from_config(config(4)).save_pretrained(made[kind])
        transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(made[kind])
    return made


def run(*words):
    return main([str(word) for word in words])


def mixed(folder):
    """The model with an adapter of ordinary pairs, another rank and experts; random factors."""
    torch.manual_seed(0)
    network = load_model(str(folder))[0]
    network.set_experts_implementation("eager")  # which knows float64
    model = peft.get_peft_model(network, peft.LoraConfig(**MIXED))
    adapters.randomise(model)
    return model


@pytest.mark.parametrize(("kind", "pairs"), [("qwen3_moe", 4 + 1 + 2 * 4), ("mixtral", 4 + 1 + 2 * 4)])
def test_what_train_writes_every_command_reads(kind, pairs, folders, tmp_path, capsys):
    """Four pairs of attention, the router's, and two for each expert; eval measures the loss that train ended with."""
    data, held_out, out = tmp_path / "data.jsonl", tmp_path / "held_out.jsonl", tmp_path / "run"
    for path, first in ((data, 0), (held_out, 20)):
        texts = [f"line {i}, {i * i} is a number." for i in range(first, first + 20)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["--model", folders[kind], "--data", data, "--validation", held_out, "--rank", 2, "--max_length", 32]
    assert run("train", *words, "--lr", 1e-3, "--steps", 2, "--batch_size", 4, "--out", out, "--no_progress") == 0
    result = json.loads((out / "result.json").read_text())
    assert result["optimizer"]["report"]["pairs"] == result["optimizer"]["report"]["pairs_preconditioned"] == pairs
    capsys.readouterr()
    words = ["--model", folders[kind], "--adapter", out / "adapter"]
    assert (
        run("eval", *words, "--tasks", held_out, "--max_length", 32, "--out", tmp_path / "eval", "--no_progress") == 0
    )
    judged = json.loads((tmp_path / "eval" / "held_out.json").read_text())["results"]["loss"]["nat_per_token"]
    assert judged == pytest.approx(result["held_out"]["after"], abs=1e-5)
    capsys.readouterr()
    assert run("pairs", *words) == 0
    assert capsys.readouterr().out.startswith(f"{pairs} pairs\n")
    small = [
        "--steps",
        2,
        "--conditions",
        10,
        "--dtypes",
        "float64",
        "--optimizer_args",
        '{"row_equilibration": false}',
    ]
    assert run("audit", *words, *small) == 0
    assert "as it is (experts), float64" in capsys.readouterr().out
    assert run("audit", *words, *small[:-2], "--optimizer", "torch.optim:AdamW") == 3


@pytest.mark.parametrize("kind", CONFIGS)
def test_ordinary_pairs_a_rank_pattern_and_experts_in_one_adapter(kind, folders, tmp_path):
    """Read back as it was; a factor of other ranks is refused, whether its rows are those of experts or not."""
    from safetensors.torch import load_file, save_file

    model, folder = mixed(folders[kind]), tmp_path / "adapter"
    model.save_pretrained(str(folder))
    back = attach_adapter(load_model(str(folders[kind]))[0], adapter=folder)
    pairing = find_pairs(back)
    shapes = sorted((pair.shape.rank, pair.blocks) for pair in pairing.pairs)
    assert shapes == [(2, 1), (2, 4), (2, 4), (3, 1)]
    assert pairing.count == 10
    for one, other in zip(pairing.pairs, find_pairs(model).pairs, strict=True):
        assert one.a_name == other.a_name
        assert torch.equal(one.a, other.a)
        assert torch.equal(one.b, other.b)
    file = folder / "adapter_model.safetensors"
    sound = load_file(file)
    a_names = [name for name in sound if "lora_A" in name]
    assert len(a_names) == 4
    for name in a_names:
        partner, experts = name.replace("lora_A", "lora_B"), 4 if "experts" in name else 1
        rows = 4 * experts  # ranks are 2 and 3
        save_file({**sound, name: torch.zeros(rows, 16), partner: torch.zeros(len(sound[partner]), rows)}, file)
        with pytest.raises(lora_rite.LoRARiteValueError, match=re.escape(name.removeprefix("base_model."))):
            attach_adapter(load_model(str(folders[kind]))[0], adapter=folder)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_audit_gives_each_expert_a_k_of_its_own(kind, folders):
    """LoRARite is invariant, AdamW is not; so is LoRARite of names alone, and what takes all experts for one pair is
    not."""
    model = mixed(folders[kind])
    options = {"lr": 1e-2, "row_equilibration": False}
    shared = {"steps": 3, "conditions": [10.0], "dtypes": ["float64"]}
    for takes in (None, "named"):
        result = audit(LoRARite, model, options=options, takes=takes, **shared)
        assert result["passed"]
        assert {row["layer"] for row in result["rows"]} == {"linear", "experts"}
        assert max(row["worst"] for row in result["rows"]) < 1e-7
    one_pair = audit(LoRARite, model, options=options, takes="params", **shared)
    assert "experts" in {row["layer"] for row in one_pair["rows"] if row["verdict"] == "failed"}
    adamw = audit(torch.optim.AdamW, model, options={"lr": 1e-2}, **shared)
    assert {row["layer"] for row in adamw["rows"] if row["verdict"] == "failed"} == {"linear", "experts"}


@pytest.mark.parametrize("kind", adapters.STACKED, ids=lambda kind: kind.name)
def test_the_audit_of_every_layer_with_several_pairs(kind):
    """Experts, groups of convolutions, blocks: from dense factors, LoRARite passes and AdamW fails."""
    model = kind.build()
    adapters.randomise(model)
    loss = lambda m, step: adapters.loss(m, kind.inputs(step).to(next(m.parameters()).dtype))
    shared = {"steps": 3, "conditions": [10.0], "dtypes": ["float64"]}
    result = audit(LoRARite, model, loss, options={"lr": 1e-2}, **shared)
    assert result["passed"]
    assert max(row["worst"] for row in result["rows"]) < 1e-8
    assert not audit(torch.optim.AdamW, model, loss, options={"lr": 1e-2}, **shared)["passed"]


@pytest.mark.parametrize("kind", adapters.STACKED, ids=lambda kind: kind.name)
def test_names_and_shapes_tell_what_the_model_tells(kind):
    """All of `named_parameters()` gives the pairs of the model, under any prefix; classes and names alike."""
    model = kind.build()
    expected = [(pair.a_name, pair.shape) for pair in find_pairs(model).pairs]
    assert expected[0][1].blocks == kind.pairs
    assert [(pair.a_name, pair.shape) for pair in find_pairs(model.named_parameters()).pairs] == expected
    assert LoRARite(model.named_parameters()).report()["pairs"] == kind.pairs
    assert create_optimizer(model, "lora_rite:LoRARite", 1e-2).report()["pairs"] == kind.pairs
    part = adapters.lora_layer(model)
    assert [pair.shape for pair in find_pairs(part.named_parameters()).pairs] == [shape for _, shape in expected]


@pytest.mark.parametrize("kind", CONFIGS)
def test_names_without_the_weights_warn_of_experts(kind, folders):
    """The trainable parameters alone do not tell how many experts there are; of ordinary layers nothing is said."""
    model = mixed(folders[kind])
    assert LoRARite(model.named_parameters()).report()["pairs"] == create_lora_rite(model).report()["pairs"] == 10
    alone = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with pytest.warns(
        UserWarning, match=r"experts.*may hold a pair for each expert.*create_lora_rite\(model\)"
    ) as seen:
        optimizer = LoRARite(alone)
    assert len(seen) == 2
    assert optimizer.report()["pairs"] == 4
    assert len(param_groups([(name, p) for name, p in alone if "experts" not in name])) == 1  # no warning


def test_factors_one_above_the_other_get_a_hint():
    """As loralib's MergedLinear has them: q and v of one matrix, each with an A of its own."""
    a, b = torch.nn.Parameter(torch.randn(8, 12)), torch.nn.Parameter(torch.zeros(20, 4))
    with pytest.raises(ValueError, match=r'rank mismatch 8 vs 4.*MergedLinear.*"blocks": 2\}$'):
        LoRARite([("c_attn.lora_A", a), ("c_attn.lora_B", b)])
    assert LoRARite([{"params": [a, b], "kind": "lora", "blocks": 2}]).report()["ranks"] == {4: 2}
    with pytest.raises(ValueError, match=r"rank mismatch 8 vs 3.*\(m, r\)$"):
        LoRARite([("c_attn.lora_A", a), ("c_attn.lora_B", torch.nn.Parameter(torch.zeros(20, 3)))])


def test_block_diagonal_and_ordinary_adapters_of_one_layer():
    """Each adapter has its own layout."""
    model = next(kind for kind in adapters.STACKED if kind.name == "bdlora_b").build()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    for source in (model, model.named_parameters()):
        assert [pair.shape for pair in find_pairs(source).pairs] == [Shape(12, 8, 2, 2), Shape(12, 16, 2)]


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_bench_and_check_count_each_expert(kind, tmp_path, capsys):
    """Pairs, elements and bytes of state, at two and at sixteen experts; the state is what the optimizer then has."""
    from lora_rite.study.check import needs
    from lora_rite.study.recipe import load_recipe
    from lora_rite.study.search import Study

    for experts in (2, 16):
        folder = tmp_path / f"{kind}{experts}"
        CONFIGS[kind](experts).save_pretrained(folder)
        model = attach_adapter(transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](experts)), rank=2)
        optimizer = create_lora_rite(model)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
        pairs, state = 4 + 1 + 2 * experts, optimizer.report()["state_bytes"]
        elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
        (case,) = bench.bench_step([str(folder)], None, [2], ["float32"], "cpu", False, 1)["cases"]
        rows = {row["optimizer"]: row for row in case["rows"]}
        assert (case["pairs"], case["parameters"]) == (pairs, elements)
        assert rows["LoRARite"]["state_bytes"] == case["formula_bytes"] == state
        train = {"model": str(folder), "batch_size": 1, "max_length": 8}
        recipe = {
            "title": "experts", "ranks": [2], "train": train, "seeds": [0],
            "tasks": {"all": {"data": str(tmp_path / "data.jsonl"), "test": str(tmp_path / "data.jsonl")}},
            "optimizers": {"LoRA-RITE": {"optimizer": "lora-rite", "lr": [1e-3]},
                           "class": {"optimizer": "lora_rite:LoRARite", "lr": [1e-3]},
                           "AdamW": {"optimizer": "adamw", "lr": [1e-3]}},
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        need = needs(Study(load_recipe(tmp_path / "recipe.yaml")), 2)
        assert (need.pairs, need.adapter) == (pairs, 8 * elements)
        assert need.state["LoRA-RITE"] == need.state["class"] == state
        assert need.state["AdamW"] == pytest.approx(8 * elements, rel=0.05)
        assert need.activations > 4 * sum(
            p.numel() for name, p in model.named_parameters() if name.endswith("_up_proj")
        )


def test_the_share_of_a_step_is_measured_with_each_expert_as_a_pair(tmp_path, monkeypatch):
    made = []
    create = contenders.create_lora_rite
    monkeypatch.setattr(
        contenders, "create_lora_rite", lambda *args, **options: made.append(create(*args, **options)) or made[-1]
    )
    CONFIGS["qwen3_moe"](4).save_pretrained(tmp_path)
    bench.bench_train([str(tmp_path)], None, 2, "float32", "cpu", 1, 8, 1)
    assert made[0].report()["pairs_preconditioned"] == 4 + 1 + 2 * 4
