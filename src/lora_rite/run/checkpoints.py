"""Crash safety of a run: checkpoints that verify, a lock on the folder, signals, and refusal of a changed run.

The Trainer writes the files of a checkpoint, in place. What makes a checkpoint of them is ``manifest.json``, with the
sha256 of each file, which is written last, after everything has reached the disk (:func:`seal`). A folder without it is
half-written and never read. The order of events that this rests on, and what is not promised: docs/reliability.md.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import tempfile
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import (
    CheckpointError,
    FolderInUseError,
    InterruptedRunError,
    LoRARiteError,
    LoRARiteValueError,
    NonFiniteError,
    WriteError,
    warn,
)
from ..inputs import one_line, parse_json, suffix

MANIFEST, LOCK, SETTINGS, RESULT, FAILED = "manifest.json", ".lock", "settings.json", "result.json", "failed.json"
#: In a checkpoint of an optimizer with two modes, whose adapter is the one to evaluate: the parameters that it trains.
TRAINING = "training_parameters.safetensors"
SCHEMA = 1
#: Verified checkpoints that rotation keeps.
KEPT = 2
#: Settings that say where something is; what is there is compared by its content (``inputs``).
PLACES = ("out", "data", "validation", "data_dir")
#: What a message advises, for ``lora-rite train``; ``compare`` has words of its own.
RESUME = "go on with --resume"
ALLOW_CHANGED = "--allow_changed with these names goes on all the same, and no longer bitwise"
#: The parts of ``settings.json`` that a resumed run must share with the interrupted one.
PARTS = ("settings", "inputs", "environment")
_passed: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """For tests of crashes. ``LORA_RITE_FAILPOINT=NAME`` kills this process (SIGKILL) where it passes here,
    ``NAME@2`` where it does so the second time, and ``NAME=ENOSPC`` raises that OSError instead."""
    point, _, error = os.environ.get("LORA_RITE_FAILPOINT", "").partition("=")
    point, _, time = point.partition("@")
    if point != name:
        return
    _passed[name] += 1
    if _passed[name] == int(time or 1):
        if error:
            number = getattr(errno, error)
            raise OSError(number, os.strerror(number))
        os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------------------------------------------- durable writing


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is either whole, and on the disk, or as it was before."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=1, allow_nan=True) + "\n")
            file.flush()
            failpoint(f"{path.name} written")
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    failpoint(f"{path.name} renamed")
    _sync_folder(path.parent)


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The object that :func:`write_json` wrote, which has these keys.

    Raises:
        LoRARiteValueError: it cannot be read, or something else is there.
    """
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        if missing := [key for key in keys if key not in found]:
            raise ValueError(f"it has no {missing[0]}")
    except OSError as error:
        raise LoRARiteValueError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        advice = "restore it, or remove it and run what wrote it again"
        raise LoRARiteValueError(f"{path} is damaged ({one_line(error)}): {advice}") from None
    return found


