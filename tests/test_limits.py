"""What ``train``, ``eval`` and ``compare`` accept as a model and as data: tiny models with random weights, offline."""

import json

import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("jsonargparse")

import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from lora_rite.cli import main  # noqa: E402
from lora_rite.errors import LoRARiteValueError  # noqa: E402
from lora_rite.finetune import limits as module  # noqa: E402
from lora_rite.finetune.data import Example, read_examples  # noqa: E402
from lora_rite.finetune.limits import check_windows, find_limits  # noqa: E402
from lora_rite.finetune.load import attach_adapter, load_model  # noqa: E402
from lora_rite.finetune.windows import make_windows  # noqa: E402
from lora_rite.inputs import MESSAGE, blame, parse_json  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
SHORT = ["--steps", "1", "--batch_size", "2", "--max_length", "16", "--rank", "2", "--no_progress"]
VOCABULARY = 300
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
}
GQA = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 48}
BART = {"d_model": 16, "max_position_embeddings": 48, "forced_eos_token_id": None, "decoder_ffn_dim": 32,
        "encoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
MAMBA = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def build(name, config, **sizes):
    """A model of transformers by its class and its config's class."""
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**{"vocab_size": VOCABULARY, **sizes}))


def tokenizer_of_bytes(**special):
    """256 tokens, and the special ones after them."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special.values()]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def prepare(parts, network, tokenizer, length, **options):
    """Makes the windows and has the model checked on them, as ``train`` does."""
    encoder_decoder = network.config.is_encoder_decoder
    found = make_windows(parts, tokenizer, "m", length, encoder_decoder=encoder_decoder, **options)
    check_windows(found, network, tokenizer, "m", **options)


def save(model, folder, **special):
    model.save_pretrained(folder)
    tokenizer_of_bytes(**special).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"prompt": "q {i}:", "completion": " a {i * i}"}}\n' for i in range(20)))
    return path


@pytest.fixture
def refused(data, tmp_path, capsys):
    """Runs train on a model, and gives the error of one line; nothing was made."""

    def run(model, *words, texts=data):
        out = tmp_path / "never"
        options = ["--model", model, "--data", texts, "--out", out, *SHORT, *words]
        assert main(["train", *map(str, options)]) == 2
        *_, line = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("lora-rite train: error: ")
        assert not out.exists()
        return line

    return run


# ---------------------------------------------------------------------------------------------------------- causality

SEES_THE_FUTURE = [
    ("BertLMHeadModel", "BertConfig", SIZES),
    ("RobertaForCausalLM", "RobertaConfig", {**SIZES, "pad_token_id": 1}),
    ("ElectraForCausalLM", "ElectraConfig", {**SIZES, "embedding_size": 16}),
    ("RoFormerForCausalLM", "RoFormerConfig", SIZES),
    ("MegatronBertForCausalLM", "MegatronBertConfig", SIZES),
    ("CamembertForCausalLM", "CamembertConfig", SIZES),
    ("XLNetLMHeadModel", "XLNetConfig", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}),
    ("XLMWithLMHeadModel", "XLMConfig", {"emb_dim": 16, "n_layers": 1, "n_heads": 2}),
    ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GQA, "head_dim": 8, "use_bidirectional_attention": True}),
]
CAUSAL = [
    ("BertLMHeadModel", "BertConfig", {**SIZES, "is_decoder": True}),
    ("LlamaForCausalLM", "LlamaConfig", {**GQA, "use_cache": False}),
    ("MistralForCausalLM", "MistralConfig", {**GQA, "sliding_window": 4}),
    ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GQA, "head_dim": 8, "sliding_window": 4}),
    ("MambaForCausalLM", "MambaConfig", MAMBA),
    ("RwkvForCausalLM", "RwkvConfig", {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2}),
    ("MixtralForCausalLM", "MixtralConfig", {**GQA, "num_local_experts": 4}),
    ("OlmoeForCausalLM", "OlmoeConfig", {**GQA, "num_experts": 8, "num_experts_per_tok": 2}),
    ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**GQA, **MOE, "num_experts": 4, "shared_expert_intermediate_size": 8}),
    ("BloomForCausalLM", "BloomConfig", {"hidden_size": 16, "n_layer": 1, "n_head": 2}),
    ("GPT2LMHeadModel", "GPT2Config", GPT2),
]
by_class = lambda cases: pytest.mark.parametrize(("name", "config", "sizes"), cases, ids=[c[0] for c in cases])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@by_class(SEES_THE_FUTURE)
def test_models_that_see_what_they_predict_are_refused(name, config, sizes, dtype):
    """Also of small random weights, through which later tokens move a logit by less than a thousandth."""
    with pytest.raises(LoRARiteValueError, match=rf"--model m: {name} \(.*\) is not causal: .* give a causal or"):
        find_limits(build(name, config, **sizes).to(dtype), tokenizer_of_bytes(**TOKENS), "m")


@pytest.mark.parametrize("copied", [2**28, 0])
@by_class(CAUSAL)
def test_causal_models_are_accepted_and_left_as_they_were(name, config, sizes, copied, monkeypatch):
    """In bfloat16, tried in float32 or (as a large model) as it is: experts, states, windows and all."""
    monkeypatch.setattr(module, "COPIED", copied)
    network = build(name, config, **sizes).to(torch.bfloat16).train()
    frozen = next(m for m in network.modules() if isinstance(m, torch.nn.Linear)).eval()
    tensors = dict([*network.named_parameters(), *network.named_buffers()])
    before = {name: t.clone() for name, t in tensors.items()}
    state = torch.get_rng_state()
    assert find_limits(network, tokenizer_of_bytes(**TOKENS), "m").tokens == VOCABULARY
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert not frozen.training
    after = dict([*network.named_parameters(), *network.named_buffers()])
    assert all(after[name] is t and torch.equal(t, before[name]) and t.grad is None for name, t in tensors.items())
    for layer in network.modules():
        assert all(not t.is_inference() for t in layer.buffers(recurse=False))


def test_a_large_model_that_sees_the_future_is_refused_in_its_own_dtype(monkeypatch):
    """As trained weights do, those of this one move logits by more than bfloat16 rounds."""
    monkeypatch.setattr(module, "COPIED", 0)
    network = build("BertLMHeadModel", "BertConfig", **SIZES, initializer_range=0.5).to(torch.bfloat16)
    with pytest.raises(LoRARiteValueError, match="is not causal"):
        find_limits(network, tokenizer_of_bytes(**TOKENS), "m")


def test_a_model_that_sees_one_token_ahead_is_refused():
    """A shift by one is found wherever the change begins."""
    network = build("LlamaForCausalLM", "LlamaConfig", **GQA)
    network.get_input_embeddings().register_forward_hook(lambda module, args, x: x + 0.1 * x.roll(-1, 1))
    with pytest.raises(LoRARiteValueError, match="is not causal"):
        find_limits(network, tokenizer_of_bytes(**TOKENS), "m")


@by_class(
    [
        ("BartForCausalLM", "BartConfig", {**BART, "is_encoder_decoder": False}),
        ("XLMWithLMHeadModel", "XLMConfig", {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "causal": True}),
    ]
)
def test_models_whose_loss_is_not_that_of_the_next_token_are_refused(name, config, sizes):
    """They compare a token's logits with that token, which they are given."""
    with pytest.raises(LoRARiteValueError, match="has the loss of the token that it is given, not of the next one"):
        find_limits(build(name, config, **sizes), tokenizer_of_bytes(**TOKENS), "m")


