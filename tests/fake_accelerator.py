"""Steps on a device that is no CPU and holds no values; run by test_device.py, in a process of its own.

Operations on it are checked as on a GPU: one that mixes devices fails, and so does one that reads a value. Prints a
line of JSON for each case: the function of LoRARite that was first to read a value, or null, in a whole step and in its
second half, and the number of copies from the host.
"""

import json
import sys
import traceback

import torch
import torch._subclasses.fake_tensor as fake_tensor
from test_device import advance, start
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_rite import LoRARite
from lora_rite.batch import Batch

DEVICE = "fake"
SETTINGS = {"balance_param": True, "weight_decay": 0.1, "update_capping": 0.5, "update_skipping": 1.0, "maximize": True}
CASES = {
    "eager": {},
    "eager_all": SETTINGS,
    "capturable": {"capturable": True},
    "capturable_all": {"capturable": True, **SETTINGS},
}


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


def on_device(t):
    return torch.empty(t.shape, dtype=t.dtype, device=DEVICE)


def moved(params, optimizer, **options):
    """The same parameters, gradients and state on the device."""
    copies = {name: torch.nn.Parameter(on_device(p)) for name, p in params.items()}
    other = LoRARite(copies.items(), lr=0.02, adamw_lr=0.1, **options)
    for name, p in params.items():
        copies[name].grad = on_device(p)
        # (torch's own AdamW keeps its counter on the CPU where it may read it)
        stays = "exp_avg" in optimizer.state[p] and not options.get("capturable")
        other.state[copies[name]] = {
            key: torch.empty(()) if key == "step" and stays else on_device(value)
            for key, value in optimizer.state[p].items()
        }
    return other


def first_reader(step):
    """The function of LoRARite in which ``step`` reads a value from the device."""
    try:
        step()
    except DataDependentOutputException as error:
        frames = traceback.extract_tb(error.__traceback__)
        return [frame.name for frame in frames if "lora_rite" in frame.filename][-1]
    return None


@torch.no_grad()
def batches_of(optimizer):
    """All batches, measured."""
    batches = [Batch(group, pairs, optimizer.state, {}) for group, pairs in optimizer._alike(lambda a, b: True)]
    for batch in batches:
        batch.precondition(batch.measure().sqrt())
    return batches


def main():
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    fake_tensor.CONSTANT_NUMEL_LIMIT = 0  # (constants of one element would be computed with, on the device)
    mode = FakeTensorMode()
    for dtype in (torch.float32, torch.bfloat16):
        for name, options in CASES.items():
            params, optimizer = start(dtype=dtype, adamw=True, **options)
            advance(params, optimizer, 2)
            with mode:
                fake = moved(params, optimizer, **options)
                first_reader(fake.step)  # (constants are made once)
                with Copies() as copies:
                    result = {"step": first_reader(fake.step)}
                result["copies"] = copies.count
                apply = [batch.apply for batch in batches_of(moved(params, optimizer, **options))]
                result["apply"] = first_reader(torch.no_grad()(lambda apply=apply: [move() for move in apply]))
            print(json.dumps({"case": name, "dtype": str(dtype), **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
