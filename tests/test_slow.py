"""What takes minutes: long runs, and the demo as the README shows it. `make test-all` runs these."""

import pytest
import torch
from problems import factors, gradients_of_w, random_matrix, regauged, relative, set_gradients, train, w

from lora_rite import LoRARite
from lora_rite.plan.state import MATRICES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 2, None], ids=["rank1", "rank2", "full"])
def test_thousands_of_noisy_steps_do_not_drift(dtype, rank):
    """B31, with 5,000 steps of white noise: W grows as a random walk does, bases stay orthonormal, V symmetric."""
    r, n, m, lr, steps = 8, 50, 40, 1e-3, 5000
    a, b = (torch.nn.Parameter(x) for x in factors(r, n, m, zero_b=True, dtype=dtype))
    optimizer = LoRARite([a, b], lr=lr)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: 0.1 * torch.randn(*shape, generator=generator)
    for _ in range(steps):
        set_gradients(a, b, draw(m, n) if rank is None else draw(m, rank) @ draw(rank, n))
        optimizer.step()
    assert w((a, b)).norm() < 4 * lr * (steps * m * r) ** 0.5
    for p, x in ((a, a.mT), (b, b)):
        state = optimizer.state[p]
        q = x.detach().double() @ state["matrices"][MATRICES.index("basis")].double()
        live = (q.norm(dim=0) > 0.5).double()
        tolerance = 1e-4 if dtype == torch.float32 else 1e-1
        assert (q.mT @ q - live.diag()).abs().max() < tolerance
        v = state["matrices"][MATRICES.index("second_moment")]
        assert (v - v.mT).abs().max() <= 1e-5 * v.abs().max()
    assert optimizer.report()["skipped"] == 0


@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_w_does_not_depend_on_the_factorisation_over_1000_steps(condition):
    """float64, with weight decay and a falling rate; errors grow with the steps, so 1e-6."""
    gradients = [gradients_of_w(1000, 20, 30, seed=3)]
    plain = factors(4, 30, 20, zero_b=True, condition=3.0)
    other = regauged(*plain, random_matrix(4, condition, seed=5))
    results = [w(train([pair], gradients, lr=3e-3, weight_decay=0.1)[0][0]) for pair in (plain, other)]
    assert relative(results[1], results[0]) < 1e-6


def test_the_demo_shows_what_it_promises(tmp_path):
    """Held-out loss of LoRA-RITE below AdamW's, both at their best learning rates, and that in fewer steps."""
    pytest.importorskip("peft")
    from lora_rite.study.demo import demo

    torch.set_num_threads(2)
    try:
        with pytest.warns(FutureWarning):
            adamw, ours = demo(tmp_path / "demo", progress=False)["table"]
    finally:
        torch.set_num_threads(1)
    assert ours["held_out_loss"] < adamw["held_out_loss"]
    assert ours["steps_to_first"] < 200
    assert ours["state_bytes"] < adamw["state_bytes"]
