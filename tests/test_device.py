"""What the device decides by itself (capturable, no eigenvalues), full precision, several pairs in a parameter."""

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.utils.backend_registration
from problems import factors, gradients_of_w, random_matrix, regauged, relative, set_gradients, train, w
from torch.utils._python_dispatch import TorchDispatchMode

from lora_rite import LoRARite, NonFiniteError, layer_report
from lora_rite.algebra import basis
from lora_rite.algebra.basis import orthonormalise
from lora_rite.algebra.linalg import inverse_of, split_gram, trace
from lora_rite.algebra.step import damped_inverse, preconditioner
from lora_rite.bench.watch import Watch
from lora_rite.optim.precision import full_precision
from lora_rite.plan.plan import Limits

SHAPES = [(4, 9, 7), (4, 9, 7), (4, 18, 13), (3, 5, 6)]


def start(seed=0, dtype=torch.float64, zero_b=True, adamw=False, **options):
    """Named pairs of several shapes and ranks, and a bias for AdamW."""
    params = {}
    for i, shape in enumerate(SHAPES):
        a, b = factors(*shape, zero_b=zero_b, seed=seed + i, dtype=dtype)
        params |= {f"l{i}.lora_A.weight": torch.nn.Parameter(a), f"l{i}.lora_B.weight": torch.nn.Parameter(b)}
    if adamw:
        params["bias"] = torch.nn.Parameter(torch.ones(5, dtype=dtype))
        options["adamw_lr"] = 0.1
    return params, LoRARite(params.items(), lr=0.02, **options)


def advance(params, optimizer, steps, seed=0):
    for t in range(steps):
        give_gradients(params, seed + t)
        optimizer.step()


def give_gradients(params, seed):
    pairs = list(params.values())
    for i, (_, n, m) in enumerate(SHAPES):
        set_gradients(*pairs[2 * i : 2 * i + 2], gradients_of_w(1, m, n, seed=seed * 100 + i)[0])
    if "bias" in params:
        params["bias"].grad = torch.full_like(params["bias"], 0.1 * (seed % 3 - 1))


def values(params, optimizer):
    tensors = [p.detach() for p in params.values()]
    return [t.clone() for t in tensors + [t for p in params.values() for t in optimizer.state[p].values()]]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


OPTIONS = [{}, {"damping": 0.0, "relative_eps": 0.0, "row_equilibration": False},
           {"balance_param": True, "weight_decay": 0.1}]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=["ours", "published", "balance"])
@pytest.mark.parametrize("zero_b", [True, False])
def test_capturable_equals_eager(options, zero_b):
    (params, optimizer), (others, eager) = (
        start(adamw=True, zero_b=zero_b, capturable=flag, **options) for flag in (True, False)
    )
    for run in ((params, optimizer), (others, eager)):
        advance(*run, 30)
    for p, other in zip(params.values(), others.values(), strict=True):
        assert relative(p.detach(), other.detach()) < 1e-9
    report, expected = optimizer.report(), eager.report()
    for key, value in expected.items():
        assert report[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)


@pytest.mark.parametrize(
    ("r", "n", "m", "zero_b", "tolerance"),
    [(8, 50, 40, True, 1e-10), (8, 50, 40, False, 1e-10), (16, 12, 20, True, 1e-8)],
)
def test_capturable_is_invariant_where_directions_are_null(r, n, m, zero_b, tolerance):
    """Gradients of rank 2, and ranks above a dimension."""
    gradients = [gradients_of_w(30, m, n, rank=2, seed=3)]
    g = torch.Generator().manual_seed(1)
    plain = [0.1 * torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((r, n), (m, r))]
    plain[1] *= not zero_b
    other = regauged(*plain, random_matrix(r, 100, seed=5))
    results = [w(train([pair], gradients, lr=0.01, capturable=True)[0][0]) for pair in (plain, other)]
    assert relative(results[1], results[0]) < tolerance


def test_the_host_never_waits_with_capturable_and_once_without():
    """B26."""
    for capturable in (True, False):
        params, optimizer = start(adamw=capturable, capturable=capturable)  # (torch's own AdamW reads its counters)
        advance(params, optimizer, 2)
        give_gradients(params, 3)
        with Watch() as watch:
            optimizer.step()
        assert watch.synchronisations == (0 if capturable else 1)


