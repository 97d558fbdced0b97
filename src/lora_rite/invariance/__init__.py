"""Whether an optimizer's step on W depends on the factorisation: :func:`lora_rite.audit`."""

from .audit import audit, random_tokens, transforms

__all__ = ["audit", "random_tokens", "transforms"]
