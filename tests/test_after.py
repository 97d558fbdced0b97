"""What comes after training: lora-rite merge, generate and chat, on tiny models, offline."""

import io
import json
import sys

import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("jsonargparse")

import torch  # noqa: E402
import transformers  # noqa: E402
from task_files import make_mt5  # noqa: E402

from lora_rite.cli import main  # noqa: E402
from lora_rite.errors import LoRARiteError, LoRARiteValueError, WriteError  # noqa: E402
from lora_rite.finetune import adapted, sources  # noqa: E402
from lora_rite.finetune import generate as generate_module  # noqa: E402
from lora_rite.finetune import merge as merge_module  # noqa: E402
from lora_rite.finetune.models import TINY  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "always::UserWarning")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPT = "def add(a, b):\n    return"


def run(*words):
    return main([str(word) for word in words])


def make_llama(folder, dtype="bfloat16", template=None, **config):
    """A random Llama with the embedded model's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.LlamaConfig(
        **{**sizes, **ids, "max_position_embeddings": 64, "initializer_range": 0.3, **config}
    )
    transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def make_gemma3(folder, window):
    """A random Gemma 3 of two layers that see so many tokens and one that sees all."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        sliding_window=window,
        layer_types=layers,
        initializer_range=0.3,
        **sizes,
    )
    transformers.Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


def make_mixtral(folder):
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.MixtralConfig(vocab_size=4096, num_key_value_heads=2, num_local_experts=3, **sizes)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def make_gpt2(folder):
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    config = transformers.GPT2Config(vocab_size=4096, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def load(folder, **options):
    config = transformers.AutoConfig.from_pretrained(folder)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, **options).eval()


