"""Kills fine-tuning runs at random moments, resumes them, and compares what they end with.

    python tools/crash_test.py --kills 200           # random SIGKILLs; half of them in the middle of a save
    python tools/crash_test.py --failpoints          # one kill at each step of saving, rotating and exporting
    python tools/crash_test.py --disk                # one failing write at each of them (disk full, I/O error)

A run of `lora-rite train` on the embedded model (a few steps, dropout and accumulation on, a checkpoint at every second
step) goes through to the end once, in a process of its own: the golden run. Then runs are killed again and again, each
resumed by `--resume` until it is finished, and everything that it ends with must be bitwise that of the golden run:
adapter, optimizer, generators of random numbers, losses. After each kill, at least one checkpoint must verify as soon
as one was ever saved, and two as soon as two were. To spend the time on crashes and not on imports, the killed
processes are forked from one that has imported torch and transformers; the golden run is not.

Prints a line of JSON with the figures; exit code 1 where anything differs.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

STEPS = 6
OPTIONS = {
    "steps": STEPS, "batch_size": 2, "accumulation": 2, "max_length": 16, "rank": 16, "lr": 0.01, "dropout": 0.1,
    "save_every": 2, "eval_every": 3, "layers_every": 1, "target_modules": "[q_proj, v_proj]",
}  # fmt: skip
#: Moments of a run at which it can be killed (see `failpoint` in lora_rite.run.failpoints).
FAILPOINTS = (
    "settings.json written", "settings.json renamed", "checkpoint begins", "checkpoint begins@2", "checkpoint written",
    "checkpoint written@2", "checkpoint synced", "manifest.json written", "manifest.json written@3",
    "manifest.json renamed", "rotation renamed", "rotation removed", "adapter written", "adapter renamed",
    "result.json written", "result.json renamed",
)  # fmt: skip
#: Failing writes, each with an error of the system.
FAULTS = (
    "settings.json written=ENOSPC", "checkpoint begins@2=EROFS", "checkpoint written@2=EIO",
    "checkpoint synced@2=ENOSPC", "manifest.json written@2=ENOSPC", "manifest.json renamed@3=EIO",
    "adapter written=ENOSPC", "result.json written=EDQUOT",
)  # fmt: skip


def words(data: Path, out: Path, *more: str) -> list[str]:
    options = [word for key, value in OPTIONS.items() for word in (f"--{key}", str(value))]
    return ["train", "--data", str(data), "--out", str(out), "--no_progress", *options, *more]


def write_data(path: Path) -> Path:
    path.write_text(
        "".join(json.dumps({"text": f"int f{i}(int a) {{ return a + {i}; }}\n" * 2}) + "\n" for i in range(12))
    )
    return path


def fork(arguments: list[str], log: Path, failpoint: str = "", limit: int = 0) -> int:
    """The id of a forked process that runs the command line. ``limit``: bytes that a file may have at most."""
    if child := os.fork():
        return child
    try:
        import resource

        import torch

        from lora_rite.cli.program import main

        torch.set_num_threads(1)
        os.environ["LORA_RITE_FAILPOINT"] = failpoint
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(99)


def wait(child: int) -> int:
    """Exit code, or minus the number of the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def saving(out: Path) -> bool:
    return any(not (p / "manifest.json").exists() for p in (out / "checkpoints").glob("checkpoint-*"))


def kill(child: int, out: Path, delay: float, in_save: bool) -> int:
    """SIGKILL after ``delay`` seconds, or that fraction of 50 ms into the next save that begins. Returns as wait()."""
    end = time.monotonic() + delay
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if in_save and saving(out):
            time.sleep(min(delay, 1) * 0.05)
            break
        if not in_save and time.monotonic() >= end:
            break
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return wait(child)


def verified(out: Path) -> tuple[int, int]:
    """Number of checkpoints that verify, and of those that have a manifest."""
    from lora_rite.run.checkpoints import checkpoints, damage
    from lora_rite.run.settings import read_settings

    try:
        stored = read_settings(out)
    except ValueError:
        return 0, 0
    found = checkpoints(out / "checkpoints")
    sealed = [p for p in found if (p / "manifest.json").exists()]
    return sum(damage(p, stored["id"]) is None for p in sealed) if stored else 0, len(sealed)


def outcome(out: Path) -> dict[str, object]:
    """Everything that must be the same bit for bit."""
    import torch

    from lora_rite.run.checkpoints import read_manifest
    from lora_rite.run.digest import digest_tensors

    last = out / "checkpoints" / f"checkpoint-{STEPS}"
    result = json.loads((out / "result.json").read_text())
    random_state = torch.load(last / "rng_state.pth", weights_only=False)  # our own file
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)
    tensors = [(f"{i}.{k}", v) for i, s in optimizer["state"].items() for k, v in s.items()]
    return {
        "adapter": (out / "adapter" / "adapter_model.safetensors").read_bytes(),
        "saved adapter": (last / "adapter_model.safetensors").read_bytes(),
        "state": read_manifest(last)["state"],
        "optimizer": digest_tensors(tensors),
        "generators": (repr(random_state["python"]), repr(random_state["numpy"]), random_state["cpu"].tolist()),
        "losses": result["losses"],
        "held-out losses": result["held_out_losses"],
        "held out": result["held_out"],
        "figures of layers": (out / "layers.jsonl").read_text(),
    }


