"""Whether an optimizer's step on W depends on the factorisation: :func:`lora_rite.audit`."""

from .audit import audit
from .problems import SYNTHETIC, random_tokens
from .runs import CONDITIONS, TOLERANCE, Transform, transforms

__all__ = ["CONDITIONS", "SYNTHETIC", "TOLERANCE", "Transform", "audit", "random_tokens", "transforms"]
