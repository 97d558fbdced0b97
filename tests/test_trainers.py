"""Wiring: what trainers hand to the optimizer, right and wrong, and the figures of each layer over time."""

import json
import warnings

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from test_hf import network, rows, trainer  # noqa: E402

from lora_rite import LoRARite, LoRARiteCallback, LoRARiteFactory, create_lora_rite, layer_report  # noqa: E402
from lora_rite.options import lr_scale  # noqa: E402
from lora_rite.plan.names import plain_names  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def warned(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "LoRARiteCallback" in str(w.message) or "raw gradients" in str(w.message)]


def test_trainer_with_the_class_instead_of_the_factory(tmp_path):
    """The Trainer then hands over nameless groups, in the model's order: right for pairs alone, else an error."""
    run = trainer(tmp_path, steps=1, save_strategy="no", factory=(LoRARite, {"lr": 1e-2}))
    run.train()
    assert run.optimizer.optimizer.report()["pairs_preconditioned"] == 14
    for options in ({"use_dora": True}, {"modules_to_save": ["norm"]}):
        run = trainer(tmp_path, model=network(**options), steps=1, factory=(LoRARite, {"lr": 1e-2}))
        with pytest.raises(ValueError, match=r"named_parameters|pairs A, B|factor is a"):
            run.train()


def test_factory_warns_of_raw_gradient_clipping_where_it_is_told():
    """axolotl passes its training arguments."""
    arguments = type("Arguments", (), {"learning_rate": 1e-2, "max_grad_norm": 1.0})()
    with pytest.warns(UserWarning, match=r"max_grad_norm=1\.0 clips raw gradients.*: set max_grad_norm=0"):
        LoRARiteFactory()(network(), arguments)
    arguments.max_grad_norm = 0.0
    assert warned(lambda: LoRARiteFactory()(network(), arguments)) == []


def test_callback_warns_once_of_raw_gradient_clipping(tmp_path):
    run = trainer(tmp_path, steps=4, save_strategy="no", max_grad_norm=0.5, callbacks=[LoRARiteCallback()])
    (message,) = warned(run.train)
    assert "max_grad_norm=0.5 clips raw gradients" in message
    assert "set max_grad_norm=0" in message


def test_nothing_to_pair_says_what_to_do():
    plain = transformers.AutoModelForCausalLM.from_config(network().config)
    with pytest.raises(ValueError, match=r"none of .* trainable parameters is a factor; attach an adapter"):
        create_lora_rite(plain)
    frozen = network()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match=r"all factors are frozen .*is_trainable=True"):
        create_lora_rite(frozen)
    with pytest.raises(ValueError, match="no LoRA pairs"):
        LoRARite([{"params": []}, {"params": [], "weight_decay": 0.0}])


def test_flattened_parameters_say_what_to_do():
    """As FSDP1 and ZeRO hand them over: one dimension, or an empty placeholder."""
    for shape in ((48,), (0,)):
        flat = [("lora_A.weight", nn.Parameter(torch.ones(shape))), ("lora_B.weight", nn.Parameter(torch.ones(shape)))]
        with pytest.raises(ValueError, match="FSDP1"):
            LoRARite(flat, adamw_lr=1e-3)
        with pytest.raises(ValueError, match="FSDP1"):
            LoRARite([{"params": [p for _, p in flat], "kind": "lora"}])


