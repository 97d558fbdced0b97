"""Files and folders that are written whole or not at all, and the lock on a folder."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import FolderInUseError, LoRARiteValueError, WriteError
from ..inputs import one_line, parse_json, suffix
from .failpoints import failpoint
from .processes import is_main, together

LOCK = ".lock"


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
    sync_folder(path.parent)


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


def check_empty(option: str, folder: Path) -> None:
    """As :func:`check_folder`, and nothing may be in the folder."""
    check_folder(option, folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise LoRARiteValueError(f"{option} {folder} is not empty: name a new folder")


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
        sync_tree(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    failpoint(f"{folder.name} renamed")
    sync_folder(folder.parent)


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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds its lock, which the system takes back from a process that dies. Of the processes of a
    run, the first one holds it for all.

    Raises:
        FolderInUseError: another process has it.
        WriteError: the folder cannot be made or written.
        LoRARiteValueError: it is not one folder for all processes.
    """
    with ExitStack() as held:
        with together():
            if is_main():
                held.enter_context(_locked(folder))
        with together():
            if not (folder / LOCK).exists():
                raise LoRARiteValueError(f"{folder} must be on a disk that all machines share: some do not see it")
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
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


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there; its entries are durable by themselves
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):  # what a folder holds before the folder
        if path.is_dir():
            sync_folder(path)
        else:
            _sync_file(path)
    sync_folder(folder)
