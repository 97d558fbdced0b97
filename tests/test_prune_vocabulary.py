"""The script that leaves the tokens out of a model that a study does not use."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from lora_rite.errors import LoRARiteValueError
from lora_rite.finetune.load import load_model

TEXTS = ["the cat sat on the mat", "  a  hat – ü", "int main() { return 0; }\n\n", "catamaran"]


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[1] / "tools" / "prune_vocabulary.py"
    spec = importlib.util.spec_from_file_location("prune_vocabulary", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe(tmp_path):
    def write(rows):
        (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        path = tmp_path / "recipe.yaml"
        path.write_text(
            "title: A study\n"
            f"tasks: {{words: {{data: {tmp_path / 'data.jsonl'}}}}}\n"
            "ranks: [2]\nseeds: [0]\nsweep_seeds: [1]\n"
            "optimizers: {AdamW: {optimizer: adamw, lr: [0.01]}}\n"
        )
        return path

    return write


@pytest.fixture
def examples(recipe):
    return recipe([{"prompt": f"{i} {text}", "completion": text} for i, text in enumerate(TEXTS * 3)])


def test_what_is_kept_computes_as_before(tool, examples, tmp_path):
    """Tokens of the data are those of before, their logits bitwise the same up to the products' order, special tokens
    are renumbered, and the tool's other claims hold: fewer tokens, licences come along."""
    before, after = tool.prune("tiny", tmp_path / "out", examples)
    (whole, old), (pruned, new) = load_model("tiny"), load_model(str(tmp_path / "out"))
    assert len(new) == after == pruned.get_input_embeddings().num_embeddings < before == len(old)
    assert pruned.config.vocab_size == after
    for name in ("bos", "eos", "pad"):
        token = getattr(old, f"{name}_token")
        assert getattr(new, f"{name}_token") == token
        if token is not None and getattr(whole.config, f"{name}_token_id") is not None:
            assert getattr(pruned.config, f"{name}_token_id") == getattr(new, f"{name}_token_id")
    kept = torch.tensor([old.convert_tokens_to_ids(token) for token in new.convert_ids_to_tokens(range(after))])
    for text in TEXTS:
        ids, ours = (t(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for t in (old, new))
        assert torch.equal(kept[ours], ids)
        assert new.decode(ours[0]) == text
        with torch.no_grad():
            torch.testing.assert_close(pruned(ours).logits, whole(ids).logits[..., kept], rtol=1e-5, atol=1e-5)


def test_other_texts_still_have_tokens(tool, examples, tmp_path):
    """Bytes are kept: what the data does not have is spelt."""
    tool.prune("tiny", tmp_path / "out", examples)
    tokenizer = load_model(str(tmp_path / "out"))[1]
    text = "Zebras… 猫 quickly"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("fallback", [False, True])
def test_merges_on_the_way_are_kept(tool, fallback):
    """Of byte pair encodings with and without a split into words, trained on another text: each text has its tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    byte = [f"<0x{i:02X}>" for i in range(256)]
    whole = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True) if fallback else models.BPE())
    if fallback:
        whole.normalizer = normalizers.Replace(" ", "▁")
        whole.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        whole.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<unk>", *(byte if fallback else [])]
    learnt = [Path(__file__).read_text(encoding="utf-8"), "the catamaran that sat on the mat"] * 3
    alphabet = [] if fallback else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    whole.train_from_iterator(learnt, trainer)
    definition = json.loads(whole.to_str())
    used = {i for text in TEXTS for i in whole.encode(text).ids}
    kept = tool._prune_tokenizer(definition, used, {"<pad>", "<eos>", "<unk>"})
    pruned = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(definition)))
    old = PreTrainedTokenizerFast(tokenizer_object=whole)
    tool._check(pruned, {text: tool._tokens(old, text) for text in TEXTS}, kept)
    assert len(kept) < whole.get_vocab_size()
    with pytest.raises(LoRARiteValueError, match="stays whole"):
        tool._check(pruned, {text: tool._tokens(old, text) for text in ["trainers.BpeTrainer"]}, kept)


def test_conversations_are_refused(tool, recipe, tmp_path, capsys):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = recipe([{"messages": [*turns, {"role": "user", "content": str(i)}, turns[1]]} for i in range(20)])
    assert tool.main(["tiny", str(tmp_path / "out"), str(path)]) == 2
    assert "has conversations" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_stays_as_it_is(tool, examples, tmp_path, capsys):
    assert tool.main(["tiny", str(tmp_path), str(examples)]) == 2
    assert "is not empty: name a new folder" in capsys.readouterr().err


def test_a_tokenizer_of_another_kind_is_refused(tool):
    with pytest.raises(LoRARiteValueError, match="no byte pair encoding"):
        tool._prune_tokenizer({"model": {"type": "Unigram"}, "post_processor": None}, set(), set())