class TorchtuneLinear(nn.Module):
    """The parameters of torchtune's LoRALinear, in its order."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs), requires_grad=False)
        self.lora_a, self.lora_b = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x):
        return x @ self.weight.mT + self.lora_b(self.lora_a(x))


def test_torchtune_passes_all_parameters_without_names():
    """``optimizer: {_component_: lora_rite.LoRARite, lr: …}`` is called with model.parameters(), frozen ones too."""
    model = nn.Sequential(TorchtuneLinear(8, 8), TorchtuneLinear(8, 4))
    optimizer = LoRARite(model.parameters(), lr=1e-2)
    model(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()
    assert optimizer.report()["pairs_preconditioned"] == 2
    assert optimizer.param_groups[0]["params"][0] is model[0].lora_a.weight


@pytest.fixture
def fit(tmp_path):
    """Fits a network in Lightning, with the callback; returns the Trainer and what was warned of."""
    pl = pytest.importorskip("lightning.pytorch")
    from lora_rite.integrations.lightning import LoRARiteCallback as Callback

    class Module(pl.LightningModule):
        def __init__(self, make):
            super().__init__()
            self.model, self.make = network(), make

        def training_step(self, batch, _):
            loss = self.model(input_ids=batch, labels=batch).loss
            if not self.automatic_optimization:
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()
            return loss

        def configure_optimizers(self):
            optimizers = self.make(self.model)
            self.automatic_optimization = not isinstance(optimizers, list)
            return optimizers

    def fit(make, **options):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        run = pl.Trainer(**{
            "max_steps": 4, "callbacks": [Callback()], "enable_checkpointing": False, "log_every_n_steps": 2,
            "default_root_dir": tmp_path, **quiet, **options,
        })  # fmt: skip
        data = torch.tensor([row["input_ids"] for row in rows(8)])
        return run, warned(lambda: run.fit(Module(make), iter([data] * 20)))

    return fit


def test_lightning_callback_warns_and_logs(fit):
    ours = lambda model: create_lora_rite(model, lr=1e-2)
    run, messages = fit(ours)
    assert messages == []
    assert run.callback_metrics["lora_rite/update_norm"] > 0
    assert "lora_rite/damped_share" in run.callback_metrics
    (message,) = fit(ours, gradient_clip_val=0.5)[1]
    assert "gradient_clip_val=0.5 clips raw gradients" in message
    (message,) = fit(lambda model: torch.optim.AdamW(model.parameters()))[1]
    assert "the optimizer is AdamW, not LoRARite" in message


@pytest.mark.parametrize(("every", "reports"), [(0, 0), (1, 4), (3, 1)])
def test_lightning_callback_reports_once_a_step(fit, every, reports, monkeypatch):
    """Of four steps of three batches each; 0 is off, as for Lightning itself."""
    steps, report = [], LoRARite.report
    monkeypatch.setattr(LoRARite, "report", lambda self: steps.append(1) or report(self))
    fit(lambda model: create_lora_rite(model, lr=1e-2), log_every_n_steps=every, accumulate_grad_batches=3)
    assert len(steps) == reports


def test_lightning_callback_numbers_several_optimizers(fit):
    def two(model):
        groups = create_lora_rite(model).param_groups[0]
        named = list(zip(groups["param_names"], groups["params"], strict=True))
        return [LoRARite(part, lr=1e-2) for part in (named[:2], named[2:])]

    run, messages = fit(two)
    assert messages == []
    assert {"lora_rite/0/update_norm", "lora_rite/1/update_norm"} <= set(run.callback_metrics)
    assert "lora_rite/update_norm" not in run.callback_metrics


def test_lightning_logs_the_update_of_the_step_that_was_made(fit, monkeypatch):
    """A schedule that falls by half at each step: at its end the figure is of the lr of the step, not of the next."""
    own, step = [], LoRARite.step

    def stepping(self, *args, **kwargs):
        step(self, *args, **kwargs)
        own.append(self.report()["update_norm"])

    monkeypatch.setattr(LoRARite, "step", stepping)

    def halving(model):
        optimizer = create_lora_rite(model, lr=1e-2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    run, _ = fit(halving, log_every_n_steps=1)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 / 16)
    assert float(run.callback_metrics["lora_rite/update_norm"]) == pytest.approx(own[-1], rel=1e-6)


def test_layer_report_adds_up_to_the_report():
    model = network()
    optimizer = create_lora_rite(model, lr=1e-2, damping=5.0)
    assert layer_report(optimizer) == []
    tokens = torch.tensor(rows(4)[0]["input_ids"])[None]
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    layers, report = layer_report(optimizer), optimizer.report()
    pairs = optimizer.param_groups[0]["params"]
    assert [row["name"] for row in layers] == plain_names(optimizer.param_groups[0]["param_names"])[::2]
    assert sum(row["update_norm"] ** 2 for row in layers) ** 0.5 == pytest.approx(report["update_norm"], rel=1e-5)
    for row, a, b in zip(layers, pairs[::2], pairs[1::2], strict=True):
        sigma = torch.linalg.svdvals(b.detach().double() @ a.detach().double())[:4]
        assert row["product_norm"] == pytest.approx(float(sigma.square().sum().sqrt()), rel=1e-4)
        # B starts at zero, so A follows the directions that are large enough, and δ has the rows of B
        delta = 5.0 * 1e-2 * lr_scale(optimizer.param_groups[0]["scaling"], 4) * b.shape[0] ** 0.5
        assert row["sigma_over_delta"] == pytest.approx(float(sigma.median()) / delta, rel=1e-3, abs=1e-6)
        assert row["damped_share"] == float((sigma < delta).double().mean())


def test_callback_writes_layers_over_time_and_resumes_them(tmp_path):
    file = tmp_path / "run" / "layers.jsonl"
    callbacks = lambda: [LoRARiteCallback(layers=file, layers_every=2)]
    trainer(tmp_path, steps=8, callbacks=callbacks()).train()
    whole = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in whole] == [2, 4, 6, 8]
    assert [len(line["layers"]) for line in whole] == [14] * 4
    with pytest.raises(ValueError, match=r"layers=.*layers\.jsonl has the figures of another run"):
        trainer(tmp_path / "second", steps=2, callbacks=callbacks()).train()
    trainer(tmp_path, steps=8, callbacks=callbacks()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert [json.loads(line) for line in file.read_text().splitlines()] == whole
    with pytest.raises(ValueError, match="layers_every must be at least 1"):
        LoRARiteCallback(layers_every=0)
