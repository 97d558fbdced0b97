"""DeepSpeed in two processes and in one, on gloo. It is not among the project's requirements: for these tests,
`pip install deepspeed`, which compiles a part of itself when it is used first.

Accelerate takes DeepSpeed on GPUs and the like alone; with ``cpu=True`` it trains by DDP. So :func:`as_on_a_gpu` tells
it otherwise; all the rest is the installed code.
"""

import json
import os
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from problems import relative
from worlds import assert_passed, checks_of, outcomes

os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import deepspeed
from test_hf import network, rows, trainer

from lora_rite import (
    LoRARite,
    LoRARiteCallback,
    LoRARiteFactory,
    LoRARiteValueError,
    ZeroLoRARite,
    create_lora_rite,
    find_pairs,
)
from lora_rite.integrations.deepspeed import whole_factors
from lora_rite.integrations.peft import unwrap

pytestmark = pytest.mark.slow
PAIRS = 14  # two layers of seven linear maps
LR = 1e-2
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
#: ZeRO's options of each kind of run. Without a threshold stage 3 keeps such small parameters whole.
CUT = {"stage": 3, "stage3_param_persistence_threshold": 0}
ROUND_ROBIN = {"stage": 2, "round_robin_gradients": True}
STAGES = [{"stage": 1}, {"stage": 2}, {"stage": 3}, CUT, {"stage": 2, **OFFLOAD}, CUT | OFFLOAD, ROUND_ROBIN]

#: Where the layout matters and little else does.
LAYOUTS = [ROUND_ROBIN, CUT | OFFLOAD]


def before():
    """Forgets the last check's state and settings."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    for key in [key for key in os.environ if key.startswith("ACCELERATE_")]:
        del os.environ[key]
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    as_on_a_gpu()


@cache
def as_on_a_gpu():
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    original = PartialState._prepare_backend

    def prepare_backend(self, cpu=False, *args):
        return original(self, cpu, *args) if cpu else ("gloo", DistributedType.MULTI_GPU)

    PartialState._prepare_backend = prepare_backend


def batch_of(t, part=slice(None)):
    return torch.tensor([row["input_ids"] for row in rows()[8 * t : 8 * t + 8]][part])


def mine(t):
    """This process's half of a batch; with one process, all of it."""
    n = 8 // dist.get_world_size()
    return batch_of(t, slice(n * dist.get_rank(), n * dist.get_rank() + n))


def whole(params):
    """The values of parameters, in every process."""
    params = list(params)
    with deepspeed.zero.GatheredParameters(params) if hasattr(params[0], "ds_id") else torch.no_grad():
        return [p.detach().clone().float() for p in params]


def trained(model):
    return whole(p for p in model.parameters() if p.requires_grad)


def assert_close(got, expected, tolerance=1e-4):
    for x, y in zip(got, expected, strict=True):
        assert relative(x, y) < tolerance


class Run:
    """The engine of a LoRA model with LoRARite as its client optimizer."""

    def __init__(self, zero, make=network, options=None, wrap=ZeroLoRARite, schedule=None, **config):
        n = dist.get_world_size()
        config |= {
            "train_micro_batch_size_per_gpu": 8 // n // config.get("gradient_accumulation_steps", 1),
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.model = make()
        self.optimizer = wrap(create_lora_rite(self.model, lr=LR, **(options or {})))
        scheduler = schedule and schedule(self.optimizer)
        self.engine = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=config, lr_scheduler=scheduler
        )[0]

    def advance(self, steps, pairs=PAIRS):
        for t in steps:
            for tokens in mine(t).chunk(self.engine.gradient_accumulation_steps()):
                self.engine.backward(self.engine(input_ids=tokens, labels=tokens).loss)
                self.engine.step()
            assert self.optimizer.report()["pairs_preconditioned"] == pairs
        return trained(self.model)


def make_universal(pieces, universal):
    """As the command line ``python -m deepspeed.checkpoint.ds_to_universal`` does."""
    from deepspeed.checkpoint.ds_to_universal import main, parse_arguments

    options = ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    before, sys.argv = sys.argv, ["tool", "--input_folder", pieces, "--output_folder", universal, *options]
    try:
        main(parse_arguments())
    finally:
        sys.argv = before


