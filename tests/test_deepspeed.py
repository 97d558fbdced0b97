"""DeepSpeed in two processes and in one. It is not among the project's requirements: for these tests,
`pip install deepspeed`, and `DS_ACCELERATOR=cpu` where it does not see by itself that there is no GPU.
"""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from problems import relative
from worlds import assert_passed, checks_of, outcomes

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import deepspeed
from test_hf import network, rows, trainer

from lora_rite import LoRARite, LoRARiteTypeError, LoRARiteValueError, ZeroLoRARite, create_lora_rite, find_pairs
from lora_rite.integrations.peft import unwrap

pytestmark = pytest.mark.slow
PAIRS = 14  # two layers of seven linear maps
LR = 1e-2
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
#: ZeRO's options of each kind of run. Without a threshold stage 3 keeps such small parameters whole.
CUT = {"stage": 3, "stage3_param_persistence_threshold": 0}
ROUND_ROBIN = {"stage": 2, "round_robin_gradients": True}
STAGES = [{"stage": 1}, {"stage": 2}, {"stage": 3}, CUT, {"stage": 2, **OFFLOAD}, CUT | OFFLOAD, ROUND_ROBIN]


def before():
    """Forgets the last check's state and settings."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    for key in [key for key in os.environ if key.startswith("ACCELERATE_")]:
        del os.environ[key]


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

    def __init__(self, zero, make=network, lr=LR, options=None, wrap=ZeroLoRARite, **config):
        n = dist.get_world_size()
        config |= {
            "train_micro_batch_size_per_gpu": 8 // n // config.get("gradient_accumulation_steps", 1),
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.model = make()
        self.optimizer = wrap(create_lora_rite(self.model, lr=lr, **(options or {})))
        self.engine = deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=config)[0]

    def advance(self, steps, pairs=PAIRS):
        for t in steps:
            for tokens in mine(t).chunk(self.engine.gradient_accumulation_steps()):
                self.engine.backward(self.engine(input_ids=tokens, labels=tokens).loss)
                self.engine.step()
            assert self.optimizer.report()["pairs_preconditioned"] == pairs
        return trained(self.model)

    def save(self, folder):
        # universal checkpoints want this note of the layout, which is that of no tensor parallelism
        self.engine.save_checkpoint(folder, client_state={"universal_checkpoint_info": {}})


@contextmanager
def patched_argv(arguments):
    before, sys.argv = sys.argv, ["tool", *arguments]
    try:
        yield
    finally:
        sys.argv = before


def one_process(steps, make=network, options=None, lr=LR):
    """What the runs must give: the joined batches."""
    model = make()
    optimizer = create_lora_rite(model, lr=lr, **(options or {}))
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
        first.save(path + "_0")
        results = first.advance(range(4))
        start = Run(dict(zero), lambda: network(lora_alpha=4))
        start.engine.load_checkpoint(path + "_0")
        start.advance(range(2))
        start.save(path + "_1")
        middle = Run(dict(zero))
        middle.engine.load_checkpoint(path + "_1")
        middle.save(path + "_2")
        end = Run(dict(zero))
        end.engine.load_checkpoint(path + "_2")
        assert all(map(torch.equal, end.advance(range(2, 4)), results))
        assert end.optimizer.report()["steps"] == 4


def check_zero_goes_on_with_another_number_of_processes(size, folder):
    """Two processes save, DeepSpeed's tool makes the checkpoint universal, one process goes on from it: the parameters
    are those of the run that did not stop, and the state is that of its fourth step."""
    from deepspeed.checkpoint.ds_to_universal import main, parse_arguments

    for number, zero in enumerate(STAGES):
        path = os.path.join(folder, f"universal_{number}")
        expected = Path(path, "expected.pt")
        if size == 2:
            run = Run(dict(zero))
            run.advance(range(2))
            run.save(os.path.join(path, "pieces"))
            results = run.advance(range(2, 4))
            if dist.get_rank() == 0:
                torch.save(results, expected)
                convert = ["--input_folder", os.path.join(path, "pieces", "global_step2"), "--output_folder"]
                convert += [os.path.join(path, "universal", "step2"), "--num_extract_workers", "1"]
                with patched_argv([*convert, "--num_merge_workers", "1"]):
                    main(parse_arguments())
            dist.barrier()
        else:
            run = Run(dict(zero), checkpoint={"load_universal": True})
            run.engine.load_checkpoint(os.path.join(path, "universal"), tag="step2")
            assert_close(run.advance(range(2, 4)), torch.load(expected))
            assert run.optimizer.report()["steps"] == 4


CHECKS = checks_of(globals())


@pytest.fixture(scope="module")
def outcome():
    yield from outcomes(__name__, [2, 1], before)


@pytest.mark.parametrize("name", CHECKS)
def test_deepspeed(name, outcome):
    assert_passed(name, outcome)
