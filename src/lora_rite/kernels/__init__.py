"""The second engine of a plan: the step in ten launches of Triton kernels over all factors at once, with the phases and
the state of :mod:`lora_rite.execute`. Triton is imported when a step is made by it."""

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..execute.engine import Decided
from ..plan.plan import Bucket, Plan

#: The card on which `make test-gpu` has passed with this engine, and the date; while there is none, ``engine=None`` is
#: the eager engine.
PASSED: str | None = None
MAX_RANK = 64
#: Above this rank a kernel takes so many KiB of shared memory, by the dtype of r×r algebra.
SMALL_RANK, SHARED = 32, {torch.float64: 128, torch.float32: 96}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Options of a group, and what they ask for that the kernels do not do.
EAGER_OPTIONS = ("apply_escape", "update_capping", "balance_param", "first_moment_dtype")

#: Whether launches do nothing, on CPU tensors, see :mod:`lora_rite.bench.pretended`.
pretended = False

_kernels: "WeakKeyDictionary[Plan, Any]" = WeakKeyDictionary()
_reasons: "WeakKeyDictionary[Plan, str | None]" = WeakKeyDictionary()


@cache
def installed() -> bool:
    return find_spec("triton") is not None


def supports(plan: Plan) -> str | None:
    """None where the kernels can make the steps of a plan (which has buckets), else the reason why these stay with the
    eager engine."""
    for bucket in plan.buckets:
        for option in EAGER_OPTIONS:
            if bucket.group.get(option):
                return option
    if not installed():
        return "without triton, which is not installed"
    if plan.buckets[0].device.type == "cpu" and not (pretended or os.environ.get("TRITON_INTERPRET") == "1"):
        return "factors on a CPU"
    if plan not in _reasons:  # What a plan rests on is looked at once: its marks are compared in each step.
        _reasons[plan] = _of_plan(plan)
    return _reasons[plan]


def _of_plan(plan: Plan) -> str | None:
    if len({bucket.device for bucket in plan.buckets}) > 1:
        return "factors on several devices"
    reasons = chain([_of_device(plan.buckets[0].device)], map(_of_bucket, plan.buckets), map(_of_card, plan.buckets))
    return next(filter(None, reasons), None)


def _of_device(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"factors on a device of type {device.type}"
    if torch.version.hip:
        return "on ROCm"
    card = torch.cuda.get_device_properties(device)
    return f"on cards before Ampere ({card.name})" if card.major < 8 else None


def _of_card(bucket: Bucket) -> str | None:
    if bucket.device.type == "cpu" or bucket.rank <= SMALL_RANK:
        return None
    card = torch.cuda.get_device_properties(bucket.device)
    shared, takes = card.shared_memory_per_block_optin // 1024, SHARED[bucket.algebra]
    if shared >= takes:
        return None
    less = f', with algebra_dtype="float32" {SHARED[torch.float32]}' if shared >= SHARED[torch.float32] else ""
    return f"rank {bucket.rank} on a card with {shared} KiB of shared memory (it takes {takes}{less}; {card.name})"


def _of_bucket(bucket: Bucket) -> str | None:
    if bucket.shards.mesh is not None:
        return "sharded factors (DTensor)"
    if bucket.rank > MAX_RANK:
        return f"rank {bucket.rank}, above {MAX_RANK}"
    params = [p for segment in bucket.segments for p in segment.params]
    gradients = [g for segment in bucket.segments for g in segment.gradients()]
    for tensors, what in ((params, "factors"), (gradients, "gradients")):
        dtypes = {t.dtype for t in tensors}
        if len(dtypes) > 1:
            return f"{what} of several dtypes in a group"
        if not dtypes <= set(_DTYPES):
            return f"{what} of {dtypes.pop()}"
    if not all(p.is_contiguous() for p in params):
        return "factors that are not contiguous"
    if not all(0 < p.numel() < 2**31 for p in params):
        return "factors without elements, or with 2³¹"
    return None


def measure(plan: Plan, others: Sequence[Tensor], counts: Tensor, capturable: bool) -> Decided:
    """As :func:`lora_rite.execute.engine.measure`; ``counts`` are those of the statistics, on the plan's device."""
    if (kernels := _kernels.get(plan)) is None:
        from .launch import Kernels

        kernels = _kernels[plan] = Kernels(plan)
    return kernels.measure(others, counts, capturable)