def test_above_a_rank_the_host_asks_whether_factors_are_deficient(monkeypatch):
    """What those take is left out then where there are none, but not where the host must not wait; the step is the
    same to rounding."""
    projected, spied = basis._projected, []
    monkeypatch.setattr(basis, "_projected", lambda *args: spied.append(len(args[0])) or projected(*args))
    results = []
    for asks_rank, capturable in ((3, False), (3, True), (64, False)):
        monkeypatch.setattr(LoRARite, "_limits", Limits(direct_elements=10**9, iterate=True, asks_rank=asks_rank))
        params, optimizer = start(zero_b=True, capturable=capturable)
        advance(params, optimizer, 5)
        spied.clear()
        give_gradients(params, 9)
        optimizer.step()
        assert sorted(spied) == ([2] if asks_rank == 3 and not capturable else [2, 6])  # of ranks 3 and 4
        results.append([p.detach() for p in params.values()])
    assert all(relative(p, results[0][i]) < 1e-9 for other in results[1:] for i, p in enumerate(other))


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch is too old"
)
def test_steps_on_an_accelerator_stay_there(tmp_path):
    """On a device without values no operation mixes it with the CPU; nothing is read with capturable, nor after the one
    decision without; after the first step nothing is copied there. In a process of its own, which gets a backend."""
    script = Path(__file__).with_name("fake_accelerator.py")
    run = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(results) == 16
    for result in results:
        reader = None if result["options"].startswith("capturable") else "_measure"
        assert (result["step"], result["apply"], result["copies"]) == (reader, None, 0), result


class Operations(TorchDispatchMode):
    """The names of what is dispatched: of a CUDA graph, the kernels."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_capturable_takes_as_many_operations_at_every_rank():
    counts = {}
    for rank in (2, 32):
        pair = [torch.nn.Parameter(x) for x in factors(rank, 40, 50, zero_b=False)]
        for capturable in (False, True):
            optimizer = LoRARite(pair, capturable=capturable)
            set_gradients(*pair, gradients_of_w(1, 50, 40)[0])
            optimizer.step()
            with Operations() as operations:
                optimizer.step()
            counts[rank, capturable] = len(operations.names)
            if capturable:  # no eigenvalues, QR or LU decompositions, in which a host waits on some devices
                linalg = {name for name in operations.names if "linalg" in name}
                assert linalg == {"linalg_cholesky_ex", "linalg_solve_triangular", "linalg_vector_norm"}
    assert counts[2, True] == counts[32, True] < 2.5 * counts[32, False]


def test_escape_and_capturable_exclude_each_other():
    with pytest.raises(ValueError, match="apply_escape needs eigenvalues"):
        start(capturable=True, apply_escape=True)


def test_capturable_skips_on_the_device():
    """Nothing changes, bit by bit; report() tells; three in a row are an error; steps go on as if it had not been."""
    (params, optimizer), (others, eager) = (start(adamw=True, capturable=True) for _ in range(2))
    for run in ((params, optimizer), (others, eager)):
        advance(*run, 3)
    for name in ("l1.lora_B.weight", "bias"):
        before = values(params, optimizer)
        give_gradients(params, 3)
        params[name].grad.view(-1)[1] = torch.nan
        optimizer.step()
        assert equal(values(params, optimizer), before)
        with pytest.warns(UserWarning, match=f"non-finite gradient of {name}: step skipped"):
            report = optimizer.report()
        assert report["clip_rate"] <= 1
        advance(params, optimizer, 1, seed=3)
        advance(others, eager, 1, seed=3)
    assert equal(values(params, optimizer), values(others, eager))
    assert report["skipped"] == 2
    assert optimizer.state_dict()["param_groups"][0]["skipped"] == 2
    for _ in range(3):
        give_gradients(params, 3)
        params["bias"].grad[0] = torch.inf
        optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["skipped"] == 5
    with pytest.raises(NonFiniteError, match="bias, 3 steps in a row"):
        optimizer.report()


def test_capturable_stands_still_after_a_change_from_outside_until_report():
    params, optimizer = start(capturable=True)
    advance(params, optimizer, 3)
    with torch.no_grad():
        params["l2.lora_A.weight"].mul_(2)
    before = values(params, optimizer)
    addresses = [t.data_ptr() for p in params.values() for t in optimizer.state[p].values()]
    advance(params, optimizer, 1, seed=3)
    assert equal(values(params, optimizer), before)
    with pytest.warns(UserWarning, match=r"changed from outside.*l2.lora_A.weight"):
        optimizer.report()
    assert [t.data_ptr() for p in params.values() for t in optimizer.state[p].values()] == addresses
    advance(params, optimizer, 1, seed=3)
    assert not torch.equal(before[0], next(iter(params.values())))


@pytest.mark.parametrize("saved", [True, False])
def test_capturable_resumes_bitwise(saved):
    (params, optimizer), (others, other) = (start(adamw=True, capturable=flag) for flag in (saved, not saved))
    advance(params, optimizer, 3)
    with torch.no_grad():
        for p, q in zip(params.values(), others.values(), strict=True):
            q.copy_(p)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for run in ((params, optimizer), (others, other)):
        advance(*run, 2, seed=3)
    assert equal(values(params, optimizer), values(others, other))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_compiled_step_is_the_same_and_compiles_nothing_anew():
    """B25: 60 steps with changing lr and a skipped one. The step is not traced: it runs as it is."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (params, optimizer), (others, plain) = start(), start()
    compiled = torch.compile(optimizer.step, backend="eager")
    for t in range(60):
        for o, ps, step in ((optimizer, params, compiled), (plain, others, plain.step)):
            o.param_groups[0]["lr"] = 0.02 * (1 - t / 60)
            give_gradients(ps, t)
            if t == 30:
                ps["l0.lora_A.weight"].grad[0, 0] = torch.nan
            step()
    assert equal(values(params, optimizer), values(others, plain))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


