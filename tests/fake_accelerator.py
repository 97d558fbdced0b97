"""Steps on a device that is no CPU and holds no values; run by test_device.py, in a process of its own.

Operations on it are checked as on a GPU: one that mixes devices fails, and so does one that reads a value. Prints a
line of JSON for each case: the function of LoRARite that was first to read a value, or null, in a whole step and in its
second half, and the number of copies from the host. With the argument "single": the device has no float64, and what is
printed are the operators that run on it, in first steps and others, each with the dtypes of its tensors.
"""

import json
import sys
import traceback
from collections import defaultdict
from functools import partial
from itertools import product

import torch
from problems import factors
from torch._subclasses import fake_tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_rite import LoRARite
from lora_rite.algebra import basis
from lora_rite.execute import eager
from lora_rite.optim.selection import alike
from lora_rite.plan import state
from lora_rite.plan.plan import make_plan

DEVICE = "fake"
SETTINGS = {"balance_param": True, "weight_decay": 0.1, "update_capping": 0.5, "update_skipping": 1.0, "maximize": True}
OPTIONS = {
    "eager": {},
    "eager_all": SETTINGS,
    "capturable": {"capturable": True},
    "capturable_all": {"capturable": True, **SETTINGS},
}
MOMENTS = {"first_moment_dtype": "bfloat16"}


def pairs(dtype):
    """Of several shapes and ranks, one of them with a frozen A, and a bias."""
    params = {"bias": torch.nn.Parameter(torch.ones(5, dtype=dtype))}
    for i, shape in enumerate([(4, 9, 7), (4, 9, 7), (4, 18, 13), (3, 5, 6), (4, 9, 7)]):
        a, b = factors(*shape, zero_b=i == 0, seed=i, dtype=dtype)
        params[f"l{i}.lora_A.weight"] = torch.nn.Parameter(a, requires_grad=i != 4)
        params[f"l{i}.lora_B.weight"] = torch.nn.Parameter(b)
    return params


def experts(dtype):
    """Three pairs in one parameter."""
    a, b = factors(4, 9, 21, seed=1, dtype=dtype)
    return {"a": torch.nn.Parameter(a.repeat(3, 1)), "b": torch.nn.Parameter(b.reshape(7, 12).contiguous())}


def optimizer_of(params, options):
    """LoRARite, with a gradient for each parameter that is trained."""
    for p in params.values():
        p.grad = torch.full_like(p, 0.1) if p.requires_grad else None
    if "bias" in params:
        return LoRARite(params.items(), lr=0.02, adamw_lr=0.1, **options)
    return LoRARite([{"params": list(params.values()), "blocks": 3, "columns": "interleaved"}], lr=0.02, **options)


class Copies(TorchDispatchMode):
    """Counts operations that take a tensor of the CPU and make one of the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        places = [
            {t.device.type for t in tree_leaves(x) if isinstance(t, torch.Tensor)} for x in ([args, kwargs or {}], out)
        ]
        self.count += "cpu" in places[0] and DEVICE in places[1]
        return out


class Operators(TorchDispatchMode):
    """By operator that has a tensor of the device among its arguments or results, the dtypes of those."""

    def __init__(self):
        super().__init__()
        self.dtypes = defaultdict(set)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves([args, kwargs or {}, out]) if isinstance(t, torch.Tensor)]
        for t in (t for t in tensors if t.device.type == DEVICE):
            self.dtypes[str(func)].add(str(t.dtype))
        return out


def on_device(t):
    return torch.empty(t.shape, dtype=t.dtype, device=DEVICE)


def moved(params, state, options):
    """The same parameters, gradients and state on the device."""
    copies = {name: torch.nn.Parameter(on_device(p), requires_grad=p.requires_grad) for name, p in params.items()}
    optimizer = optimizer_of(copies, options)
    for name, p in params.items():
        # (torch's own AdamW keeps its counter on the CPU where it may read it)
        stays = "exp_avg" in state[p] and not options.get("capturable")
        own = {k: torch.empty(()) if k == "step" and stays else on_device(v) for k, v in state[p].items()}
        if own:
            optimizer.state[copies[name]] = own
    return optimizer


def first_reader(step):
    """The function of LoRARite in which ``step`` reads a value from the device."""
    try:
        step()
    except fake_tensor.DataDependentOutputException as error:
        frames = traceback.extract_tb(error.__traceback__)
        return [frame.name for frame in frames if "lora_rite" in frame.filename][-1]
    return None


@torch.no_grad()
def halves_of(optimizer):
    """What writes, of each bucket, the rest of the step being done."""
    stepped, halves = alike(optimizer.param_groups, optimizer.state, lambda a, b: True), []
    plan = make_plan(stepped, optimizer.state, optimizer._limits)
    for bucket, workspace in zip(plan.buckets, plan.workspaces(), strict=True):
        start = eager.begin(bucket, workspace)
        measured = eager.measure(bucket, start)
        preconditioned = eager.precondition(bucket, start, measured, eager.norm_square(bucket, measured).sqrt())
        halves.append(partial(eager.move, bucket, start, measured, preconditioned))
    return halves


def single():
    """Prints what a device without float64 must have. (Where the host asks on the CPU, in the first step, it is told by
    iterations, which ask nothing: nothing has a value here.)"""
    state.SINGLE = (DEVICE,)
    basis.orthonormalise = partial(basis.orthonormalise, iterate=True, asks=False)
    mode, operators = fake_tensor.FakeTensorMode(), Operators()
    for problem, dtype, name, more in (
        (pairs, torch.float32, "eager_all", {}), (pairs, torch.bfloat16, "capturable", MOMENTS),
        (pairs, torch.float16, "eager", MOMENTS), (experts, torch.bfloat16, "capturable_all", {}),
        (experts, torch.float32, "eager", MOMENTS),
    ):  # fmt: skip
        params, options = problem(dtype), {**OPTIONS[name], **more}
        optimizer, capturable = optimizer_of(params, options), options.get("capturable")
        optimizer.step()
        with mode:
            copies = {name: torch.nn.Parameter(on_device(p), p.requires_grad) for name, p in params.items()}
            fresh = optimizer_of(copies, options)
            with operators:
                reader = first_reader(fresh.step)
                for half in [] if capturable else halves_of(moved(params, optimizer.state, options)):
                    assert first_reader(torch.no_grad()(half)) is None
                assert not capturable or first_reader(fresh.step) is None
            assert reader == (None if capturable else "_measure"), reader
    print(json.dumps({name: sorted(dtypes) for name, dtypes in operators.dtypes.items()}))


def main():
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    fake_tensor.CONSTANT_NUMEL_LIMIT = 0  # (constants of one element would be computed with, on the device)
    if sys.argv[1:] == ["single"]:
        single()
        return
    mode = fake_tensor.FakeTensorMode()
    for problem, dtype, (name, options) in product((pairs, experts), (torch.float32, torch.bfloat16), OPTIONS.items()):
        params = problem(dtype)
        optimizer = optimizer_of(params, options)
        for _ in range(2):
            optimizer.step()
        with mode:
            fake = moved(params, optimizer.state, options)
            first_reader(fake.step)  # (constants are made once)
            with Copies() as copies:
                reader = first_reader(fake.step)
            halves = halves_of(moved(params, optimizer.state, options))
            half_reader = first_reader(torch.no_grad()(lambda halves=halves: [half() for half in halves]))
        result = {"step": reader, "apply": half_reader, "copies": copies.count}
        print(json.dumps({"problem": problem.__name__, "dtype": str(dtype), "options": name, **result}))


if __name__ == "__main__":
    main()