def test_every_command_refuses_an_encoder_before_it_writes(data, tmp_path, refused, capsys):
    model = save(build("BertLMHeadModel", "BertConfig", **SIZES), tmp_path / "bert", **TOKENS)
    assert f"--model {model}: BertLMHeadModel (bert) is not causal" in refused(model)
    capsys.readouterr()
    out = tmp_path / "evaluation"
    assert main(["eval", "--tasks", str(data), "--model", str(model), "--out", str(out), "--no_progress"]) == 2
    assert f"lora-rite eval: error: --model {model}: BertLMHeadModel (bert) is not causal" in capsys.readouterr().err
    recipe = tmp_path / "study.YAML"
    recipe.write_text(
        f"title: t\ntasks: {{own: {{data: {data}}}}}\noptimizers: {{a: {{optimizer: adamw, lr: [0.1]}}}}\n"
        f"train: {{model: {model}, steps: 1}}\n"
    )
    pytest.importorskip("scipy")
    assert main(["compare", str(recipe), "--out", str(tmp_path / "study")]) == 2
    assert f"train: model {model}: BertLMHeadModel (bert) is not causal" in capsys.readouterr().err
    assert not out.exists()
    assert not (tmp_path / "study").exists()


# ------------------------------------------------------------------------------------------------------------- limits

