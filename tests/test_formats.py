"""The formats that training text comes in: files, data sets, records; chats under a template; what is said of them."""

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("peft")
pytest.importorskip("jsonargparse")
trl = pytest.importorskip("trl")

from transformers import AutoTokenizer  # noqa: E402

from lora_rite.cli import main  # noqa: E402
from lora_rite.errors import LoRARiteValueError  # noqa: E402
from lora_rite.finetune.data import ALPACA, Chat, Example, as_record, read_data, read_examples, split  # noqa: E402
from lora_rite.finetune.models import TINY  # noqa: E402
from lora_rite.finetune.windows import IGNORED, windows  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<end>\n{% endgeneration %}{% else %}{{ m.content }}<end>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
#: Writes the last turn otherwise than those before it.
CHANGING = TEMPLATE.replace("{{ m.content }}", "{% if loop.last %}(last) {% endif %}{{ m.content }}")


def tokenizer(template=None):
    found = AutoTokenizer.from_pretrained(TINY)
    found.chat_template = template
    return found


def turns(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def chat(messages, **more):
    return Chat(json.dumps(messages, ensure_ascii=False), **more)


def learnt(row, tok):
    """The text that carries loss, a string for each run."""
    runs, last = [], None
    for n, (token, label) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
        if label == IGNORED:
            continue
        if last != n - 1:
            runs.append([])
        runs[-1].append(token)
        last = n
    return [tok.decode(run) for run in runs]


# ------------------------------------------------------------------------------------------------------------- files

RECORDS = [{"prompt": "a; b", "completion": "c,\nd"}, {"prompt": 'e "f"', "completion": "g"}]
TABLE = 'prompt,completion\na; b,"c,\nd"\n"e ""f""",g\n'
FILES = {
    ".jsonl": "".join(json.dumps(record) + "\n" for record in RECORDS).encode(),
    ".json": json.dumps(RECORDS, indent=1).encode(),
    ".csv": TABLE.encode(),
    ".tsv": b'prompt\tcompletion\r\na; b\t"c,\r\nd"\r\n"e ""f"""\tg\r\n',
}
FILES[".ndjson"] = FILES[".jsonl"]


def contents(suffix):
    if suffix != ".parquet":
        return FILES[suffix]
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), sink := pyarrow.BufferOutputStream())
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("name", ["data{}", "data{}.gz", "data.bin", "data{}.bak", "DATA"])
@pytest.mark.parametrize("suffix", [*FILES, ".parquet"])
def test_files_are_known_by_their_suffix_or_else_by_their_content(suffix, name, tmp_path):
    path = tmp_path / name.format(suffix.upper() if name.endswith(".gz") else suffix)
    path.write_bytes(gzip.compress(contents(suffix)) if name.endswith((".gz", ".bin")) else contents(suffix))
    assert read_examples(path) == [Example("a; b", "c,\nd"), Example('e "f"', "g")]


def test_other_delimiters_of_a_table(tmp_path):
    (tmp_path / "a.csv").write_text("prompt;completion;id\na, b;c;1\n\n")
    found = read_data(tmp_path / "a.csv")
    assert found.examples == [Example("a, b", "c")]
    assert found.summary("a.csv") == "a.csv: 1 example (prompts with completions); keys passed over: id"
    (tmp_path / "b.csv").write_text("messages\n" + '"[{""role"": ""user"", ""content"": ""a""},')
    with pytest.raises(LoRARiteValueError, match=r"b.csv:2: "):
        read_data(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("text\n" + "x" * 200_000)
    assert len(read_examples(tmp_path / "c.csv")[0].completion) == 200_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,completion\na,b\na,b,c\n", "data.csv:3: it has 3 cells, and the heading 2"),
        ("text,text\na,b\n", "data.csv:1: the column 'text' is there twice"),
        ("text\n", "has no text"),
        ("words\na\n", 'data.csv:2: expected "messages"'),
    ],
)
def test_bad_tables(text, message, tmp_path):
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(LoRARiteValueError, match=message):
        read_data(tmp_path / "data.csv")
    if "cells" in message:
        with pytest.warns(UserWarning, match="1 lines are left out, 1 are used"):
            assert read_examples(tmp_path / "data.csv", skip_bad_lines=True) == [Example("a", "b")]


@pytest.mark.parametrize(
    "content",
    [gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-20], b"\x1f\x8b\x00", b"plain"],
    ids=["cut", "header", "plain"],
)
def test_a_damaged_gzip_file(content, tmp_path):
    (tmp_path / "data.jsonl.gz").write_bytes(content)
    with pytest.raises(LoRARiteValueError, match=r"cannot read .*data.jsonl.gz: not a whole gzip file"):
        read_examples(tmp_path / "data.jsonl.gz")


