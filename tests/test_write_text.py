"""The script that writes a text of the machine as a task: its splits."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from lora_rite.errors import LoRARiteValueError
from lora_rite.finetune.data import read_examples

SPLITS = ("train", "validation", "test")


@pytest.fixture
def tool():
    path = Path(__file__).parents[1] / "tools" / "write_text.py"
    spec = importlib.util.spec_from_file_location("write_text", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["write_text"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["write_text"]


def plant(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name} – ü\nx = 1\n", encoding="utf-8")
    return root


NAMES = [f"{folder}/test_{n}.py" for folder in ("a", "b/c") for n in range(60)]


def test_the_splits_depend_on_paths_alone(tool, tmp_path):
    """Each file is in one split, about 1 in 10 in validation and in test; where the text lies, in which order its files
    were made and what else lies there do not matter."""
    found = tool.read(plant(tmp_path / "one", NAMES), "test_*.py", ("tests",))
    other = plant(tmp_path / "two", [*reversed(NAMES), "a/tests/test_x.py", "a/helper.py"])
    assert tool.read(other, "test_*.py", ("tests",)) == found
    texts = [text for part in SPLITS for text in found[part]]
    assert sorted(texts) == sorted(f"# {name} – ü\nx = 1\n" for name in NAMES)
    assert all(5 <= len(found[part]) <= 22 for part in SPLITS[1:])


def test_a_text_counts_once_and_limits_hold(tool, tmp_path, monkeypatch):
    root = plant(tmp_path / "text", NAMES)
    whole = tool.read(root, "*.py")
    for n in range(40):
        (root / f"copy_{n}.py").write_text(whole["train"][0], encoding="utf-8")
    copied = tool.read(root, "*.py")
    assert sorted(t for part in SPLITS for t in copied[part]) == sorted(t for part in SPLITS for t in whole[part])
    (root / "a" / "long.py").write_text("y" * (tool.LONGEST + 1))
    assert not any("yy" in text for part in tool.read(root, "*.py").values() for text in part)
    monkeypatch.setattr(tool, "CHARACTERS", dict.fromkeys(SPLITS, 100))
    assert all(0 < sum(map(len, part)) <= 100 for part in tool.read(root, "*.py").values())


def test_what_is_written_is_what_a_study_reads(tool, tmp_path, monkeypatch, capsys):
    """The files have the texts as they are; a folder with something in it, and a text of too few files, are refused
    before anything is written."""
    root = plant(tmp_path / "text", NAMES)
    monkeypatch.setitem(tool.TEXTS, "sympy-tests", tool.Text("Mine", "free", lambda: root, "*.py"))
    out = tmp_path / "out"
    assert tool.main(["sympy-tests", str(out)]) == 0
    found = tool.read(root, "*.py")
    for part in SPLITS:
        assert [example.completion for example in read_examples(out / f"{part}.jsonl")] == found[part]
        assert len((out / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()) == len(found[part])
    assert tool.main(["sympy-tests", str(out)]) == 2
    assert "is not empty: name a new folder" in capsys.readouterr().err
    with pytest.raises(LoRARiteValueError, match=r"no \*\.txt for train, of 0 files"):
        tool.read(root, "*.txt")


def test_the_texts_are_there(tool):
    """Where their packages are installed; the splits of the real ones have enough for 200 steps of 8 windows."""
    for name, text in tool.TEXTS.items():
        if name == "sympy-tests":
            pytest.importorskip("sympy")
        found = tool.read(text.root(), text.pattern, text.without)
        assert sum(map(len, found["train"])) > 2_000_000, name
        assert all(sum(map(len, found[part])) > 50_000 for part in SPLITS[1:]), name
        assert json.dumps(found) == json.dumps(tool.read(text.root(), text.pattern, text.without))
