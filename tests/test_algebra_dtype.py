"""r×r matrices in float32 (``algebra_dtype``, and Apple's MPS): how exact the step is, what a device needs for it."""

import json
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.utils.backend_registration
from problems import factors, gradients_of_w, random_matrix, regauged, relative, train, w
from test_device import equal, give_gradients, start, values

from lora_rite import PUBLISHED, LoRARite, layer_report
from lora_rite.algebra.linalg import inverse_of, inverse_root, largest_eigenvalue, polar
from lora_rite.algebra.step import damped_inverse
from lora_rite.plan import state

SINGLE = {"algebra_dtype": "float32"}


def change(before, after):
    return w(after) - w(before)


# ------------------------------------------------------------------------------------------------------ how exact it is


@pytest.mark.parametrize(
    ("options", "condition", "zero_b", "tolerance"),
    [({}, 3.0, True, 1e-5), ({}, 1e2, False, 1e-3), ({}, 1e3, False, 1e-3), ({}, 1e4, False, 5e-3),
     (PUBLISHED, 3.0, True, 1e-5), (PUBLISHED, 1e3, False, 2e-4)],
)  # fmt: skip
def test_the_step_equals_that_of_float64(options, condition, zero_b, tolerance, eager_engine):
    """ΔW after 30 steps of float32 factors, against float64 throughout. With float64 algebra alone the error is 4e-7,
    9e-5, 2e-4 and 8e-4, and 4e-7 and 5e-5 with the published settings: the factors are rounded at each step, which
    their condition magnifies."""
    gradients = [gradients_of_w(30, 40, 50, seed=3)]
    pair = factors(8, 50, 40, zero_b=zero_b, condition=condition, dtype=torch.float32)
    exact = tuple(x.double() for x in pair)
    expected = change(exact, train([exact], gradients, lr=0.01, **options)[0][0])
    got = change(pair, train([pair], gradients, lr=0.01, **SINGLE, **options)[0][0])
    assert relative(got, expected) < tolerance


@pytest.mark.parametrize("zero_b", [False, True], ids=["dense", "zero_b"])
def test_w_does_not_depend_on_the_factorisation(zero_b, eager_engine):
    """As in test_step, where the bound is 1e-4 with float64 algebra; with gradients of rank 2 too."""
    for rank, tolerance in ((None, 1e-4), (2, 1e-2)):
        gradients = [gradients_of_w(30, 40, 50, rank=rank, seed=3)]
        plain = factors(8, 50, 40, zero_b=zero_b, condition=3.0, dtype=torch.float32)
        other = regauged(*plain, random_matrix(8, 1e2, seed=5))
        results = [w(train([pair], gradients, lr=0.01, **SINGLE)[0][0]) for pair in (plain, other)]
        assert relative(results[1], results[0]) < tolerance


@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_w_does_not_depend_on_the_scale_of_the_factors(scale, eager_engine):
    gradients = [gradients_of_w(20, 20, 30)]
    plain = factors(4, 30, 20, condition=3.0, dtype=torch.float32)
    other = (plain[0] / scale, plain[1] * scale)
    results = [w(train([pair], gradients, lr=0.01, **SINGLE)[0][0]) for pair in (plain, other)]
    assert relative(results[1], results[0]) < 1e-4


@pytest.mark.parametrize("zero_b", [False, True], ids=["dense", "zero_b"])
@pytest.mark.parametrize(("r", "n", "m"), [(16, 12, 20), (8, 30, 2), (8, 1, 30), (64, 70, 80)])
def test_null_directions(r, n, m, zero_b, eager_engine):
    """Of dimensions below the rank, and of B = 0 at a larger rank: against float64 throughout."""
    generator = torch.Generator().manual_seed(1)
    pair = torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator) * (not zero_b)
    exact, gradients = tuple(x.double() for x in pair), [gradients_of_w(10, m, n)]
    expected = change(exact, train([exact], gradients, lr=1e-2)[0][0])
    got = change(pair, train([pair], gradients, lr=1e-2, **SINGLE)[0][0])
    assert relative(got, expected) < 1e-2


def test_rounding_noise_is_not_taken_for_a_direction(eager_engine):
    gradients = gradients_of_w(30, 40, 50, rank=2, seed=1)
    pair = factors(8, 50, 40, zero_b=True, dtype=torch.float32)
    for options in ({}, PUBLISHED):
        assert w(train([pair], [gradients], lr=1e-2, **SINGLE, **options)[0][0]).norm() < 5


@pytest.mark.parametrize("r", [3, 16, 64])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
def test_parts_in_float32(condition, r):
    """Of symmetric matrices with eigenvalues from 1 down to 1/condition, and of others with such singular values; the
    errors that rounding the matrix itself makes grow with the condition."""
    g = torch.Generator().manual_seed(r)
    q, p = (torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.float64))[0] for _ in range(2))
    s = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), r, dtype=torch.float64)
    moment, matrix = (q * s) @ q.mT, (q * s) @ p.mT
    single = lambda x: x.float()[None]
    assert largest_eigenvalue(single(moment)).item() == pytest.approx(1, abs=1e-4 * r)
    expected = (q / (s.sqrt() + 1e-3)) @ q.mT
    assert relative(inverse_root(single(1e-6 * moment), 1e-9, 1e-3)[0] * 1e-3, expected) < 1e-2
    half = polar(single(matrix), 1e-9)[0].double().mT @ matrix
    assert relative(half, (p * s) @ p.mT) < 1e-5
    damped = (p * (s / (s**2 + 1e-8))) @ q.mT
    delta = torch.full((1, 1, 1), 1e-4)
    assert relative(damped_inverse(single(matrix), delta)[0], damped) < 1e-6 * min(condition, 1e4) + 1e-5
    if condition < 1e6:
        assert relative(inverse_of(single(matrix))[0], matrix.inverse()) < 1e-6 * condition + 1e-5


