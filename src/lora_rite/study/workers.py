"""The processes that do the runs of a study: this one, or several, each with its GPU or its share of the cores."""

import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from ..errors import LoRARiteError, LoRARiteValueError
from ..run.output import tolerate


class _Here(Executor):
    """Runs a call in this process, at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextmanager
def executor(jobs: int, devices: list[int] | None) -> Iterator[Executor]:
    """This process for one job; else so many processes, each with its GPU or its share of the cores."""
    if jobs == 1 and not devices:
        yield _Here()
        return
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for device in itertools.islice(itertools.cycle(devices or [None]), jobs):
        queue.put(device)
    pool = ProcessPoolExecutor(jobs, context, start_worker, (queue, max(1, (os.cpu_count() or 1) // jobs)))
    terminate = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield pool
    except BrokenProcessPool:
        raise LoRARiteError("a process died (out of memory?); the same command goes on") from None
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        signal.signal(signal.SIGTERM, terminate)
        pool.shutdown(cancel_futures=True)


def check_devices(devices: list[int]) -> None:
    """Refuses GPUs that are not there: a process whose GPU is hidden trains on the CPU."""
    import torch

    count = torch.cuda.device_count()
    hidden = "CUDA_VISIBLE_DEVICES" in os.environ  # torch counts without these, and numbers are among all
    if missing := [device for device in devices if count == 0 or not (hidden or 0 <= device < count)]:
        raise LoRARiteValueError(f"--devices: no GPU {missing[0]}, torch sees {count} CUDA devices")


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def start_worker(queue: Any, threads: int) -> None:
    """Makes a process ready for runs: with a GPU of the queue, where it has any left but None, and so many threads."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C reaches the whole group: go without a traceback
    for stream in (sys.stdout, sys.stderr):
        tolerate(stream)
    device = queue.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", threads)))
