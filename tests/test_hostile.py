"""Broken and hostile configs, data, models and adapters. Ids (E1, …) are those of the project's list of tortures."""

import json
import os
import struct
import sys
import time
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("peft")
pytest.importorskip("jsonargparse")

from safetensors.torch import load_file, save_file

from lora_rite import LoRARiteError
from lora_rite.cli import main
from lora_rite.errors import LoRARiteValueError
from lora_rite.finetune import prepare as prepare_module
from lora_rite.finetune.data import Example, read_examples
from lora_rite.finetune.models import TINY
from lora_rite.finetune.untrusted import check_adapter, read_config
from lora_rite.finetune.windows import IGNORED, windows

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "default::UserWarning")
#: Inputs tried by each fuzzer: in the fast tests, and in the slow ones (figures of docs/reliability.md).
fuzzed = pytest.mark.parametrize("inputs", [300, pytest.param(20_000, marks=pytest.mark.slow)])
OPTIONS = {"steps": 1, "batch_size": 2, "max_length": 16, "rank": 2, "target_modules": "[q_proj]"}
WORDS = [str(word) for key, value in OPTIONS.items() for word in (f"--{key}", value)] + ["--no_progress"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"int f{i}(int a) {{ return a; }}"}) for i in range(12)))
    return path


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that hostile code makes; and a socket is none of its business."""
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("tried to connect"))
    return tmp_path / "canary"


def fuzz(inputs, check, *strategies):
    """Calls ``check`` with so many inputs, the same ones at each run."""
    options = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "database": None}
    settings(max_examples=inputs, **options)(given(*strategies)(check))()


def attempt(function, *arguments):
    """What it returns, and None; or None, and the message of the error."""
    try:
        return function(*arguments), None
    except LoRARiteError as error:
        return None, str(error)


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# ------------------------------------------------------------------------------------------------------------ configs

BOMB = "a: &a [x, x]\n" + "".join(
    f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefghijklm", "bcdefghijklmn", strict=True)
)
CONFIGS = {
    "object": ("rank: 2\nlr: !!python/object/apply:os.mkdir [CANARY]\n", "run.yaml:2: tags (!) are not supported"),
    "name": ("lr: !!python/name:os.system\n", "run.yaml:1: tags"),
    "local tag": ("lr: !x 3\n", "run.yaml:1: tags"),
    "bomb": (BOMB, "run.yaml:1: anchors (&) and aliases (*) are not supported"),
    "itself": ("a: &a\n  - *a\n", "run.yaml:1: anchors"),
    "deep": ("a: " + "[" * 5000, "run.yaml:1: nested deeper than 20"),
    "large": ("# " + "x" * 2**20, "run.yaml has more than 1048576 bytes"),
    "nul": ("rank: 2\nlr: \0\n", "run.yaml:2: the character '\\x00' is not allowed"),
    "not UTF-8": (b"rank: 2\nlr: \xff\n", "run.yaml is not UTF-8 text: invalid start byte at byte 12"),
    "UTF-16": ("rank: 2".encode("utf-16"), "run.yaml is not UTF-8 text"),
    "tab": ("optimizer_args:\n\tdamping: 1\n", "run.yaml:2: found character '\\t'"),
    "list": ("- rank\n- 2\n", "run.yaml: expected a mapping"),
    "number": ("3", "run.yaml: expected a mapping"),
    "empty": ("", "run.yaml: expected a mapping"),
    "two documents": ("rank: 2\n---\nrank: 3\n", "run.yaml:2: but found another document"),
    "twice": ("rank: 2\nlr: 1\nrank: 3\n", "run.yaml:3: rank is given twice"),
    "twice inside": ("optimizer_args:\n  damping: 1\n  damping: 2\n", "run.yaml:3: damping is given twice"),
    "list as key": ("? [a]\n: 1\n", "run.yaml"),
    "number as key": ("1: 2\n", "run.yaml: 1 is no name of an option"),
    "date": ("rank: 2020-99-99\n", "run.yaml: month must be in 1..12"),
    "unknown": ("rank: 2\nlearing_rate: 1\n", "run.yaml:2: no option learing_rate"),
    "close": ("rank: 2\nwarmpu: 1\n", "run.yaml:2: no option warmpu, did you mean warmup?"),
    "float": ("lr: 1\nrank: 8.5\n", "run.yaml:2: rank must be a whole number, got 8.5"),
    "word": ("lr: fast\n", "run.yaml:1: lr must be a number, got fast"),
    "word as switch": ('rank: 2\nbf16: "no"\n', "run.yaml:2: bf16 must be true or false, got 'no'"),
    "code": ("rank: 2\ntrust_remote_code: true\n", "run.yaml:2: --trust_remote_code can be given on the command line"),
    "nested code": ("trust_remote_code: 1\n", "run.yaml:1: --trust_remote_code can be given"),
    "optimizer": ("rank: 2\noptimizer: os:mkdir\n", "run.yaml:2: --optimizer with an import path can be given"),
    "argument": ("optimizer_args: {cls: 'os:mkdir'}\n", "run.yaml:1: --optimizer_args with an import path"),
    "in a string": ("optimizer_args: '{cls: \"os:mkdir\"}'\n", "run.yaml:1: --optimizer_args with an import path"),
    "debug": ("debug: true\n", "run.yaml:1: --debug can be given on the command line only"),
    "config": ("config: other.yaml\n", "run.yaml:1: --config can be given on the command line only"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_bad_configs_are_one_line_with_the_place(kind, data, tmp_path, canary, capsys):
    """E1, E2, E4: exit code 2, nothing executed, nothing created."""
    text, message = CONFIGS[kind]
    text = text if isinstance(text, bytes) else text.replace("CANARY", str(canary)).encode()
    (tmp_path / "run.yaml").write_bytes(text)
    words = ["--data", str(data), "--out", str(tmp_path / "run"), "--config", str(tmp_path / "run.yaml")]
    assert main(["train", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not canary.exists()
    assert not (tmp_path / "run").exists()


def test_a_colon_alone_is_no_code():
    from lora_rite.finetune.untrusted import names_code

    assert not names_code({"device": "cuda:0"})
    assert names_code({"cls": "os:mkdir"})


@pytest.mark.parametrize("value", ["{class_path: in_a_config.C}", '\'{"class_path": "in_a_config.C"}\''])
def test_a_class_in_a_config_is_not_imported(value, data, tmp_path, canary, monkeypatch, capsys):
    """E4: jsonargparse would make an object of it."""
    (tmp_path / "in_a_config.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass C: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "run.yaml").write_text(f"optimizer_args: {{damping: {value}}}\n")
    words = ["--data", str(data), "--out", str(tmp_path / "run"), "--config", str(tmp_path / "run.yaml"), *WORDS]
    assert main(["train", *words]) == 2
    assert "damping must be a finite number" in capsys.readouterr().err
    assert "in_a_config" not in sys.modules
    assert not canary.exists()


def test_what_a_config_may_say(tmp_path):
    """E2: 1e-4 is a number, a byte order mark is none of the key."""
    path = tmp_path / "run.yaml"
    path.write_bytes('\ufefflr: 1e-4\neps: -1E+3\nb: 2.5e3\nname: 1e\nword: "1e-4"\n'.encode())
    config = read_config(path)
    assert config == {"lr": 1e-4, "eps": -1000.0, "b": 2500.0, "name": "1e", "word": "1e-4"}
    assert config.lines["lr"] == f"{path}:1"


def test_what_print_config_writes_is_read(data, tmp_path, capsys):
    """Options that a file may not switch on are in there, switched off."""
    words = ["train", "--data", str(data), "--out", str(tmp_path / "run"), *WORDS]
    with pytest.raises(SystemExit):
        main([*words, "--print_config"])
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert read_config(tmp_path / "run.yaml")["trust_remote_code"] is False
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 0


@pytest.mark.parametrize("path", ["missing.yaml", ".", "/dev/zero", "x" * 5000 + ".yaml", "a\0b"])
def test_configs_that_are_no_files(path, data, tmp_path, capsys):
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), "--config", path]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


yaml_text = st.one_of(
    st.text(max_size=200),
    st.lists(
        st.sampled_from(
            [*"{}[]:,-?&*!|>%@`\"'# \n\t\\", "- ", ": ", "\n  ", "lr", "1e-4", "<<", "&a ", "*a", "!!", "---\n", "~"]
        ),
        max_size=60,
    ).map("".join),
    st.binary(max_size=100),
)


@fuzzed
def test_fuzzed_configs_are_read_or_refused(inputs, tmp_path):
    """E1: a mapping of plain values, or LoRARiteValueError that names the file; nothing else, for any bytes."""

    def check(text):
        path = tmp_path / "fuzz.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        config, error = attempt(read_config, path)
        if error is None:
            assert all(isinstance(key, str) for key in config)
        else:
            assert "fuzz.yaml" in error
            assert "\n" not in error

    fuzz(inputs, check, yaml_text)


letters = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=10)
plain = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**60), 2**60),
        st.floats(allow_nan=False, allow_infinity=False),
        letters,
    ),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(letters, children, max_size=3),
    max_leaves=8,
)


@fuzzed
def test_plain_values_come_through(inputs, tmp_path):
    """Strict is not wrong: what JSON says is read as JSON reads it."""

    def check(value):
        (tmp_path / "plain.yaml").write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
        assert read_config(tmp_path / "plain.yaml") == value

    fuzz(inputs, check, st.dictionaries(letters, plain, max_size=4))


# --------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "data.jsonl:2: not a JSON object that can be read"),
        ('{"text": ' + "1" * 10_000 + "}", "data.jsonl:2: not a JSON object that can be read"),
        ('{"text": "\\ud800"}', "data.jsonl:2: \"text\" is not Unicode text"),
        ('{"text": ["a"]}', "data.jsonl:2: \"text\" must be a string, got a list"),
        ('{"text": NaN}', "data.jsonl:2: \"text\" must be a string, got a float"),
        ('[{"text": "a"}]', "data.jsonl:2: expected a JSON object, got a list"),
        ('{"text": "a"', "data.jsonl:2: not a JSON object on one line"),
        ('{"text": "a"}{"text": "b"}', "data.jsonl:2: not a JSON object on one line: Extra data"),
    ],
)  # fmt: skip
def test_bad_lines_are_named_and_may_be_skipped(line, message, tmp_path):
    """E8: before any training. (More of them in test_data.py.)"""
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "first"}\r\n' + line + '\r\n\r\n{"text": "last"}')
    with pytest.raises(LoRARiteValueError) as caught:
        read_examples(path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500
    with pytest.warns(UserWarning, match=r"1 lines are left out, 2 are used; the first: .*data.jsonl:2"):
        assert read_examples(path, skip_bad_lines=True) == [Example("", "first"), Example("", "last")]


def test_long_lines_and_odd_files(tmp_path):
    """E8: 10 MB in a line are text; folders, devices and pipes are no data."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "x" * 10**7}))
    assert len(read_examples(path)[0].completion) == 10**7
    if not hasattr(os, "mkfifo"):
        return  # (Windows has no such files)
    os.mkfifo(tmp_path / "pipe.jsonl")
    for other in (tmp_path, tmp_path / "pipe.jsonl", "/dev/zero", tmp_path / ("x" * 5000), "a\0b"):
        with pytest.raises(LoRARiteValueError, match="cannot read"):
            read_examples(type(path)(other))


