"""How a step is done in PyTorch: its phases, as functions from values to values."""
