"""The experiments run, and the slow variant that they take apart is LoRARite where nothing is taken apart."""

import json
import math

import pytest
import torch
from problems import factors, gradients_of_w, random_matrix, regauged, relative, set_gradients, train, w

from lora_rite.cli import main
from lora_rite.theory import cost
from lora_rite.theory.problems import Regression, slope
from lora_rite.theory.regret import OneSidedAdagrad, theorem_3
from lora_rite.theory.variant import Variant

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def train_variant(pair, gradients, **options):
    params = [torch.nn.Parameter(x.clone()) for x in pair]
    optimizer = Variant(params, **options)
    for g in gradients:
        set_gradients(*params, g)
        optimizer.step()
    return w(params)


@pytest.mark.parametrize("zero_b", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"damping": 0.0, "row_equilibration": False, "relative_eps": 0.0},
        {"apply_escape": True, "damping": 3.0, "betas": (0.5, 0.9), "update_skipping": 0.3},
        {"apply_escape": True, "damping": 0.0, "betas": (0.0, 1.0), "relative_eps": 0.0, "row_equilibration": False},
    ],
)
def test_the_variant_is_lora_rite_where_nothing_is_exchanged(options, zero_b):
    """float64, gradients of full rank: equal to rounding."""
    pair, gradients = factors(4, 20, 15, zero_b=zero_b), gradients_of_w(30, 15, 20, rank=6)
    ((ours,), _) = train([pair], [gradients], lr=1e-2, **options)
    changed = {"rows" if k == "row_equilibration" else k: None if v is False else v for k, v in options.items()}
    changed.update({"apply_escape": True} if "apply_escape" in options else {})
    assert relative(train_variant(pair, gradients, lr=1e-2, **changed), w(ours)) < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": "before"},
        {"second_moment": False},
        {"rows": "after"},
        {"rows": "element"},
        {"row_floor": 0.0},
        {"clip_scope": "pair", "clip_unmagnified_grad": 0.1},
        {"betas": (0.9, 1.0), "apply_escape": True},
    ],
    ids=str,
)
def test_every_variant_but_transport_is_invariant(options):
    pair, gradients = factors(4, 20, 15, condition=3.0), gradients_of_w(20, 15, 20, rank=6)
    other = regauged(*pair, random_matrix(4, 1e3))
    ends = [train_variant(start, gradients, lr=1e-2, **options) for start in (pair, other)]
    assert relative(ends[1], ends[0]) < 1e-9


def test_every_exchange_changes_the_step():
    pair, gradients = factors(4, 20, 15), gradients_of_w(20, 15, 20, rank=6)
    plain = train_variant(pair, gradients, lr=1e-2)
    for options in ({"momentum": "before"}, {"second_moment": False}, {"rows": "after"}, {"rows": "element"},
                    {"rows": None}, {"row_floor": 1e-1}, {"clip_scope": "pair", "clip_unmagnified_grad": 0.1},
                    {"betas": (0.9, 1.0)}, {"transport": False}):  # fmt: skip
        assert relative(train_variant(pair, gradients, lr=1e-2, **options), plain) > 1e-6, options


def test_summed_second_moment_is_algorithm_1():
    """One step, β₁ = 0, V = ḡᵀḡ/rows summed: S is the polar factor of ḡ times √rows, whatever β₂."""
    a, b = factors(3, 12, 10)
    g = gradients_of_w(1, 10, 12)[0]
    params = [torch.nn.Parameter(x.clone()) for x in (a, b)]
    set_gradients(*params, g)
    theorem_3(params, 0.1).step()
    q = torch.linalg.qr(a.mT)[0]
    u, _, vh = torch.linalg.svd(g @ q, full_matrices=False)
    expected = -0.1 * 10**0.5 * u @ vh @ q.mT  # δB·A
    torch.testing.assert_close((params[1].detach() - b) @ a, expected, rtol=1e-6, atol=1e-9)