def test_skipping_bad_lines_on_the_command_line(data, tmp_path, capsys):
    """E8: nothing is trained before the data is read."""
    data.write_text(data.read_text() + "\n{broken")
    words = ["train", "--data", str(data), "--out", str(tmp_path / "run"), *WORDS]
    assert main(words) == 2
    assert f"{data}:13: not a JSON object" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*words, "--skip_bad_lines"]) == 0
    assert "1 lines are left out, 12 are used" in capsys.readouterr().err


json_line = st.one_of(
    st.text(max_size=100),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=20)),
        lambda c: st.lists(c, max_size=3) | st.dictionaries(st.sampled_from(["text", "prompt", "completion", "x"]), c),
        max_leaves=6,
    ).map(json.dumps),
    st.binary(max_size=60),
)


@fuzzed
def test_fuzzed_data_is_read_or_refused(inputs, tmp_path):
    """E8: examples with text, or LoRARiteValueError that names the file."""

    def check(lines):
        path = tmp_path / "fuzz.jsonl"
        as_bytes = lambda line: line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
        path.write_bytes(b"\n".join(as_bytes(line) for line in lines))
        examples, error = attempt(read_examples, path)
        if error is not None:
            assert "fuzz.jsonl" in error
            return
        assert examples
        for example in examples:
            assert example.completion.strip()
            (example.prompt + example.completion).encode()

    fuzz(inputs, check, st.lists(json_line, max_size=4))


