"""Versions, machine and code that a run was made with."""

import hashlib
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from .processes import count, sharded


def versions(*more: str) -> dict[str, Any]:
    """Versions (of ``more`` packages too), machine and the commit of this package's source (None outside a checkout,
    "+" after local changes)."""
    import torch

    packages = ("lora-rite", "torch", "transformers", "peft", "accelerate", *more)
    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def chip() -> str:
    """The name of the accelerator, or of the CPU where there is none."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return processor() if accelerator is None else accelerator.type


def processor() -> str:
    """The name of the CPU, as Linux knows it; elsewhere what Python says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(versions: dict[str, Any]) -> dict[str, Any]:
    """What bitwise equality needs to stay the same: versions, this package's code, device, instruction set, threads,
    processes."""
    import torch

    left_out = ("date", "machine", "processor", "git_commit")
    kept = {key: value for key, value in versions.items() if key not in left_out}
    code = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(Path(__file__).parents[1].rglob("*.py"))))
    processes = {"processes": count(), "sharded": sharded()}
    return {**kept, "code": code.hexdigest(), "cpu": torch.backends.cpu.get_cpu_capability(), **processes}


def _git_commit() -> str | None:
    package = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        run = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() / "src" / "lora_rite" != package:
            return None  # installed somewhere inside another project's checkout
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return None
