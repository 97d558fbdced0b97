"""Words, tables and progress bars on the terminal."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any


def table(title: str | None, headings: Sequence[str], rows: Iterable[Sequence[Any]], left: Sequence[str] = ()) -> Any:
    """A table of rich's. Cells are shown by :class:`str`; the first column, and those under the headings ``left``, are
    left-justified, the others right-justified."""
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="left" if i == 0 or heading in left else "right")
    for cells in rows:
        made.add_row(*map(str, cells))
    return made


def as_text(shown: Any, width: int) -> str:
    """What rich prints of something on a terminal of so many columns."""
    from rich.console import Console

    text = StringIO()
    Console(file=text, width=width).print(shown)
    return text.getvalue()


def number(count: int, what: str) -> str:
    """As in "1 pair" and "2 pairs"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def shows_bars(progress: bool, on_stdout: bool = False) -> bool:
    """Whether there are progress bars: where they are wanted and stderr (or stdout) is a terminal. In a file, a pipe or
    a notebook each state of a bar would stay."""
    stream = sys.stdout if on_stdout else sys.stderr
    return progress and stream is not None and stream.isatty()


@contextmanager
def bars(progress: bool) -> Iterator[None]:
    """Within, no bar of tqdm's is shown, whichever library makes it, unless :func:`shows_bars`."""
    if shows_bars(progress):
        yield
        return
    from tqdm import tqdm

    begin = tqdm.__init__

    def hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = begin
