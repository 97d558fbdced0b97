"""Reading, splitting and cutting of training text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from lora_rite.finetune.data import Example, read_examples, split
from lora_rite.finetune.windows import IGNORED, windows


class Letters:
    """A tokenizer of one token a character, which begins texts by itself or does not."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self, begins=False):
        self.begins = begins

    def __call__(self, text, add_special_tokens=True, verbose=True):
        assert not (text and add_special_tokens)
        return {"input_ids": [1] * (self.begins and add_special_tokens) + [ord(c) for c in text]}


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_formats(tmp_path):
    lines = [{"text": "one"}, "", {"prompt": "2+2=", "completion": "4"}]
    assert read_examples(write(tmp_path / "a.jsonl", *lines)) == [Example("", "one"), Example("2+2=", "4")]
    assert read_examples(write(tmp_path / "a.txt", "def f():", "    pass")) == [Example("", "def f():\n    pass")]
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x\xc3\xa9"}\r\n')
    assert read_examples(tmp_path / "bom.jsonl") == [Example("", "xé")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "bad.jsonl:2: not a JSON object"),
        ("[1]", "bad.jsonl:2: expected a JSON object, got a list"),
        ({"txt": "x"}, r"""bad.jsonl:2: expected "messages", .* or "text"; got \['txt'\]"""),
        ({"prompt": "x"}, "bad.jsonl:2: expected"),
        ({"text": 3}, 'bad.jsonl:2: "text" must be a string, got a int'),
        ({"text": None}, "got a NoneType"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read_examples(write(tmp_path / "bad.jsonl", {"text": "fine"}, line))


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*missing.jsonl"):
        read_examples(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="has no text"):
        read_examples(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "binary.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"not UTF-8 text: .* at byte 3"):
        read_examples(tmp_path / "binary.txt")


def test_a_misspelt_key_is_named_with_the_one_that_was_meant(tmp_path):
    for key, meant in (("mesages", "messages"), ("promt", "prompt"), ("txt", "text")):
        with pytest.raises(ValueError, match=rf"got \['{key}'\], did you mean {meant}\?"):
            read_examples(write(tmp_path / "data.jsonl", f'{{"{key}": "a"}}'))
    with pytest.raises(ValueError, match=r"got \['answer', 'question'\]$"):  # which are near to none
        read_examples(write(tmp_path / "data.jsonl", '{"question": "a", "answer": "b"}'))


def test_split_is_reproducible_and_without_overlap():
    examples = [Example("", str(i % 40)) for i in range(50)]  # ten of them twice
    one, again, other = (split(examples, 0.25, seed) for seed in (0, 0, 1))
    assert one == again
    assert one != other
    assert not set(one.train) & set(one.held_out)
    assert len(one.train) + len(one.held_out) == 50
    assert len(set(one.held_out)) == 10
    text = "".join(f"line {i}\n" for i in range(100))
    train, held_out = split([Example("", text)], 0.1, 0)
    assert train[0].completion + held_out[0].completion == text
    assert held_out[0].completion.startswith("\n")
    with pytest.raises(ValueError, match="--validation"):
        split([Example("a", "b")], 0.1, 0)
    for examples, share in (([Example("a", "b")] * 5, 0.1), ([Example("a", "b"), Example("a", "c")], 0.9)):
        with pytest.raises(ValueError, match=r"--holdout .* leaves none to train on; give --validation"):
            split(examples, share, 0)


def test_windows():
    rows, cut, _ = windows([Example("", "abcdef"), Example("", "gh")], Letters(), 5)
    assert [row["input_ids"] for row in rows] == [[1, 97, 98, 99, 100], [101, 102, 2, 1, 103], [104, 2]]
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert all(len(row["attention_mask"]) == len(row["input_ids"]) for row in rows)
    assert cut == 0
    (row,) = windows([Example("ab", "c")], Letters(), 5).rows
    assert row["input_ids"] == [1, 97, 98, 99, 2]
    assert row["labels"] == [IGNORED, IGNORED, IGNORED, 99, 2]


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda lengths: max(lengths) > 2),
    length=st.integers(3, 9),
)
def test_a_window_amid_a_text_begins_as_the_tokenizer_does(lengths, length):
    """Each window begins with the begin token; what was added is not predicted and predicts nothing, and without it the
    windows are the texts, in their order, with all other labels."""
    texts = ["abcdefghijkl"[:n] for n in lengths]
    rows = windows([Example("", text) for text in texts], Letters(begins=True), length).rows
    stream = [i for text in texts for i in (1, *map(ord, text), 2)]
    at = 0
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        added = stream[at] != 1
        assert ids[0] == 1
        assert ids[added:] == stream[at : at + len(ids) - added]
        assert labels == ([IGNORED, IGNORED, *ids[2:]] if added else ids)
        assert len(ids) == length or row is rows[-1] or at + len(ids) - added == len(stream)
        at += len(ids) - added
    assert at >= len(stream) - 1  # the last end token alone carries no loss, and makes no window


def test_windows_without_loss_are_dropped_or_refused():
    rows, cut, dropped = windows([Example("a" * 9, "b"), Example("a", "b")], Letters(), 4)
    assert (len(rows), cut, dropped) == (1, 1, 1)
    with pytest.raises(
        ValueError, match=r"within 4 tokens: prompts are too long \(the shortest has 6\), raise --max_length"
    ):
        windows([Example("a" * 9, "b"), Example("a" * 5, "b")], Letters(), 4)


@pytest.mark.parametrize(
    ("examples", "shown"),
    [
        ([Example("ab", "12"), Example("a" * 99, "3")], "12"),  # the long one is no reason to raise --max_length
        ([Example("", "1" * 60)], "1" * 40 + "…"),
        ([Example("", "a")], "a"),
    ],
    ids=["completions", "text", "one token"],
)
def test_text_that_the_tokenizer_has_no_tokens_for_is_no_matter_of_length(examples, shown):
    class NoDigits(Letters):
        bos_token_id = eos_token_id = None

        def __call__(self, text, **kwargs):
            return super().__call__("".join(c for c in text if not c.isdigit()), **kwargs)

    with pytest.raises(ValueError, match=f"the model's tokenizer makes no tokens of .*'{shown}' in the first") as error:
        windows(examples, NoDigits(), 4)
    assert "--max_length" not in str(error.value)
