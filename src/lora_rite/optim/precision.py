"""Full precision within a step, whatever the process is set to."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch.amp.autocast_mode import is_autocast_available


class _Precision:
    """The precision of float32 products, which is one for the process: other threads may step at the same time."""

    lock, users = threading.Lock(), 0
    before: ClassVar[list[tuple[Any, str]]] = []

    @classmethod
    def enter(cls) -> None:
        with cls.lock:
            if not cls.users:
                backends: Any = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
                cls.before = [(b, b.fp32_precision) for b in backends if b.fp32_precision not in ("none", "ieee")]
                for backend, _ in cls.before:
                    backend.fp32_precision = "ieee"
            cls.users += 1

    @classmethod
    def leave(cls) -> None:
        with cls.lock:
            cls.users -= 1
            if not cls.users:
                for backend, precision in cls.before:
                    inherited = precision == torch.backends.fp32_precision  # type: ignore[attr-defined]
                    backend.fp32_precision = "none" if inherited else precision


@contextmanager
def full_precision(groups: list[dict[str, Any]]) -> Iterator[None]:
    """float32 products in float32: with TF32 or bfloat16 inside them, Gram matrices would keep three digits. Not under
    autocast either, on the types of device that parameters of the groups are on."""
    params = chain.from_iterable(group["params"] for group in groups)
    devices = {device.type for device in set(map(attrgetter("device"), params))}
    with ExitStack() as stack:
        for device in devices:
            if is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        _Precision.enter()
        stack.callback(_Precision.leave)
        yield