class Letters:
    """A tokenizer of one token a character, whose padding and end tokens are the same."""

    bos_token_id, eos_token_id, pad_token_id = None, 2, 2

    def __call__(self, text, **kwargs):
        return {"input_ids": [ord(c) for c in text]}


def test_answers_of_one_token_and_labels_without_loss():
    """E9: one token of answer carries loss, its end token too; a prompt that fills the window leaves no row."""
    (row,) = windows([Example("ab", "c")], Letters(), 16).rows
    assert row["labels"] == [IGNORED, IGNORED, 99, 2]
    (row,) = windows([Example("a" * 20, "b"), Example("a", "b")], Letters(), 16).rows
    assert row["input_ids"] == [97, 98, 2]
    with pytest.raises(LoRARiteValueError, match="no token carries loss within 16 tokens"):
        windows([Example("a" * 16, "b")], Letters(), 16)


def test_a_batch_whose_padding_is_the_end_token_carries_no_loss_for_padding(tmp_path):
    """E9: pad == eos."""
    from transformers import DataCollatorForSeq2Seq

    _, tokenizer = prepare_module.load_model("tiny")
    tokenizer.pad_token = tokenizer.eos_token
    rows = windows([Example("", "int a;"), Example("x", "y")], tokenizer, 16).rows
    batch = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)([dict(row) for row in rows])
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_a_token_beyond_the_model(data, tmp_path, monkeypatch, capsys):
    """E9: an error before training instead of an index error (or a dead GPU) within it."""
    load = prepare_module.load_model

    def shrunk(*args, **kwargs):
        network, tokenizer = load(*args, **kwargs)
        network.resize_token_embeddings(40)
        return network, tokenizer

    monkeypatch.setattr(prepare_module, "load_model", shrunk)
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *WORDS]) == 2
    assert "and the model knows 40 tokens" in capsys.readouterr().err


