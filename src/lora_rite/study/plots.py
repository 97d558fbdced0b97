"""The pictures of a study's report, as SVG."""

import io
import math
import statistics
from collections.abc import Sequence

from .cases import Case
from .statistics import curve


def figure(case: Case, cases: Sequence[Case]) -> str:
    """Held-out loss over steps and over time (a thin line a seed, a thick one for the mean), and validation loss over
    the learning rates tried, as SVG. An optimizer has the same colour in all cases."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [row.name for row in cases[0].in_order]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": case.slug, "font.size": 9}):
        canvas, (by_step, by_time, by_lr) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
        top = max((curve(result)[0][1] for row in case.rows for result in row.finished), default=math.nan)
        for row in case.rows:
            color = plt.get_cmap("tab10")(names.index(row.name) % 10)
            curves = [curve(result) for result in row.finished]
            for axis, scale in ((by_step, 1.0), (by_time, row.median("seconds", "step"))):
                for points in curves:
                    axis.plot([s * scale for s, _ in points], [v for _, v in points], color=color, lw=0.5, alpha=0.4)
                if curves:
                    mean = [(s[0][0] * scale, statistics.fmean(v for _, v in s)) for s in zip(*curves, strict=True)]
                    axis.plot(*zip(*mean, strict=True), color=color, lw=1.8, label=f"{row.name}, lr {row.lr:g}")
            tried = {lr: loss for lr, loss in row.validation.items() if math.isfinite(loss)}
            by_lr.plot(list(tried), list(tried.values()), "o-", color=color, ms=3.5, lw=1.2, label=row.name)
            if row.lr in tried:
                by_lr.plot(row.lr, tried[row.lr], "o", color=color, ms=8)
        rates = sorted({lr for row in case.rows for lr in row.validation})
        low = min((min(row.validation.values(), default=math.inf) for row in case.rows), default=math.inf)
        if math.isfinite(low) and math.isfinite(top) and low < top:
            by_lr.set_ylim(low - 0.05 * (top - low), top)
        by_lr.set(title="validation loss, best rate marked", xlabel="learning rate", xscale="log")
        by_lr.set_xticks(rates, [f"{lr:g}" for lr in rates], rotation=60)
        by_lr.minorticks_off()
        by_step.set(title="test loss over steps", xlabel="step", ylabel="nat")
        by_time.set(title="test loss over training time", xlabel="seconds (steps × median step time)")
        for axis in (by_step, by_time, by_lr):
            axis.grid(alpha=0.3)
        if by_step.get_legend_handles_labels()[0]:  # (all may have diverged)
            by_step.legend(fontsize=8)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(canvas)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
