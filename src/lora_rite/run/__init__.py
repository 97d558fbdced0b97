"""What makes a command safe: files written whole, checkpoints that are verified, settings that are compared."""
