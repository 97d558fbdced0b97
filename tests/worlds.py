"""Runs the functions ``check_…(size, folder)`` of a module in several processes (gloo), all of them in one world."""

import json
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: Rank and number of processes → check → what it raised, or nothing.
Outcome = dict[tuple[int, int], dict[str, str]]


def checks_of(names: dict[str, Any]) -> dict[str, Callable[[int, str], None]]:
    """The checks among a module's ``globals()``, by name."""
    return {name.removeprefix("check_"): f for name, f in list(names.items()) if name.startswith("check_")}


def outcomes(module: str, sizes: Sequence[int], before: Callable[[], None] | None = None) -> Iterator[Outcome]:
    """Yields once, for a fixture; the worlds share a folder. ``before`` is called in each process before each check."""
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            torch.multiprocessing.spawn(_run, (size, folder, module, before), nprocs=size)
        ranks = [(rank, size) for size in sizes for rank in range(size)]
        yield {key: json.loads(Path(folder, "results_{}_of_{}.json".format(*key)).read_text()) for key in ranks}


def assert_passed(name: str, outcome: Outcome) -> None:
    for (rank, size), results in outcome.items():
        assert results[name] == "", f"rank {rank} of {size}:\n{results[name]}"


def _run(rank: int, size: int, folder: str, module: str, before: Callable[[], None] | None) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous_{size}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    warnings.simplefilter("ignore")
    results = {}
    for name, check in checks_of(vars(import_module(module))).items():
        try:
            if before:
                before()
            check(size, folder)
            results[name] = ""
        except Exception:  # the others go on, unless they wait for this one: then the group's timeout ends them
            results[name] = traceback.format_exc()
    Path(folder, f"results_{rank}_of_{size}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # else threads of gloo now and then end a process by SIGABRT while the interpreter is taken down