@pytest.mark.parametrize("text", ["int a;\n", "text\nof a book, and more", "prompt and completion\n", '{"id": 1}\n'])
def test_one_plain_text_is_said_to_be_one(text, tmp_path):
    (tmp_path / "notes.txt").write_text(text)
    found = read_data(tmp_path / "notes.txt")
    assert found.examples == [Example("", text)]
    assert found.summary("notes.txt") == f"notes.txt: one plain text of {len(text)} characters"


def test_a_data_set_by_its_name_and_split(tmp_path, monkeypatch):
    """From a folder that ``datasets`` can load, as from the hub; columns that are not taken are not decoded."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "own" / "set"
    folder.mkdir(parents=True)
    for name, n in (("train", 3), ("test", 2)):
        lines = [json.dumps({"messages": turns(f"{name} {i}", "b"), "id": i}) for i in range(n)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    read = lambda name: read_examples(type(tmp_path)(name))
    assert [json.loads(e.messages)[0]["content"] for e in read("own/set:train")] == [f"train {i}" for i in range(3)]
    assert read(str(folder) + ":test[:1]") == [chat(turns("test 0", "b"))]
    with pytest.raises(LoRARiteValueError, match=r"cannot load own/set: .*nosuch"):
        read("own/set:nosuch")
    with pytest.raises(
        LoRARiteValueError, match=r"own/set: it is a folder \(a data set: NAME:SPLIT, as own/set:train\)"
    ):
        read("own/set")


# ----------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": turns("a", "b")}, chat(turns("a", "b"))),
        ({"messages": json.dumps(turns("a", "b")), "prompt": "a"}, chat(turns("a", "b"))),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, chat(turns("a", "b"))),
        ({"conversations": turns("a", "b")}, chat(turns("a", "b"))),
        ({"prompt": turns("a"), "completion": turns("", "b")[1:]}, chat(turns("a", "b"), start=1)),
        ({"prompt": turns("a"), "completion": "b"}, chat(turns("a", "b"), start=1)),
        ({"messages": turns("a", "b"), "tools": [{"name": "f"}]}, chat(turns("a", "b"), tools='[{"name": "f"}]')),
        ({"instruction": "a", "input": "", "output": "b"}, chat(turns("a", "b"), alpaca=("a", "", "b"))),
        ({"instruction": "a", "input": "c", "output": "b"}, chat(turns("a\n\nc", "b"), alpaca=("a", "c", "b"))),
        ({"instruction": "a", "output": "b", "text": "whole"}, chat(turns("a", "b"), alpaca=("a", "", "b"))),
        ({"prompt": "a", "completion": "b"}, Example("a", "b")),
        ({"text": "a", "messages": None}, Example("", "a")),
    ],
)
def test_records(record, expected, tmp_path):
    """And what a study keeps of an example is read as the same example."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record))
    assert read_examples(path) == [expected]
    path.write_text(json.dumps(as_record(expected)))
    assert read_examples(path) == [expected]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, '"messages" must be a list of messages'),
        ({"messages": "words"}, '"messages" must be a list of messages'),
        ({"messages": ["a"]}, 'objects with "role" and "content"'),
        ({"messages": [{"role": "user"}]}, r"needs \"role\" and \"content\"; got \['role'\]"),
        ({"messages": turns("a")}, "no message of the assistant to learn from; the roles are user"),
        ({"prompt": turns("a", "b"), "completion": turns("c")}, "no message of the assistant"),
        ({"messages": turns("a", "\ud800")}, "half of a surrogate pair"),
        ({"messages": turns("a", "b"), "tools": 3}, '"tools" must be a list'),
        ({"instruction": 3, "output": "b"}, '"instruction" must be a string, got a int'),
    ],
)
def test_bad_records_are_named(record, message, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' + json.dumps(record))
    with pytest.raises(LoRARiteValueError, match=f"bad.jsonl:2: .*{message}"):
        read_examples(tmp_path / "bad.jsonl")


def test_empty_examples_are_counted_and_left_out(tmp_path):
    empty = [
        {"text": " "}, {"prompt": "a", "completion": ""}, {"instruction": "a", "output": " "},
        {"messages": turns("a", "")},
    ]  # fmt: skip
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, [*empty, {"text": "a"}])))
    with pytest.warns(UserWarning, match=r"empty examples are left out: 4, the first: .*data.jsonl:1"):
        found = read_data(path)
    assert (found.examples, found.empty) == ([Example("", "a")], 4)
    assert found.summary("d") == "d: 1 example (texts); left out: 4 empty"
    path.write_text("\n".join(map(json.dumps, empty)))
    with pytest.raises(LoRARiteValueError, match="has no text: 4 empty examples alone"):
        read_data(path)


