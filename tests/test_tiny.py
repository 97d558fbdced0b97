"""The embedded model: it is small, loads offline, and is the language model that its committed figures say it is."""

import inspect
import json
import pathlib
import string

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_rite

TINY = pathlib.Path(lora_rite.__file__).parent / "finetune" / "tiny"
FIGURES = pathlib.Path(__file__).parents[1] / "benchmarks" / "results" / "tiny_model.json"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY, local_files_only=True, dtype=torch.float32).eval()


def test_directory_is_small_and_complete():
    names = {file.name for file in TINY.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "data.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 12_000_000


def test_model_is_a_small_tied_bfloat16_gemma(model):
    config = json.loads((TINY / "config.json").read_text())
    assert config["architectures"] == ["GemmaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) <= 5_000_000


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "def f(x):\n\tif x:\n\t\treturn x\n\n\n        # done\n",
        "a , b . c ' d n't  ?  !\r\n\r\n trailing   ",
        "grüße → Ωμέγα 你好 😀 \u00a0 \u2028 e\u0301",
        "<bos> </s> [PAD] 1234567890",
        string.printable,
        "\x00\x7f\ufeff",
        inspect.getsource(pathlib),
    ],
)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text) == [tokenizer.bos_token_id, *ids]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_tokenizer_special_tokens_and_indentation(tokenizer, model):
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert special == [0, 1, 2]
    assert special == [model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id]
    assert len(tokenizer) == model.config.vocab_size
    for depth in range(1, 6):
        assert len(tokenizer.encode("\n" + "    " * depth, add_special_tokens=False)) == 1


def test_model_knows_python(tokenizer, model):
    ids = tokenizer(inspect.getsource(inspect.getsource), return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
        shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
        noise = model(input_ids=shuffled, labels=shuffled).loss
    assert loss < 4.0  # a model that knows nothing has log(4096) = 8.3
    assert noise > loss + 2


def test_model_generates(tokenizer, model):
    inputs = tokenizer("class Test(unittest.TestCase):\n    def setUp(", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "self" in tokenizer.decode(output[0, inputs.input_ids.shape[1] :])


def test_splits_are_disjoint():
    texts = json.loads((TINY / "data.json").read_text())["texts"]
    digests = {split: {t["sha256"] for t in texts if t["split"] == split} for split in ("train", "held_out")}
    assert digests["train"]
    assert digests["held_out"]
    assert not digests["train"] & digests["held_out"]
    assert len({t["path"] for t in texts}) == len(texts) == sum(map(len, digests.values()))


def test_committed_figures_belong_to_the_shipped_model(model):
    figures = json.loads(FIGURES.read_text())
    data = json.loads((TINY / "data.json").read_text())
    gap = figures["trigram"]["all"]["nat_per_token"] - figures["model"]["all"]["nat_per_token"]
    assert gap >= 0.7
    assert figures["gap_nat_per_token"] == pytest.approx(gap, abs=1e-4)
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())
    assert figures["training"] == data["training"]
    assert f"{figures['model']['all']['nat_per_token']:.3f}" in (TINY / "README.md").read_text()