# ----------------------------------------------------------------------------------------------------- where it applies


def test_float64_factors_are_computed_in_float64(eager_engine):
    pair, gradients = factors(4, 9, 7), [gradients_of_w(3, 7, 9)]
    plain, single = (train([pair], gradients, **options)[0][0] for options in ({}, SINGLE))
    assert equal(plain, single)


@pytest.mark.parametrize("capturable", [False, True])
def test_it_can_change_at_any_time_and_is_not_loaded(capturable):
    """The state is the same; what decides is the optimizer that steps."""
    params, optimizer = start(dtype=torch.float32, capturable=capturable, **SINGLE)
    others, other = start(dtype=torch.float32, capturable=capturable)
    for t in range(4):
        give_gradients(params, t)
        optimizer.step()
    with torch.no_grad():
        for name, p in others.items():
            p.copy_(params[name])
    other.load_state_dict(optimizer.state_dict())
    assert {group["algebra_dtype"] for group in other.param_groups} == {None}
    assert equal(values(others, other), values(params, optimizer))
    optimizer.param_groups[0]["algebra_dtype"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for run in ((params, optimizer), (others, other)):
            give_gradients(run[0], 9)
            run[1].step()
    assert equal(values(others, other), values(params, optimizer))


def test_a_device_without_float64_is_given_none(monkeypatch):
    """There is no MPS here, so the CPU takes its place: the step is that of the option; what needs eigenvalues in a
    step is refused."""
    runs = []
    for types, options in ((("mps",), SINGLE), (("cpu",), {})):
        monkeypatch.setattr(state, "SINGLE", types)
        params, optimizer = start(dtype=torch.float32, **options)
        for t in range(3):
            give_gradients(params, t)
            optimizer.step()
        runs.append(values(params, optimizer))
    assert equal(*runs)
    assert optimizer.report()["update_norm"] > 0
    assert len(layer_report(optimizer)) == 4
    message = "apply_escape needs eigenvalues, which cpu devices do not have"
    with pytest.raises(ValueError, match=message):
        LoRARite(params.items(), apply_escape=True)
    optimizer.param_groups[0]["apply_escape"] = True
    with pytest.raises(ValueError, match=message):
        optimizer.step()


# ------------------------------------------------------------------------------------------------ what MPS is asked for

#: Operators of which the list has no kernel of a device, since they are made of others: views, new tensors, copies, and
#: those that call an operator of the list.
MADE_OF_OTHERS = {
    "_to_copy", "_unsafe_view", "alias", "arange", "clone", "copy_", "detach", "diagonal", "expand", "eye", "full",
    "full_like", "empty_like", "new_zeros", "ones", "ones_like", "scalar_tensor", "select", "slice", "split",
    "split_with_sizes", "stack", "transpose", "unbind", "unsqueeze", "view", "zeros", "zeros_like",
    "_foreach_add_", "_foreach_copy_", "_foreach_norm", "_foreach_sub_",  # one after the other
}  # fmt: skip
#: Operators that are another one with arguments in another form.
CALLS = {
    "bitwise_and.Scalar": "bitwise_and.Tensor_out", "bitwise_and_.Scalar": "bitwise_and.Tensor_out",
    "bitwise_right_shift.Tensor_Scalar_out": "__rshift__.Scalar",
    "mv": "addmv.out", "rsub.Scalar": "sub.out", "sum": "sum.IntList_out", "abs": "abs.out",
    "nan_to_num": "nan_to_num.out",
}  # fmt: skip


@cache
def kernels_of_mps():
    """The operators that have a kernel on MPS, by torch's own list (the source of 2.13 is part of the package)."""
    import torchgen

    yaml = pytest.importorskip("yaml")
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    functions = {f["func"].partition("(")[0]: f for f in yaml.safe_load(path.read_text())}
    keys = {name: {k.strip() for key in f.get("dispatch", {}) for k in key.split(",")} for name, f in functions.items()}
    return {
        name for name, f in functions.items() if "MPS" in keys[name] | keys.get(f.get("structured_delegate"), set())
    }


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch is too old"
)
def test_mps_has_all_operators_that_a_step_needs(tmp_path):
    """On a device without values, that has no float64, as MPS: first and further steps, with and without
    ``capturable``, of float32, bfloat16 and float16 factors, with experts, a frozen factor, all settings, and first
    moments in bfloat16. Nobody has run this on a Mac."""
    script = Path(__file__).with_name("fake_accelerator.py")
    command = [sys.executable, "-W", "ignore", script, "single"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    used, have = json.loads(run.stdout), kernels_of_mps()
    assert not {name: dtypes for name, dtypes in used.items() if "torch.float64" in dtypes}
    plain = [name.removeprefix("aten.").removesuffix(".default") for name in used if name != "prim.device.default"]
    own = [name for name in plain if name.partition(".")[0] not in MADE_OF_OTHERS]
    assert [name for name in own if CALLS.get(name, name) not in have] == []
    assert {"linalg_cholesky_ex", "linalg_solve_triangular", "bmm", "where.self"} <= set(own)
    assert not {"_linalg_eigh", "_linalg_svd", "frexp.Tensor", "linalg_eigh"} & have
