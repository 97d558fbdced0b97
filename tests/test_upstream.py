"""The drafts of docs/upstream: they are what LoRARite computes, and fit into the packages that they are for."""

import copy
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from lora_rite import create_lora_rite  # noqa: E402

DRAFTS = Path(__file__).parents[1] / "docs" / "upstream"


@pytest.fixture
def draft(monkeypatch):
    """The draft for PEFT, as ``peft.optimizers.lorarite``."""
    spec = importlib.util.spec_from_file_location("peft.optimizers.lorarite", DRAFTS / "peft" / "lorarite.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(30, 20), nn.Linear(20, 24), nn.Linear(24, 7)

    def forward(self, x):
        return self.head(self.hidden(self.embedding(x)).tanh())


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": False}], ids=str
)
def test_peft_draft_equals_lora_rite(draft, options):
    """20 clipped steps with weight decay in float64: the difference is rounding alone. Embedding, two linear layers."""
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["embedding", "hidden", "head"], **options)
    ours = peft.get_peft_model(Network(), config).double()
    theirs = copy.deepcopy(ours)
    settings = {"lr": 1e-2, "weight_decay": 0.1, "adamw_lr": 1e-3}
    sides = [(ours, create_lora_rite(ours, **settings)), (theirs, draft.create_lorarite_optimizer(theirs, **settings))]
    start = [p.detach().clone() for p in ours.parameters() if p.requires_grad]
    for _ in range(20):
        x, y = torch.randint(30, (8, 5)), torch.randint(7, (40,))
        for model, optimizer in sides:
            optimizer.zero_grad()
            (5 * nn.functional.cross_entropy(model(x).flatten(0, 1), y)).backward()
            optimizer.step()
    assert sides[0][1].report()["clip_rate"] > 0
    ends = zip(*([p.detach() for p in model.parameters() if p.requires_grad] for model, _ in sides), strict=True)
    for (p, q), before in zip(ends, start, strict=True):
        assert torch.linalg.vector_norm(p - q) < 1e-11 * torch.linalg.vector_norm(p - before)


def applied(tmp_path, package, name):
    """A copy of an installed package, to which the draft's diff has been applied."""
    if shutil.which("git") is None:
        pytest.skip("the diff is applied by git")
    folder = Path(importlib.util.find_spec(package).origin).parent
    shutil.copytree(folder, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    apply = ["git", "apply", "-p2", f"--include={package}/*", str(DRAFTS / name / "changes.diff")]
    # Inside a repository git would look for its root, and apply nothing.
    subprocess.run(apply, cwd=tmp_path, check=True, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)})
    return tmp_path / package


@pytest.mark.slow
def test_peft_draft_passes_its_tests_in_a_copy_of_peft(tmp_path):
    copied = applied(tmp_path, "peft", "peft")
    assert "create_lorarite_optimizer" in (copied / "optimizers" / "__init__.py").read_text(encoding="utf-8")
    shutil.copy(DRAFTS / "peft" / "lorarite.py", copied / "optimizers")
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "__init__.py").touch()
    (tests / "testing_utils.py").write_text('torch_device = "cpu"\n', encoding="utf-8")
    shutil.copy(DRAFTS / "peft" / "test_lorarite.py", tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "tests"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "19 passed" in done.stdout
