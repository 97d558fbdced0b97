"""What a step costs, beside its peers: ``lora-rite bench``."""
