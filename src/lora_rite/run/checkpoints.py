"""Checkpoints that verify.

The Trainer writes the files of a checkpoint, in place. What makes a checkpoint of them is ``manifest.json``, with the
sha256 of each file, which is written last, after everything has reached the disk (:func:`seal`). A folder without it is
half-written and never read. The order of events that this rests on, and what is not promised: docs/reliability.md.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, WriteError, warn
from ..inputs import parse_json
from .digest import digest_file
from .failpoints import failpoint
from .files import sync_folder, sync_tree, write_json

MANIFEST = "manifest.json"
#: In a checkpoint of an optimizer with two modes, whose adapter is the one to evaluate: the parameters that it trains.
TRAINING = "training_parameters.safetensors"
#: In a checkpoint of a run that keeps them: the trained parameters at the lowest held-out loss so far.
BEST = "best.safetensors"

SCHEMA = 1
#: Verified checkpoints that rotation keeps.
KEPT = 2


def seal(folder: Path, run: str, state: str) -> None:
    """Makes a checkpoint of the files in ``folder``: brings them to the disk, then writes the manifest.

    Args:
        folder: ``checkpoint-STEP``, as the Trainer has written it.
        run: id of the run.
        state: digest of adapter and optimizer (:func:`digest_state`).
    """
    sync_tree(folder)
    failpoint("checkpoint synced")
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest_file(path)}
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }
    write_json(
        folder / MANIFEST, {"schema": SCHEMA, "run": run, "step": step_of(folder), "state": state, "files": files}
    )
    sync_folder(folder.parent)
    sync_folder(folder.parent.parent)


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