class Harness:
    def __init__(self, folder: Path):
        self.folder, self.data = folder, write_data(folder / "data.jsonl")
        self.log = folder / "log.txt"
        self.failures: list[str] = []
        begin = time.monotonic()
        subprocess.run([sys.executable, "-m", "lora_rite.cli", *words(self.data, folder / "golden")],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        self.golden_seconds = time.monotonic() - begin
        self.golden = outcome(folder / "golden")
        import peft  # noqa: F401
        import transformers  # noqa: F401

        import lora_rite.finetune.train  # noqa: F401

        begin = time.monotonic()
        code = wait(fork(words(self.data, folder / "forked"), self.log))
        self.run_seconds = time.monotonic() - begin
        self.compare(folder / "forked", code, "an uninterrupted forked run")

    def compare(self, out: Path, code: int, what: str) -> None:
        if code:
            self.failures.append(f"{what}: exit code {code}")
            return
        got = outcome(out)
        self.failures += [f"{what}: other {key}" for key in got if got[key] != self.golden[key]]

    def check_checkpoints(self, out: Path, saved: int, what: str) -> int:
        """At least as many checkpoints verify as were saved, up to two. Returns the number that do."""
        good, _ = verified(out)
        if good < min(saved, 2):
            self.failures.append(f"{what}: {good} checkpoints verify, {saved} were saved")
        return max(saved, good)

    def random_kills(self, kills: int, seed: int) -> dict[str, object]:
        """Runs, each killed until a random number of its lives is spent, then resumed to the end."""
        choice = random.Random(seed)
        done, in_save, runs = 0, 0, 0
        begin = time.monotonic()
        while done < kills:
            runs += 1
            out, saved, lives = self.folder / f"run{runs}", 0, choice.randint(1, 8)
            code = None
            while code is None or code == -signal.SIGKILL:
                resume = ["--resume"] * out.exists()
                child = fork(words(self.data, out, *resume), self.log)
                if lives and done < kills:
                    at_save = choice.random() < 0.5
                    code = kill(child, out, choice.uniform(0, 1 if at_save else 1.1 * self.run_seconds), at_save)
                    if code == -signal.SIGKILL:
                        done, in_save, lives = done + 1, in_save + saving(out), lives - 1
                        saved = self.check_checkpoints(out, saved, f"run {runs}, kill {done}")
                else:
                    code = wait(child)
            self.compare(out, code, f"run {runs}")
        return {
            "kills": done,
            "of these within a save": in_save,
            "runs": runs,
            "seconds": round(time.monotonic() - begin),
        }

    def failpoints(self, every: int) -> dict[str, object]:
        points = FAILPOINTS[::every]
        for i, point in enumerate(points):
            out = self.folder / f"point{i}"
            code = wait(fork(words(self.data, out), self.log, point))
            if code != -signal.SIGKILL:
                self.failures.append(f"{point}: exit code {code}, not killed there")
                continue
            self.check_checkpoints(out, 0, point)
            self.compare(out, wait(fork(words(self.data, out, "--resume"), self.log)), point)
        return {"failpoints": len(points)}

    def disk(self) -> dict[str, object]:
        """A failing write ends the run with exit code 4 and leaves its checkpoints; --resume ends as the golden run.

        Three faults are the system's own, for the writers of safetensors, tokenizers and torch: no file may grow beyond
        a size."""
        limits = {f"limit of {kb} kB a file": 1000 * kb for kb in (200, 250, 300)}
        for i, fault in enumerate([*FAULTS, *limits]):
            out = self.folder / f"fault{i}"
            code = wait(fork(words(self.data, out), self.log, "" if fault in limits else fault, limits.get(fault, 0)))
            if code != 4:
                self.failures.append(f"{fault}: exit code {code} instead of 4")
            if left := [p.name for p in out.rglob("*.tmp")] + ["half a checkpoint"] * saving(out):
                self.failures.append(f"{fault}: {left} left behind")
            self.check_checkpoints(out, int("@" in fault), fault)
            self.compare(out, wait(fork(words(self.data, out, "--resume"), self.log)), fault)
        return {"faults": len(FAULTS) + len(limits)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="number of random kills")
    parser.add_argument("--failpoints", type=int, nargs="?", const=1, help="a kill at each step of saving, or each Nth")
    parser.add_argument("--disk", action="store_true", help="a failing write at each step of saving")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--folder", type=Path, help="work here and keep everything (default: a temporary folder)")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        harness = Harness(folder)
        figures: dict[str, object] = {}
        if options.kills:
            figures |= harness.random_kills(options.kills, options.seed)
        if options.failpoints:
            figures |= harness.failpoints(options.failpoints)
        if options.disk:
            figures |= harness.disk()
        if harness.failures and harness.log.exists():
            print(harness.log.read_text()[-4000:], file=sys.stderr)
    print(json.dumps({**figures, "seconds_a_run": round(harness.run_seconds, 2), "failures": harness.failures}))
    return int(bool(harness.failures))


if __name__ == "__main__":
    sys.exit(main())
