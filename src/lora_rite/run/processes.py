"""The processes of one run, as torchrun and ``accelerate launch`` start them: the first alone writes and speaks, and
what one of them finds wrong, all raise. In one process, all of this does nothing."""

import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any, TypeVar

from ..errors import LoRARiteError, LoRARiteValueError
from ..inputs import one_line

T = TypeVar("T")
#: What torchrun tells each process.
TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
#: How many processes a launcher has started, as accelerate reads it: torchrun, srun and mpirun.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
#: What accelerate's launcher asks for that has no place in a run of ours, by the environment variable.
_OTHER = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}  # fmt: skip
#: Of FSDP2, what has no place there, and what to do.
_OF_FSDP = {
    "FSDP_ACTIVATION_CHECKPOINTING": "lora-rite train does that by --gradient_checkpointing",
    "FSDP_OFFLOAD_PARAMS": "lora-rite train leaves the parameters on the GPUs",
}  # fmt: skip
#: How long the processes wait for each other: for the slowest to fetch a large model.
_PATIENCE = timedelta(hours=2)


def check_alone(what: str) -> None:
    """Raises LoRARiteValueError where the environment says that this process is one of several."""
    for key in SIZES:
        if (processes := os.environ.get(key, "1")) != "1":
            raise LoRARiteValueError(
                f"{what} is one process, and there are {processes} ({key}, as a launcher sets it): start it without one"
            )


def check_one(what: str) -> None:
    """As :func:`check_alone`, for what trains; and where the environment half says so, as accelerate would believe."""
    check_alone(what)
    _check_halves(f"unset it, {what} is one process")


