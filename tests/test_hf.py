"""LoRARite on PEFT models and under transformers' Trainer, on a random model of two layers."""

import json
import re
import warnings

import pytest
import torch
from test_numerics import equal

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lora_rite import LoRARite, LoRARiteCallback, LoRARiteFactory, create_lora_rite, find_pairs  # noqa: E402
from lora_rite.integrations.peft import unwrap  # noqa: E402
from lora_rite.options import LR  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}


def network(**lora):
    torch.manual_seed(0)
    config = transformers.GemmaConfig(vocab_size=60, num_key_value_heads=1, **SIZE)
    base = transformers.AutoModelForCausalLM.from_config(config)
    options = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    return peft.get_peft_model(base, peft.LoraConfig(**options))


def rows(n=64):
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 20, (n, 12), generator=g).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(folder, *, steps=12, model=None, factory=(LoRARiteFactory, {"lr": 1e-2}), callbacks=None, **arguments):
    options = {
        "max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "max_grad_norm": 0.0,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 5, "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": False, "use_cpu": True, "lr_scheduler_type": "cosine", "warmup_steps": 2, **arguments,
    }  # fmt: skip
    return transformers.Trainer(
        model or network(lora_dropout=0.1),
        transformers.TrainingArguments(output_dir=str(folder), **options),
        train_dataset=rows(),
        optimizer_cls_and_kwargs=factory,
        callbacks=callbacks,
    )


def trained(model):
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def state_of(optimizer):
    while not isinstance(optimizer, LoRARite):
        optimizer = optimizer.optimizer
    return optimizer.state_dict()["state"], optimizer.report()


def test_trainer_trains_saves_and_resumes_bitwise(tmp_path):
    """Interrupted at step 8, resumed from the checkpoint of step 5 in a new process's place; dropout is on."""
    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "parts", steps=12)

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 8

    first.add_callback(Stop())
    first.train()
    resumed = trainer(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-5"))
    assert equal(trained(resumed.model), trained(whole.model))
    assert equal(state_of(resumed.optimizer)[0], state_of(whole.optimizer)[0])
    state, report = state_of(whole.optimizer)
    assert report["pairs"] == report["pairs_preconditioned"] == 14
    assert report["steps"] == 12
    assert len(state) == 28
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_adapter_loads_with_peft(tmp_path):
    model = network()
    trainer(tmp_path, model=model, save_strategy="no", steps=2).train()
    model.save_pretrained(str(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(network().unload(), str(tmp_path / "adapter"))
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)


def test_factory_with_and_without_training_arguments():
    """axolotl passes its training arguments, transformers does not."""
    model = network()
    assert LoRARiteFactory()(model, lr=3e-3, damping=5.0).param_groups[0]["damping"] == 5.0
    arguments = type("Arguments", (), {"learning_rate": 7e-3})()
    assert LoRARiteFactory()(model, arguments).param_groups[0]["lr"] == 7e-3
    assert LoRARiteFactory()(model, arguments, lr=1e-3).param_groups[0]["lr"] == 1e-3
    with pytest.raises(ValueError, match=re.escape(f'(LoRARiteFactory, {{"lr": {LR}}})')):
        LoRARiteFactory()(model)


def test_callback_warns_and_logs(tmp_path):
    """B23: max_grad_norm, too."""
    run = trainer(tmp_path, steps=3, save_strategy="no", max_grad_norm=1.0, learning_rate=5e-5)
    run.callback_handler.callbacks.insert(0, LoRARiteCallback())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    messages = "\n".join(str(w.message) for w in caught)
    assert {w.filename for w in caught if "LoRARiteCallback" in str(w.message)} == {__file__}
    assert "max_grad_norm=1.0 clips raw gradients" in messages
    assert "learning_rate=5e-05 of the training arguments is not used" in messages
    logged = run.state.log_history[1]
    for key in ("damped_share", "sigma_over_delta", "clip_rate", "gradient_norm", "update_norm", "skipped"):
        assert f"lora_rite/{key}" in logged
    assert logged["lora_rite/update_norm"] > 0
    other = trainer(tmp_path, steps=1, save_strategy="no", factory=None, callbacks=[LoRARiteCallback()])
    with pytest.warns(UserWarning, match="the optimizer is AdamW, not LoRARite"):
        other.train()


def test_callback_is_silent_where_all_is_well(tmp_path):
    run = trainer(tmp_path, steps=2, save_strategy="no", callbacks=[LoRARiteCallback()])
    run.create_optimizer()
    for group in run.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])  # (in float32 another number)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    assert not [w for w in caught if "LoRARiteCallback" in str(w.message)]