def one_process(steps, make=network):
    """What the runs must give: the joined batches."""
    model = make()
    optimizer = create_lora_rite(model, lr=LR)
    for t in range(steps):
        optimizer.zero_grad()
        model(input_ids=batch_of(t), labels=batch_of(t)).loss.backward()
        optimizer.step()
    return trained(model), optimizer


def check_stage_0_equals_one_process_and_resumes_bitwise(size, folder):
    run = Run({"stage": 0}, wrap=lambda optimizer: optimizer)
    run.advance(range(3))
    run.engine.save_checkpoint(folder, tag=f"stage_0_of_{size}")
    results = run.advance(range(3, 6))
    assert_close(results, one_process(6)[0])
    other = Run({"stage": 0}, wrap=lambda optimizer: optimizer)
    other.engine.load_checkpoint(folder, tag=f"stage_0_of_{size}")
    assert all(map(torch.equal, other.advance(range(3, 6)), results))


def check_stage_0_in_bfloat16_keeps_float32_factors(size, folder):
    run = Run({"stage": 0}, wrap=lambda optimizer: optimizer, bf16={"enabled": True})
    run.advance(range(3))
    assert {p.dtype for p in run.optimizer.param_groups[0]["params"]} == {torch.float32}
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}


def check_zero_equals_one_process(size, folder):
    """Each stage, offloaded, in several micro-batches: the parameters and the report are those of one process."""
    expected, reference = one_process(4)
    for zero in STAGES:
        run = Run(dict(zero), gradient_accumulation_steps=2)
        assert_close(run.advance(range(4)), expected)
        got, known = run.optimizer.report(), reference.report()
        assert got.keys() == known.keys()
        for key, value in known.items():
            assert got[key] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), key


def check_zero_resumes_bitwise(size, folder):
    """A checkpoint is loaded by new engines, also before a step was made, and saved again before one is."""
    for number, zero in enumerate(STAGES):
        path = os.path.join(folder, f"resume_{number}_of_{size}")
        first = Run(dict(zero))
        first.engine.save_checkpoint(path + "_0")
        results = first.advance(range(4))
        start = Run(dict(zero), lambda: network(lora_alpha=4))
        start.engine.load_checkpoint(path + "_0")
        start.advance(range(2))
        start.engine.save_checkpoint(path + "_1")
        middle = Run(dict(zero))
        middle.engine.load_checkpoint(path + "_1")
        middle.engine.save_checkpoint(path + "_2")
        end = Run(dict(zero))
        end.engine.load_checkpoint(path + "_2")
        assert all(map(torch.equal, end.advance(range(2, 4)), results))
        assert end.optimizer.report()["steps"] == 4


def check_zero_goes_on_with_another_number_of_processes(size, folder):
    """Two processes save, DeepSpeed's tool makes the checkpoint universal, one process goes on from it: the parameters
    are those of the run that did not stop. With ``round_robin_gradients`` the tool mixes up parameters: an error."""
    options = {"adamw_lr": 3e-3}
    for number, zero in enumerate(({"stage": 1}, {"stage": 2}, CUT, ROUND_ROBIN)):
        path = os.path.join(folder, f"universal_{number}")
        expected = Path(path, "expected.pt")
        if size == 2:
            run = Run(dict(zero), mixed, options=options)
            run.advance(range(2))
            run.engine.save_checkpoint(os.path.join(path, "pieces"))
            results = run.advance(range(2, 4))
            if dist.get_rank() == 0:
                torch.save(results, expected)
                make_universal(os.path.join(path, "pieces", "global_step2"), os.path.join(path, "universal", "step2"))
            dist.barrier()
            continue
        run = Run(dict(zero), mixed, options=options, checkpoint={"load_universal": True})
        run.engine.load_checkpoint(os.path.join(path, "universal"), tag="step2")
        if zero == ROUND_ROBIN:
            with pytest.raises(LoRARiteValueError, match="round_robin_gradients"):
                run.advance(range(2, 4))
            continue
        assert_close(run.advance(range(2, 4)), torch.load(expected))
        assert run.optimizer.report()["steps"] == 4


