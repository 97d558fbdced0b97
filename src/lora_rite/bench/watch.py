"""What is measured of a call: seconds, memory, reads of the device."""

import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def seconds(call: Callable[[], Any], device: str) -> float:
    """Of one call, on CUDA by events on the device."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: list[float]) -> tuple[float, list[float]]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return median, [low, high]


class Watch(TorchDispatchMode):
    """Bytes of tensors that live at the same time and were made inside (without what single operations use
    inwardly), and reads of values on the device by the host."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.live: dict[int, list[int]] = {}  # storage → [tensors on it, bytes]
        self.now = self.peak = self.synchronisations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        self.synchronisations += "_local_scalar_dense" in str(func) and args[0].device.type == self.device
        for t in _tensors(out):
            storage = t.untyped_storage()
            key = storage._cdata
            if key in inputs and key not in self.live:
                continue  # a view of what was there before
            entry = self.live.setdefault(key, [0, storage.nbytes()])
            if entry[0] == 0:
                self.now += entry[1]
                self.peak = max(self.peak, self.now)
            entry[0] += 1
            weakref.finalize(t, self._dropped, key)
        return out

    def _dropped(self, key: int) -> None:
        entry = self.live[key]
        entry[0] -= 1
        if entry[0] == 0:
            self.now -= entry[1]
            del self.live[key]


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
