"""FSDP2 through Accelerate and through transformers' Trainer, on gloo: the optimizer is made before the model is cut,
and Accelerate puts DTensors in the places of its parameters.

Accelerate lets FSDP2 run on accelerators alone; with ``cpu=True`` it takes the plugin and trains by DDP. So
:func:`as_on_an_accelerator` tells it otherwise; all the rest is the installed code.
"""

import os
from functools import cache

import pytest
import torch
import torch.distributed as dist
from problems import relative
from worlds import assert_passed, checks_of, outcomes

pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from test_hf import network, rows, trainer

from lora_rite import create_lora_rite, find_pairs
from lora_rite.integrations.peft import unwrap

pytestmark = pytest.mark.slow
PAIRS = 14  # two layers of seven linear maps


def before():
    """Forgets the last check's state and settings."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    for key in [key for key in os.environ if key.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[key]
    as_on_an_accelerator()


@cache
def as_on_an_accelerator():
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **options):
        original(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def whole(model):
    """B·A of each pair, in every process."""
    full = lambda p: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
    return [full(pair.b) @ full(pair.a) for pair in find_pairs(model).pairs]


def assert_dtensors(optimizer):
    params = optimizer.param_groups[0]["params"]
    assert len(params) == 2 * PAIRS
    assert all(type(p).__name__ == "DTensor" and p.placements[0].is_shard(0) for p in params)
    assert optimizer.report()["pairs_preconditioned"] == PAIRS


def batch_of(t, part=slice(None)):
    return torch.tensor([row["input_ids"] for row in rows()[8 * t : 8 * t + 8]][part])


def train_one_process(steps):
    """What the sharded runs must give: the joined batches."""
    model = network()
    optimizer = create_lora_rite(model, lr=1e-2)
    for t in range(steps):
        tokens = batch_of(t)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return whole(model)


def check_accelerate(size, folder, **plugin):
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    rank = dist.get_rank()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **plugin)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = network()
    optimizer = create_lora_rite(model, lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)

    def advance(steps):
        for t in steps:
            tokens = batch_of(t, slice(4 * rank, 4 * rank + 4))
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            assert_dtensors(unwrap(optimizer))

    advance(range(2))
    accelerator.save_state(os.path.join(folder, "accelerate"))
    advance(range(2, 4))
    results = whole(model)
    for got, expected in zip(results, train_one_process(4), strict=True):
        assert relative(got, expected) < 1e-4
    accelerator.load_state(os.path.join(folder, "accelerate"))
    advance(range(2, 4))
    assert all(map(torch.equal, whole(model), results))


def check_accelerate_with_sharded_checkpoints(size, folder):
    check_accelerate(size, folder, state_dict_type="SHARDED_STATE_DICT")


def check_accelerate_by_way_of_the_meta_device_with_activation_checkpointing(size, folder):
    check_accelerate(size, folder, cpu_ram_efficient_loading=True, activation_checkpointing=True)


def check_trainer(size, folder, state_dict_type="FULL_STATE_DICT"):
    """W as of the same run under DDP; a resumed run ends bitwise where the whole one does."""
    fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": state_dict_type}}
    arguments = {"per_device_train_batch_size": 4, "save_steps": 3, "seed": 1}
    ddp = trainer(os.path.join(folder, "ddp"), steps=6, model=network(), **arguments)
    ddp.train()
    results = []
    for resume in (None, os.path.join(folder, state_dict_type, "checkpoint-3")):
        before()
        run = trainer(os.path.join(folder, state_dict_type), steps=6, model=network(), **arguments, **fsdp)
        run.train(resume_from_checkpoint=resume)
        assert_dtensors(unwrap(run.optimizer))
        assert unwrap(run.optimizer).report()["steps"] == 6
        results.append(whole(run.model))
    assert all(map(torch.equal, *results))
    for got, expected in zip(results[0], whole(ddp.model), strict=True):
        assert relative(got, expected) < 1e-4


def check_trainer_with_sharded_checkpoints(size, folder):
    check_trainer(size, folder, "SHARDED_STATE_DICT")


CHECKS = checks_of(globals())


@pytest.fixture(scope="module")
def outcome():
    yield from outcomes(__name__, [2], before)


@pytest.mark.parametrize("name", CHECKS)
def test_fsdp2(name, outcome):
    assert_passed(name, outcome)