def check_zero_in_bfloat16_keeps_float32_factors(size, folder):
    """The model's bfloat16 factors are the float32 ones, rounded; also by DeepSpeed's BF16_Optimizer, the last one."""
    float32, _ = one_process(4)
    zeros = [({"stage": 1}, {}), ({"stage": 2}, {}), (dict(CUT), {}), ({"stage": 1}, {"grad_accum_dtype": "fp32"})]
    for zero, data_types in zeros:
        run = Run(zero, bf16={"enabled": True}, data_types=data_types)
        rounded = run.advance(range(4))
        copies = run.optimizer.optimizer.param_groups[0]["params"]
        assert all(map(torch.equal, (copy.bfloat16().float() for copy in copies), rounded))
        assert any(not torch.equal(copy.bfloat16().float(), copy) for copy in copies)
        assert_close(rounded, float32, 0.1)
    assert type(run.engine.optimizer).__name__ == "BF16_Optimizer"


def with_frozen_a():
    model = network()
    for pair in find_pairs(model).pairs:
        pair.a.requires_grad_(False)
    return model


def check_zero_with_one_frozen_factor(size, folder):
    expected, _ = one_process(3, with_frozen_a)
    frozen = [pair.a.detach().clone() for pair in find_pairs(with_frozen_a()).pairs]
    for number, zero in enumerate(LAYOUTS):
        run = Run(dict(zero), with_frozen_a)
        run.advance(range(2))
        path = os.path.join(folder, f"frozen_{number}_of_{size}")
        run.engine.save_checkpoint(path)
        assert_close(run.advance(range(2, 3)), expected)
        assert all(map(torch.equal, whole(p for n, p in run.model.named_parameters() if "lora_A" in n), frozen))
        other = Run(dict(zero), with_frozen_a)
        other.engine.load_checkpoint(path)
        assert all(map(torch.equal, other.advance(range(2, 3)), trained(run.model)))


def mixed():
    """Groups of several ranks and scalings, and DoRA's magnitudes, for AdamW."""
    return network(rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 12}, use_dora=True)


def check_zero_with_several_groups_and_a_schedule(size, folder):
    """Parameters that are no factors stay shared out; schedules reach all groups; a run resumes bitwise."""
    options = {"adamw_lr": 3e-3, "adamw_weight_decay": 0.1}

    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))

    model = mixed()
    reference = create_lora_rite(model, lr=LR, **options)
    groups = len(reference.param_groups)
    assert groups > 3
    scheduler = schedule(reference)
    for t in range(4):
        reference.zero_grad()
        model(input_ids=batch_of(t), labels=batch_of(t)).loss.backward()
        reference.step()
        scheduler.step()
    expected = trained(model)
    for number, zero in enumerate(LAYOUTS):
        path = os.path.join(folder, f"mixed_{number}_of_{size}")
        run = Run(dict(zero), mixed, options=options, schedule=schedule)
        run.advance(range(2))
        run.engine.save_checkpoint(path)
        results = run.advance(range(2, 4))
        assert_close(results, expected)
        report = run.optimizer.report()
        assert report["other_parameters"] == PAIRS == reference.report()["other_parameters"]
        assert [g["lr"] for g in run.optimizer.optimizer.param_groups] == pytest.approx([LR / 4] * (groups - 1))
        if size == 1:
            assert report["state_bytes"] == pytest.approx(reference.report()["state_bytes"], rel=0.01)
        other = Run(dict(zero), mixed, options=options, schedule=schedule)
        other.engine.load_checkpoint(path)
        assert all(map(torch.equal, other.advance(range(2, 4)), results))


def with_two_adapters():
    model = network()
    model.add_adapter("idle", model.peft_config["default"])
    for p in find_pairs((n, p) for n, p in model.named_parameters() if "idle" in n).frozen:
        model.get_parameter(p).requires_grad_(True)
    return model


def check_zero_passes_over_pairs_without_gradients(size, folder):
    """They stay bitwise as they are, though DeepSpeed gives them gradients of zero."""
    names = [name for name, p in with_two_adapters().named_parameters() if p.requires_grad]
    start, (expected, _) = trained(with_two_adapters()), one_process(3, with_two_adapters)
    assert len(names) == 4 * PAIRS
    for number, zero in enumerate(LAYOUTS):
        run = Run(dict(zero), with_two_adapters)
        run.advance(range(2))
        path = os.path.join(folder, f"idle_{number}_of_{size}")
        run.engine.save_checkpoint(path)
        got = run.advance(range(2, 3))
        other = Run(dict(zero), with_two_adapters)
        other.engine.load_checkpoint(path)
        assert all(map(torch.equal, other.advance(range(2, 3)), got))
        assert run.optimizer.report()["pairs"] == 2 * PAIRS
        for name, x, y, before in zip(names, got, expected, start, strict=True):
            assert torch.equal(x, before) if "idle" in name else relative(x, y) < 1e-4