@pytest.mark.parametrize("tensor", [False, True])
def test_callback_logs_the_update_of_the_step_that_was_made(tensor, tmp_path):
    """The schedule falls to 0 after the last step, and rises after the first ones; the figures, the layers' too, are
    those of each step's own lr, whether a number or a tensor that the schedule fills in place."""
    own = []

    class Own(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            report = unwrap(optimizer).report()  # the schedule has not moved on yet
            own.append((report["update_norm"], report["sigma_over_delta"]))

    file = tmp_path / "layers.jsonl"
    run = trainer(tmp_path, steps=4, save_strategy="no", callbacks=[Own()], warmup_steps=2)
    run.callback_handler.callbacks.insert(0, LoRARiteCallback(file, 1))
    run.create_optimizer()
    for group in run.optimizer.param_groups if tensor else ():
        group["lr"] = torch.tensor(group["lr"])
    run.train()
    logged = [entry["lora_rite/update_norm"] for entry in run.state.log_history if "loss" in entry]
    assert logged == [norm for norm, _ in own]
    assert logged[0] == 0 < min(logged[1:])  # the warm-up's first step has lr 0
    for line, (norm, _) in zip(map(json.loads, file.read_text().splitlines()), own, strict=True):
        assert sum(row["update_norm"] ** 2 for row in line["layers"]) ** 0.5 == pytest.approx(norm, rel=1e-5)
    assert run.optimizer.param_groups[0]["lr"] == 0  # as the schedule has left it


def test_update_norm_is_that_of_the_next_step_without_gradients():
    """report()["update_norm"]: to first order, what the moments alone write into W = B·A."""
    model = network()
    optimizer = create_lora_rite(model, lr=1e-5, betas=(0.999999, 0.999))
    for i in range(20):
        for j, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * i + j))
        optimizer.step()
    product = lambda: [pair.b.detach().double() @ pair.a.detach().double() for pair in find_pairs(model).pairs]
    before, expected = product(), optimizer.report()["update_norm"]
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    after = product()
    moved = sum((x - y).square().sum() for x, y in zip(after, before, strict=True)).sqrt().item()
    # both sides together: they may add up or cancel; beta1 is near 1 (bias-corrected: 20/21 of the average stays)
    assert 0.5 * expected < moved < 1.5 * expected


@pytest.mark.parametrize(
    ("lora", "pairs", "others"),
    [
        ({}, 14, 0),
        ({"use_dora": True}, 14, 14),
        ({"use_rslora": True}, 14, 0),
        ({"lora_bias": True}, 14, 14),
        ({"modules_to_save": ["lm_head"]}, 14, 1),
        ({"target_modules": ["embed_tokens", "q_proj"]}, 3, 0),
    ],
    ids=["linear", "dora", "rslora", "lora_bias", "modules_to_save", "embedding"],
)
def test_peft_adapters(lora, pairs, others):
    """Every pair is preconditioned, every other parameter moves by AdamW."""
    if "embed_tokens" in lora.get("target_modules", ()):
        lora = {**lora, "ensure_weight_tying": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = network(**lora)
    optimizer = create_lora_rite(model, lr=1e-2, **({"adamw_lr": 1e-3} if others else {}))
    tokens = torch.tensor(rows(4)[0]["input_ids"])[None]
    before = {n: p.detach().clone() for n, p in trained(model).items()}
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    report = optimizer.report()
    assert (report["pairs"], report["pairs_preconditioned"], report["other_parameters"]) == (pairs, pairs, others)
    unmoved = [n for n, p in trained(model).items() if torch.equal(p, before[n])]
    assert not unmoved


def test_embeddings_are_damped_on_their_zero_side():
    """PEFT starts an embedding's A at zero: that side is damped, and B stays in the first step."""
    embedding = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Embedding(30, 8)), peft.LoraConfig(r=2, target_modules=["0"])
    )
    (pair,) = find_pairs(embedding).pairs
    assert not pair.a.any()
    optimizer, before = create_lora_rite(embedding, lr=0.1), pair.b.detach().clone()
    embedding(torch.arange(6)).square().sum().backward()
    optimizer.step()
    assert torch.equal(pair.b, before)
    assert pair.a.any()
    assert optimizer.state[pair.a]["damped"]
    assert not optimizer.state[pair.b]["damped"]


def test_layers_without_plain_pairs_go_to_adamw_with_the_reason():
    adalora = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(8, 8)), peft.AdaLoraConfig(target_modules=["0"], total_step=10)
    )
    assert len(find_pairs(adalora).left_out) == 3
    with pytest.raises(ValueError, match="no LoRA pairs"):
        create_lora_rite(adalora, adamw_lr=1e-3)


def test_two_adapters_of_which_one_is_active():
    model = network()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    optimizer = create_lora_rite(model, lr=1e-2)
    assert optimizer.report()["ranks"] == {2: 2, 4: 14}


def test_accelerate_wraps_it():
    """Accelerate saves and loads the state of a fresh optimizer, and steps through a wrapper."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    model, optimizer = accelerator.prepare(model, create_lora_rite(model, lr=1e-2))
    tokens = torch.tensor(rows(4)[0]["input_ids"])[None]
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
