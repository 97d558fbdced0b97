"""A card that is not there: Triton compiles for it and prepares each launch, and nothing is launched. What a step of
the triton engine costs in Python can be measured so, and the way of a launch be tested, on a machine without a GPU."""

# pyright: reportMissingImports=false

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..errors import LoRARiteValueError


@contextmanager
def pretended_card(capability: int = 90) -> Iterator[None]:
    """Steps by ``engine="triton"`` of factors on a CPU, with launches for a card of this compute capability (90:
    Hopper), which do nothing but say that all is well: no parameter moves.

    Raises:
        LoRARiteValueError: TRITON_INTERPRET is set, by which nothing is compiled.
    """
    from triton import knobs
    from triton.runtime.driver import driver

    if knobs.runtime.interpret:
        raise LoRARiteValueError("engine triton is measured as it compiles kernels: unset TRITON_INTERPRET")
    before, kernels.pretended = driver._active, True
    driver.set_active(_Driver(capability))  # type: ignore[arg-type]
    try:
        yield
    finally:
        driver._active, kernels.pretended = before, False


class _Driver:
    """What Triton asks a driver for at a launch. A capability is a device of its own, so that each has its kernels."""

    def __init__(self, capability: int):
        self.capability, self.utils, self.launcher_cls = capability, _Utils(), _Launcher

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Utils:
    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, name, 0, 0, 1024  # module, function, registers, spills, threads of a block at most

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024 if device == 90 else 163 * 1024}


class _Launcher:
    def __init__(self, source: Any, metadata: Any):
        self.decides = metadata.name == "decide_kernel"

    def __call__(self, *arguments: Any) -> None:
        if self.decides:
            flags, _, _, _, _, ok, _ = (x for x in arguments if isinstance(x, Tensor))
            flags.fill_(1)
            ok.fill_(1)
