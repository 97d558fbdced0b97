"""What a run was made with, and the refusal to resume it with something else."""

import json
import re
from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError
from ..inputs import parse_json
from .files import LOCK

SETTINGS, RESULT, FAILED = "settings.json", "result.json", "failed.json"

#: Settings that say where something is; what is there is compared by its content (``inputs``).
PLACES = ("out", "data", "validation", "data_dir", "adapter", "chat_template")
#: What a message advises, for ``lora-rite train``; ``compare`` has words of its own.
RESUME = "go on with --resume"
ALLOW_CHANGED = "--allow_changed with these names goes on all the same, and no longer bitwise"
#: The parts of ``settings.json`` that a resumed run must share with the interrupted one.
PARTS = ("settings", "inputs", "environment")


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
