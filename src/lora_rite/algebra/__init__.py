"""What the step is: batched pure functions of tensors. Nothing here knows parameters, groups or state."""