POSITIONS = [
    ("GPT2LMHeadModel", "GPT2Config", GPT2, 48),
    ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "n_positions": 3}, 3),
    ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "vocab_size": 48}, 48),  # one table is as large as the other
    ("GPTJForCausalLM", "GPTJConfig", {**GPT2, "rotary_dim": 4}, 48),
    ("CTRLLMHeadModel", "CTRLConfig", {**GPT2, "dff": 32}, 48),
    ("OPTForCausalLM", "OPTConfig", {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1,
                                     "num_attention_heads": 2, "word_embed_proj_dim": 16,
                                     "max_position_embeddings": 48}, 48),
    ("RobertaForCausalLM", "RobertaConfig", {**SIZES, "is_decoder": True, "pad_token_id": 9}, 38),
    ("XGLMForCausalLM", "XGLMConfig", {"d_model": 16, "ffn_dim": 32, "num_layers": 1, "attention_heads": 2,
                                       "max_position_embeddings": 48}, None),  # its table grows
    ("LlamaForCausalLM", "LlamaConfig", GQA, None),
    ("BloomForCausalLM", "BloomConfig", {"hidden_size": 16, "n_layer": 1, "n_head": 2}, None),
    ("MambaForCausalLM", "MambaConfig", MAMBA, None),
    ("BartForConditionalGeneration", "BartConfig", BART, 48),
    ("T5ForConditionalGeneration", "T5Config", T5, None),  # a table of distances
    ("T5ForConditionalGeneration", "T5Config", {**T5, "relative_attention_num_buckets": 256,
                                               "relative_attention_max_distance": 512}, None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "sizes", "expected"), POSITIONS)
def test_the_positions_of_a_model_are_what_it_runs_on(name, config, sizes, expected):
    """As many tokens run and one more does not; where there is no limit, four times the config's number run."""
    network = build(name, config, **sizes).eval()
    found = find_limits(network, tokenizer_of_bytes(**TOKENS), "m")
    assert found.positions == found.answer_positions == expected
    run = lambda n: network(input_ids=torch.full((1, n), 5), labels=torch.full((1, n), 5))
    run(expected or 200)
    if expected is not None:
        with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
            run(expected + 1)


def test_prompt_and_completion_have_limits_of_their_own():
    """A pair of two models: 48 positions and 300 tokens for prompts, 40 and 280 for completions."""
    encoder = transformers.BertConfig(vocab_size=VOCABULARY, **SIZES)
    decoder = transformers.BertConfig(
        **{**SIZES, "max_position_embeddings": 40}, vocab_size=280, is_decoder=True, add_cross_attention=True
    )
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    network = transformers.EncoderDecoderModel(config)
    tokenizer = tokenizer_of_bytes(**TOKENS)
    assert find_limits(network, tokenizer, "m")[:2] == (48, 40)
    make = lambda prompt, completion: prepare([[Example("a" * prompt, "b" * completion)]], network, tokenizer, 100)
    make(46, 38)
    with pytest.raises(LoRARiteValueError, match="--max_length: a window has 49 tokens, and --model has 48 positions"):
        make(47, 38)
    with pytest.raises(
        LoRARiteValueError, match="a window has 41 tokens, and --model has 40 positions; give --max_len"
    ):
        make(46, 39)


