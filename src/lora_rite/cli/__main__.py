"""``python -m lora_rite.cli``."""

import sys

from .main import main

sys.exit(main())