def make_adapter(folder, base, config=None, **options):
    """An adapter of random factors, none of them zero, of the base model in a folder."""
    if config is None:
        kind = "SEQ_2_SEQ_LM" if transformers.AutoConfig.from_pretrained(base).is_encoder_decoder else "CAUSAL_LM"
        config = peft.LoraConfig(
            **{"r": 4, "lora_alpha": 8, "task_type": kind, "target_modules": "all-linear"} | options
        )
    model = peft.get_peft_model(load(base, dtype=torch.float32), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return folder


def logits(model):
    ids = torch.arange(3, 40)[None]
    more = {"decoder_input_ids": ids[:, :9]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@pytest.fixture
def base(tmp_path):
    return make_llama(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    return make_adapter(tmp_path / "adapter", base)


# ------------------------------------------------------------------------------------------------------------- merge

LORA = {
    "linear": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding_dora": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding_and_head": {"target_modules": ["lm_head", "embed_tokens"]},
    "tied_adapters": {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    "saved_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved_embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "token_rows": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}},
}
OTHERS = {
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "hira": lambda: peft.HiraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", [*LORA, *OTHERS])
def test_a_merged_model_is_base_and_adapter(name, tied, tmp_path):
    """Its logits in float32, on other tokens than merge looks at, are those of PEFT's model to 1e-4 of their size: also
    where the embedding is the head and the adapter changes one of them."""
    if not tied and name == "tied_adapters":
        pytest.skip("nothing is tied")
    base = make_llama(tmp_path / "base", tie_word_embeddings=tied)
    config = OTHERS[name]() if name in OTHERS else None
    adapter = make_adapter(tmp_path / "adapter", base, config, **LORA.get(name, {}))
    done = merge_module.merge(str(adapter), tmp_path / "merged", dtype="float32")
    before = logits(load(base, dtype=torch.float32))
    expected = logits(peft.PeftModel.from_pretrained(load(base, dtype=torch.float32), adapter).eval())
    found = logits(load(tmp_path / "merged"))
    assert (expected - before).norm() > 1e-2 * expected.norm(), "the adapter does nothing, so nothing is tested"
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert done["difference"] < 1e-4
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    assert "adapter_config.json" not in names


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make_mt5, {}),
        (make_mt5, {"use_dora": True}),
        (make_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        (make_mixtral, {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}),
    ],
    ids=["encoder_decoder", "encoder_decoder_dora", "transposed", "experts"],
)
def test_other_models_are_merged(make, options, tmp_path):
    """Encoder–decoder models, GPT-2's transposed maps, experts: the same logits, to 1e-4 of their size."""
    base = make(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, **options)
    merge_module.merge(str(adapter), tmp_path / "merged")
    before = logits(load(base))
    expected = logits(peft.PeftModel.from_pretrained(load(base), adapter).eval())
    assert (expected - before).norm() > 1e-2 * expected.norm()
    assert (logits(load(tmp_path / "merged")) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_convolutions_are_merged(size, dora):
    """In one, two and three dimensions: the outputs are the same to 1e-4 of their size."""
    kind = getattr(torch.nn, f"Conv{size}d")
    network = torch.nn.Sequential(kind(3, 6, 3), torch.nn.Tanh(), kind(6, 2, 3, padding=1)).requires_grad_(False)
    model = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=["0", "2"], use_dora=dora)).eval()
    x = torch.randn(2, 3, *[5] * size)
    before = model(x)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    expected = model(x)
    assert (expected - before).norm() > 1e-2 * expected.norm()
    assert (merge_module._merged(model)(x) - expected).norm() < 1e-4 * expected.norm()


def test_what_a_model_cannot_hold_is_refused(tmp_path):
    """mT5's encoder and decoder share one embedding, of which an adapter of ``shared`` changes neither."""
    base = make_mt5(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["shared", "q"])
    with pytest.raises(LoRARiteError, match="cannot be merged"):
        merge_module.merge(str(adapter), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("dtype", "written"), [(None, "bfloat16"), ("float32", "float32"), ("float16", "float16")])
def test_the_dtype_is_kept_or_chosen(dtype, written, adapter, tmp_path, capsys):
    """All weights are in it, and the config says so."""
    from safetensors import safe_open

    out = tmp_path / "merged"
    assert run("merge", adapter, "--out", out, *(["--dtype", dtype] if dtype else [])) == 0
    assert f"in {written}" in capsys.readouterr().out
    with safe_open(out / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {getattr(torch, written)}  # noqa: SIM118
    assert json.loads((out / "config.json").read_text())["dtype"] == written


def test_a_model_is_rounded_once(tmp_path):
    """From float32 to bfloat16: what is written is their sum, rounded, and not that of a rounded base."""
    base = make_llama(tmp_path / "base", "float32")
    adapter = make_adapter(tmp_path / "adapter", base)
    for dtype in ("float32", "bfloat16"):
        merge_module.merge(str(adapter), tmp_path / dtype, dtype=dtype)
    whole, rounded = (load(tmp_path / dtype).state_dict() for dtype in ("float32", "bfloat16"))
    assert all(torch.equal(rounded[name], whole[name].bfloat16()) for name in whole)


def test_a_quantised_base_is_dequantised(tmp_path, capsys):
    """bitsandbytes' NF4: the merged model is that of the dequantised base, and no longer quantised."""
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = load(make_llama(tmp_path / "plain", hidden_size=64), quantization_config=config, dtype=torch.float32)
    quantised.save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "plain")
    assert run("merge", adapter, "--model", tmp_path / "base", "--out", tmp_path / "merged") == 0
    assert "the quantised weights are dequantised to float32" in capsys.readouterr().err
    merged = load(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    quantised.dequantize(dtype=torch.float32)
    expected = logits(peft.PeftModel.from_pretrained(quantised, adapter).eval())
    assert (logits(merged) - expected).norm() < 1e-4 * expected.norm()
    plain = logits(peft.PeftModel.from_pretrained(load(tmp_path / "plain", dtype=torch.float32), adapter).eval())
    assert (logits(merged) - plain).norm() > 1e-2 * expected.norm(), "it was not quantised"


def test_a_gguf_base_is_found_and_dequantised(tmp_path, capsys):
    """The adapter of a run on a GGUF file records the file, of which its folder is not the model."""
    pytest.importorskip("gguf")
    from test_gguf import train_words, write_gguf

    write_gguf(tmp_path / "small.gguf")
    rows = [{"prompt": f"{'ab' * n} ", "completion": "cab baa"} for n in range(1, 13)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(train_words(tmp_path / "small.gguf", tmp_path / "data.jsonl", tmp_path / "run")) == 0
    capsys.readouterr()
    assert run("merge", tmp_path / "run", "--out", tmp_path / "merged") == 0
    printed = capsys.readouterr()
    assert "dequantised to float32" in printed.err
    assert "small.gguf with" in printed.out
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")("cab").input_ids


def test_a_generation_config_that_transformers_would_not_write(base, adapter, tmp_path):
    """Models are published with a temperature and without sampling, which transformers reads and refuses to write."""
    (base / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "top_p": 0.9}')
    merge_module.merge(str(adapter), tmp_path / "merged")
    found = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert found["temperature"] == 0.6


def test_what_is_in_out_stays(adapter, tmp_path, capsys, monkeypatch):
    """A folder with a file in it is refused before anything is loaded, a file too; an empty folder is fine."""
    out = tmp_path / "merged"
    out.mkdir()
    (out / "mine").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(merge_module, "load_source", lambda *_, **__: pytest.fail("a model was loaded"))
        assert run("merge", adapter, "--out", out) == 2
        assert f"--out {out} is not empty" in capsys.readouterr().err
        assert run("merge", adapter, "--out", out / "mine") == 2
        assert run("merge", adapter) == 2
        assert "--out is needed" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    assert run("merge", adapter, "--out", out) == 0
    assert (out / "model.safetensors").is_file()


def test_what_comes_into_out_meanwhile_stays(adapter, tmp_path, monkeypatch):
    out, read_back = tmp_path / "merged", merge_module._difference

    def put(*arguments):
        out.mkdir()
        (out / "mine").write_text("mine")
        return read_back(*arguments)

    monkeypatch.setattr(merge_module, "_difference", put)
    with pytest.raises(LoRARiteValueError, match="is not empty"):
        merge_module.merge(str(adapter), out)
    assert (out / "mine").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_a_model_that_cannot_be_written_is_not_there(adapter, tmp_path, monkeypatch):
    """The disk fills up while it is written: exit code 4's error, no folder, none half-written beside it."""
    monkeypatch.setenv("LORA_RITE_FAILPOINT", "merged written=ENOSPC")
    with pytest.raises(WriteError, match="cannot write the model"):
        merge_module.merge(str(adapter), tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
    monkeypatch.delenv("LORA_RITE_FAILPOINT")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(WriteError, match=r"0 MB free, and the model needs"):
        merge_module.merge(str(adapter), tmp_path / "merged")


def test_a_merge_that_loses_something_is_found_and_not_written(adapter, tmp_path, monkeypatch):
    """The model is read back: one weight that is not as it should be is an error, and there is no folder."""
    merged = merge_module._merged

    def forgetful(network):
        network = merged(network)
        with torch.no_grad():
            network.model.layers[1].self_attn.q_proj.weight.mul_(1.01)
        return network

    monkeypatch.setattr(merge_module, "_merged", forgetful)
    with pytest.raises(LoRARiteError, match="cannot be merged"):
        merge_module.merge(str(adapter), tmp_path / "merged", dtype="float32")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_cannot_be_merged_says_why(base, tmp_path, capsys):
    make_adapter(tmp_path / "adapter", base, lora_bias=True)
    assert run("merge", tmp_path / "adapter", "--out", tmp_path / "merged") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"cannot merge {tmp_path / 'adapter'}: " in line
    assert "bias" in line
    assert not (tmp_path / "merged").exists()


# ----------------------------------------------------------------------------------------------------- what is named


def test_the_base_is_the_recorded_one_or_the_one_given(base, adapter, tmp_path, capsys):
    moved = base.rename(tmp_path / "moved")
    assert run("merge", adapter, "--out", tmp_path / "merged") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"(the base model of {adapter}; --model gives another one)" in line
    assert run("merge", adapter, "--out", tmp_path / "merged", "--model", moved) == 0
    other = make_llama(tmp_path / "other", hidden_size=64)
    assert run("merge", adapter, "--out", tmp_path / "merged2", "--model", other) == 2
    assert "size mismatch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recorded", "says"),
    [
        (None, "names no base model: give it by --model"),
        ("", "names no base model"),
        ("a\nb", "names no base model"),
        ("https://user:secret@host/model", "names no base model"),
        (["tiny"], "names no base model"),
    ],
)
def test_an_adapter_without_a_base(recorded, says, adapter, capsys):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": recorded}))
    assert run("generate", adapter, "--prompt", "a") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert "secret" not in line


def test_the_embedded_model_of_another_installation(adapter):
    path = adapter / "adapter_config.json"
    there = "/usr/lib/python3/site-packages/lora_rite/finetune/tiny"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": there}))
    assert sources.find_source(str(adapter)) == ("tiny", adapter)


def test_a_run_an_adapter_and_a_model_are_told_apart(base, adapter, tmp_path):
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    adapter.rename(run_folder / "adapter")
    assert sources.find_source(str(run_folder)) == (str(base), run_folder / "adapter")
    assert sources.find_source(str(run_folder / "adapter")) == (str(base), run_folder / "adapter")
    assert sources.find_source(str(base)) == (str(base), None)
    assert sources.find_source("tiny") == ("tiny", None)
    with pytest.raises(LoRARiteValueError, match="is for an adapter"):
        sources.find_source(str(base), "tiny")
    with pytest.raises(LoRARiteValueError, match="is no adapter"):
        merge_module.merge(str(base), tmp_path / "merged")
    with pytest.raises(LoRARiteValueError, match="not a URL") as caught:
        sources.find_source("https://user:secret@host/model")
    assert "secret" not in str(caught.value)
    (tmp_path / "stopped" / "checkpoints").mkdir(parents=True)
    (tmp_path / "stopped" / "settings.json").write_text("{}")
    with pytest.raises(LoRARiteValueError, match="has not finished"):
        sources.find_source(str(tmp_path / "stopped"))


@pytest.mark.parametrize(
    ("name", "meant"), [("runs/frist", ", did you mean runs/first?"), ("me/model", ""), ("first", "")]
)
def test_a_mistyped_folder_is_told_from_a_hub_id(name, meant, tmp_path, monkeypatch, capsys):
    """Whose form it has: with the folder beside it that was meant, where there is one."""
    (tmp_path / "runs" / "first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert run("generate", name, "--prompt", "a") == 2
    assert f"cannot load {name} (a hub id: there is no such folder{meant})" in capsys.readouterr().err


def test_an_adapter_on_the_hub(base, adapter, monkeypatch):
    """Its safetensors, config and tokenizer are fetched, no pickle and no code; another id is a model's."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    fetched = {}

    def download(name, file):
        if name != "me/mine":
            raise EntryNotFoundError("no such file")

    def snapshot(name, allow_patterns):
        fetched[name] = allow_patterns
        return str(adapter)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert sources.find_source("me/mine") == (str(base), adapter)
    assert not any(pattern.endswith((".bin", ".py", ".pt", "/*")) or pattern == "*" for pattern in fetched["me/mine"])
    assert sources.find_source("google/gemma-2b") == ("google/gemma-2b", None)


@pytest.mark.parametrize("verb", [["generate", "--prompt", "a"], ["chat"], ["merge", "--out", "merged"]])
def test_a_strangers_adapter_runs_nothing(verb, adapter, tmp_path, capsys, monkeypatch):
    """A pickle is refused by name."""
    monkeypatch.chdir(tmp_path)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert run(verb[0], adapter, *verb[1:]) == 2
    assert "is a pickle, which can run code" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_the_tokenizer_of_a_strangers_adapter_runs_nothing(adapter, tmp_path, capsys):
    """A tokenizer whose class is a file of the adapter's is not imported without --trust_remote_code."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.save_pretrained(adapter)
    path = adapter / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    path.write_text(json.dumps({**config, "tokenizer_class": "Evil"}))
    (adapter / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    run("generate", adapter, "--prompt", "a", "--max_new_tokens", 1)
    assert not (tmp_path / "canary").exists()
    assert "evil" not in sys.modules


# ---------------------------------------------------------------------------------------------------------- generate


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model with a chat template."""
    torch.manual_seed(0)
    return make_llama(tmp_path_factory.mktemp("talker"), "float32", TEMPLATE)


def greedy(folder, text, tokens, network=None, **options):
    """What transformers makes of a text, by itself."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids if isinstance(text, str) else text
    network = load(folder) if network is None else network
    output = network.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, **options)
    start = 0 if network.config.is_encoder_decoder else ids.shape[1]
    return tokenizer.decode(output[0, start:], skip_special_tokens=True)


def test_generate_writes_what_the_adapter_makes_of_the_prompt(base, adapter, capsys):
    """Greedily, by transformers and PEFT; another text than the base model's; and nothing else on stdout."""
    expected = greedy(base, PROMPT, 8, peft.PeftModel.from_pretrained(load(base), adapter).eval())
    assert expected != greedy(base, PROMPT, 8)
    assert run("generate", adapter, "--prompt", PROMPT, "--max_new_tokens", 8, "--temperature", 0) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{expected}\n"
    assert printed.err == "lora-rite: the model has no chat template: it goes on with the text as it is\n"


def test_the_text_is_streamed(monkeypatch):
    """Piece by piece, while the model still writes."""
    writer = generate_module.Writer("tiny", None, {"max_new_tokens": 12, "temperature": 0})
    steps, pieces, forward = [], [], writer.network.forward
    monkeypatch.setattr(writer.network, "forward", lambda *a, **k: steps.append(1) or forward(*a, **k))
    text = writer.answer("def add(a, b):\n    return a +", lambda piece: pieces.append((len(steps), piece)))
    assert "".join(piece for _, piece in pieces) == text
    written = [step for step, piece in pieces if piece.strip()]
    assert len(written) > 2
    assert written[0] < 12


@pytest.mark.parametrize("how", ["argument", "file", "stdin"])
def test_the_prompt_comes_from_an_argument_a_file_or_stdin(how, talker, tmp_path, capsys, monkeypatch):
    """Of a file and of stdin, the end of the last line is none of the prompt."""
    words = ["generate", talker, "--max_new_tokens", 4, "--raw", "--temperature", 0]
    (tmp_path / "prompt.txt").write_text(f"{PROMPT}\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n"))
    assert (
        run(
            *words, *{"argument": ["--prompt", PROMPT], "file": ["--prompt_file", tmp_path / "prompt.txt"]}.get(how, [])
        )
        == 0
    )
    assert capsys.readouterr().out == greedy(talker, PROMPT, 4) + "\n"


def test_sampling_is_reproducible(talker, capsys):
    def sampled(*words):
        assert run("generate", talker, "--prompt", PROMPT, "--max_new_tokens", 8, *words) == 0
        return capsys.readouterr().out

    first = sampled("--temperature", 1.5)
    assert first == sampled("--temperature", 1.5, "--seed", 0)
    assert first != sampled("--temperature", 1.5, "--seed", 1)
    assert sampled("--temperature", 0) == sampled("--temperature", 0, "--seed", 1) == sampled("--top_k", 1)


def test_the_chat_template_is_used_where_there_is_one(talker, capsys):
    """A question in the template, with a system message or without; --raw gives the text as it is."""
    words = ["generate", talker, "--prompt", "Why?", "--max_new_tokens", 6, "--temperature", 0]
    prompts = {
        (): "<user>Why?\n<assistant>",
        ("--system", "Be brief."): "<system>Be brief.\n<user>Why?\n<assistant>",
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(talker)
    for more, text in prompts.items():
        assert run(*words, *more) == 0
        printed = capsys.readouterr()
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        assert printed.out == greedy(talker, ids, 6) + "\n"
        assert "in the model's chat template" in printed.err
    assert run(*words, "--raw") == 0
    printed = capsys.readouterr()
    assert printed.out == greedy(talker, "Why?", 6) + "\n"
    assert printed.err == ""


def test_an_adapter_brings_its_own_tokenizer_and_template(base, adapter, capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(adapter)
    assert run("generate", adapter, "--prompt", "Why?", "--max_new_tokens", 2) == 0
    assert "in the model's chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--generation_args.repetition_penaltie", "1.2"], "no such option of generation, did you mean repetition_pen"),
        (["--generation_args.temperature", "1"], "give it by --temperature"),
        (["--generation_args.return_dict_in_generate", "true"], "no such option of generation"),
        (["--generation_args.repetition_penalty", "-1.0"], "the options of generation"),
        (["--temperature", "-1"], "--temperature must be a finite number ≥ 0, got -1.0"),
        (["--temperature", ".nan"], "--temperature must be a finite number"),
        (["--top_p", "0"], "--top_p must be above 0 and at most 1, got 0.0"),
        (["--top_k", "0"], "--top_k must be at least 1"),
        (["--max_new_tokens", "0"], "--max_new_tokens must be at least 1"),
        (["--max_new_tokens", "64"], "the model 64 positions: that leaves"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--prompt_file", "missing.txt"], "give either --prompt or --prompt_file"),
        (["--device", "abacus"], "--device abacus"),
        (["--load_in_4bit", "--load_in_8bit"], "give either --load_in_4bit or --load_in_8bit"),
        (["--raw", "--system", "Be brief."], "--system needs the model's chat template"),
        (["--prompt", "a\udcff"], "the prompt is not UTF-8 text"),
        (["--prompt", "word " * 99], "positions: that leaves 0"),
    ],
)
def test_what_cannot_be_generated_is_said_in_one_line(words, says, base, capsys):
    assert run("generate", base, *([] if "--prompt" in words else ["--prompt", "Why?"]), *words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    line = printed.err.splitlines()[-1]
    assert line.startswith("lora-rite generate: error: ")
    assert says in line


def test_options_of_transformers_are_followed(talker, capsys):
    words = ["generate", talker, "--prompt", PROMPT, "--raw", "--max_new_tokens", 8, "--temperature", 0]
    assert run(*words, "--generation_args.repetition_penalty", 1.8) == 0
    assert capsys.readouterr().out == greedy(talker, PROMPT, 8, repetition_penalty=1.8) + "\n"
    assert run(*words, "--generation_args.num_beams", 3) == 0  # which cannot be streamed
    assert capsys.readouterr().out == greedy(talker, PROMPT, 8, num_beams=3) + "\n"


def test_encoder_decoder_models_generate(tmp_path, capsys):
    base = make_mt5(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    expected = greedy(base, "water ice", 5, peft.PeftModel.from_pretrained(load(base), adapter).eval())
    assert run("generate", adapter, "--prompt", "water ice", "--max_new_tokens", 5, "--temperature", 0) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert run("generate", adapter, "--prompt", "") == 2  # its tokenizer adds nothing
    assert "the prompt is empty" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "loaded"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_the_model_is_loaded_in_the_checkpoints_dtype_or_the_one_given(dtype, loaded, adapter):
    assert generate_module.Writer(str(adapter), None, {}, dtype=dtype).network.dtype == loaded


@pytest.mark.parametrize("verb", [["generate", "--prompt", "a"], ["chat"]])
def test_the_model_is_quantised_where_it_is_asked_for(verb, adapter, monkeypatch):
    bnb, loaded = pytest.importorskip("bitsandbytes"), []
    answer = generate_module.Writer.answer
    monkeypatch.setattr(generate_module.Writer, "answer", lambda self, *a: (loaded.append(self), answer(self, *a))[1])
    for bits, layer in ((4, bnb.nn.Linear4bit), (8, bnb.nn.Linear8bitLt)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("a\n"))
        assert run(*verb[:1], adapter, *verb[1:], f"--load_in_{bits}bit", "--max_new_tokens", 1, "--device", "cpu") == 0
        assert any(isinstance(module, layer) for module in loaded[-1].network.modules())


@pytest.mark.parametrize("verb", [["generate", "--prompt", "a"], ["chat"], ["merge", "--out", "merged"]])
def test_code_of_a_model_runs_where_it_is_allowed_alone(verb, adapter, tmp_path, capsys, monkeypatch):
    seen = []

    def refuse(name, *, trust_remote_code, **options):
        seen.append(trust_remote_code)
        raise LoRARiteValueError("refused")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapted, "load_model", refuse)
    assert run(verb[0], adapter, *verb[1:]) == run(verb[0], adapter, *verb[1:], "--trust_remote_code") == 2
    assert seen == [False, True]


# -------------------------------------------------------------------------------------------------------------- chat


class Lines:
    """Standard input that gives lines, or raises what is among them."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def isatty(self):
        return False

    def readline(self):
        if not self.lines:
            return ""
        line = self.lines.pop(0)
        if not isinstance(line, str):
            raise line
        return f"{line}\n"


@pytest.fixture
def prompts(monkeypatch):
    """What the model is given, which answers "first", "second", …"""
    given, answers = [], iter(["first", "second", "third"])

    def answer(self, prompt, show):
        given.append(prompt)
        text = next(answers)
        if text == "first" and given[0] == "stop\n":
            show("fi")
            raise KeyboardInterrupt
        show(text)

    monkeypatch.setattr(generate_module.Writer, "answer", answer)
    return given


def read_and_answered(writer, monkeypatch, conversations):
    """The answers to conversations, one after the other, and how many tokens of each prompt the model has read."""
    lengths, forward = [], writer.network.forward

    def counted(*args, input_ids, **kwargs):
        lengths[-1].append(input_ids.shape[1])
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(writer.network, "forward", counted)
    answers = [(lengths.append([]), writer.answer(said, lambda piece: None))[1] for said in conversations]
    return answers, [each[0] for each in lengths]


@pytest.mark.parametrize("window", [None, 256, 8])
def test_what_was_said_before_is_not_read_again(window, tmp_path, monkeypatch):
    """An answer is that of a model that reads the whole conversation, but what this has in common with the last one is
    there as keys and values, also where that is less than the last one had. A sliding window that is full has forgotten
    them."""
    if window is None:
        folder = make_llama(tmp_path / "model", "float32", TEMPLATE, max_position_embeddings=512)
    else:
        folder = make_gemma3(tmp_path / "model", window)
    options = {"max_new_tokens": 6, "temperature": 0}
    one, two, other = ({"role": "user", "content": text} for text in ("word " * 9, "more " * 5, "and " * 7))
    said = lambda text: {"role": "assistant", "content": text}
    writer = generate_module.Writer(str(folder), None, options)
    first = writer.answer([one], lambda piece: None)
    conversations = [[one, said(first), two], [one, other], [two]]
    answers, read = read_and_answered(writer, monkeypatch, conversations)
    fresh = [
        read_and_answered(generate_module.Writer(str(folder), None, options), monkeypatch, [c]) for c in conversations
    ]
    assert answers == [found[0] for found, _ in fresh]
    whole = [length for _, (length,) in fresh]
    if window != 8:
        assert read[0] < whole[0] - 20
        assert read[1] < whole[1] - 20
    assert read[2] >= whole[2] - 3  # the template's beginning


def test_an_answer_that_is_broken_off_leaves_nothing_to_go_on_from(talker, monkeypatch):
    writer = generate_module.Writer(str(talker), None, {"max_new_tokens": 6, "temperature": 0})
    whole = writer.answer(PROMPT, lambda piece: None)
    generate = writer.network.generate

    def broken(**kwargs):
        generate(**kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(writer.network, "generate", broken)
    with pytest.raises(KeyboardInterrupt):
        writer.answer(PROMPT, lambda piece: None)
    monkeypatch.setattr(writer.network, "generate", generate)
    assert read_and_answered(writer, monkeypatch, [PROMPT]) == ([whole], [writer.encode(PROMPT).shape[1]])


def chat(monkeypatch, model, *lines, more=()):
    monkeypatch.setattr(sys, "stdin", Lines(*lines))
    return run("chat", model, *more)


@pytest.mark.parametrize("end", [[], ["/exit", "not read"], [KeyboardInterrupt()]], ids=["eof", "exit", "ctrl-c"])
def test_chat_keeps_the_conversation_and_ends_cleanly(end, talker, prompts, monkeypatch, capsys):
    """Each message comes after what was said before; /new begins another conversation, of the same system message."""
    words = ["--system", "Be brief."]
    assert chat(monkeypatch, talker, "one", "", "two", "/new", "three", *end, more=words) == 0
    said = lambda *texts: [
        {"role": role, "content": text}
        for role, text in zip(["system", *["user", "assistant"] * 2], texts, strict=False)
    ]
    assert prompts == [
        said("Be brief.", "one"),
        said("Be brief.", "one", "first", "two"),
        said("Be brief.", "three"),
    ]
    assert capsys.readouterr().out == "first\nsecond\nthird\n"


def test_chat_without_a_template_goes_on_with_the_text(base, prompts, monkeypatch, capsys):
    """And says so in one line."""
    assert chat(monkeypatch, base, "one", "two", "/new", "three") == 0
    assert prompts == ["one\n", "one\nfirst\ntwo\n", "three\n"]
    err = capsys.readouterr().err
    assert err == "lora-rite: the model has no chat template: it goes on with the text as it is\n"
    assert chat(monkeypatch, base, "one", more=["--system", "Be brief."]) == 2
    assert "--system needs the model's chat template, and it has none" in capsys.readouterr().err


def test_ctrl_c_ends_an_answer_and_not_the_chat(base, prompts, monkeypatch, capsys):
    assert chat(monkeypatch, base, "stop", "two") == 0
    assert prompts == ["stop\n", "stop\nfi\ntwo\n"]
    assert capsys.readouterr().out == "fi …\nsecond\n"


def test_a_conversation_that_is_too_long_is_said_and_can_begin_again(talker, monkeypatch, capsys):
    """What does not fit is not kept: a shorter message goes on where it was. By the model itself."""
    assert chat(monkeypatch, talker, "a", "word " * 99, "b", more=["--max_new_tokens", 2, "--temperature", 0]) == 0
    printed = capsys.readouterr()
    assert "positions: that leaves 0 for --max_new_tokens 2 (/new begins another conversation)" in printed.err
    first, second = printed.out.splitlines()
    text = f"<user>a\n<assistant>{first}\n<user>b\n<assistant>"
    ids = transformers.AutoTokenizer.from_pretrained(talker)(
        text, add_special_tokens=False, return_tensors="pt"
    ).input_ids
    assert second == greedy(talker, ids, 2)


def test_input_that_is_not_text_is_one_line(base, monkeypatch, capsys):
    error = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    assert chat(monkeypatch, base, error) == 2
    assert "standard input is not UTF-8 text: invalid start byte" in capsys.readouterr().err
