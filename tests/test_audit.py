"""The audit finds invariance where it is known to be and its absence where it is known not to be."""

import json
import math

import pytest
import torch
from problems import factors

import lora_rite
from lora_rite import LoRARite, audit
from lora_rite.cli import main
from lora_rite.invariance.runs import Transform, minus, norm_of, transforms

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class ScaledGD(torch.optim.Optimizer):
    """A ← A − lr·(BᵀB)⁻¹·g_A and the same for B: invariant from dense factors, exactly."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        params = self.param_groups[0]["params"]
        for a, b in zip(params[::2], params[1::2], strict=True):
            flat_a, flat_b = a.flatten(1).clone(), b.flatten(1).clone()
            left = torch.linalg.solve(flat_b.mT @ flat_b, a.grad.flatten(1)).reshape(a.shape)
            right = torch.linalg.solve(flat_a @ flat_a.mT, b.grad.flatten(1), left=False).reshape(b.shape)
            a -= self.defaults["lr"] * left
            b -= self.defaults["lr"] * right


def rows_of(result, **wanted):
    return [row for row in result["rows"] if all(row[k] == v for k, v in wanted.items())]


def test_lora_rite_is_invariant_for_every_layer_start_and_k():
    """float64: what is left is rounding, times the condition of K."""
    result = audit(LoRARite, options={"lr": 1e-2}, dtypes=["float64"], steps=6)
    assert result["passed"]
    assert result["failures"] == []
    assert {row["layer"] for row in result["rows"]} == {"linear", "embedding", "convolution"}
    assert {row["start"].rpartition(", ")[2] for row in result["rows"]} == {"zero", "dense"}
    for row in result["rows"]:
        assert len(row["errors"]) == 6
        assert row["worst"] == max(row["errors"]) <= 1e-12 * max(row["condition"], 10) ** 1.2
        assert row["moved"] > 1e-3


def test_a_method_known_to_be_invariant_passes_and_sgd_passes_under_rotations_alone():
    """Scaled gradient descent commutes with every K; gradient descent with orthogonal K only."""
    options = {"options": {"lr": 1e-3}, "dtypes": ["float64"], "problems": ["linear"], "steps": 10}
    options["conditions"] = [10, 1e4]  # it squares the condition: (BᵀB)⁻¹
    scaled, sgd = audit(ScaledGD, **options), audit(torch.optim.SGD, **options)
    for row in rows_of(scaled, start="linear, dense"):
        assert row["verdict"] in ("passed", "control")
        assert row["worst"] < 1e-8
    for row in rows_of(sgd, start="linear, dense"):
        orthogonal = row["transform"] in ("rounding", "rotation")
        assert (row["worst"] < 1e-12) == orthogonal
        assert (row["verdict"] == "failed") != orthogonal
    assert not sgd["passed"]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, "torch.optim:AdamW"])
def test_adamw_fails(optimizer):
    result = audit(optimizer, options={"lr": 1e-2}, problems=["linear"], steps=3, conditions=[10])
    assert not result["passed"]
    for row in rows_of(result, transform="rotation") + rows_of(result, transform="cond 10"):
        assert row["verdict"] == "failed"
        assert row["worst"] > 0.1


def test_sgd_from_dense_factors_under_a_scaling_errs_by_the_known_amount():
    """One step of gradient descent from (sB, A/s) moves W by lr(s²GAᵀA/s²… ) that is −lr(G·AᵀA/s² + s²·BBᵀG), G the
    gradient of W: the first-order part is known, and lr makes the second-order part negligible."""
    a, b = (torch.nn.Parameter(x) for x in factors(2, 5, 4))
    g = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = torch.nn.Module()
    model.lora_A, model.lora_B = a, b
    result = audit(
        torch.optim.SGD, model, lambda m, step: (m.lora_B @ m.lora_A * g).sum(), options={"lr": 1e-9}, steps=1
    )
    a, b = a.detach(), b.detach()
    moved = lambda s: g @ a.mT @ a / s**2 + s**2 * b @ b.mT @ g
    expected = (moved(1) - moved(1e3)).norm() / moved(1).norm()
    (row,) = rows_of(result, transform="scale 1e3")
    assert row["worst"] == pytest.approx(expected.item(), rel=1e-6)


def test_norms_come_from_factors():
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    one, two = (draw(7, 2), draw(2, 9)), (draw(7, 3), draw(3, 9))
    direct = one[0] @ one[1] - two[0] @ two[1]
    assert norm_of([minus(one, two)]) == pytest.approx(direct.norm().item())
    assert norm_of([one, two]) == pytest.approx(math.hypot((one[0] @ one[1]).norm(), (two[0] @ two[1]).norm()))


@pytest.mark.parametrize("change", transforms()[1:], ids=lambda change: change.label)
@pytest.mark.parametrize("shapes", [((4, 6), (5, 4)), ((4, 3, 3, 3), (5, 4, 1, 1))], ids=["linear", "convolution"])
def test_transforms_leave_the_product_and_have_their_condition(change, shapes):
    a, b = (torch.randn(s, dtype=torch.float64) for s in shapes)
    new_a, new_b = change(a, b, torch.Generator().manual_seed(0))
    assert (new_a.shape, new_b.shape) == (a.shape, b.shape)
    flat = lambda p: p.flatten(1)
    torch.testing.assert_close(flat(new_b) @ flat(new_a), flat(b) @ flat(a), rtol=1e-8, atol=1e-8)
    k = torch.linalg.lstsq(flat(b), flat(new_b)).solution
    assert torch.linalg.cond(k).item() == pytest.approx(change.condition, rel=1e-6)
    assert torch.linalg.det(k).abs().item() == pytest.approx(change.scale**4, rel=1e-6)


def test_the_control_changes_every_element_by_a_rounding():
    a = torch.randn(4, 6)
    new_a, new_b = Transform("rounding", noise=True)(a, torch.zeros(5, 4), torch.Generator().manual_seed(0))
    change = (new_a - a).abs() / a.abs()
    assert 0 < change.max() < 6 * torch.finfo(torch.float32).eps
    assert not new_b.any()


def test_what_does_not_move_or_is_not_finite_does_not_pass():
    class Still(torch.optim.SGD):
        def step(self, closure=None): ...

    class Broken(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            self.param_groups[0]["params"][0].fill_(math.nan)

    class Picky(torch.optim.SGD):
        def step(self, closure=None):
            if max(p.abs().max() for p in self.param_groups[0]["params"]) > 100:
                raise RuntimeError("too large")
            super().step(closure)

    result = audit(Picky, options={"lr": 1e-2}, problems=["linear"], steps=2, conditions=[10])
    assert {row["worst"] for row in rows_of(result, transform="scale 1e-3")} == {math.inf}
    assert {row["verdict"] for row in rows_of(result, transform="scale 1e-3")} == {"failed"}
    for optimizer in (Still, Broken):
        result = audit(optimizer, options={"lr": 1e-2}, problems=["linear"], steps=2, conditions=[10])
        assert not result["passed"]
        assert all(row["verdict"] == "failed" for row in result["rows"] if row["transform"] != "rounding")


def test_what_rounding_explains_is_not_called_a_failure():
    """float32 and condition 1e6: BK alone is rounded by a tenth of W. Reported, but neither passed nor failed."""
    result = audit(LoRARite, options={"lr": 1e-2}, dtypes=["float32"], problems=["linear"], steps=3)
    verdicts = {row["transform"]: row["verdict"] for row in rows_of(result, start="linear, dense")}
    assert verdicts["cond 1e6"] == "rounding"
    assert verdicts["cond 100"] == verdicts["scale 1e3"] == "passed"
    assert result["passed"]
    strict = audit(LoRARite, options={"lr": 1e-2}, dtypes=["float32"], problems=["linear"], steps=3, tolerance=1e-12)
    assert not strict["passed"]


def test_a_problem_that_rounding_alone_explains_shows_nothing():
    """Where a step is chance, the control is as large as every error: nothing fails there, and nothing is shown."""

    class Chaotic(ScaledGD):
        @torch.no_grad()
        def step(self, closure=None):
            params = self.param_groups[0]["params"]
            if params[1].any():
                super().step()
                return
            for a, b in zip(params[::2], params[1::2], strict=True):
                b += torch.sin(1e20 * a.sum()) * torch.linalg.pinv(a).sum(0)

    result = audit(Chaotic, options={"lr": 1e-3}, dtypes=["float64"], problems=["linear"], steps=1, conditions=[10])
    verdicts = lambda start: {row["verdict"] for row in rows_of(result, start=f"linear, {start}")} - {"control"}
    assert (verdicts("zero"), verdicts("dense")) == ({"rounding"}, {"passed"})
    assert not result["passed"]


def test_what_cannot_be_trained_is_named_and_does_not_count():
    result = audit(torch.optim.Muon, options={"lr": 1e-2}, steps=1, problems=["linear", "convolution"], conditions=[10])
    assert {failure["start"] for failure in result["failures"]} == {"convolution, zero", "convolution, dense"}
    assert "2D" in result["failures"][0]["reason"]
    assert {row["layer"] for row in result["rows"]} == {"linear"}
    with pytest.raises(ValueError, match="Muon cannot train any of the problems: ValueError: Muon only supports 2D"):
        audit(torch.optim.Muon, options={"lr": 1e-2}, steps=1, problems=["convolution"])


def test_the_optimizer_gets_what_it_takes():
    seen = []

    def record(subject, lr):
        seen.append(subject)
        params = subject.parameters() if isinstance(subject, torch.nn.Module) else subject
        return torch.optim.SGD([p for p in params if p.requires_grad] if params is not subject else params, lr=lr)

    def of_params(params, lr):
        return record(params, lr)

    def of_model(model, lr):
        return record(model, lr)

    shared = {"options": {"lr": 1e-3}, "steps": 1, "problems": ["linear"], "conditions": [1], "dtypes": ["float32"]}
    for function, takes, kind in ((of_params, None, list), (of_model, None, torch.nn.Module), (record, "named", list)):
        seen.clear()
        audit(function, takes=takes, **shared)
        assert isinstance(seen[0], kind)
        assert isinstance(seen[0], torch.nn.Module) or isinstance(seen[0][0], tuple) == (takes == "named")


def test_bad_arguments():
    with pytest.raises(ValueError, match="steps must be at least 1"):
        audit(LoRARite, steps=0)
    with pytest.raises(ValueError, match="conditions must be numbers ≥ 1"):
        audit(LoRARite, conditions=[0.1])
    with pytest.raises(ValueError, match="unknown dtype 'int8': choose from float64, float32"):
        audit(LoRARite, dtypes=["int8"])
    with pytest.raises(ValueError, match="unknown problem 'rnn'"):
        audit(LoRARite, problems=["rnn"])
    with pytest.raises(ValueError, match="not an import path like"):
        audit("torch.optim.AdamW")
    with pytest.raises(ValueError, match=r"cannot import torch\.optim:AdamX"):
        audit("torch.optim:AdamX")
    with pytest.raises(ValueError, match="no LoRA pairs"):
        audit(LoRARite, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unexpected keyword argument 'rate'"):
        audit(LoRARite, options={"rate": 1})


# ------------------------------------------------------------------------------------------------- models, command line


@pytest.fixture(scope="module")
def tiny():
    peft = pytest.importorskip("peft")
    from lora_rite.finetune.load import load_model

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[0], lora_dropout=0.1)
    return peft.get_peft_model(load_model("tiny")[0], config).train()


def test_a_model_is_left_alone_and_its_dropout_is_the_same_in_all_runs(tiny):
    before = {name: p.clone() for name, p in tiny.state_dict().items()}
    made = []

    def make(model):
        made.append(model)
        return lora_rite.create_lora_rite(model, lr=1e-2, row_equilibration=False)

    result = audit(make, tiny, steps=3, conditions=[100], dtypes=["float64"])
    assert result["passed"]
    assert max(row["worst"] for row in result["rows"]) < 1e-6
    assert all(torch.equal(before[name], p) for name, p in tiny.state_dict().items())
    frozen = next(name for name, p in tiny.named_parameters() if not p.requires_grad)
    assert made[0].get_parameter(frozen) is made[1].get_parameter(frozen)
    assert made[0] is not made[1]


def test_other_trainable_parameters_take_part(tiny):
    import copy

    model = copy.deepcopy(tiny)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.requires_grad_()
    options = {"lr": 1e-2, "adamw_lr": 1e-3, "row_equilibration": False}
    assert audit(LoRARite, model, options=options, steps=2, conditions=[100])["passed"]


def run(*words):
    return main(["audit", *(str(word) for word in words)])


def test_command_line(tmp_path, capsys):
    pytest.importorskip("jsonargparse")
    small = ["--steps", 2, "--dtypes", "float64", "--conditions", 100]
    assert run(*small, "--peers", "--out", tmp_path / "audit") == 0
    printed = capsys.readouterr().out
    assert "LoRARite is invariant: 40 passed" in printed
    assert "Muon, a factor each: not run on convolution, zero; convolution, dense" in printed
    result = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert result["passed"]
    assert result["versions"]["torch"] == torch.__version__
    peers = {peer["label"]: peer["passed"] for peer in result["peers"]}
    assert "LoRARite" not in peers  # it is the audited one
    assert printed.count("LoRARite, float64") == 1
    assert not any(peers[name] for name in ("AdamW", "LoRA+ (AdamW)", "Riemannian (AdamW)", "Muon, a factor each"))
    assert (tmp_path / "audit" / "audit.png").stat().st_size > 10_000
    assert run(*small, "--optimizer", "torch.optim:AdamW") == 3
    assert "AdamW is not invariant" in capsys.readouterr().out


def test_command_line_on_a_model_and_its_text(tmp_path, capsys):
    pytest.importorskip("peft")
    data = tmp_path / "text.txt"
    data.write_text("for each of the lines, one more line of text\n" * 40)
    words = ["--model", "tiny", "--rank", 2, "--target_modules", '["q_proj"]', "--steps", 2, "--conditions", 10]
    words += ["--optimizer_args", '{"row_equilibration": false}', "--data", data]
    assert run(*words) == 0
    assert "as it is (linear), float32" in capsys.readouterr().out


@pytest.mark.slow
def test_lora_rite_is_invariant_on_the_embedded_model(tmp_path):
    """As ``lora-rite audit --model tiny`` has it, and in both dtypes. Rows of A whose inputs are zero but for rounding
    must not be made as large as the others."""
    pytest.importorskip("peft")
    assert run("--model", "tiny") == 0
    out = tmp_path / "audit"
    small = ["--model", "tiny", "--rank", 8, "--dtypes", "float64", "float32", "--conditions", 100]
    assert run(*small, "--out", out) == 0
    rows = json.loads((out / "audit.json").read_text())["rows"]
    assert len(rows) == 10
    for row in rows:
        assert row["worst"] < (1e-5 if row["dtype"] == "float64" else 1e-2)


def test_command_line_errors(tmp_path, capsys):
    pytest.importorskip("peft")
    (tmp_path / "file").touch()
    for words, text in [
        (["--data", tmp_path / "x.txt"], "--data is for a --model"),
        (["--optimizer", "nowhere:X"], "cannot import nowhere:X: No module named 'nowhere'"),
        (["--optimizer_args", '{"lr": 1}'], "give the learning rate by --lr"),
        (["--optimizer_args.epss", "1"], "has no such argument, did you mean eps?"),
        (["--model", tmp_path / "none"], "cannot load --model"),
        (["--out", tmp_path / "file"], "--out: "),
    ]:
        assert run(*words) == 2
        assert text in capsys.readouterr().err


def test_reasons_name_the_kind_of_an_error_once():
    def broken(params, lr):
        raise KeyError("momentum")

    with pytest.raises(ValueError, match=r"cannot train any of the problems: KeyError: 'momentum'$"):
        audit(broken, options={"lr": 1e-3}, steps=1, problems=["linear"], dtypes=["float64"])
