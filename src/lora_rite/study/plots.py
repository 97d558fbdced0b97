"""The pictures of a study's report, as SVG, in which an optimizer has the same colour in all cases; and of a run."""

import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

from .cases import Case, Outcome
from .statistics import curve

#: The share of a run over which its training loss is averaged, for the eye.
WINDOW = 0.05


def figure(case: Case, cases: Sequence[Case]) -> str:
    """The loss over steps and over time (a thin line a seed, a thick one for the mean), the validation loss over the
    learning rates tried, and, where there are budgets, the loss over these. Dashed: AdamW's final loss.

    The loss over steps is the held-out one, or the training loss where that was measured at the ends alone.
    """
    training = not case.curves and all(result.get("losses") for row in case.rows for result in row.finished)
    names = [row.name for row in cases[0].in_order]
    budgets = any(row.budgets for row in case.rows)
    canvas, axes = _canvas(3 + budgets)
    by_step, by_time, by_lr = axes[:3]
    for row in case.rows:
        color = _color(names.index(row.name))
        _draw_curves(by_step, by_time, row, color, training)
        if budgets:
            means = {steps: statistics.fmean(found.values()) for steps, found in case.by_budget(row).items() if found}
            axes[3].plot(list(means), list(means.values()), "o-", color=color, ms=3.5, lw=1.2)
    if case.adamw is not None and math.isfinite(case.adamw.mean):
        for axis in (*[by_step, by_time] * case.curves, *axes[3:]):
            axis.axhline(case.adamw.mean, color=_color(names.index(case.adamw.name)), lw=0.8, ls="--")
    what = "training loss (running mean)" if training else "test loss"
    by_step.set(title=f"{what} over steps", xlabel="step", ylabel="nat")
    by_time.set(title=f"{what} over training time", xlabel="seconds (steps × median step time)")
    _draw_rates(by_lr, [(row.name, row, _color(names.index(row.name))) for row in case.rows])
    by_lr.set(title="validation loss, best rate marked")
    _limit(by_lr, case.rows)
    if budgets:
        axes[3].set(title="test loss over budget, a run each", xlabel="steps of the run")
    if by_step.get_legend_handles_labels()[0]:  # (all may have diverged)
        by_step.legend(fontsize=8)
    return _svg(canvas, case.slug)


def figure_of_ranks(cases: Sequence[Case]) -> str:
    """The validation loss over the learning rates tried, a panel for each optimizer and a line for each rank.

    Args:
        cases: of one task, by rank.
    """
    from matplotlib import colormaps

    names = [row.name for row in cases[0].in_order]
    slug = f"{cases[0].task}-ranks"
    canvas, axes = _canvas(len(names), sharey=True)
    for name, axis in zip(names, axes, strict=True):
        rows = [(case.rank, row) for case in cases for row in case.in_order if row.name == name]
        shades = [colormaps["viridis"](i / len(rows)) for i in range(len(rows))]  # (the last is too light a yellow)
        _draw_rates(axis, [(f"rank {rank}", row, shade) for (rank, row), shade in zip(rows, shades, strict=True)])
        axis.set(title=name)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    canvas.supylabel("validation loss, nat")
    _limit(axes[0], [row for case in cases for row in case.in_order])
    return _svg(canvas, slug)


def figure_of_run(result: dict[str, Any]) -> bytes:
    """The loss of one run over its steps, as PNG: of training (thin as logged, thick its running mean) and held out.

    Args:
        result: its result.json.
    """
    import matplotlib.pyplot as plt

    settings = result["settings"]
    canvas, (axis,) = _canvas(1, size=(8, 4.5))
    if entries := result.get("losses", []):
        steps = [entry["step"] for entry in entries]
        axis.plot(steps, [entry["loss"] for entry in entries], color="tab:blue", lw=0.6, alpha=0.4)
        means = [mean for _, mean in _training_curve(result)]
        axis.plot(steps, means, color="tab:blue", lw=1.8, label="training (thick: running mean)")
    if "before" in result["held_out"]:  # not so in the record of a run that has diverged
        held_out = curve(result)
        axis.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", ms=4, lw=1.8, label="held out")
    words = [f"{key} {settings[key]}" for key in ("model", "optimizer", "lr", "rank") if settings.get(key) is not None]
    axis.set(title=", ".join(words), xlabel="step", ylabel="loss, nat a token")
    if axis.lines:
        axis.legend()
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    plt.close(canvas)
    return buffer.getvalue()