def check_a_gradient_that_is_not_finite_skips_the_step_everywhere(size, folder):
    """DeepSpeed looks for one, and where it is told not to, LoRARite does."""
    for zero, looks in (({"stage": 2}, True), ({"stage": 2}, False), (CUT, True)):
        bf16 = {"enabled": True, "check_grad_overflow": looks}
        run = Run(dict(zero), mixed, options={"adamw_lr": 1e-3}, bf16=bf16)
        before = run.advance(range(1))
        loss = run.engine(input_ids=mine(1), labels=mine(1)).loss
        run.engine.backward(loss * (torch.nan if dist.get_rank() == 0 else 1))
        run.engine.step()
        assert all(map(torch.equal, trained(run.model), before))
        after = run.advance(range(1, 2))
        assert not all(map(torch.equal, after, before))
        assert all(x.isfinite().all() for x in after)
        assert (run.optimizer.report()["steps"], run.optimizer.report()["skipped"]) == (2, 0 if looks else 1)


def check_zero_refuses_what_it_cannot_do(size, folder):
    for stage in (1, 2, 3):
        with pytest.raises(LoRARiteValueError, match=r"DeepSpeed ZeRO flattens and splits them.*ZeroLoRARite"):
            Run({"stage": stage}, wrap=lambda optimizer: optimizer).advance(range(1))
    with pytest.raises(LoRARiteValueError, match="stages 1 to 3, which has not taken over"):
        Run({"stage": 0}).advance(range(1))
    with pytest.raises(LoRARiteValueError, match="sub_group_size"):
        Run({"stage": 3, "sub_group_size": 100}).advance(range(1))
    run = Run({"stage": 2})
    with pytest.raises(LoRARiteValueError, match="not a state of ZeroLoRARite"):
        run.optimizer.load_state_dict(torch.optim.AdamW(run.model.parameters()).state_dict())
    other = Run({"stage": 2})
    other.advance(range(1))
    state = other.optimizer.state_dict()
    names = state["param_groups"][0]["lora_rite"]["optimizer"]["param_groups"][0]["param_names"]
    names[0] = names[0].replace("layers.0", "layers.7")
    run.optimizer.load_state_dict(state)
    with pytest.raises(LoRARiteValueError, match="the state is of other parameters"):
        run.advance(range(1))


