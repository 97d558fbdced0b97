"""Triton's interpreter, faster: it makes ``triton.language`` interpretable anew in every call of a device function,
which takes half of the time, though the kernel that calls has done it already."""

from triton.runtime.interpreter import InterpretedFunction

_patched = set()
_slow = InterpretedFunction.__call__


def _call(self, *args, **kwargs):
    module = self.fn.__module__
    if module.startswith("lora_rite.") or module in _patched:
        return self.rewrite()(*args, **kwargs)
    _patched.add(module)
    return _slow(self, *args, **kwargs)


def hurry():
    InterpretedFunction.__call__ = _call