def check_folder(option: str, folder: Path) -> None:
    """Checks that the folder that an option names can be made and written, before the work begins, and leaves nothing.

    Raises:
        LoRARiteValueError: it is a file.
        WriteError: it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise LoRARiteValueError(f"{option}: {folder} is not a folder")
    try:
        there = next(part for part in (folder, *folder.absolute().parents) if part.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise WriteError(f"{option}: cannot write into {folder}: {error.strerror or error}") from None


def prepare_folder(option: str, folder: Path) -> None:
    """Makes the folder, after :func:`check_folder`, whose errors it has."""
    check_folder(option, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{option}: cannot write into {folder}: {error.strerror or error}") from None


def prepare_file(option: str, path: Path, suffixes: Sequence[str] = ()) -> None:
    """As :func:`prepare_folder`, for the file that an option names; any suffix will do where none are given."""
    if path.is_dir():
        raise LoRARiteValueError(f"{option}: {path} is a folder; name a file")
    if suffixes and suffix(path) not in suffixes:
        raise LoRARiteValueError(f"{option}: {path} must end in {' or '.join(suffixes)}")
    prepare_folder(option, path.parent)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Has ``write`` fill a folder, which then replaces ``folder``, whole and on the disk."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write(temporary)
        failpoint(f"{folder.name} written")
        _sync_tree(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    failpoint(f"{folder.name} renamed")
    _sync_folder(folder.parent)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there; its entries are durable by themselves
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):  # what a folder holds before the folder
        if path.is_dir():
            _sync_folder(path)
        else:
            _sync_file(path)
    _sync_folder(folder)


# ---------------------------------------------------------------------------------------------------------- the lock


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds its lock, which the system takes back from a process that dies.

    Raises:
        FolderInUseError: another process has it.
        WriteError: the folder cannot be made or written.
    """
    from filelock import FileLock, Timeout

    path = folder / LOCK
    lock = FileLock(path, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        owner = path.read_text(encoding="utf-8").strip() or "unknown"
        raise FolderInUseError(f"{folder} is in use by another process (id {owner})") from None
    except OSError as error:
        raise WriteError(f"cannot write into {folder}: {error.strerror or error}") from None
    try:
        path.write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------------------------------------------- one checkpoint


def seal(folder: Path, run: str, state: str) -> None:
    """Makes a checkpoint of the files in ``folder``: brings them to the disk, then writes the manifest.

    Args:
        folder: ``checkpoint-STEP``, as the Trainer has written it.
        run: id of the run.
        state: digest of adapter and optimizer (:func:`digest_state`).
    """
    _sync_tree(folder)
    failpoint("checkpoint synced")
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest_file(path)}
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }
    write_json(
        folder / MANIFEST, {"schema": SCHEMA, "run": run, "step": step_of(folder), "state": state, "files": files}
    )
    _sync_folder(folder.parent)
    _sync_folder(folder.parent.parent)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest, checked for its form alone.

    Raises:
        ValueError: it says in what way the manifest is not one.
    """
    path = checkpoint / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise ValueError("no manifest: half-written")
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
        schema, files = manifest["schema"], manifest["files"]
        entries = [(Path(name), entry["size"], entry["sha256"]) for name, entry in files.items()]
        if not {"run", "step", "state"} <= manifest.keys():
            raise KeyError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("the manifest is damaged") from None
    if schema != SCHEMA:
        raise ValueError(f"the manifest has schema {schema}, this version reads {SCHEMA}")
    if any(name.is_absolute() or ".." in name.parts for name, _, _ in entries):
        raise ValueError("the manifest names a file outside the checkpoint")
    return manifest


def damage(checkpoint: Path, run: str) -> str | None:
    """What is wrong with a checkpoint of the run, None where every byte is as it was written."""
    try:
        manifest = read_manifest(checkpoint)
        if manifest["run"] != run:
            return "it is of another run"
        if manifest["step"] != step_of(checkpoint):
            return f"its manifest is of step {manifest['step']}"
        found = (p for p in checkpoint.rglob("*") if p.is_symlink() or not p.is_dir())
        paths = {p.relative_to(checkpoint).as_posix(): p for p in found}
        paths.pop(MANIFEST)
        files = manifest["files"]
        if different := sorted(paths.keys() ^ files.keys()):
            return f"{different[0]} is {'not in the manifest' if different[0] in paths else 'missing'}"
        for name, path in paths.items():
            if path.is_symlink():
                return f"{name} is a link"
            if path.stat().st_size != files[name]["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {files[name]['size']}"
            if digest_file(path) != files[name]["sha256"]:
                return f"{name} has other bytes than were written"
    except (ValueError, OSError) as error:
        return str(error)
    return None


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ all checkpoints


def checkpoints(folder: Path) -> list[Path]:
    """Folders ``checkpoint-STEP``, newest first, by step: clocks may jump."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,12}", p.name)]
    return sorted(found, key=step_of, reverse=True)


def newest_verified(folder: Path, run: str) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that verifies (None where no save was ever finished), and what is wrong with newer ones.

    Raises:
        CheckpointError: there are checkpoints and all are damaged.
    """
    problems: dict[Path, str] = {}
    for checkpoint in checkpoints(folder):
        if (problem := damage(checkpoint, run)) is None:
            return checkpoint, problems
        problems[checkpoint] = problem
    unfinished = [p for p in problems if not (p / MANIFEST).exists()]
    if problems and (len(problems) > 1 or not unfinished):  # a kill leaves one unfinished save, not two
        listed = "; ".join(f"{p.name}: {problem}" for p, problem in problems.items())
        raise CheckpointError(f"no checkpoint in {folder} can be trusted ({listed}): restore one, or train anew")
    return None, problems


def rotate(folder: Path, run: str) -> None:
    """Removes checkpoints that are older than the newest ``KEPT`` which verify."""
    verified = 0
    for checkpoint in checkpoints(folder):
        if verified >= KEPT:
            doomed = checkpoint.with_name(f".deleted-{checkpoint.name}")
            os.replace(checkpoint, doomed)
            failpoint("rotation renamed")
            shutil.rmtree(doomed)
            failpoint("rotation removed")
        elif damage(checkpoint, run) is None:
            verified += 1


def clear(folder: Path, problems: dict[Path, str]) -> None:
    """Removes what a killed process has left, and puts damaged checkpoints aside: the run will write them anew."""
    for checkpoint, problem in problems.items():
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        if (checkpoint / MANIFEST).exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(checkpoint, aside)
            warn(f"{checkpoint} is not used: {problem}; it is {aside.name} now")
        else:
            shutil.rmtree(checkpoint)
            warn(f"{checkpoint} is not used: {problem}; removed")
    for left_over in folder.glob(".deleted-checkpoint-*"):
        shutil.rmtree(left_over)


# ----------------------------------------------------------------------------------------------- what a run is made of


def digest_tensors(named: Iterable[tuple[str, Any]]) -> str:
    """sha256 of names, dtypes, shapes and bytes of tensors, in the order given."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_rows(*parts: list[dict[str, list[int]]]) -> str:
    """sha256 of token rows: the text, its tokenizer, and how it was cut and split."""
    import numpy as np

    digest = hashlib.sha256()
    for part in parts:
        for row in part:
            for key in sorted(row):
                digest.update(f"{key} {len(row[key])}\n".encode())
                digest.update(np.asarray(row[key], dtype=np.int64).tobytes())
        digest.update(b"end\n")
    return digest.hexdigest()


