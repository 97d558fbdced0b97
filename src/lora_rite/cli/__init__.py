"""The command line, ``lora-rite``."""

from .main import main

__all__ = ["main"]
