"""``python -m lora_rite.cli``."""

import sys

from .program import main

sys.exit(main())
