"""The ways in which a step can be computed, and the one place where tests choose among them (fixture ``engine``)."""

from dataclasses import replace

import pytest

from lora_rite import LoRARite
from lora_rite.plan.plan import Limits

#: Factors copied into one tensor and multiplied together; each multiplied as it lies; r×r matrices by iterations
#: instead of LAPACK. A further engine is one more line here, and what chooses it one in :func:`use`.
ENGINES = {
    "stacked": Limits(direct_elements=10**9, iterate=False),
    "as_they_lie": Limits(direct_elements=0, iterate=False),
    "iterative": Limits(direct_elements=10**9, iterate=True),
}


def use(patch: pytest.MonkeyPatch, engine: str, **limits):
    """All optimizers step by this engine until ``patch`` is undone, with further ``limits``."""
    patch.setattr(LoRARite, "_limits", replace(ENGINES[engine], **limits))