def test_held_out_examples_that_are_trained_on(data, tmp_path, capsys):
    """E10: a warning with the count, and the count in the result."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join([*data.read_text().splitlines()[:3], '{"text": "int other;"}']))
    words = ["train", "--data", str(data), "--validation", str(held_out), "--out", str(tmp_path / "run"), *WORDS]
    assert main(words) == 0
    assert "3 held-out examples are in the training data too" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["held_out"]["examples_in_training_data"] == 3


@pytest.mark.parametrize("options", [{"batch_size": 50}, {"accumulation": 50}, {"lr": 0}, {"rank": 200}, {"alpha": 0}])
def test_extreme_settings_have_a_defined_result(options, data, tmp_path):
    """E16: a batch or an accumulation beyond the data, a learning rate of 0, a rank above the width."""
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *WORDS, *words]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    if "lr" in options or "alpha" in options:
        assert result["held_out"]["before"] == result["held_out"]["after"]


@pytest.mark.parametrize(
    "option", ["--seed=18446744073709551616", "--steps=-1", "--steps=0", "--steps=1e400", "--lr=inf"]
)
def test_settings_out_of_range(option, data, tmp_path):
    """E16."""
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), option]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["foreign file", "file", "link", "link to a folder", "long", "newline"])
def test_results_go_into_a_folder_of_their_own(kind, data, tmp_path, capsys):
    """E3: whatever is there stays as it is, and a link leads nowhere else."""
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    if kind == "foreign file":
        out.mkdir()
        (out / "thesis.txt").write_text("precious")
    elif kind == "file":
        out.write_text("precious")
    elif kind == "link":
        out.mkdir()
        (out / "adapter").symlink_to(elsewhere)
    elif kind == "link to a folder":
        out.mkdir()
        (out / "checkpoints").symlink_to(elsewhere, target_is_directory=True)
    elif kind == "long":
        out = tmp_path / ("x" * 5000)
    else:
        out = tmp_path / "run\n"
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    code = main(["train", "--data", str(data), "--out", str(out), *WORDS])
    assert code == {"newline": 0, "long": 1}.get(kind, 2)
    assert not list(elsewhere.iterdir())
    assert all(p.exists() and (p.is_file() and p.read_bytes()) == content for p, content in before.items())


# ------------------------------------------------------------------------------------------------- models and adapters


def hostile_model(folder, canary, **config):
    """A folder with the embedded model, further lines in config.json, and code that makes the canary."""
    import shutil

    shutil.copytree(TINY, folder)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass C: pass\n")
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, **config}))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}},
        {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}},
        {"auto_map": {"AutoConfig": "other/repo--evil.C"}, "model_type": "evil"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"_attn_implementation": "evil/kernel"},
        {"attn_implementation": "evil/kernel"},
    ],
)
def test_the_code_of_a_model_does_not_run(config, tmp_path, canary):
    """E4: with code of its own it is refused, or loaded without it; nothing is fetched that its config names."""
    folder = hostile_model(tmp_path / "model", canary, **config)
    loaded, error = attempt(prepare_module.load_model, str(folder))
    if error is None:
        assert type(loaded[0]).__module__.startswith("transformers.")
    else:
        assert "cannot load --model" in error
        assert "\n" not in error
    assert not canary.exists()


def test_a_pickled_model_is_refused(tmp_path, canary):
    """E5: weights come from safetensors alone."""
    folder = hostile_model(tmp_path / "model", canary)
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    torch.save({"x": Payload(canary)}, folder / "pytorch_model.bin")
    with pytest.raises(LoRARiteValueError, match="cannot load --model"):
        prepare_module.load_model(str(folder))
    assert not canary.exists()


def test_a_model_that_is_not_there_is_said_soon(tmp_path, canary, monkeypatch, data, capsys):
    """E14: offline, within 5 seconds and without a try to connect."""
    begin = time.monotonic()
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), "--model", "no/such-model"]) == 2
    assert time.monotonic() - begin < 5
    assert "cannot load --model no/such-model" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A sound adapter of the embedded model."""
    folder = tmp_path_factory.mktemp("adapter")
    network = prepare_module.attach_adapter(prepare_module.load_model("tiny")[0], rank=2, target_modules=["q_proj"])
    network.save_pretrained(str(folder))
    check_adapter(folder, network)
    return folder


