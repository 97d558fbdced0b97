"""The step as the paper writes it, :mod:`lora_rite.simple`, is what LoRARite computes, and stays fit to read."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from problems import factors, gradients_of_w, random_matrix, regauged, relative, train, w

from lora_rite import PUBLISHED, simple

ROOT = Path(__file__).parent.parent
DENSE, SUMMED = (4, 18, 13), {"betas": (0.5, 1.0), "apply_escape": True}
CASES = {  # shapes (r, n, m), the zero factor, the condition number; LoRARite's options
    "dense": (DENSE, None, 10.0, {}),
    "zero_b": (DENSE, "b", 10.0, {}),
    "zero_a": (DENSE, "a", 10.0, {}),
    "rank_deficient": (DENSE, "a column of b", 10.0, {}),
    "published": (DENSE, None, 10.0, PUBLISHED),
    "published_zero_b": (DENSE, "b", 1.0, PUBLISHED),
    "escape": (DENSE, None, 10.0, {"apply_escape": True, "betas": (0.9, 0.9)}),
    "escape_from_zero": (DENSE, "b", 10.0, {"apply_escape": True, "betas": (0.9, 0.9)}),
    "summed": (DENSE, None, 10.0, SUMMED),
    "unclipped_and_decaying": (DENSE, None, 10.0, {"clip_unmagnified_grad": 0.0, "weight_decay": 0.3}),
    "eps_and_rows": (DENSE, "b", 10.0, {"eps": 1e-3, "relative_eps": 0.1, "row_beta": 0.5, "damping": 3.0}),
    "rank_above_n": ((6, 4, 30), None, None, {}),
    "rank_above_m": ((8, 30, 2), "b", None, {}),
    "one_column": ((1, 5, 6), "b", 1.0, {}),
}


def options_of(*, row_equilibration=True, row_beta=0.99, clip_unmagnified_grad=1.0, apply_escape=False, **same):
    """Those of simple from those of LoRARite. (``update_skipping`` is in neither where gradients are small.)"""
    same = {key: value for key, value in same.items() if key not in ("update_skipping", "scaling")}
    rows = row_beta if row_equilibration else None
    return simple.Options(row_beta=rows, clip=clip_unmagnified_grad, escape=apply_escape, **same)


def start_of(shape, zero, condition):
    r, n, m = shape
    if condition is None:  # r exceeds a dimension
        a, b = gradients_of_w(1, r, n, scale=1.0)[0], gradients_of_w(1, m, r, scale=1.0, seed=1)[0]
    else:
        a, b = factors(r, n, m, condition=condition)
    if zero == "a column of b":
        return regauged(a, b * torch.tensor([1.0, 1.0, 1.0, 0.0]).double(), random_matrix(r, 5.0))
    return a * (zero != "a"), b * (zero != "b")


@pytest.mark.parametrize(("shape", "zero", "condition", "options"), CASES.values(), ids=CASES)
def test_equals_lora_rite(shape, zero, condition, options, engine):
    """20 steps in float64, by the kernels 4 in float32. Where r exceeds a dimension the condition number of a factor,
    up to 1e3, multiplies rounding once more."""
    dtype, steps, tolerances = engine.choose((torch.float64, 20, (1e-11, 1e-9)), (torch.float32, 4, (1e-5, 1e-3)))
    options = {"lr": 1e-2, **options}
    start, gradients = start_of(shape, zero, condition), gradients_of_w(steps, shape[2], shape[1])
    a, b = start
    state, o = simple.initial_state(a, b), options_of(**options)
    for g in gradients:
        a, b = simple.step(a, b, b.mT @ g, g @ a.mT, state, o)
    (params,), _ = train([[x.to(dtype) for x in start]], [gradients], **options)
    tolerance = tolerances[shape[0] > min(shape[1:])]
    assert relative(w(params) - w(start), w((a, b)) - w(start)) < tolerance
    for got, expected in zip(params, (a, b), strict=True):
        assert relative(got, expected) < tolerance


def test_defaults_are_those_of_lora_rite():
    from lora_rite import LoRARite

    ours = {k: p.default for k, p in inspect.signature(LoRARite).parameters.items()}
    assert simple.Options(null=0.0) == options_of(
        **{k: ours[k] for k in ("lr", "betas", "eps", "relative_eps", "damping", "row_equilibration", "row_beta",
                                "clip_unmagnified_grad", "weight_decay", "apply_escape")}, null=0.0,
    )  # fmt: skip


def test_it_fits_on_a_page_and_needs_torch_alone():
    text = Path(simple.__file__).read_text()
    assert len(text.splitlines()) <= 120
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    assert modules == {"typing", "torch"}
    assert not any(node.level for node in imports if isinstance(node, ast.ImportFrom))


def test_the_document_shows_it():
    assert '\n--8<-- "src/lora_rite/simple.py"\n' in (ROOT / "docs" / "algorithm.md").read_text()