def test_chats_are_split_as_examples_are():
    examples = [*(chat(turns(str(i % 15), "b")) for i in range(20)), *(Example("a", str(i)) for i in range(5))]
    one, again, other = (split(examples, 0.25, seed) for seed in (0, 0, 1))
    assert one == again != other
    assert not set(one.train) & set(one.held_out)
    assert len(one.train) + len(one.held_out) == 25
    with pytest.raises(LoRARiteValueError, match="--validation"):
        split(examples[:1], 0.1, 0)


# ------------------------------------------------------------------------------------------------------------- chats

words = st.text(st.characters(exclude_categories=["C"], exclude_characters="<>|"), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(st.lists(words, min_size=2, max_size=8), st.sampled_from([TEMPLATE, MARKED]))
def test_the_turns_of_the_assistant_carry_loss_and_nothing_else(texts, template):
    """Whatever is said, with marks in the template or without: what is learnt is what the assistant says, to the end of
    its turn, and the tokens are those of the whole conversation. (A token that spans two turns carries loss.)"""
    tok = tokenizer(template)
    (row,) = windows([chat(turns(*texts))], tok, 4096).rows
    pieces = [(tok.bos_token, False)]
    for message in turns(*texts):
        is_answer = message["role"] == "assistant"
        pieces += [(f"<{message['role']}>", False), (f"{message['content']}<end>\n", is_answer)]
    answers = [is_answer for text, is_answer in pieces for _ in text]
    whole = tok("".join(text for text, _ in pieces), add_special_tokens=False, return_offsets_mapping=True)
    assert row["input_ids"] == whole["input_ids"]
    assert row["input_ids"].count(tok.bos_token_id) == 1
    assert [label != IGNORED for label in row["labels"]] == [any(answers[a:b]) for a, b in whole["offset_mapping"]]


def test_of_a_prompt_no_turn_carries_loss():
    messages = turns("a", "before", "b", "after")
    for template in (TEMPLATE, MARKED):
        tok = tokenizer(template)
        (row,) = windows([chat(messages, start=3)], tok, 512).rows
        assert learnt(row, tok) == ["after<end>\n"]


def test_packed_chats_learn_what_single_ones_do():
    tok = tokenizer(TEMPLATE)
    chats = [chat(turns("a" * n, "b" * n, "c", "d" * n)) for n in range(1, 6)]
    single = [text for row in windows(chats, tok, 256).rows for text in learnt(row, tok)]
    packed = windows(chats, tok, 256, packing=True).rows
    assert len(packed) < len(chats)
    assert [text for row in packed for text in learnt(row, tok)] == single


def test_a_known_template_is_trained_as_trl_does():
    """Qwen3's writes the last turn otherwise: its turns cannot be told apart without TRL's version."""
    from trl import chat_template_utils

    tok = tokenizer(chat_template_utils.qwen3_chat_template)
    (row,) = windows([chat(turns("a", "first", "b", "second"))], tok, 512).rows
    first, second = learnt(row, tok)
    assert "first" in first
    assert "second" in second
    assert "<|im_end|>" in first
    assert "<|im_start|>" not in first + second


def test_a_template_that_rewrites_turns_is_refused():
    with pytest.raises(LoRARiteValueError, match=r"begins 'a': it writes a turn otherwise .* \{% generation %\}"):
        windows([chat(turns("a", "b", "c", "d"))], tokenizer(CHANGING), 512)


def test_what_the_template_refuses_is_told():
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(LoRARiteValueError, match="the conversation that begins 'a': roles must alternate"):
        windows([chat(turns("a", "b"))], tokenizer(strict), 512)


def test_models_without_a_template():
    """Instructions get Alpaca's text; other conversations are refused."""
    tok = tokenizer()
    made = windows([chat(turns("a\n\nc", "b"), alpaca=("a", "c", "b"))], tok, 512).rows
    assert made == windows([Example(ALPACA[0].format("a", "c"), "b")], tok, 512).rows
    made = windows([chat(turns("a", "b"), alpaca=("a", "", "b"))], tok, 512).rows
    assert made == windows([Example(ALPACA[1].format("a"), "b")], tok, 512).rows
    with pytest.raises(LoRARiteValueError, match="no chat template for conversations; give --chat_template"):
        windows([chat(turns("a", "b"))], tok, 512)
    with pytest.raises(LoRARiteValueError, match=r"an encoder-decoder model learns .* not from conversations"):
        windows([chat(turns("a", "b"))], tokenizer(TEMPLATE), 512, encoder_decoder=True)


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_never_a_second_begin_or_end_token(encoder_decoder):
    """Text that was rendered by a template already is in many data sets."""
    tok = tokenizer()
    bos, eos = tok.bos_token, tok.eos_token
    plain = [Example("int ", "a;")] + [Example("", "int a;")] * (not encoder_decoder)
    marked = [Example(f"{bos}int ", f"a;{eos}")] + [Example("", f"{bos}int a;{eos}")] * (not encoder_decoder)
    found = [windows(part, tok, 64, encoder_decoder=encoder_decoder).rows for part in (plain, marked)]
    if not encoder_decoder:
        assert found[0] == found[1]
    for row in found[1]:
        for key in ("input_ids", "labels"):
            assert not any(a == b and a in (tok.bos_token_id, tok.eos_token_id) for a, b in pairwise(row[key]))


# ------------------------------------------------------------------------------------------------- the command line

OPTIONS = ["--steps", "2", "--rank", "1", "--target_modules", "[q_proj]", "--batch_size", "2"]


@pytest.fixture
def files(tmp_path):
    records = [{"messages": turns(f"number {i}?", f"{i}", "more?" * i, f"{i + 1}")} for i in range(12)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    return tmp_path


def run(folder, *words):
    words = ["--data", folder / "chats.jsonl", "--chat_template", folder / "template.jinja", *words, *OPTIONS]
    return main(["train", *map(str, words), "--out", str(folder / "run")])


def test_a_run_on_chats_says_first_what_is_cut_and_left_out(files, capsys):
    assert run(files, "--max_length", "40", "--holdout", "0.2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{files / 'chats.jsonl'}: 12 examples (conversations)"
    assert lines[1].startswith("training: 10 examples, ")
    assert "cut, since longer than --max_length 40: " in lines[1]
    assert lines[2].startswith("held out: 2 examples, 2 windows, ")
    result = json.loads((files / "run" / "result.json").read_text())
    assert result["examples"]["cut"]["train"] > result["examples"]["dropped"]["train"] == 0
    assert result["settings"]["chat_template"] == str(files / "template.jinja")


def test_examples_without_an_answer_in_their_window_are_counted(tmp_path):
    tok = tokenizer()
    found = windows([Example("a " * 30, "b"), Example("a " * 7, "b " * 9), Example("a", "b")], tok, 16)
    assert (len(found.rows), found.cut, found.dropped) == (2, 2, 1)


def test_preview_shows_what_carries_loss_and_stops(files, capsys):
    assert run(files, "--preview", "2") == 0
    out = capsys.readouterr().out
    assert out.count("\nwindow ") == 2
    assert "<|bos|><user>number 0?<end>\n<assistant>«0<end>\n»<user><end>\n<assistant>«1<end>\n»" in out
    assert not (files / "run").exists()


@pytest.mark.parametrize("content", ["{% for %}", None])
def test_templates_that_cannot_be_used(content, files, capsys):
    (files / "template.jinja").unlink()
    if content is not None:
        (files / "template.jinja").write_text(content)
    assert run(files) == 2
    error = capsys.readouterr().err
    assert f"\nlora-rite train: error: --chat_template {files / 'template.jinja'}: " in f"\n{error}"
    assert not (files / "run").exists()


def test_a_template_without_conversations_is_refused(files, capsys):
    (files / "chats.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    assert run(files) == 2
    assert "--chat_template: no example is a conversation" in capsys.readouterr().err


def test_eval_measures_the_loss_on_chats_that_train_did(files, capsys):
    """As the held-out loss of a run; a changed template is refused in the results' folder."""
    validation = files / "held-out.jsonl"
    validation.write_text(json.dumps({"messages": turns("who?", "you", "and?", "me")}))
    assert run(files, "--validation", str(validation)) == 0
    held_out = json.loads((files / "run" / "result.json").read_text())["held_out"]
    words = ["eval", "--tasks", validation, "--chat_template", files / "template.jinja", "--out", files / "eval"]
    assert main(list(map(str, words))) == 0
    loss = json.loads((files / "eval" / "held-out.json").read_text())["results"]["loss"]
    assert loss["tokens"] == held_out["tokens"]
    assert loss["nat_per_token"] == pytest.approx(held_out["before"], rel=1e-5)
    assert main(list(map(str, words))) == 0
    (files / "template.jinja").write_text(TEMPLATE + " ")
    assert main(list(map(str, words))) == 2
    assert "chat_template_sha256: " in capsys.readouterr().err


def test_an_adapter_is_evaluated_with_the_template_it_was_trained_with(files, capsys):
    """That of its folder, as the base model has none; it belongs to what the evaluation is known by."""
    validation = files / "held-out.jsonl"
    validation.write_text(json.dumps({"messages": turns("who?", "you", "and?", "me")}))
    assert run(files, "--validation", str(validation)) == 0
    held_out = json.loads((files / "run" / "result.json").read_text())["held_out"]
    adapter = files / "run" / "adapter"
    words = ["eval", "--tasks", validation, "--adapter", adapter, "--out", files / "eval"]
    assert main(list(map(str, words))) == 0
    loss = json.loads((files / "eval" / "held-out.json").read_text())["results"]["loss"]
    assert loss["nat_per_token"] == pytest.approx(held_out["after"], rel=1e-5)
    assert main(list(map(str, words))) == 0
    (adapter / "chat_template.jinja").write_text(TEMPLATE + " ")
    assert main(list(map(str, words))) == 2
    assert "chat_template_sha256: " in capsys.readouterr().err


def test_the_template_of_the_docs_marks_the_answers_and_their_ends():
    """It is the one that data.md prints, has one begin token, and teaches the end token, at which generation stops."""
    template = (Path(__file__).parents[1] / "examples" / "chat.jinja").read_text()
    assert f"```jinja\n{template}```" in (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    tok = tokenizer(template)
    messages = [{"role": "system", "content": "be brief"}, *turns("one?", "1", "two?", "2")]
    row = windows([chat(messages)], tok, 256).rows[0]
    assert learnt(row, tok) == [f"1{tok.eos_token}", f"2{tok.eos_token}"]
    assert row["input_ids"].count(tok.bos_token_id) == 1
    asked = tok.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert row["input_ids"][: len(asked)] == asked
    tok.bos_token = None  # Qwen's has none
    assert tok.apply_chat_template(messages, tokenize=False).startswith("<|system|>\nbe brief\n<|user|>\none?\n")


def test_a_study_takes_chats_and_data_sets(files, monkeypatch):
    """What it keeps of a task is read as the same examples; a data set is not a file that is missing."""
    from types import SimpleNamespace

    from lora_rite.study.data import missing_files, read_data, write_data

    path = lambda name: type(files)(name)
    task = SimpleNamespace(task=None, data=files / "chats.jsonl", validation=None, test=None, limit={})
    recipe = SimpleNamespace(tasks={"Chats": task})
    found = {"Chats": read_data(task, None)}
    write_data(recipe, files / "data", found)
    for part, examples in found["Chats"].items():
        assert read_examples(files / "data" / "Chats" / f"{part}.jsonl") == examples
    task.data, task.validation = path("own/set:train"), path("lost.jsonl")
    assert missing_files(recipe, files / "other") == [("tasks.Chats.validation", path("lost.jsonl"))]


def test_a_study_of_chats_is_checked_with_its_template(files, monkeypatch):
    """Before its first run; each task with its own."""
    from lora_rite.study import compare as module

    template = files / "template.jinja"
    recipe = files / "recipe.yaml"
    recipe.write_text(
        "title: Chats\ntrain: {steps: 1, batch_size: 2, target_modules: [q_proj]}\nranks: [1]\nseeds: [0]\n"
        f"tasks: {{Chats: {{data: {files / 'chats.jsonl'}, train: {{chat_template: {template}}}}}}}\n"
        "optimizers: {LoRA-RITE: {optimizer: lora-rite, lr: [0.01]}}\n"
    )
    reached = []
    monkeypatch.setattr(module, "_run_all", lambda *args: reached.append(1))
    monkeypatch.setattr(module, "report", lambda out: out)
    module.compare(recipe, out=files / "study", progress=False)
    assert reached
    recipe.write_text(recipe.read_text().replace(f", train: {{chat_template: {template}}}", ""))
    with pytest.raises(LoRARiteValueError, match="no chat template for conversations"):
        module.compare(recipe, out=files / "other", progress=False)
    recipe.write_text(recipe.read_text().replace("steps: 1", "preview: 1"))
    with pytest.raises(LoRARiteValueError, match=r"train.preview: the study decides it"):
        module.compare(recipe, out=files / "other", progress=False)