@pytest.mark.parametrize("packing", [False, True])
def test_windows_beyond_the_positions_are_refused(packing, tmp_path, refused, data):
    data.write_text("".join(json.dumps({"prompt": "q" * 30, "completion": "a" * n}) + "\n" for n in range(20, 40)))
    if packing:
        model = save(build("LlamaForCausalLM", "LlamaConfig", **GQA), tmp_path / "m", **TOKENS)
        network, tokenizer = load_model(str(model))
        with pytest.warns(UserWarning, match="a window has 80 tokens, and --model was made for 48"):
            prepare([read_examples(data)], network, tokenizer, 80, packing=True)
        return
    size = {**SIZES, "is_decoder": True, "pad_token_id": 1}
    model = save(build("RobertaForCausalLM", "RobertaConfig", **size), tmp_path / "m", **TOKENS)
    assert "--max_length: a window has 64 tokens, and --model has 46 positions" in refused(model, "--max_length", 64)
    words = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "run"), *SHORT]
    assert main(["train", *words, "--max_length", "46"]) == 0
    out = tmp_path / "evaluation"  # where the window is cut to what the model has
    assert main(["eval", "--tasks", str(data), "--model", str(model), "--out", str(out), "--no_progress"]) == 0
    assert json.loads((out / "data.json").read_text())["results"]["loss"]["window"] == 46


def test_a_window_that_the_code_cannot_run_is_refused_where_no_table_ends():
    """MPT cuts its biases out of a matrix of a fixed size."""
    network = build("MptForCausalLM", "MptConfig", d_model=16, n_layers=1, n_heads=2, max_seq_len=48)
    tokenizer = tokenizer_of_bytes(**TOKENS)
    prepare([[Example("", "x" * 100)]], network, tokenizer, 48)
    with pytest.raises(LoRARiteValueError, match="--max_length: --model cannot be run on a window of 64 tokens"):
        prepare([[Example("", "x" * 100)]], network, tokenizer, 64)


@pytest.mark.parametrize("words", [[], ["--packing"]])
def test_a_tokenizer_without_special_tokens(words, tmp_path, refused):
    model = save(build("LlamaForCausalLM", "LlamaConfig", **GQA), tmp_path / "m")
    assert f"--model {model}: its tokenizer has no token to pad with" in refused(model, *words)


