"""DeepSpeed in two processes. It is not among the project's requirements: for these tests, `pip install deepspeed`."""

import pytest
import torch
import torch.distributed as dist
from problems import relative
from worlds import assert_passed, checks_of, outcomes

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from test_hf import network, rows

from lora_rite import LoRARiteValueError, create_lora_rite, find_pairs

pytestmark = pytest.mark.slow
PAIRS = 14  # two layers of seven linear maps


def batch_of(t, part=slice(None)):
    return torch.tensor([row["input_ids"] for row in rows()[8 * t : 8 * t + 8]][part])


def products(model):
    return [(pair.b @ pair.a).detach() for pair in find_pairs(model).pairs]


class Run:
    """The engine of a LoRA model with LoRARite as its client optimizer."""

    def __init__(self, stage, model=None, **config):
        import deepspeed

        config |= {
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        self.model = model or network()
        self.optimizer = create_lora_rite(self.model, lr=1e-2)
        self.engine = deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=config)[0]

    def advance(self, steps):
        for t in steps:
            tokens = batch_of(t, slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4))
            self.engine.backward(self.engine(input_ids=tokens, labels=tokens).loss)
            self.engine.step()
            assert self.optimizer.report()["pairs_preconditioned"] == PAIRS
        return products(self.model)


def check_stage_0_equals_one_process_and_resumes_bitwise(size, folder):
    run = Run(0)
    run.advance(range(3))
    run.engine.save_checkpoint(folder, tag="stage_0")
    results = run.advance(range(3, 6))
    model = network()
    optimizer = create_lora_rite(model, lr=1e-2)
    for t in range(6):
        optimizer.zero_grad()
        model(input_ids=batch_of(t), labels=batch_of(t)).loss.backward()
        optimizer.step()
    for got, expected in zip(results, products(model), strict=True):
        assert relative(got, expected) < 1e-4
    other = Run(0)
    other.engine.load_checkpoint(folder, tag="stage_0")
    assert all(map(torch.equal, other.advance(range(3, 6)), results))


def check_stage_0_in_bfloat16_keeps_float32_factors(size, folder):
    run = Run(0, bf16={"enabled": True})
    run.advance(range(3))
    assert {p.dtype for p in run.optimizer.param_groups[0]["params"]} == {torch.float32}
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}


def check_stage_0_with_one_frozen_factor(size, folder):
    model = network()
    for pair in find_pairs(model).pairs:
        pair.a.requires_grad_(False)
    before = [pair.a.detach().clone() for pair in find_pairs(model).pairs]
    Run(0, model).advance(range(2))
    assert all(torch.equal(pair.a, x) for pair, x in zip(find_pairs(model).pairs, before, strict=True))


def check_stages_1_to_3_are_refused_by_name(size, folder):
    for stage in (1, 2, 3):
        with pytest.raises(LoRARiteValueError, match=r"DeepSpeed ZeRO flattens and splits them.*stage 0, DDP or FSDP2"):
            Run(stage).advance(range(1))


CHECKS = checks_of(globals())


@pytest.fixture(scope="module")
def outcome():
    yield from outcomes(__name__, [2])


@pytest.mark.parametrize("name", CHECKS)
def test_deepspeed(name, outcome):
    assert_passed(name, outcome)
