"""The command line, ``lora-rite``."""

from .program import main

__all__ = ["main"]
