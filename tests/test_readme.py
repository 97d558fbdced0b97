"""What the README shows does what it says."""

import re
from pathlib import Path

import pytest

pytest.importorskip("peft")
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_quick_start_runs_as_it_is_pasted(capsys):
    """The embedded model learns its line, every pair is preconditioned, and it is short."""
    (code,) = re.findall(r"\*\*Quick start\.\*\*.*?```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) <= 20
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 20
    assert losses[-1] < 0.1 * losses[0]
    assert "'pairs_preconditioned': 35" in printed
