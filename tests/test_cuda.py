"""The step on a GPU, where there is one, against the same on the CPU. (Where there is none, the CPU against itself: so
the tests at least run.)"""

import pytest
import torch
from problems import factors, gradients_of_w, random_matrix, regauged, relative, set_gradients, train, w

from lora_rite import LoRARite
from lora_rite.algebra.rounding import stochastic_round

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make test-gpu")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
SHAPE = (300, 200)  # n, m


def on(device, pairs):
    return [tuple(x.to(device) for x in pair) for pair in pairs]


@devices
@pytest.mark.parametrize("capturable", [False, True], ids=["eager", "capturable"])
@pytest.mark.parametrize("zero_b", [False, True], ids=["dense", "zero_b"])
@pytest.mark.parametrize("r", [1, 16, 64])
def test_equals_float64_on_a_cpu(device, r, zero_b, capturable):
    n, m = SHAPE
    pairs = [factors(r, n, m, zero_b=zero_b, condition=10.0, seed=i) for i in range(2)]
    gradients = [gradients_of_w(15, m, n, seed=i) for i in range(2)]
    expected, _ = train(pairs, gradients, lr=1e-2)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        start = on(device, [[x.to(dtype) for x in pair] for pair in pairs])
        got, _ = train(start, [g.to(device) for g in gradients], lr=1e-2, capturable=capturable)
        for pair, other in zip(got, expected, strict=True):
            assert relative(w(pair).cpu(), w(other)) < tolerance


@devices
@pytest.mark.parametrize("rank", [2, None], ids=["rank_2_gradients", "full"])
def test_w_does_not_depend_on_the_factorisation(device, rank):
    r, (n, m) = 8, SHAPE
    plain = factors(r, n, m, zero_b=True)
    gradients = [gradients_of_w(20, m, n, rank=rank).to(device)]
    other = regauged(*plain, random_matrix(r, 100.0, seed=2))
    results = [w(train(on(device, [pair]), gradients, lr=1e-2)[0][0]) for pair in (plain, other)]
    assert relative(results[1], results[0]) < 1e-8


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_noise_is_the_same_everywhere(device, dtype):
    x = torch.randn(3, 50, 40, generator=torch.Generator().manual_seed(0))
    key = torch.tensor([1, 2**40 + 3, 77])
    expected = stochastic_round(x, dtype, key)
    assert torch.equal(stochastic_round(x.to(device), dtype, key.to(device)).cpu(), expected)
    assert not torch.equal(expected, x.to(dtype))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [4, 16, 64])
def test_a_graph_of_the_kernels_follows_the_learning_rate(r, dtype):
    """A captured step of engine="triton", with the backward pass in the graph, against the eager engine without one."""
    n, m = SHAPE
    inputs = torch.randn(32, n, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    runs = []
    for engine in ("triton", "eager"):
        params = [torch.nn.Parameter(x.to("cuda")) for x in factors(r, n, m, zero_b=True, dtype=dtype)]
        lr = torch.tensor(1e-2, device="cuda")
        optimizer = LoRARite(params, lr=lr, capturable=True, engine=engine)

        def step(params=params, optimizer=optimizer):
            optimizer.zero_grad()
            (inputs @ params[0].mT @ params[1].mT - 1).float().square().mean().backward()
            optimizer.step()

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        replay = replayed(step, "cuda") if engine == "triton" else step
        for _ in range(5):
            lr.mul_(0.7)
            replay()
        if engine == "triton":
            step()  # The tables of a step outside are not those of the graph.
            replay()
        else:
            step()
            step()
        runs.append(w(params))
        assert optimizer.report()["engine"] == engine
    assert relative(runs[0], runs[1]) < (1e-3 if dtype == torch.float32 else 3e-2)


@needs_cuda
def test_the_kernels_at_the_shapes_of_a_model():
    """Two thousand pairs; memory is flat."""
    pairs = [factors(16, 256, 128, zero_b=True, dtype=torch.float32, seed=i % 7) for i in range(2000)]
    gradients = [gradients_of_w(1, 128, 256, seed=i % 5).to("cuda") for i in range(2000)]
    runs = [train(on("cuda", pairs), gradients, lr=1e-2, engine=engine) for engine in ("triton", "eager")]
    for pair, other in zip(runs[0][0][::97], runs[1][0][::97], strict=True):
        assert relative(w(pair), w(other)) < 1e-4
    optimizer = runs[0][1]
    before = torch.cuda.memory_allocated()
    for _ in range(300):
        optimizer.step()
    assert torch.cuda.memory_allocated() == before


def started(device, **options):
    """An optimizer after its first step, and its parameters, whose gradients stay."""
    params = [torch.nn.Parameter(x.to(device)) for x in factors(16, *SHAPE, zero_b=True, dtype=torch.float32)]
    set_gradients(*params, gradients_of_w(1, SHAPE[1], SHAPE[0])[0].to(device))
    params[0].grad = torch.full_like(params[0], 1e-3)
    optimizer = LoRARite(params, lr=1e-2, **options)
    optimizer.step()
    return params, optimizer


def replayed(step, device):
    """The step as a CUDA graph; on the CPU as it is."""
    if device == "cpu":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@devices
def test_a_graph_replays_the_step(device):
    params, optimizer = started(device, capturable=True)
    others, eager = started(device, capturable=True)
    replay = replayed(optimizer.step, device)
    for value in (0.1, 0.2, torch.nan, 0.1, 0.3):
        for p in (*params, *others):
            p.grad[0, 0] = value
        replay()
        eager.step()
    for p, other in zip(params, others, strict=True):
        assert relative(p, other) < 1e-5
        assert optimizer.state[p]["step"] == eager.state[other]["step"] == 5  # with the first one, and one skipped


@devices
def test_tf32_does_not_reach_the_step(device):
    results = []
    for precision in ("highest", "high"):
        params, optimizer = started(device)
        for g in gradients_of_w(10, SHAPE[1], SHAPE[0]).to(device):
            set_gradients(*params, g)
            torch.set_float32_matmul_precision(precision)
            try:
                optimizer.step()
            finally:
                torch.set_float32_matmul_precision("highest")
        results.append(w(params))
    assert relative(results[1], results[0]) < 1e-5


def waits(messages):
    """How often torch's synchronisation debug mode has seen the host wait. (Switching it on is a warning too, once a
    process, which has the word.)"""
    return sum("called a synchronizing CUDA operation" in str(message) for message in messages)


def test_waits_are_counted_and_the_notice_of_the_debug_mode_is_not():
    """The two messages of torch."""
    notice = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    wait = "called a synchronizing CUDA operation (Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:304.)"
    assert waits([notice]) == 0
    assert waits([notice, wait, UserWarning(wait)]) == 2


@needs_cuda
@pytest.mark.parametrize("capturable", [False, True], ids=["eager", "capturable"])
def test_the_host_waits_once_or_never(capturable, recwarn):
    _, optimizer = started("cuda", capturable=capturable)
    optimizer.step()
    recwarn.clear()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits(warning.message for warning in recwarn) == (not capturable)


@needs_cuda
def test_memory_is_flat():
    _, optimizer = started("cuda")
    optimizer.step()
    before = torch.cuda.memory_allocated()
    for _ in range(300):
        optimizer.step()
    assert torch.cuda.memory_allocated() == before