def digest_state(model: Any, optimizer: Any) -> str:
    """sha256 of the trainable parameters and of the tensors in the optimizer's state."""
    from torch.utils._pytree import keystr, tree_flatten_with_path

    state, _ = tree_flatten_with_path(optimizer.state_dict())  # that of a wrapper (Lookahead, …) has a form of its own
    named = [*_trained(model), *((keystr(path), value) for path, value in state if hasattr(value, "dtype"))]
    return digest_tensors(named)


def _trained(model: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def environment(versions: dict[str, Any]) -> dict[str, Any]:
    """What bitwise equality needs to stay the same: versions, this package's code, device, instruction set, threads."""
    import torch

    kept = {key: value for key, value in versions.items() if key not in ("date", "machine", "git_commit")}
    code = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(Path(__file__).parents[1].rglob("*.py"))))
    return {**kept, "code": code.hexdigest(), "cpu": torch.backends.cpu.get_cpu_capability()}


def read_settings(out: Path) -> dict[str, Any] | None:
    """What ``settings.json`` of a run says; None where the run never came to write it.

    Raises:
        LoRARiteValueError: there is no run in the folder, or the file is damaged.
    """
    path = out / SETTINGS
    if not path.is_file():
        if (out / LOCK).is_file():
            return None
        raise LoRARiteValueError(f"{out} holds no run to resume (no {SETTINGS})")
    try:
        stored = parse_json(path.read_text(encoding="utf-8"))
        parts = [stored["id"], stored["changes"], *(stored[part] for part in PARTS)]
        if [type(part) for part in parts] != [str, list, dict, dict, dict]:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise LoRARiteValueError(f"{path} is damaged: restore it, or train anew elsewhere") from None
    return stored


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """What differs between two mappings: {key: [before, now]}."""
    now = json.loads(json.dumps(now))
    return {k: [before.get(k), now.get(k)] for k in sorted({*before, *now}) if before.get(k) != now.get(k)}


def refuse_changes(out: Path, changed: dict[str, list[Any]], allowed: list[str] | None) -> None:
    """Raises LoRARiteValueError where something changed that ``--allow_changed`` does not name."""
    refused = {key: values for key, values in changed.items() if key not in (allowed or [])}
    if refused:
        raise LoRARiteValueError(
            f"cannot resume {out} with other settings, data or versions ({list_changes(refused)}); {ALLOW_CHANGED}"
        )


def list_changes(changed: dict[str, list[Any]]) -> str:
    """What :func:`changes` has found, on one line."""
    short = lambda value: f"{value[:12]}…" if re.fullmatch("[0-9a-f]{40,}", str(value)) else repr(value)
    return "; ".join(f"{key}: {short(a)} → {short(b)}" for key, (a, b) in changed.items())


# ------------------------------------------------------------------------------------------------------------ the run


