"""Fine-tuning with LoRA-RITE: what the command line runs. Uses the public API of ``lora_rite`` only.

Needs the extra: ``pip install "lora-rite[finetune]"``. Modules are imported where a verb needs them.
"""

import logging

# where it is installed, PEFT imports it, and it warns of a missing kernel for 4-bit inference
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