@pytest.mark.parametrize("special", [{"bos_token": "<s>"}, {"unk_token": "<unk>"}])
def test_any_special_token_pads(special, data, tmp_path):
    """It is neither attended to nor learnt: the loss of each example in a batch is that of it alone."""
    model = save(build("LlamaForCausalLM", "LlamaConfig", **GQA), tmp_path / "m", **special)
    losses = []
    for size in ("1", "20"):
        out = tmp_path / size
        words = ["--tasks", str(data), "--model", str(model), "--out", str(out), "--batch_size", size]
        assert main(["eval", *words, "--no_progress"]) == 0
        losses.append(json.loads((out / "data.json").read_text())["results"]["loss"]["nat_per_token"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert main(["train", "--model", str(model), "--data", str(data), "--out", str(tmp_path / "run"), *SHORT]) == 0


@pytest.mark.parametrize(("size", "token"), [(100, "token"), (258, "token 258")])
def test_a_tokenizer_with_more_tokens_than_the_model(size, token, data, tmp_path, refused, capsys):
    """Its bytes, or its padding token alone."""
    model = save(build("LlamaForCausalLM", "LlamaConfig", **GQA, vocab_size=size), tmp_path / "m", **TOKENS)
    line = refused(model)
    assert f"the tokenizer of --model gives {token}" in line
    assert f"and the model knows {size} tokens" in line
    out = tmp_path / "evaluation"
    assert main(["eval", "--tasks", str(data), "--model", str(model), "--out", str(out), "--no_progress"]) == 2
    assert "the tokenizer of --model gives" in capsys.readouterr().err
    assert not out.exists()


@by_class(
    [
        ("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": None}),
        ("BartForConditionalGeneration", "BartConfig", {**BART, "decoder_start_token_id": None}),
        ("T5ForConditionalGeneration", "T5Config", {**T5, "pad_token_id": None}),
    ]
)
def test_an_encoder_decoder_model_without_its_ids(name, config, sizes, tmp_path, refused):
    missing = next(key for key in ("decoder_start_token_id", "pad_token_id") if key in sizes and sizes[key] is None)
    model = save(build(name, config, **sizes), tmp_path / "m", **TOKENS)
    assert f"--model {model}: its config has no {missing}" in refused(model)


# ------------------------------------------------------------------------------------------- what a folder is instead


@pytest.fixture
def folders(tmp_path):
    """A model, an adapter of it, and the folder of a run that has one."""
    model = save(build("LlamaForCausalLM", "LlamaConfig", **GQA), tmp_path / "model", **TOKENS)
    network = attach_adapter(load_model(str(model))[0], rank=2)
    for folder in (tmp_path / "adapter", tmp_path / "run" / "adapter"):
        network.save_pretrained(folder)
    return tmp_path


@pytest.mark.parametrize("also", [None, "config.json"])
def test_an_adapter_as_a_model(also, folders, refused, data, capsys):
    """It says so, and how to go on, also where transformers would have loaded the base that the adapter names."""
    if also is not None:
        (folders / "adapter" / also).write_bytes((folders / "model" / also).read_bytes())
    line = refused(folders / "adapter")
    assert "it is an adapter (adapter_config.json), not a model: give its base model" in line
    assert str(folders / "model") in line
    assert "--adapter" in line
    assert "lora-rite merge" in line
    assert main(["eval", "--tasks", str(data), "--model", str(folders / "adapter")]) == 2
    assert "it is an adapter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("run", "it is the folder of a run, whose adapter is"),
        ("nothing", "nothing: there is no such folder"),
        ("modle", "there is no such folder, did you mean"),
        ("empty", "the folder has no config.json"),
    ],
)
def test_other_folders_as_a_model(model, message, folders, refused):
    (folders / "empty").mkdir()
    line = refused(folders / model)
    assert message in line
    assert "a hub id" not in line


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("model", "is a model (config.json), not an adapter (adapter_config.json): give it as --model"),
        ("run", "has no adapter_config.json; its adapter is"),
        ("nothing", "there is no such folder"),
        ("data.jsonl", "it is a file, not a folder"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "pairs"])
def test_other_folders_as_an_adapter(command, adapter, message, folders, data, capsys):
    words = ["--tasks", str(data)] if command == "eval" else []
    words += ["--model", str(folders / "model"), "--adapter", str(folders / adapter)]
    assert main([command, *words]) == 2
    error = capsys.readouterr().err
    assert f"--adapter {folders / adapter}: " in error
    assert message in error


# ----------------------------------------------------------------------------------------- messages of other libraries


def test_a_tokenizer_that_cannot_be_read_is_told_to_the_end(tmp_path, refused):
    """transformers announces a list with a colon; what is missing stands after it."""
    model = save(build("LlamaForCausalLM", "LlamaConfig", **GQA), tmp_path / "m", **TOKENS)
    for file in model.glob("token*.json"):
        file.unlink()
    line = refused(model)
    assert not line.endswith(":")
    assert "sentencepiece or tiktoken" in line


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("one of:\n(1) this\n\n(2) that", "--x: one of: (1) this (2) that"),
        ("", "--x: ValueError"),
        ("word " * 1000, None),
    ],
)
def test_a_message_is_one_line_whole_or_cut_at_a_word(message, expected):
    with pytest.raises(LoRARiteValueError) as caught, blame("--x"):
        raise ValueError(message)
    told = str(caught.value)
    assert told == expected or (told.endswith("word …") and MESSAGE - 10 < len(told) < MESSAGE + 10)


# --------------------------------------------------------------------------------------------------- suffixes and keys

RECORDS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


