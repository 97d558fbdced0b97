"""LoRARite with the authors' settings against float64 trajectories of the authors' own code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_rite import PUBLISHED, LoRARite

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared" / "reference"
FOLDER = SHARED if SHARED.exists() else HERE / "data"
CASES = json.loads((FOLDER / "trajectories.json").read_text())


def run(case, settings, dtype, most=None):
    """The factors that the case prescribes and those of LoRARite, after each of its steps, or the first few (``most``):
    two lists of (A, B) in float64."""
    settings = dict(settings)
    steps, pairs, _ = (settings.pop(key) for key in ("steps", "pairs", "rank"))
    data = {k: v for k, v in np.load(FOLDER / "trajectories.npz").items() if k.startswith(f"{case}/")}
    load = lambda k, what: torch.tensor(data[f"{case}/pair{k}/{what}"])
    factors = [[torch.nn.Parameter(load(k, what).to(dtype)) for what in ("A0", "B0")] for k in range(pairs)]
    optimizer = LoRARite([p for pair in factors for p in pair], **{**PUBLISHED, **settings})
    trajectory = [(load(k, "A"), load(k, "B")) for k in range(pairs)]
    expected, got = [], []
    gradients = [load(k, "G").to(dtype) for k in range(pairs)]
    for t in range(most or steps):
        for k, (a, b) in enumerate(factors):
            g = gradients[k][t]
            a.grad, b.grad = b.detach().mT @ g, g @ a.detach().mT
        optimizer.step()
        for k, (a, b) in enumerate(factors):
            expected.append((trajectory[k][0][t], trajectory[k][1][t]))
            got.append((a.detach().to(torch.float64, copy=True), b.detach().to(torch.float64, copy=True)))
    return expected, got


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


cases = pytest.mark.parametrize(("case", "settings"), CASES.items(), ids=CASES)


@cases
def test_float64_equals_the_authors_code(case, settings, eager_engine):
    for (a, b), (a_got, b_got) in zip(*run(case, settings, torch.float64), strict=True):
        assert relative_error(a_got, a) < 1e-10
        assert relative_error(b_got, b) < 1e-10


@cases
def test_float32_is_near_in_w(case, settings, engine):
    tolerance, most = 1e-2 if case == "ill_conditioned" else 1e-5, engine.choose(None, kernels=4)
    for (a, b), (a_got, b_got) in zip(*run(case, settings, torch.float32, most), strict=True):
        assert relative_error(b_got @ a_got, b @ a) < tolerance
