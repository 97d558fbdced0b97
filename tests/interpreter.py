"""Triton's interpreter on a CPU, as tests want it: there, faster, and silent about what a GPU does in silence."""

import os
import warnings
from functools import cache

import pytest


def use_interpreter():
    """The module triton. Skips what calls this, a test or a module of tests, where there is no interpreter for it."""
    triton = pytest.importorskip("triton", reason='needs triton: pip install "lora-rite[kernels]"')
    if int(triton.__version__.split(".")[1]) < 7:
        pytest.skip("the interpreter of triton 3.6 fails with NumPy 2.4", allow_module_level=True)
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles for a GPU here", allow_module_level=True)
    _hurry()
    return triton


@cache
def _hurry():
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction

    patched, slow, run = set(), InterpretedFunction.__call__, InterpretedFunction.run

    def call(self, *args, **kwargs):
        """It makes ``triton.language`` interpretable anew in every call of a device function, which takes half of the
        time, though the kernel that calls has done it already."""
        module = self.fn.__module__
        if module.startswith("lora_rite.") or module in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(module)
        return slow(self, *args, **kwargs)

    def silently(self, *args, **kwargs):
        """NumPy warns of what a GPU makes Inf or NaN of."""
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            return run(self, *args, **kwargs)

    InterpretedFunction.__call__, InterpretedFunction.run = call, silently
    # Each takes an eighth of the time: a table of dtypes made in each call, and sums of integers again in 64 bits, for
    # an assertion that only debugging makes.
    known, look_up = cache(interpreter._get_np_dtype), interpreter._get_np_dtype
    interpreter._get_np_dtype = lambda dtype: (look_up if dtype.scalar.is_ptr() else known)(dtype.scalar)
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
