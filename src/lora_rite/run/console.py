"""Words and tables on the terminal."""

from collections.abc import Iterable, Sequence
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