def _canvas(panels: int, sharey: bool = False, size: tuple[float, float] = (13 / 3, 4)) -> tuple[Any, list[Any]]:
    """A figure with so many panels of a size in inches, three in a row, or two by two."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 2 if panels == 4 else min(panels, 3)
    rows = math.ceil(panels / columns)
    figsize = (size[0] * columns, size[1] * rows)
    with matplotlib.rc_context({"font.size": 9}):
        canvas, grid = plt.subplots(rows, columns, squeeze=False, sharey=sharey, figsize=figsize, layout="constrained")
    for axis in grid.flat[panels:]:
        axis.remove()
    for axis in grid.flat[:panels]:
        axis.grid(alpha=0.3)
    return canvas, list(grid.flat[:panels])


def _svg(canvas: Any, slug: str) -> str:
    import matplotlib
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": slug, "font.size": 9}):
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(canvas)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _color(number: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab10"](number % 10)


def _draw_curves(by_step: Any, by_time: Any, row: Outcome, color: Any, training: bool) -> None:
    curves = [_training_curve(result) if training else curve(result) for result in row.finished]
    for axis, scale in ((by_step, 1.0), (by_time, row.median("seconds", "step"))):
        for points in curves:
            axis.plot([s * scale for s, _ in points], [v for _, v in points], color=color, lw=0.5, alpha=0.4)
        if curves:
            mean = [(s[0][0] * scale, statistics.fmean(v for _, v in s)) for s in zip(*curves, strict=True)]
            axis.plot(*zip(*mean, strict=True), color=color, lw=1.8, label=f"{row.name}, lr {row.lr:g}")


def _training_curve(result: dict[str, Any]) -> list[tuple[int, float]]:
    """(step, running mean of the training loss) of a run; of as many losses before a step as after it: one that lags
    would look worse than it is."""
    losses = [entry["loss"] for entry in result["losses"]]
    half = int(len(losses) * WINDOW / 2)
    means = [statistics.fmean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]
    return [(entry["step"], mean) for entry, mean in zip(result["losses"], means, strict=True)]


def _draw_rates(axis: Any, lines: Sequence[tuple[str, Outcome, Any]]) -> None:
    """Validation loss over the learning rates tried, the chosen one marked, for (label, row, colour)."""
    for label, row, color in lines:
        tried = {lr: loss for lr, loss in sorted(row.validation.items()) if math.isfinite(loss)}
        if tried:
            axis.plot(list(tried), list(tried.values()), "o-", color=color, ms=3.5, lw=1.2, label=label)
        if row.lr in tried:
            axis.plot(row.lr, tried[row.lr], "o", color=color, ms=8)
    rates = sorted({lr for _, row, _ in lines for lr in row.validation})
    axis.set(xlabel="learning rate", xscale="log")
    axis.set_xticks(rates, [f"{lr:g}" for lr in rates], rotation=60)
    axis.minorticks_off()


def _limit(axis: Any, rows: Sequence[Outcome]) -> None:
    """Leaves out of a panel of learning rates what is worse than the loss before training."""
    losses = [loss for row in rows for loss in row.validation.values() if math.isfinite(loss)]
    before = max((curve(result)[0][1] for row in rows for result in row.finished), default=math.nan)
    if losses and min(losses) < (top := min(before, max(losses))):
        margin = 0.05 * (top - min(losses))
        axis.set_ylim(min(losses) - margin, top + margin)
