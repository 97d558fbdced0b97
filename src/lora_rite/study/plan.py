"""The plan of a study on the terminal: what is done, what is to do, and how long that will take."""

import math
from pathlib import Path

from ..run.console import number, table
from .search import FINALISTS, MAX_EXTENSIONS, Losses, Study


def print_plan(study: Study, losses: Losses, out: Path) -> None:
    """The study's lines with the learning rates to try and the runs done and to do."""
    from rich.console import Console

    rows = []
    for line in study.lines:
        runs, search = study.runs(line, losses), study.search(line, losses)
        best = search.best
        done = sum(run in losses for run in runs)
        known = len(runs) + study.later(line, losses)
        grid = ", ".join(f"{lr:g}" for lr in search.grid)
        rows.append((*line, grid, "" if best is None else f"{best:g}", done, known - done))
    headings = ("task", "rank", "optimizer", "lr to try", "best lr", "done", "to do")
    title = f"{study.recipe.title}: {study.steps_text()} a run"
    console = Console()
    console.print(table(title, headings, rows, left=("optimizer", "lr to try")))
    more = number(len(study.recipe.sweep_seeds) - 1, "more seed")
    console.print(
        f"{number(study.planned(losses), 'run')}, {len(losses)} of them finished in {out}; and in each line the best "
        f"{FINALISTS} rates with {more}, and up to {MAX_EXTENSIONS} more rates where the best lies on the edge of the "
        "grid",
        highlight=False,
        soft_wrap=True,
    )


def duration(seconds: float) -> str:
    """As in "3 min" or "2 h 05 min"."""
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