#: DeepSpeed's configurations as LLaMA-Factory 0.9 has them in examples/deepspeed.
COMMON = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {
        "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
}  # fmt: skip
Z2 = {
    "stage": 2, "allgather_partitions": True, "allgather_bucket_size": 5e8, "overlap_comm": False,
    "reduce_scatter": True, "reduce_bucket_size": 5e8, "contiguous_gradients": True, "round_robin_gradients": True,
}  # fmt: skip
Z3 = {
    "stage": 3, "overlap_comm": False, "contiguous_gradients": True, "sub_group_size": 1e9,
    "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}  # fmt: skip
PINNED = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
PINNED_BOTH = PINNED | {"offload_param": {"device": "cpu", "pin_memory": True}}


def check_trainer_with_the_configurations_of_llama_factory(size, folder):
    """W as of the same run under DDP; a resumed run ends bitwise where the whole one does."""
    arguments = {"per_device_train_batch_size": 8 // size, "save_steps": 3, "seed": 1}
    ddp = trainer(os.path.join(folder, f"ddp_{size}"), steps=5, model=network(), **arguments)
    ddp.train()
    for number, zero in enumerate((Z2, Z3, Z2 | PINNED, Z3 | PINNED_BOTH)):
        path = os.path.join(folder, f"trainer_{number}_of_{size}")
        results = []
        for resume in (None, os.path.join(path, "checkpoint-3")):
            before()
            config = json.loads(json.dumps({**COMMON, "zero_optimization": zero}))  # the Trainer fills it in
            options = arguments | {"use_cpu": False, "deepspeed": config}
            run = trainer(path, steps=5, model=network(), callbacks=[LoRARiteCallback()], **options)
            run.train(resume_from_checkpoint=resume)
            assert isinstance(unwrap(run.optimizer), LoRARite)
            report = unwrap(run.optimizer).report()
            assert (report["steps"], report["pairs_preconditioned"]) == (5, PAIRS)
            assert "lora_rite/update_norm" in run.state.log_history[0]
            results.append(trained(run.model))
        assert all(map(torch.equal, *results))
        assert_close(results[0], trained(ddp.model))


def check_trainer_goes_on_with_another_number_of_processes(size, folder):
    """Two processes save, one goes on, by the universal checkpoint that DeepSpeed's tool has made of it."""
    arguments = {"save_steps": 3, "seed": 1, "use_cpu": False, "per_device_train_batch_size": 8 // size}
    for number, zero in enumerate(({**Z2, "round_robin_gradients": False}, Z3)):
        before()
        config = json.loads(
            json.dumps({**COMMON, "zero_optimization": zero, "checkpoint": {"load_universal": size == 1}})
        )
        path = os.path.join(folder, f"trainer_universal_{number}")
        checkpoint = os.path.join(path, "checkpoint-3")
        run = trainer(path, steps=5, model=network(), deepspeed=config, **arguments)
        run.train(resume_from_checkpoint=checkpoint if size == 1 else None)
        results, expected = trained(run.model), Path(path, "expected.pt")
        if size == 2 and dist.get_rank() == 0:
            torch.save(results, expected)
            pieces = os.path.join(checkpoint, "global_step3")
            make_universal(pieces, pieces + "_universal")
        elif size == 1:
            assert unwrap(run.optimizer).report()["steps"] == 5
            assert_close(results, torch.load(expected))
        dist.barrier()


def check_accelerate(size, folder):
    """With stage 3, from_config cuts the base while it is made (zero.Init)."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    for stage, clip in ((2, 0.0), (3, 0.5)):
        before()
        config = {"zero_optimization": {"stage": stage, **OFFLOAD}, "gradient_clipping": clip}
        config["train_micro_batch_size_per_gpu"] = 8 // size
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        model = network()
        start = whole(model.parameters())
        for value in start:  # as DeepSpeed does: zero.Init makes processes draw unlike numbers
            dist.broadcast(value, 0)
        assert all(hasattr(p, "ds_id") for p in model.parameters() if not p.requires_grad) == (stage == 3)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer = LoRARiteFactory()(model, lr=LR)
        assert any("gradient_clipping=0.5 clips raw gradients" in str(w.message) for w in said) == bool(clip)
        model, optimizer = accelerator.prepare(model, optimizer)
        for t in range(4):
            accelerator.backward(model(input_ids=mine(t), labels=mine(t)).loss)
            optimizer.step()
            optimizer.zero_grad()
        assert unwrap(optimizer).report()["pairs_preconditioned"] == PAIRS
        unset_hf_deepspeed_config()

        def same(start=start):
            reference = network()
            with torch.no_grad():
                for p, value in zip(reference.parameters(), start, strict=True):
                    p.copy_(value)
            return reference

        assert_close(trained(model), one_process(4, same)[0])


def check_zero_with_an_adapter_that_was_cut_before(size, folder):
    """The factory makes its factors whole, to see what they are."""
    config = {"train_micro_batch_size_per_gpu": 8 // size, "zero_optimization": CUT, "gradient_clipping": 0.0}
    model = network()
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    assert all(p.numel() == 0 for p in model.parameters())
    with pytest.raises(LoRARiteValueError, match=r"within deepspeed\.zero\.GatheredParameters"):
        create_lora_rite(model, lr=LR)
    with whole_factors(model):
        optimizer = ZeroLoRARite(create_lora_rite(model, lr=LR))
    config |= {"zero_allow_untested_optimizer": True}
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    engine.backward(engine(input_ids=mine(0), labels=mine(0)).loss)
    engine.step()
    assert_close(trained(model), one_process(1)[0])


CHECKS = checks_of(globals())


@pytest.fixture(scope="module")
def outcome():
    yield from outcomes(__name__, [2, 1], before)


@pytest.mark.parametrize("name", CHECKS)
def test_deepspeed(name, outcome):
    assert_passed(name, outcome)
