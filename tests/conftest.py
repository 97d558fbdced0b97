"""All tests: one thread (reproducible, and several processes share two cores), no network, seeded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # `make test-gpu` shows them
if not os.environ["CUDA_VISIBLE_DEVICES"]:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import pytest
import torch
from engines import ENGINES, use

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """The name of the engine by which all steps of a test are made: a property holds whichever it is."""
    use(monkeypatch, request.param)
    return request.param