def test_an_adapter_leaves_the_filters_of_warnings_as_they_were(trained):
    before = [*warnings.filters]
    prepare_module.attach_adapter(prepare_module.load_model("tiny")[0], adapter=trained)
    assert warnings.filters == before


def copy(folder, to):
    import shutil

    shutil.copytree(folder, to)
    return to / "adapter_model.safetensors"


def with_header(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


entry = lambda dtype="F32", shape=(2, 192), offsets=(0, 1536): {
    "dtype": dtype,
    "shape": list(shape),
    "data_offsets": list(offsets),
}
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FILES = {
    "empty": (b"", "is damaged"),
    "truncated": (with_header({A: entry()}, b"\0" * 700), "is damaged"),
    "header of 2^63 bytes": (struct.pack("<Q", 2**63) + b"{}", "is damaged"),
    "header beyond the end": (struct.pack("<Q", 10**6) + b"{}", "is damaged"),
    "header no JSON": (with_header(b"{" * 20), "is damaged"),
    "header deep": (with_header(b"[" * 10**5), "is damaged"),
    "overlap": (with_header({A: entry(), A.replace("_A", "_B"): entry()}, b"\0" * 1536), "is damaged"),
    "negative": (with_header({A: entry(offsets=(-1, 1535))}, b"\0" * 1536), "is damaged"),
    "wrong size": (with_header({A: entry(shape=(3, 192))}, b"\0" * 1536), "is damaged"),
    "huge shape": (with_header({A: entry(shape=(2**40, 2**40))}, b"\0" * 1536), "is damaged"),
    "no tensors": (with_header({}), "has no tensors"),
    "integers": (with_header({A: entry("I64", (2, 96))}, b"\0" * 1536), "is of torch.int64"),
    "NaN": (with_header({A: entry()}, b"\xff" * 1536), "contains NaN or Inf"),
    "rank": (with_header({A: entry(shape=(4, 96))}, b"\0" * 1536), "has rank 4, adapter_config.json has r=2"),
    "pickle": (b"\x80\x04]\x94.", "is damaged"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_adapter_is_refused(kind, trained, tmp_path, capsys):
    """E6, E7: nothing of it is loaded."""
    file = copy(trained, tmp_path / "adapter")
    file.write_bytes(FILES[kind][0])
    assert main(["pairs", "--adapter", str(file.parent)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert FILES[kind][1] in line
    assert len(line) < 600


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "training_args.bin"])
def test_a_pickled_adapter_is_refused(name, trained, tmp_path, canary, capsys):
    """E5: the payload does not run."""
    file = copy(trained, tmp_path / "adapter")
    file.unlink()
    torch.save({"x": Payload(canary)}, file.parent / name)
    assert main(["pairs", "--adapter", str(file.parent)]) == 2
    assert f"has no adapter_model.safetensors ({name} is a pickle" in capsys.readouterr().err
    assert not canary.exists()


def test_a_pickle_beside_the_adapter_is_not_read(trained, tmp_path, canary):
    """E5."""
    file = copy(trained, tmp_path / "adapter")
    for name in ("adapter_model.bin", "training_args.bin"):
        torch.save({"x": Payload(canary)}, file.parent / name)
    assert main(["pairs", "--adapter", str(file.parent)]) == 0
    assert not canary.exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "XLORA", "adapters": {"0": "evil/repo"}}, "peft_type 'XLORA' is not supported"),
        ({"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "evil/repo"}, "peft_type 'PROMPT_TUNING'"),
        ({"peft_type": None}, "peft_type None"),
        ({"megatron_config": {"x": 1}, "megatron_core": "evil"}, "megatron_config is not supported"),
        ({"r": 16}, "has rank 2, adapter_config.json has r=16"),
        ({"r": "2"}, "has r=2"),
        ({"r": [2]}, "has r=[2]"),
        ({"rank_pattern": [1]}, "rank_pattern must be a mapping of names to ranks, got [1]"),
        ({"alpha_pattern": [1]}, "--adapter"),
        ({"target_modules": ["k_proj"]}, "--adapter"),
    ],
)
def test_what_an_adapter_config_asks_for(config, message, trained, tmp_path, canary, monkeypatch, capsys):
    """E7: nothing is fetched or imported that it names, and it fits its tensors."""
    file = copy(trained, tmp_path / "adapter")
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = file.parent / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    assert main(["pairs", "--adapter", str(file.parent)]) == 2
    assert message in capsys.readouterr().err
    assert not canary.exists()


def test_the_base_that_an_adapter_names_is_not_fetched(trained, tmp_path, canary):
    """E7: the model is the one that the user names."""
    file = copy(trained, tmp_path / "adapter")
    path = file.parent / "adapter_config.json"
    config = {**json.loads(path.read_text()), "base_model_name_or_path": "evil/repo", "revision": "main"}
    path.write_text(json.dumps(config))
    assert main(["pairs", "--adapter", str(file.parent)]) == 0


@pytest.mark.parametrize("text", ["", "[]", "null", '{"peft_type": []}', "[" * 10**5, "\0"])
def test_a_damaged_adapter_config(text, trained, tmp_path, capsys):
    file = copy(trained, tmp_path / "adapter")
    (file.parent / "adapter_config.json").write_text(text)
    assert main(["pairs", "--adapter", str(file.parent)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@fuzzed
def test_fuzzed_adapters_are_read_or_refused(inputs, trained, tmp_path):
    """E6: one byte changed, and in a half of them the end cut off; whole tensors, or LoRARiteValueError."""
    file = copy(trained, tmp_path / "fuzzed")
    sound = file.read_bytes()

    def check(position, change, cut):
        data = bytearray(sound)
        data[position] ^= change
        file.write_bytes(data[: len(data) - cut])
        _, error = attempt(check_adapter, file.parent, torch.nn.Identity())
        if error is None:
            assert len(load_file(file)) == 10
        else:
            assert "\n" not in error

    ends = st.just(0) | st.integers(0, len(sound))
    fuzz(inputs, check, st.integers(0, 1500) | st.integers(0, len(sound) - 1), st.integers(1, 255), ends)


def test_save_file_is_what_the_damaged_files_imitate(tmp_path):
    """The damaged files above differ from a sound one in what they say they do, and not in their form."""
    save_file({A: torch.zeros(2, 192)}, tmp_path / "sound.safetensors")
    (tmp_path / "ours.safetensors").write_bytes(with_header({A: entry()}, b"\0" * 1536))
    assert torch.equal(load_file(tmp_path / "ours.safetensors")[A], load_file(tmp_path / "sound.safetensors")[A])