class Run:
    """The folder of one run, whose lock is held: begins or resumes it, saves, stops and fails in order.

    Args:
        out: the folder.
        settings, inputs: what the run is made of: options, and digests of base weights and tokens.
        versions: see :func:`environment`.
        allow_changed: names of settings, inputs or versions that may differ from the interrupted run.
    """

    def __init__(
        self,
        out: Path,
        settings: dict[str, Any],
        inputs: dict[str, Any],
        versions: dict[str, Any],
        allow_changed: list[str] | None,
    ):
        self.out, self.folder = out, out / "checkpoints"
        self.allow_changed = allow_changed
        self.record: dict[str, Any] = {
            "id": uuid.uuid4().hex, "settings": settings, "inputs": inputs, "environment": environment(versions),
            "changes": [],
        }  # fmt: skip
        self.checkpoint: Path | None = None
        self.last_saved: int | None = None

    def begin(self, resume: bool) -> None:
        """Writes ``settings.json``; where the run is resumed, checks it and chooses the checkpoint to go on from."""
        stored = read_settings(self.out) if resume else None
        if stored is None:
            write_json(self.out / SETTINGS, self.record)
            return
        differ = {part: changes(stored[part], self.record[part]) for part in PARTS}
        changed = {k: v for found in differ.values() for k, v in found.items() if k not in PLACES}
        refuse_changes(self.out, changed, self.allow_changed)
        self.record.update(id=stored["id"], changes=stored["changes"])
        self.checkpoint, problems = newest_verified(self.folder, stored["id"])
        clear(self.folder, problems)
        if self.checkpoint is None:
            (self.out / "layers.jsonl").unlink(missing_ok=True)  # of steps that are computed again
            warn(f"{self.out} had saved no checkpoint yet: the run starts from the beginning")
        else:
            self.last_saved = step_of(self.checkpoint)
        if changed:
            self.record["changes"].append({"after_step": self.last_saved or 0, "changed": changed})
        if any(differ.values()):
            write_json(self.out / SETTINGS, self.record)
        if changed:
            warn(
                f"changed since the run was interrupted: {', '.join(changed)}; it is no longer bitwise the run that it "
                "would have been"
            )

    def train(self, trainer: Any, steps: int) -> None:
        """Trains from the checkpoint on, or from the beginning. Signals end it after a step and a checkpoint.

        Raises:
            InterruptedRunError, NonFiniteError, WriteError, LoRARiteError: see the exit codes in docs/reliability.md.
        """
        trainer.run = self
        try:
            if self.checkpoint is not None and step_of(self.checkpoint) >= steps:
                self._load(trainer, steps)
                return
            with _stop_after_step(trainer) as received:
                trainer.add_callback(self._checks(trainer))
                trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
            if received:
                step = trainer.state.global_step
                raise InterruptedRunError(
                    f"stopped by {received[0].name} after step {step}, which is saved; {RESUME}", received[0]
                )
        except NonFiniteError as error:
            self.fail(str(error), trainer.state.global_step)
        except RuntimeError as error:
            if "CUDA error" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise LoRARiteError(f"the GPU's context is lost ({reason}); {self._where_to_go_on()}") from error

    def fail(self, reason: str, step: int) -> None:
        """Records that the run has failed, exports nothing, and raises NonFiniteError."""
        message = f"{reason.rstrip('.')}. No adapter was written; {self._where_to_go_on()}"
        record = {"status": "failed", "error": reason, "step": step, "last_checkpoint": self.last_saved}
        write_json(self.out / FAILED, {**record, **self.record})
        raise NonFiniteError(message)

    def _where_to_go_on(self) -> str:
        if self.last_saved is None:
            return "there is no checkpoint (--save_every 0?)"
        return f"the last good checkpoint is that of step {self.last_saved}: {RESUME}"

    def _load(self, trainer: Any, steps: int) -> None:
        """The state after the last step, of a run that was killed after it had saved that."""
        from transformers import TrainerState

        folder = str(self.checkpoint)
        trainer._load_from_checkpoint(folder)
        trainer.create_scheduler(num_training_steps=steps)
        trainer._load_optimizer_and_scheduler(folder)
        trainer.state = TrainerState.load_from_json(str(Path(folder) / "trainer_state.json"))
        self._go_on(trainer)

    def _go_on(self, trainer: Any) -> None:
        """Checks that adapter and optimizer in memory are those that were saved (nothing was silently left out in
        loading), and has an optimizer with two modes train where it did."""
        import torch
        from safetensors.torch import load_file

        from ..optim.modes import two_modes

        if self.checkpoint is None:
            return
        if digest_state(trainer.model, trainer.optimizer) != read_manifest(self.checkpoint)["state"]:
            raise CheckpointError(f"{self.checkpoint} does not give back the adapter and the optimizer that were saved")
        if (saved := self.checkpoint / TRAINING).is_file():
            two_modes(trainer.optimizer).train()
            values = load_file(saved)
            with torch.no_grad():
                for name, p in _trained(trainer.model):
                    p.copy_(values[name])

    def _checks(self, trainer: Any) -> Any:
        from transformers import TrainerCallback

        from ..integrations.peft import unwrap
        from ..optim.optimizer import LoRARite

        run = self

        class Checks(TrainerCallback):
            """Compares what was loaded with what was saved, and stops at a loss that is not finite.

            LoRARite skips the step of a non-finite gradient and raises by itself at the third in a row; any other
            optimizer has NaN in its state by now."""

            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                run._go_on(trainer)

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                loss = (logs or {}).get("loss", 0.0)
                if abs(loss) < float("inf") or isinstance(unwrap(kwargs.get("optimizer")), LoRARite):
                    return
                raise NonFiniteError(f"the loss is {loss} at step {state.global_step}: lower --lr")

        return Checks()

    def save(self, trainer: Any, write: Callable[[], None]) -> None:
        """Has the Trainer write its checkpoint, seals it, and rotates the older ones.

        Raises:
            NonFiniteError: the adapter is not finite; nothing is written.
            WriteError: it cannot be written; what was written of it is removed.
        """
        from safetensors.torch import save_file

        from ..optim.modes import evaluating, two_modes

        step = trainer.state.global_step
        for name, p in _trained(trainer.model):
            if not p.isfinite().all():
                raise NonFiniteError(f"{name} contains NaN or Inf at step {step}: lower --lr")
        checkpoint = self.folder / f"checkpoint-{step}"
        with writing(checkpoint, f"the checkpoint of step {step}", self._where_to_go_on):
            failpoint("checkpoint begins")
            with evaluating(trainer.optimizer):
                write()
                state = digest_state(trainer.model, trainer.optimizer)
            if two_modes(trainer.optimizer) is not None:
                training = {name: p.detach().contiguous() for name, p in _trained(trainer.model)}
                save_file(training, checkpoint / TRAINING)
            failpoint("checkpoint written")
            seal(checkpoint, self.record["id"], state)
        self.last_saved = step
        rotate(self.folder, self.record["id"])

    def finish(self, export: Callable[[Path], None], result: dict[str, Any]) -> None:
        """Writes the adapter, then the result: a run with ``result.json`` is finished."""
        with writing(self.out / ".adapter.tmp", "the result", self._where_to_go_on):
            write_folder(self.out / "adapter", export)
            write_json(self.out / RESULT, result)
        (self.out / FAILED).unlink(missing_ok=True)


