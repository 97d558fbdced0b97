"""Runs the command line in several processes, as torchrun starts them. They are forked from a server that has imported
what they need, so that a launch costs no imports."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as `lora_rite.run.processes.quiet`, before the server has torch
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch", "transformers", "peft", "trl", "lora_rite.cli.program", "lora_rite.finetune.train"]
)


class Done(NamedTuple):
    """The exit code of a process, and what it has printed."""

    code: int | None
    stdout: str
    stderr: str


class Launch:
    """``size`` processes of ``lora-rite WORDS`` at work, which print into files in ``folder``. ``before``, a function
    of a module, is called in each with its rank."""

    def __init__(self, words, folder: Path, size: int = 2, before=None, **variables):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        told = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.processes = []
        for rank in range(size):
            of_one = {key: str(value) for key, value in {**variables, **told, "RANK": rank, "LOCAL_RANK": rank}.items()}
            arguments = ([str(word) for word in words], folder / str(rank), of_one, before)
            self.processes.append(SERVER.Process(target=_run, args=arguments))
            self.processes[-1].start()

    def wait(self, seconds: float = 120) -> list[Done]:
        for process in self.processes:
            process.join(seconds)
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        printed = lambda rank: [(self.folder / f"{rank}{end}").read_text() for end in (".out", ".err")]
        return [Done(process.exitcode, *printed(rank)) for rank, process in enumerate(self.processes)]


def _run(words: list[str], log: Path, variables: dict[str, str], before) -> None:
    for number, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(f"{log}{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}

    import torch

    from lora_rite.cli.program import main

    torch.set_num_threads(1)
    if before is not None:
        before(int(variables["RANK"]))
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
