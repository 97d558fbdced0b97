"""All tests: one thread (reproducible, and several processes share two cores), no network, seeded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # `make test-gpu` shows them
if not os.environ["CUDA_VISIBLE_DEVICES"]:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import pytest
import torch
from engines import EAGER, ENGINES, made, select, use

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    items[:] = select(items)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """The engine by which all steps of a test are made: a property holds whichever it is."""
    made.clear()
    use(monkeypatch, ENGINES[request.param])
    yield ENGINES[request.param]
    assert made["triton"] or not ENGINES[request.param].kernels, "the kernels have made no step"


@pytest.fixture(params=EAGER)
def eager_engine(request, monkeypatch):
    """As ``engine``, without the kernels: what these leave to the eager engine holds in all of its ways."""
    use(monkeypatch, ENGINES[request.param])