def spectrum(r, low, dtype=torch.float64, p=3):
    """Symmetric matrices (p, r, r) with eigenvalues from 1 down to 10^low."""
    g = torch.Generator().manual_seed(r)
    q = torch.linalg.qr(torch.randn(p, r, r, generator=g, dtype=torch.float64))[0]
    return ((q * torch.logspace(0, low, r, dtype=torch.float64)) @ q.mT).to(dtype)


def by_eigenvalues(matrix, eps, relative_eps):
    w_, u = torch.linalg.eigh(matrix)
    root = w_.clamp_min(0).sqrt()
    return (u / (root + eps + relative_eps * root[..., -1:])[..., None, :]) @ u.mT


@pytest.mark.parametrize("r", [1, 2, 7, 16, 64])
@pytest.mark.parametrize(("low", "tolerance"), [(0, 1e-13), (-6, 1e-10), (-12, 1e-6), (-18, 1e-3)])
def test_preconditioner_without_eigenvalues(r, low, tolerance):
    matrix = 3e-5 * spectrum(r, low)
    for eps, relative_eps in ((1e-6, 0.0), (1e-12, 1e-3)):
        got = preconditioner(matrix, torch.zeros(3, 1, 1), eps, relative_eps, iterate=True)
        assert relative(got, by_eigenvalues(matrix, eps, relative_eps)) < tolerance


def test_preconditioner_of_zero_rank_deficient_and_non_finite_matrices():
    """Negative eigenvalues that are rounding noise count for as little as positive ones do."""
    thin = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices = torch.cat([torch.zeros(1, 8, 8, dtype=torch.float64), (thin @ thin.mT).float().double()])
    matrices = torch.cat([matrices, torch.full((1, 8, 8), torch.nan)])
    got = preconditioner(matrices, torch.zeros(4, 1, 1), 1e-6, 1e-3, iterate=True)
    assert torch.allclose(got[0], 1e6 * torch.eye(8, dtype=torch.float64))
    expected = by_eigenvalues(matrices[1:3], 1e-6, 1e-3)
    assert relative(matrices[1:3] @ got[1:3], matrices[1:3] @ expected) < 1e-5
    assert (got[1:3].diagonal(dim1=-2, dim2=-1) <= 1.1 * expected.diagonal(dim1=-2, dim2=-1).amax()).all()
    assert got[3].isnan().all()


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8])
@pytest.mark.parametrize("r", [1, 4, 64])
def test_inverse_without_lu(r, condition):
    """Of columns whose lengths differ by up to 1e7."""
    k = torch.stack([random_matrix(r, condition, seed=i) for i in range(3)]) * torch.logspace(0, 7, r).double()
    eye = torch.eye(r, dtype=torch.float64)
    assert (k @ inverse_of(k) - eye).norm() < 1e-15 * r * condition


