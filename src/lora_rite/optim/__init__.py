"""What the optimizer needs beside the step: checks, AdamW for other parameters, states of other runs, statistics."""