def crash_safe(trainer_class: type) -> type:
    """A class of transformers' Trainer whose checkpoints are sealed by its ``run``."""

    class CrashSafeTrainer(trainer_class):  # type: ignore[misc, valid-type]
        run: Run

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            self.run.save(self, lambda: super(CrashSafeTrainer, self)._save_checkpoint(*args, **kwargs))

    return CrashSafeTrainer


@contextmanager
def writing(path: Path, what: str, advice: Callable[[], str]) -> Iterator[None]:
    """Turns errors of writing, of the system, safetensors or torch, into WriteError; removes the folder ``path``."""
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:
        # torch's writer raises RuntimeError "[enforce fail at inline_container.cc:…] …", tokenizers a bare Exception
        known = isinstance(error, (OSError, SafetensorError))
        if not (known or re.search(r"inline_container|PytorchStreamWriter|\(os error \d+\)", str(error))):
            raise
        shutil.rmtree(path, ignore_errors=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise WriteError(f"cannot write {what} into {path.parent}: {reason}; {advice()}") from error


def check_space(folder: Path, model: Any) -> None:
    """Raises WriteError where the disk cannot hold the checkpoints: ``KEPT`` and the one being written, each of the
    adapter and at most twice that of optimizer state, float32."""
    elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed, free = (KEPT + 1) * 3 * 4 * elements, shutil.disk_usage(folder).free
    if free < needed:
        raise WriteError(
            f"{folder} has {free / 1e6:,.0f} MB free, and {KEPT + 1} checkpoints need about {needed / 1e6:,.0f} MB: "
            "free some, choose another --out, or --save_every 0"
        )


@contextmanager
def _stop_after_step(trainer: Any) -> Iterator[list[signal.Signals]]:
    """SIGINT, SIGTERM and SIGHUP make the Trainer save and stop after the present step. The second one acts at once.

    Yields the list of signals received. Signals that this process ignores (nohup) stay ignored."""
    from transformers import TrainerCallback

    received: list[signal.Signals] = []

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if received:
                control.should_save = control.should_training_stop = True

    trainer.add_callback(Stop())
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {n: h for n in numbers if (h := signal.getsignal(n)) not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: Any) -> None:
        received.append(signal.Signals(number))
        restore()
        message = f"lora-rite: {received[0].name}: finishing the step and saving it; once more stops at once\n"
        os.write(2, message.encode())  # print() is not safe here

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    for number in before:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        restore()
