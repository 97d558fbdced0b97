"""The tokens that a run learns from, and the order of its batches, stay what they were: studies rest on them."""

import hashlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("peft")

from task_files import make_mt5, make_task_files
from transformers import Trainer

from lora_rite.finetune.train import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
INSTRUCTIONS = "natural_instructions"
OPTIONS = {"steps": 4, "batch_size": 2, "accumulation": 2, "max_length": 96, "rank": 1, "target_modules": ["q_proj"]}
#: sha256 of the windows and of the batches in their order, for the tasks of the recipes (24 characters of each).
PINNED = {
    "arc_challenge": ("9c263b546fe88ec7082e6787", "a92757684697350d951be628"),
    "hellaswag": ("d8532f666ff8da8da9a3ef5e", "e8b92aecc0c4f650dfa5f82b"),
    "gsm8k": ("5719fcc88de1b59dc5f365d5", "b7cfd57c2f6c92fc0137ba15"),
    "openbookqa": ("53ad6eb3ac09b8edb006ebed", "c023fb92c778c098ebab2ecc"),
    "natural_instructions": ("f26c08ec6a0d353ae6856957", "41f49ffc5602fa21c2852d92"),
    "packing": ("8470d722875a1aae8809047e", "9c9b2805f958574055945483"),
    "group_by_length": ("0da27f56d3ef5159f35cd4f1", "f92454eafbba8e6b14f727cc"),
    "encoder-decoder": ("cc06182cb7b1bed40dba0ea7", "5be51ef500f12d78f58edf21"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_task_files(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def batches(monkeypatch):
    """sha256 of the batches that a run trains on, which is not done."""
    seen = SimpleNamespace(digest=hashlib.sha256(), count=0)

    def training_step(self, model, inputs, *args, **kwargs):
        for key in ("input_ids", "labels"):
            seen.digest.update(f"{key} {tuple(inputs[key].shape)}\n".encode())
            seen.digest.update(inputs[key].numpy().tobytes())
        seen.count += 1
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p)
        return torch.zeros(())

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return seen


def digests(batches, out, folder, **options):
    result = train(out=out, data_dir=folder, progress=False, **{**OPTIONS, **options})
    assert batches.count == OPTIONS["steps"] * OPTIONS["accumulation"]
    return result["inputs"]["tokens"][:24], batches.digest.hexdigest()[:24]


@pytest.mark.parametrize("optimizer", ["lora-rite", "adamw"])
@pytest.mark.parametrize("task", ["arc_challenge", "hellaswag", "gsm8k", "openbookqa", INSTRUCTIONS])
def test_tokens_and_order_of_the_tasks(task, optimizer, batches, folder, tmp_path):
    """For every optimizer of a seed the same."""
    assert digests(batches, tmp_path / "run", folder, task=task, optimizer=optimizer) == PINNED[task]


@pytest.mark.parametrize("optimizer", ["lora-rite", "adamw"])
@pytest.mark.parametrize("option", ["packing", "group_by_length"])
def test_tokens_and_order_of_packed_and_grouped_windows(option, optimizer, batches, folder, tmp_path):
    options = {"task": INSTRUCTIONS, "optimizer": optimizer, option: True}
    assert digests(batches, tmp_path / "run", folder, **options) == PINNED[option]


def test_tokens_and_order_of_an_encoder_decoder(batches, folder, tmp_path):
    model = str(make_mt5(tmp_path / "mt5"))
    options = {"task": "openbookqa", "model": model, "target_modules": ["q"]}
    assert digests(batches, tmp_path / "run", folder, **options) == PINNED["encoder-decoder"]