@pytest.mark.parametrize("rank_first", [True, False])
@pytest.mark.parametrize("rows", [5, 16, 17, 50])
def test_gram_matrices_from_parts(rows, rank_first):
    """Of eight rows each, also where some are left over, or there are fewer; as A and as B lie."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, *((4, rows) if rank_first else (rows, 4)), generator=g).double() for _ in range(2))
    x, y = (x.mT, y.mT) if rank_first else (x, y)
    assert torch.allclose(split_gram(x, y, 8), x.mT @ y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rank", [0, 3, 8])
def test_basis_with_and_without_asking(rank):
    """All ways lead to the same directions, and to a basis that is as good."""
    g = torch.Generator().manual_seed(rank)
    turns = [torch.linalg.qr(torch.randn(2, n, 8, generator=g, dtype=torch.float64))[0] for n in (20, 8)]
    x = turns[0][..., :rank] @ turns[1][..., :rank, :]
    warm = torch.eye(8, dtype=torch.float64).expand(2, -1, -1) * 0.2
    z = x @ warm
    ways = ({}, {"iterate": True, "asks": False}, {"iterate": True})
    results = [orthonormalise(warm, z.mT @ z, **way) for way in ways]
    spans = []
    for found, c, inverse in results:
        q = x @ found.basis
        spans.append(q @ q.mT)
        for one, other in ((q @ found.coordinates, x), (spans[-1] @ spans[-1], spans[-1]), (z @ c, q)):
            assert (one - other).abs().max() < 1e-12
        assert (inverse @ warm - torch.eye(8)).abs().max() < 1e-12
    assert max((span - spans[0]).abs().max() for span in spans) < 1e-12
    assert (trace(spans[0]) - rank).abs().max() < 1e-12


@pytest.mark.parametrize("delta", [0.0, 1e-5, 0.1, 10.0])
@pytest.mark.parametrize("rank", [0, 2, 8])
def test_damped_inverse(rank, delta):
    """The formula by singular values; 0 where σ = 0, also for δ = 0."""
    g = torch.Generator().manual_seed(rank)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    s = draw(3, 8, rank) @ draw(3, rank, 8)
    u, sigma, vh = torch.linalg.svd(s)
    least = torch.linalg.vector_norm(sigma, dim=-1, keepdim=True) * torch.finfo(s.dtype).eps ** 0.375
    f = torch.where(sigma > 1e-10, sigma / (sigma**2 + least.clamp_min(delta) ** 2), 0)
    expected = vh.mT @ (f[..., None] * u.mT)
    got = damped_inverse(s, torch.full((3, 1, 1), delta, dtype=torch.float64))
    assert (got - expected).norm() <= (1e-2 if delta == 0 else 1e-4 if delta < 1e-3 else 1e-9) * expected.norm()


def test_float32_products_are_not_rounded_further(monkeypatch):
    """TF32 (torch.set_float32_matmul_precision("high")), imitated where it would strike, does not reach the step."""
    bmm, matmul = torch.bmm, torch.backends.cuda.matmul

    def rounded_bmm(x, y, out=None):
        if matmul.fp32_precision == "tf32" and x.dtype == torch.float32:
            x, y = (
                t.view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32) for t in (x.contiguous(), y.contiguous())
            )
        return bmm(x, y, out=out)

    pair = factors(4, 20, 30, dtype=torch.float32)
    gradients = [gradients_of_w(20, 30, 20)]
    expected = w(train([pair], gradients, lr=0.01)[0][0])
    monkeypatch.setattr(torch, "bmm", rounded_bmm)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert relative(torch.bmm(pair[0][None], pair[0].mT[None]), pair[0] @ pair[0].mT) > 1e-5
        got = w(train([pair], gradients, lr=0.01)[0][0])
        assert torch.get_float32_matmul_precision() == "high"
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got, expected)


def test_precision_is_one_setting_for_all_threads_and_stays_inherited(monkeypatch):
    """Optimizers that step at the same time leave it as it was; and what follows torch.backends still follows it."""
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "none"
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")
    try:
        with full_precision([{"params": [torch.zeros(1)]}]):
            assert matmul.fp32_precision == "ieee"
            inner = full_precision([{"params": [torch.zeros(1)]}])
            inner.__enter__()  # (another thread begins)
        assert matmul.fp32_precision == "ieee"
        inner.__exit__(None, None, None)
        assert matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = "none"


@pytest.mark.parametrize("adamw", [False, True])
def test_steps_and_reports_are_the_same_under_autocast(adamw):
    runs = []
    for enabled in (False, True):
        params, optimizer = start(dtype=torch.float32, adamw=adamw, zero_b=False)
        for seed in range(5):
            give_gradients(params, seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                optimizer.step()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            runs.append((values(params, optimizer), optimizer.report(), layer_report(optimizer)))
    assert equal(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


def test_counts_do_not_follow_the_default_dtype():
    """(bfloat16 counts to 256.)"""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        params, optimizer = start(dtype=torch.bfloat16, adamw=True)
        advance(params, optimizer, 1)
    finally:
        torch.set_default_dtype(before)
    assert {state["step"].dtype for state in optimizer.state.values()} == {torch.float32}
    assert optimizer._statistics.counts.dtype == torch.float32


# ------------------------------------------------------------------------------------- several pairs in one parameter


def stacked(pairs, columns):
    """A (E·r, n) and B, (m, r·E) with the pair running fastest or slowest, or (E·m, r), from E pairs."""
    bs = torch.stack([b for _, b in pairs], {"interleaved": 2, "side by side": 1, "": 0}[columns])
    return torch.cat([a for a, _ in pairs]), bs.flatten(1) if columns else bs.flatten(0, 1)


@pytest.mark.parametrize("columns", ["interleaved", "side by side", ""], ids=["experts", "block_diagonal_a", "groups"])
@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pairs_in_one_parameter_equal_the_same_pairs_apart(columns, capturable, dtype):
    """Some get no gradient in some steps: they and their state stay, bit by bit."""
    count, r, n, m, steps = 3, 4, 9, 7, 12
    options = {"lr": 0.02, "weight_decay": 0.1, "capturable": capturable}
    pairs = [factors(r, n, m, zero_b=e != 1, seed=e, dtype=dtype) for e in range(count)]
    gradients = [gradients_of_w(steps, m, n, seed=e) for e in range(count)]
    apart = [[torch.nn.Parameter(x.clone()) for x in pair] for pair in pairs]
    apart_optimizer = LoRARite([p for pair in apart for p in pair], **options)
    a, b = (torch.nn.Parameter(x) for x in stacked(pairs, columns))
    group = {"params": [a, b], "kind": "lora", "blocks": count, "columns": columns}
    optimizer = LoRARite([group], **options)
    assert optimizer.report()["pairs"] == count
    assert optimizer.report()["ranks"] == {r: count}
    for t in range(steps):
        idle = [t % 5 == e for e in range(count)]
        for (x, y), g, skip in zip(apart, gradients, idle, strict=True):
            set_gradients(x, y, g[t])
            if skip:
                x.grad.zero_()
                y.grad.zero_()
        a.grad, b.grad = stacked([(x.grad, y.grad) for x, y in apart], columns)
        for (x, y), skip in zip(apart, idle, strict=True):
            if skip:
                x.grad = y.grad = None
        before = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in (a, b)]
        old = a.detach().clone(), b.detach().clone()
        apart_optimizer.step()
        optimizer.step()
        if before[0] and any(idle):
            e = idle.index(True)
            for p, state, was in zip((a, b), before, old, strict=True):
                for key in ("step", "matrices", "numbers", "row_moment"):
                    assert torch.equal(state[key][e], optimizer.state[p][key][e])
                layout = {"interleaved": (1, (r, count)), "side by side": (1, (count, r)), "": (0, (count, -1))}
                shape = layout[columns if p is b else ""]
                block = lambda x, shape=shape, e=e: x.unflatten(*shape).select(shape[0] + shape[1].index(count), e)
                assert torch.equal(block(p.detach()), block(was))
                assert torch.equal(block(optimizer.state[p]["first_moment"]), block(state["first_moment"]))
    expected = stacked(apart, columns)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for p, other in zip((a, b), expected, strict=True):
        assert relative(p.detach(), other.detach()) < tolerance


def test_pairs_in_one_parameter_are_invariant_and_resume():
    count, r, n, m = 2, 3, 9, 7
    pairs = [factors(r, n, m, seed=e) for e in range(count)]
    other = [regauged(*pair, random_matrix(r, 100, seed=e)) for e, pair in enumerate(pairs)]
    gradients = [gradients_of_w(10, m, n, seed=e) for e in range(count)]

    def run(pairs, resume_at=None):
        a, b = (torch.nn.Parameter(x) for x in stacked(pairs, "interleaved"))
        make = lambda: LoRARite(
            [{"params": [a, b], "kind": "lora", "blocks": count, "columns": "interleaved"}], lr=0.02
        )
        optimizer = make()
        split = lambda: list(zip(a.unflatten(0, (count, r)), b.unflatten(1, (r, count)).movedim(2, 0), strict=True))
        for t in range(10):
            if t == resume_at:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = make()
                optimizer.load_state_dict(state)
            leaves = [[x.detach().clone() for x in pair] for pair in split()]
            for (x, y), g in zip(leaves, gradients, strict=True):
                set_gradients(x, y, g[t])
            a.grad, b.grad = stacked([(x.grad, y.grad) for x, y in leaves], "interleaved")
            optimizer.step()
        return torch.stack([w(pair) for pair in split()])

    plain = run(pairs)
    assert relative(run(other), plain) < 1e-8
    assert torch.equal(run(pairs, resume_at=4), plain)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("columns", ["interleaved", ""])
def test_what_is_wrong_with_one_of_several_pairs_is_said_of_its_parameter(columns, capturable):
    """A pair that was changed from outside starts anew, NaN is an error, each with the right name."""
    count, r, n, m = 4, 2, 9, 7

    def begin():
        params = [
            torch.nn.Parameter(x)
            for i in range(2)
            for x in stacked([factors(r, n, m, seed=10 * i + e) for e in range(count)], columns)
        ]
        names = ["x0.lora_A.w", "x0.lora_B.w", "x1.lora_A.w", "x1.lora_B.w"]
        group = {"params": list(zip(names, params, strict=True)), "kind": "lora", "blocks": count, "columns": columns}
        return params, LoRARite([group], lr=0.01, capturable=capturable)

    def step(params, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
        optimizer.report()

    for changed, name in ((slice(0, 1), "x0"), (slice(2, 3), "x1")):
        params, optimizer = begin()
        step(params, optimizer, 0)
        before = [p.detach().clone() for p in params]
        with torch.no_grad():
            params[changed][0][2 * r : 3 * r] *= 1.5  # of the third of four pairs
        with pytest.warns(UserWarning, match=rf"1 pairs were changed from outside since the last step \({name}.lora_A"):
            step(params, optimizer, 1)
        step(params, optimizer, 2)
        assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True))
        with torch.no_grad():
            params[changed][0][0, 0] = torch.nan
        with pytest.raises(NonFiniteError, match=rf"parameter {name}.lora_A.w contains NaN"):
            step(params, optimizer, 3)


def test_a_wrong_number_of_pairs_is_an_error():
    a, b = torch.nn.Parameter(torch.zeros(8, 5)), torch.nn.Parameter(torch.zeros(6, 8))
    for blocks in (0, 3, 1.5):
        with pytest.raises(ValueError, match="blocks"):
            LoRARite([{"params": [a, b], "kind": "lora", "blocks": blocks, "columns": "interleaved"}])
    with pytest.raises(ValueError, match="columns must be one of"):
        LoRARite([{"params": [a, b], "kind": "lora", "blocks": 4, "columns": "by rank"}])
    with pytest.raises(ValueError, match=r"l\.lora_A has shape"):
        LoRARite([{"params": [("l.lora_A", a), ("l.lora_B", b)], "kind": "lora", "blocks": 2}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoRARite([{"params": [a, b], "kind": "lora", "blocks": 4, "columns": "interleaved"}])
