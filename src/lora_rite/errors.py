"""The errors of lora-rite: all are :class:`LoRARiteError`, and also the built-in error that a caller would expect."""


class LoRARiteError(Exception):
    """Base of all errors that lora-rite raises on purpose."""


class LoRARiteValueError(LoRARiteError, ValueError):
    """A parameter, hyperparameter or state that cannot be used as given."""


class LoRARiteTypeError(LoRARiteError, TypeError):
    """An argument of the wrong kind."""


class NonFiniteError(LoRARiteError, RuntimeError):
    """NaN or Inf in a parameter, or in the gradients of several steps in a row."""
