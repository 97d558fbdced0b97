"""Moments at which a test has a run die, or a write fail."""

import errno
import os
import signal
from collections import Counter

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
