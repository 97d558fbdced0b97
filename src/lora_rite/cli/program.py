"""``lora-rite``: reads the command line, runs the verb, and says what went wrong in a line and an exit code."""

import errno
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import InterruptedRunError, LoRARiteError, LoRARiteValueError, WriteError
from ..run import processes
from ..run.output import flush, tolerant_output

#: The exit code where whoever read the output has gone: that of SIGPIPE.
READER_GONE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of ``lora-rite``. Returns the exit code: 0, 2 for wrong usage, 3 where an audit does not pass,
    128 + n for signal n, 141 where whoever read the output has gone, and 1 or the code of the error's class
    (:mod:`lora_rite.errors`) otherwise."""
    with tolerant_output(), processes.quiet():
        try:
            code = _main(argv)
        except SystemExit:  # of --help
            if isinstance(flush(sys.stdout), BrokenPipeError):
                return READER_GONE
            raise
        except BrokenPipeError:
            if not _reader_is_gone():
                raise
            code = READER_GONE
        lost = flush(sys.stdout)
        if isinstance(lost, BrokenPipeError):
            return READER_GONE
        if lost is not None and code == 0:  # else it has been said
            print(f"lora-rite: error: cannot write the output: {lost.strerror}", file=sys.stderr)
            return WriteError.exit_code
        return code


def _reader_is_gone() -> bool:
    """Whether a BrokenPipeError is of stdout or stderr: an empty line tells, what failed may be in no buffer now."""
    errors = [flush(stream, "\n") for stream in (sys.stdout, sys.stderr)]
    return any(isinstance(error, BrokenPipeError) for error in errors)


def _main(argv: Sequence[str] | None) -> int:
    try:
        import docstring_parser  # noqa: F401
        import jsonargparse  # noqa: F401
    except ImportError:
        print('lora-rite: the command line needs its extra: pip install "lora-rite[finetune]"', file=sys.stderr)
        return 1
    from .parser import CommandLine
    from .registry import GROUPS, VERBS

    try:
        verb, options = CommandLine(VERBS, GROUPS).parse(sys.argv[1:] if argv is None else argv)
    except LoRARiteValueError as error:
        _tell("lora-rite: error: ", error)
        return 2
    debug = options.pop("debug")
    with warnings.catch_warnings():
        if not debug:
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            warnings.showwarning = lambda message, *_, **__: print(f"lora-rite: {message}", file=sys.stderr)
        return _run(verb, VERBS[verb].run, options, debug)


def _run(name: str, verb: Callable[..., int | None], options: dict[str, Any], debug: bool) -> int:
    """Runs a verb; what it raises becomes a line and the exit code, unless in ``debug``."""
    try:
        if name != "train":
            processes.check_alone(f"lora-rite {name}")
        code = verb(**options) or 0
    except KeyboardInterrupt:
        _tell("lora-rite: ", "interrupted")
        return 130
    except (LoRARiteError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return READER_GONE
        if debug:
            raise
        what = "" if isinstance(error, InterruptedRunError) else "error: "
        _tell(f"lora-rite {name}: {what}", error)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
        code = WriteError.exit_code if full else getattr(error, "exit_code", 1)
        if not hasattr(error, "everywhere"):  # the others may be waiting for this process: it must not wait for them
            return code
    processes.leave()
    return code


def _tell(before: str, error: Exception | str) -> None:
    """Prints an error, in one of the processes that have it."""
    if processes.tells(error):
        print(f"{before}{error}", file=sys.stderr)
