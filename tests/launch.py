"""Runs the command line in several processes, as torchrun starts them. They are forked from a server that has imported
what they need, so that a launch costs no imports."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import NamedTuple

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "transformers", "peft", "trl", "lora_rite.cli.program", "lora_rite.finetune.train"])


class Done(NamedTuple):
    """The exit code of a process, and what it has printed."""

    code: int | None
    stdout: str
    stderr: str


class Launch:
    """``size`` processes of ``lora-rite WORDS`` at work. Variables named ``RANK:KEY`` are those of one of them alone."""

    def __init__(self, words, folder: Path, size: int = 2, **variables: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        told = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.processes = []
        for rank in range(size):
            own = {key.partition(":")[2] or key: v for key, v in variables.items() if key.partition(":")[0] in (key, str(rank))}
            variables_of_one = {**own, **told, "RANK": rank, "LOCAL_RANK": rank}
            arguments = ([str(w) for w in words], folder / str(rank), {k: str(v) for k, v in variables_of_one.items()})
            self.processes.append(SERVER.Process(target=_run, args=arguments))
            self.processes[-1].start()

    def wait(self, seconds: float = 120) -> list[Done]:
        for process in self.processes:
            process.join(seconds)
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        texts = [[(self.folder / f"{rank}{end}").read_text() for end in (".out", ".err")] for rank in range(len(self.processes))]
        return [Done(process.exitcode, *text) for process, text in zip(self.processes, texts, strict=True)]


def _run(words: list[str], log: Path, variables: dict[str, str]) -> None:
    for number, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(f"{log}{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}

    import torch

    from lora_rite.cli.program import main

    torch.set_num_threads(1)
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
