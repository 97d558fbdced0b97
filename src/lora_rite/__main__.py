"""``python -m lora_rite``, the command line."""

import sys

from .cli import main

sys.exit(main())