def check_several() -> None:
    """Raises LoRARiteValueError where the environment speaks of several processes as neither torchrun nor ``accelerate
    launch`` for DDP or FSDP2 does."""
    advice = "start them by torchrun or accelerate launch"
    missing = _missing()
    for key in SIZES:
        if (processes := os.environ.get(key, "1")) != "1" and (missing or str(_told()[1]) != processes):
            without = f", without {missing}" if missing else ""
            raise LoRARiteValueError(
                f"there are {processes} processes ({key}, as a launcher sets it){without}: {advice}"
            )
    _check_halves("unset it, or start by torchrun or accelerate launch")
    for key, name in _OTHER.items():
        if _is_set(key):
            raise LoRARiteValueError(f"accelerate's config asks for {name}: lora-rite train runs by DDP or FSDP2")
    if (backend := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() != "no":
        advice = "lora-rite train compiles by --torch_compile"
        raise LoRARiteValueError(f"accelerate's config asks for dynamo ({backend.lower()}): {advice}")
    if not sharded():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise LoRARiteValueError("accelerate's config asks for FSDP1, which flattens factors: fsdp_version: 2")
    for key, advice in _OF_FSDP.items():
        if _is_set(key):
            raise LoRARiteValueError(f"accelerate's config asks for {key.lower()}: {advice}")


def _check_halves(advice: str) -> None:
    missing = _missing()
    if (rank := os.environ.get("LOCAL_RANK", "-1")) != "-1" and missing:
        what = f"LOCAL_RANK={rank} is set, as a launcher of several processes sets it"
        raise LoRARiteValueError(f"{what}, without {missing}: {advice}")


def _missing() -> str:
    """What torchrun tells and the environment does not."""
    return ", ".join(key for key in TOLD if key not in os.environ)


def _is_set(key: str) -> bool:
    return os.environ.get(key, "false").lower() in ("1", "true", "yes", "y", "t", "on")


def _told() -> tuple[int, int]:
    """Rank and number of processes, by the environment."""
    values = [os.environ.get(key, default) for key, default in (("RANK", "0"), ("WORLD_SIZE", "1"))]
    rank, size = (int(value) if value.isdecimal() else 0 for value in values)
    return (rank, size) if size > 1 else (0, 1)


def sharded() -> bool:
    """Whether ``accelerate launch`` asks for the model to be shared out over the processes (FSDP)."""
    return _is_set("ACCELERATE_USE_FSDP")


def uses_cpu() -> bool:
    """Whether a run takes no accelerator: there is none, or ``accelerate launch --cpu`` says so."""
    import torch

    return not torch.accelerator.is_available() or _is_set("ACCELERATE_USE_CPU")


def join() -> None:
    """Brings the processes that the environment speaks of together, each on its device, as the Trainer does it later.

    Raises:
        LoRARiteValueError: they cannot be on this kind of device.
    """
    if sharded():
        # Else from_pretrained would load the weights in the first process alone, and all processes try the model.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")  # else it is gathered as a whole
    _, size = _told()
    if size == 1 or count() > 1:
        return
    from accelerate import PartialState

    PartialState(cpu=uses_cpu(), timeout=_PATIENCE)
    if count() != size:
        raise LoRARiteValueError(f"accelerate makes no {size} processes of one on this device: train in one process")


def leave() -> None:
    """Ends what :func:`join` or the Trainer has begun, at the end of a program."""
    if "torch" in sys.modules and _of_group("get_world_size", 0):
        import torch.distributed as dist

        dist.destroy_process_group()


def count() -> int:
    """How many processes have joined."""
    return _of_group("get_world_size", 1)


def rank() -> int:
    """Which of them this one is."""
    return _of_group("get_rank", 0)


def _of_group(name: str, alone: int) -> int:
    import torch.distributed as dist

    return getattr(dist, name)() if dist.is_available() and dist.is_initialized() else alone


def is_main() -> bool:
    """Whether this is the one that writes and speaks."""
    return rank() == 0


def gather(value: T) -> list[T]:
    """The values of all processes, in their order."""
    return [value] if count() == 1 else _exchange(None, value)


def _exchange(error: Exception | None, value: Any) -> list[Any]:
    """The values of all processes; or what one of them has sent as its error, raised in all. So a process that fails on
    its way to a meeting is heard at whichever meeting the others are."""
    import torch.distributed as dist

    found: list[Any] = [None] * count()
    dist.all_gather_object(found, (error, value))
    for error, _ in found:
        if error is not None:
            raise everywhere(error)
    return [value for _, value in found]


def highest(value: int) -> int:
    """The largest of all processes' numbers."""
    if count() == 1:
        return value
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    found = torch.tensor(value, device=PartialState(cpu=uses_cpu()).device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


@contextmanager
def together() -> Iterator[None]:
    """What goes wrong within in one process, all raise, so that none goes on and waits for another."""
    found = None
    try:
        yield
    except (LoRARiteError, OSError, ImportError) as error:
        if count() == 1 or hasattr(error, "everywhere"):
            raise
        found = _portable(error)
    if count() > 1:
        _exchange(found, None)


def on_main(function: Callable[[], T]) -> T:
    """What the function returns in the main process, which alone runs it, or raises there, in all of them."""
    result: Any = None
    with together():
        if is_main():
            result = function()
    return gather(result)[0]


def everywhere(error: Exception) -> Exception:
    """The error, marked as one that all processes raise: one of them is to tell it."""
    error.everywhere = True  # type: ignore[attr-defined]
    return error


def _portable(error: Exception) -> Exception:
    """The error as other processes can have it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class of somebody's makes of its arguments
        made = LoRARiteError(one_line(error))
        made.exit_code = getattr(error, "exit_code", 1)
        return made
    return error


def tells(error: Exception | str) -> bool:
    """Whether this process is to print an error, or a word: the first one any, another an error that it alone has found
    after joining."""
    if _told()[0] == 0:
        return True
    return isinstance(error, Exception) and count() > 1 and not hasattr(error, "everywhere")


@contextmanager
def quiet() -> Iterator[None]:
    """Within, processes other than the first print nothing and warn of nothing."""
    rank, size = _told()
    if size > 1:  # else each says that DDP looks for parameters without a gradient (torch reads this as it is imported)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if rank == 0:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(redirect_stdout(nowhere))
        yield
