"""What is wrong with options, data and names is said before a model's weights are loaded, which may take minutes."""

import json

import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("jsonargparse")

import transformers  # noqa: E402
from test_limits import GQA, TOKENS, build, save  # noqa: E402

from lora_rite.cli import main  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
TURNS = [{"role": role, "content": f"text {n}"} for n, role in enumerate(["user", "assistant"] * 2)]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model without a chat template, an adapter of another one, conversations, and texts."""
    folder = tmp_path_factory.mktemp("before")
    save(build("LlamaForCausalLM", "LlamaConfig", **GQA), folder / "model", **TOKENS)
    other = build("LlamaForCausalLM", "LlamaConfig", **{**GQA, "hidden_size": 32})
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(other, config).save_pretrained(folder / "adapter")
    chats = [{"messages": [*TURNS, {"role": "user", "content": str(n)}, TURNS[-1]]} for n in range(4)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    texts = [{"prompt": "a" * 40, "completion": text} for text in "bcde"]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (folder / "empty.txt").touch()
    return {name: str(folder / name) for name in ("model", "adapter", "chats.jsonl", "texts.jsonl", "empty.txt", "out")}


@pytest.fixture
def error(places, monkeypatch, capsys):
    """What a command line, with the names of the places in it, is answered with."""
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights loaded"))

    def run(words):
        assert main([places.get(word, word) for word in words.split()]) == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data chats.jsonl", "the training data: the model's tokenizer has no chat template"),
        ("--data texts.jsonl --max_length 8", "the training data: no token carries loss within 8 tokens"),
        ("--data texts.jsonl --target_modules q_prj", "--target_modules q_prj: no module of the model is named so"),
        ("--data texts.jsonl --target_modules .*q_prj$", "--target_modules .*q_prj$: Target modules"),
        ("--data texts.jsonl --modules_to_save lm_haed", "--modules_to_save lm_haed: no module of the model"),
        ("--data texts.jsonl --adapter adapter", "--adapter"),
        ("--data texts.jsonl --optimizer_args.damping -1", "damping must be a finite number"),
        ("--data texts.jsonl --optimizer lora-plus --lr 1 --optimizer_args.betas 3", "--optimizer lora-plus with"),
        ("--data texts.jsonl --optimizer adamw --optimizer_args.eps -1", "Invalid epsilon value"),
        ("--data texts.jsonl --epochs 0.1 --scheduler_args.num_cycles x", "--scheduler cosine: "),
    ],
)
def test_train(words, message, error, places, tmp_path):
    found = error(f"train --model model --out {tmp_path / 'run'} --no_progress {words}")
    assert message in found
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tasks chats.jsonl", "no chat template for conversations; give --chat_template"),
        ("--tasks texts.jsonl --max_length 8", "no token carries loss within 8 tokens"),
        ("--tasks texts.jsonl --device cuda:77", "--device cuda:77: "),
        ("--tasks texts.jsonl --device gpu", "--device gpu: "),
        ("--tasks texts.jsonl --adapter adapter", "--adapter"),
    ],
)
def test_eval(words, message, error):
    pytest.importorskip("lm_eval")
    assert message in error(f"eval --model model --no_progress {words}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("generate model --prompt a --system b", "--system needs the model's chat template, and it has none"),
        ("generate model --prompt_file empty.txt", "the prompt is empty"),
        ("generate model --prompt a --max_new_tokens 99", "the prompt has 1 tokens, and the model 48 positions"),
        ("generate model --prompt a --device gpu", "--device gpu: "),
        ("generate adapter --model model --prompt a", "adapter"),
        ("chat model --system b", "--system needs the model's chat template, and it has none"),
        ("chat model --device gpu", "--device gpu: "),
    ],
)
def test_generate_and_chat(words, message, error):
    assert message in error(words)