def test_one_sided_adagrad_takes_a_polar_step_first():
    a, b = factors(3, 12, 10)
    params = [torch.nn.Parameter(x.clone()) for x in (a, b)]
    set_gradients(*params, gradients_of_w(1, 10, 12)[0])
    OneSidedAdagrad(params, 0.1).step()
    step = (params[1].detach() - b) / 0.1
    torch.testing.assert_close(step.mT @ step, torch.eye(3, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_regression_gradients_are_those_of_autograd():
    problem = Regression(24, 3)
    x, y = problem.data()
    with torch.no_grad():
        problem.b += 0.1
    problem.gradients(x, y)
    loss = ((x @ problem.a.mT @ problem.b.mT - y).square().sum() / 2) / len(x)
    for p, g in zip((problem.a, problem.b), torch.autograd.grad(loss, (problem.a, problem.b)), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-5)


def test_slope():
    assert slope([1, 10, 100], [2, 2 * 10**1.5, 2e3]) == pytest.approx(1.5)


# Small enough to run here; what each must show is clear enough at that size.
SMALL = {
    "width": {"widths": [64, 512], "steps": 20, "seeds": 1},
    "transfer": {"widths": [64, 128], "ranks": [4, 8], "lrs": [1e-2, 3e-2, 1e-1], "steps": 10, "seeds": 1},
    "regret": {"steps": 64, "seeds": 1, "imbalances": [1.0, 1e4], "lrs": [0.1, 0.3]},
    "cost": {"widths": [128, 256, 384], "ranks": [4, 8, 16], "rounds": 1},
    "damping": {"gradient_ranks": [2, 8], "lrs": [1e-2], "steps": 8, "seeds": 1},
    "noise": {"steps": 60},
    "ablation": {
        "cases": ["LoRARite", "no second moment", "AdamW"],
        "widths": [16],
        "rank": 2,
        "steps": [4],
        "lrs": [1e-2],
        "seeds": 2,
    },
}


#: On the embedded model: half a minute each.
SLOW = {
    "ranks": {"ranks": [2, 8], "steps": 2, "lrs": [5e-3, 1e-2, 2e-2], "adamw_lrs": [5e-3, 1e-2, 2e-2]},
    "factors": {"steps": 4, "every": 2, "rank": 2},
    "few_tokens": {"rank": 2, "steps": 2, "lrs": [1e-2], "expert_steps": 4, "expert_lrs": [1e-2], "expert_seeds": 1},
}


def run(name, settings, out):
    assert main(["theory", "--experiment", name, "--out", str(out), "--settings", json.dumps(settings)]) == 0
    assert (out / f"{name}.png").stat().st_size > 10_000
    result = json.loads((out / f"{name}.json").read_text())
    assert result["experiment"] == name
    assert min(len(result["expected"]), len(result["found"])) > 100
    assert result["versions"]["torch"] == torch.__version__
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every experiment from the command line, once."""
    pytest.importorskip("peft")
    pytest.importorskip("pytorch_optimizer")
    out = tmp_path_factory.mktemp("theory")
    return {name: run(name, settings, out) for name, settings in SMALL.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_experiments_on_the_embedded_model(name, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("pytorch_optimizer")
    result = run(name, SLOW[name], tmp_path)
    if name == "factors":
        assert set(result["curves"]) == {"AdamW", "LoRARite", "LoRARite, damping 0"}
        assert result["curves"]["LoRARite"]["through_a"][0] < result["curves"]["LoRARite, damping 0"]["through_a"][0]
    else:
        assert all(math.isfinite(loss) for row in result["rows"] for loss in row["losses"])


@pytest.mark.slow
def test_the_embedded_ablation(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    from lora_rite.theory import ablation

    short = lambda make, steps, seed: train_embedded(make, steps=2, seed=seed, rank=2)
    train_embedded = ablation.train_embedded
    monkeypatch.setattr(ablation, "train_embedded", short)
    (row,) = ablation.run("embedded", cases=("LoRARite",), embedded_seeds=(100,))["rows"]
    assert 3 < row["losses"][0] < 7


def test_adam_moves_the_output_through_a_by_the_width_and_lora_rite_by_its_root(results):
    fits = {f["optimizer"]: f for f in results["width"]["fits"] if f["step"] == 2}
    assert fits["AdamW"]["through_a"] == pytest.approx(1, abs=0.15)
    assert fits["LoRARite"]["through_a"] == pytest.approx(0.5, abs=0.15)
    assert fits["published step"]["through_b"] == pytest.approx(0, abs=0.15)


def test_regret_of_lora_rite_does_not_see_the_imbalance(results):
    best = {(b["optimizer"], b["imbalance"]): b["regret"][-1] for b in results["regret"]["best"]}
    assert best["LoRA-RITE", 1e4] == pytest.approx(best["LoRA-RITE", 1.0], rel=1e-6)
    assert best["one-sided Adagrad", 1e4] > 1.05 * best["one-sided Adagrad", 1.0]


def test_costs_are_linear_in_the_width(results):
    cost = results["cost"]
    assert cost["operations"]["largest_error"] < 0.1
    assert cost["operations"]["(m+n)r²"] == pytest.approx(16, rel=0.1)  # eight tall products: the factors are small
    assert cost["bytes"]["largest_error"] < 0.01
    assert cost["bytes"]["(m+n)r"] == pytest.approx(4, rel=0.01)


def test_large_factors_take_six_tall_products():
    operations = cost.run(widths=(1024, 2048, 4096), ranks=(8, 16), rounds=1)["operations"]
    assert operations["(m+n)r²"] == pytest.approx(12, rel=0.05)


def test_the_published_step_blows_up_where_the_gradient_lacks_rank_and_ours_does_not(results):
    worst = {
        (r["optimizer"], r["gradient_rank"]): r["worst"]
        for r in results["damping"]["rows"]
        if (r["problem"], r["dtype"]) == ("noise", "float64")
    }
    assert worst["published, pinv of the dtype", 2] > 1e3
    assert worst["damping 20", 2] < 2
    assert worst["published, pinv of the dtype", 8] < 10


def test_noise_keeps_bases_orthonormal(results):
    for walk in results["noise"]["walks"]:
        assert walk["drift"] < 1e-3
        assert walk["skipped"] == 0
        assert math.isfinite(walk["w"][-1])


def test_the_gauge_ablation_trains_in_both_dtypes():
    from lora_rite.theory import ablation

    rows = ablation.run("gauge", widths=(16,), rank=2, steps=(30,), seeds=1)["rows"]
    assert len(rows) == 8
    assert all(loss < 1.1 for row in rows for loss in row["losses"])


def test_unknown_settings(capsys):
    assert main(["theory", "--experiment", "width", "--settings", '{"with": 3}']) == 2
    assert "--settings: width has no 'with'; it has widths, rank" in capsys.readouterr().err
    assert main(["theory", "--experiment", "noise", "--settings", '{"steps": "x"}']) == 2
    assert "--settings of noise: steps must be a whole number, got x" in capsys.readouterr().err
    assert main(["theory", "--experiment", "noise", "--settings", '{"steps": 0}']) == 2
    assert "--settings of noise: " in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_an_error_before_the_run(tmp_path, capsys, monkeypatch):
    from lora_rite.theory import noise

    monkeypatch.setattr(noise, "run", lambda steps=1: pytest.fail("ran"))
    (tmp_path / "file").touch()
    assert main(["theory", "--experiment", "noise", "--out", str(tmp_path / "file")]) == 2
    assert f"--out: {tmp_path / 'file'} is not a folder" in capsys.readouterr().err