@pytest.mark.parametrize("suffix", [".JSONL", ".Jsonl", ".JSON", ".json", ".PARQUET", ".Parquet"])
def test_the_case_of_a_suffix_does_not_matter(suffix, tmp_path):
    path = tmp_path / f"data{suffix}"
    if suffix.lower() == ".parquet":
        pytest.importorskip("pyarrow")
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(RECORDS), path)
    else:
        path.write_text(json.dumps(RECORDS) if suffix.lower() == ".json" else "\n".join(map(json.dumps, RECORDS)))
    assert read_examples(path) == [Example("a", "b"), Example("c", "d")]


@pytest.mark.parametrize("suffix", [".Txt", ".TXT", ".C", ""])
def test_other_files_are_one_text(suffix, tmp_path):
    path = tmp_path / f"data{suffix}"
    path.write_text('{"id": 1}\nint a;')
    assert read_examples(path) == [Example("", '{"id": 1}\nint a;')]


def test_suffixes_of_what_else_is_named(data, tmp_path, capsys):
    """A config, the files of a task, a folder of data for eval, and a model's files in its digest."""
    (tmp_path / "run.YAML").write_text("rank: 3\n")
    (tmp_path / "gsm8k").mkdir()
    rows = "".join(json.dumps({"question": f"{i}?", "answer": f"#### {i}"}) + "\n" for i in range(8))
    (tmp_path / "gsm8k" / "train.JSONL").write_text(rows)
    words = ["--task", "gsm8k", "--data_dir", tmp_path, "--out", tmp_path / "run", "--config", tmp_path / "run.YAML"]
    assert main(["train", *map(str, words), *SHORT[:-3], "--no_progress"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["settings"]["rank"], result["examples"]["train"]) == (3, 7)
    (tmp_path / "own.JSONL").write_bytes(data.read_bytes())
    assert main(["eval", "--tasks", str(tmp_path / "own.JSONL"), "--no_progress"]) == 0
    assert " 20 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}', 'd.jsonl:2: "text" is given twice'),
        ("d.JSONL", '{"text": "a"}\n{"prompt": "b", "completion": "c", "prompt": "b"}', ':2: "prompt" is given twice'),
        ("d.jsonl", '{"text": "a"}\n{"text": "b", "id": {"x": 1, "x": 2}}', 'd.jsonl:2: "x" is given twice'),
        ("d.json", '[{"text": "a, ]"} , {"text": "b", "text": "c"}]', 'd.json:2: "text" is given twice'),
        ("d.json", '{"text": "b", "text": "c"}', 'd.json:1: "text" is given twice'),
        ("d.jsonl", '{"text": "a"}\n{"text": "b", "completion": "c"}', ':2: "text" and "completion" in one record'),
        ("d.jsonl", '{"text": "a"}\n{"prompt": "p", "completion": "c", "text": "x"}', ':2: "text" and "prompt" in one'),
        ("d.jsonl", '{"text": "a"}\n{"text": "b", "shorter": ["c"]}', ':2: "text" and "shorter" in one record'),
    ],
)  # fmt: skip
def test_records_that_can_be_read_in_two_ways_are_errors_with_their_place(name, text, message, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(LoRARiteValueError, match=message):
        read_examples(path)
    if "\n" in text or "[" in text:
        with pytest.warns(UserWarning, match="1 lines are left out, 1 are used"):
            assert len(read_examples(path, skip_bad_lines=True)) == 1


def test_a_key_whose_value_is_null_is_not_given(tmp_path):
    """As parquet has it, where some records are texts and others prompts."""
    path = tmp_path / "d.jsonl"
    lines = [
        {"text": "a", "prompt": None, "completion": None, "others": None},
        {"text": None, "prompt": "p", "completion": "c", "id": 7},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read_examples(path) == [Example("", "a"), Example("p", "c")]


def test_other_files_of_json_with_a_key_twice(folders, capsys):
    config = folders / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 2, "r": 4'))
    assert main(["pairs", "--model", str(folders / "model"), "--adapter", str(folders / "adapter")]) == 2
    assert 'adapter_config.json is damaged: "r" is given twice' in capsys.readouterr().err
    with pytest.raises(ValueError, match='"a" is given twice'):
        parse_json('[{"a": 1, "a": 1}]')
