"""docs/trainers.md and tools/try_trainer.py: the lines of the page are what the tool runs."""

import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("try_trainer", ROOT / "tools" / "try_trainer.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.mark.parametrize("name", tool.TRAINERS)
def test_lines_of_each_section_are_complete(name):
    """Python that compiles, in files that the command names; YAML without a key of the tool's; one command with …."""
    yaml = pytest.importorskip("yaml")
    trainer = tool.TRAINERS[name]
    files, below, command = tool.lines(trainer.section)
    for file, code in files.items():
        compile(code, file, "exec")
        assert file in command or file.removesuffix(".py") in below
    above = yaml.safe_load(trainer.config) or {}
    assert not above.keys() & (yaml.safe_load(below) or {}).keys()
    assert ("config.yaml" in command) == bool(above)
    assert command.endswith(" …")
    assert "lora_rite" in "".join([*files.values(), below, command])


def test_each_trainer_has_its_row():
    """With version, date and a result."""
    for trainer in tool.TRAINERS.values():
        (row,) = re.findall(
            rf"^\| \[{re.escape(trainer.section)}\].*$", tool.PAGE.read_text(encoding="utf-8"), re.MULTILINE
        )
        assert re.search(r"\d+\.\d+", row)
        assert re.search(r"\d{4}-\d\d-\d\d", row)


def test_words_of_a_section_end_where_the_next_one_begins():
    files, _, _ = tool.lines("LLaMA-Factory")
    assert list(files) == ["train_lora_rite.py"]


def test_steps_and_differences_are_read_off_checkpoints(tmp_path):
    """The newest optimizer's state counts, and adapters that are apart are told from equal ones."""
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    for out, value in (("whole", 1.0), ("resumed", 1.5)):
        for number in (5, 10):
            folder = tmp_path / out / f"checkpoint-{number}"
            folder.mkdir(parents=True)
            torch.save({"state": {i: {"step": torch.tensor(float(number))} for i in range(3)}}, folder / "optimizer.pt")
            safetensors.save_file({"a": torch.tensor([2.0, value])}, folder / "adapter_model.safetensors")
            for file in folder.iterdir():  # those of a real run are further apart than a clock's ticks
                os.utime(file, (number, number))
            (folder / "adapter_config.json").touch()
    whole, resumed = str(tmp_path / "whole"), str(tmp_path / "resumed")
    assert not tool.resumes(whole, resumed)
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-5")
    assert tool.resumes(whole, resumed)
    assert tool.steps(whole) == [10, 10, 10]
    assert tool.difference([whole, whole]) == 0
    assert tool.difference([whole, resumed]) == pytest.approx(0.25)
