"""``lora-rite report``: what a study came to, as a page that needs no server, and the same as Markdown."""

import importlib.util
import io
import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LoRARiteValueError
from ..run.files import read_json

CONFIDENCE = 0.95
#: Fewer seeds decide nothing, whatever the test says of them.
LEAST_SEEDS = 3
#: A learning rate is good where its validation loss exceeds the optimizer's best by no more than this share.
GOOD = 0.01


class Difference(NamedTuple):
    """Mean of paired differences a − b over seeds, half the width of its 95% interval, and p of the paired t-test."""

    mean: float
    half_width: float
    p: float
    seeds: int

    @property
    def verdict(self) -> str:
        """Whether a is "better" (a loss: lower) or "worse", or the difference is "not significant"."""
        if self.seeds < LEAST_SEEDS or not self.p < 1 - CONFIDENCE:
            return "not significant"
        return "better" if self.mean < 0 else "worse"


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% interval by Student's t (NaN for one value)."""
    from scipy import stats

    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return mean, math.nan
    return mean, float(stats.sem(values) * stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))


def difference(a: dict[int, float], b: dict[int, float]) -> Difference:
    """The paired t-test of two optimizers' losses by seed, over the seeds that both have."""
    from scipy import stats

    seeds = sorted(set(a) & set(b))
    first, second = [a[s] for s in seeds], [b[s] for s in seeds]
    if len(seeds) < 2 or not all(map(math.isfinite, first + second)):
        mean = statistics.fmean(first) - statistics.fmean(second) if seeds else math.nan
        return Difference(mean, math.nan, math.nan, len(seeds))
    mean, half_width = mean_interval([x - y for x, y in zip(first, second, strict=True)])
    spread = len({round(x - y, 12) for x, y in zip(first, second, strict=True)}) > 1
    p = float(stats.ttest_rel(first, second).pvalue) if spread else float(mean == 0)  # type: ignore[attr-defined]
    return Difference(mean, half_width, p, len(seeds))


def step_at(result: dict[str, Any], loss: float) -> float | None:
    """The step at which a run's held-out loss first reaches ``loss``, interpolated between two measurements."""
    points = curve(result)
    if points[0][1] <= loss:
        return 0.0
    for (step, value), (next_step, next_value) in pairwise(points):
        if next_value <= loss:
            return step + (next_step - step) * (value - loss) / (value - next_value)
    return None


def curve(result: dict[str, Any]) -> list[tuple[int, float]]:
    """(step, held-out loss) of a run, from before training to after it."""
    points = [(0, result["held_out"]["before"])]
    points += [(entry["step"], entry["held_out_loss"]) for entry in result["held_out_losses"]]
    end = result["settings"]["steps"]
    return points if points[-1][0] == end else [*points, (end, result["held_out"]["after"])]


class Row:
    """One optimizer in one case: its runs on the test split by seed, and its sweep."""

    def __init__(
        self,
        name: str,
        sweep: dict[str, Any],
        runs: list[dict[str, Any]],
        tried_paths: dict[float, list[str]],
        folder: Path,
    ):
        self.name, self.lr, self.grid = name, sweep["best"], sweep["grid"]
        self.validation = dict(sweep["validation_loss"])
        self.tried_paths = tried_paths
        self.paths = {run["seed"]: run["path"] for run in runs}
        self.losses = {run["seed"]: run["loss"] for run in runs}
        self.results = {seed: read_json(folder / p, "settings", "held_out") for seed, p in self.paths.items()}
        self.accuracies: dict[str, dict[int, float]] = {}
        for seed, path in self.paths.items():
            if "accuracy" in self.results[seed]:
                self.accuracies.setdefault("accuracy", {})[seed] = 100 * self.results[seed]["accuracy"]["after"]
            for file in sorted((folder / path).parent.glob("evaluation/*.json")):
                record = read_json(file, "task", "results")
                figures = record["results"]
                if "metric" not in figures:
                    continue  # of a text: its loss alone
                name = f"{record['task']}, {figures['metric'].partition(',')[0]}"
                self.accuracies.setdefault(name, {})[seed] = 100 * figures["metrics"][figures["metric"]]
        self.mean, self.half_width = mean_interval(list(self.losses.values())) if runs else (math.inf, math.nan)

    @property
    def finished(self) -> list[dict[str, Any]]:
        """The results of the runs that did not diverge."""
        return [result for result in self.results.values() if "diverged" not in result]

    def median(self, *keys: str) -> float:
        """The median over seeds of a figure of the results; NaN where none has it."""
        values = []
        for value in self.finished:
            for key in keys:
                value = value[key]
            values.append(value)
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else math.nan

    @property
    def good(self) -> list[float]:
        """The learning rates tried whose validation loss is within :data:`GOOD` of the best."""
        best = min(self.validation.values(), default=math.inf)
        return [lr for lr, loss in self.validation.items() if loss <= best * (1 + GOOD)]


class Case:
    """One task at one rank: a row for each optimizer, the best first."""

    def __init__(self, task: str, rank: int, study: dict[str, Any], folder: Path):
        self.task, self.rank, self.slug = task, rank, f"{task}-r{rank}"
        self.in_order = []
        for sweep in study["sweeps"]:
            name = sweep["optimizer"]
            if (sweep["task"], sweep["rank"]) != (task, rank):
                continue
            runs = [r for r in study["runs"] if (r["task"], r["rank"], r["optimizer"]) == (task, rank, name)]
            final = [r for r in runs if r["split"] == "test" and r["lr"] == sweep["best"]]
            tried: dict[float, list[str]] = {}
            for run in runs:
                if run["split"] == "validation":
                    tried.setdefault(run["lr"], []).append(run["path"])
            own = [run for run in final if run["seed"] in study["recipe"]["seeds"]]
            self.in_order.append(Row(name, sweep, own, tried, folder))
        self.rows = sorted((row for row in self.in_order if row.losses), key=lambda row: row.mean)
        self.baseline = self.in_order[0]
        self.lead = difference(self.rows[0].losses, self.rows[1].losses) if len(self.rows) > 1 else None

    @property
    def title(self) -> str:
        return f"{self.task}, rank {self.rank}"

    def is_best(self, row: Row) -> bool:
        """Whether the row leads by a difference that is significant."""
        return self.lead is not None and row is self.rows[0] and self.lead.verdict == "better"

    @property
    def metrics(self) -> list[str]:
        """The names of the evaluations."""
        return sorted({name for row in self.rows for name in row.accuracies})

    def accuracy(self, row: Row, metric: str) -> str:
        """Mean ± interval in percent of the row, in bold where it leads by a difference that is significant."""
        values = row.accuracies.get(metric, {})
        if not values:
            return "–"
        others = sorted(
            (other.accuracies[metric] for other in self.rows if other is not row and metric in other.accuracies),
            key=lambda found: -statistics.fmean(found.values()),
        )
        mean, half_width = mean_interval(list(values.values()))
        text = _plus_minus(mean, half_width, digits=2)
        return f"**{text}**" if others and difference(values, others[0]).verdict == "worse" else text

    def accuracy_against_baseline(self, row: Row, metric: str) -> str:
        """Mean ± interval of the difference to the baseline over paired seeds: what is smaller cannot be detected."""
        pair = [r.accuracies.get(metric, {}) for r in (row, self.baseline)]
        return "–" if row is self.baseline or not all(pair) else _plus_minus(*difference(*pair)[:2], digits=2)

    def against_baseline(self, row: Row) -> Difference:
        return difference(row.losses, self.baseline.losses)

    def steps_to_baseline(self, row: Row) -> float | None:
        """Mean over seeds of the step at which the row reaches the baseline's final loss of the same seed; None where
        one of them does not."""
        steps = [
            step_at(result, self.baseline.losses[seed])
            for seed, result in row.results.items()
            if seed in self.baseline.losses and "diverged" not in result
        ]
        known = [step for step in steps if step is not None]
        return statistics.fmean(known) if known and len(known) == len(row.losses) else None

    def time_ratio(self, row: Row) -> float:
        """The row's time of a step over the baseline's."""
        own, baseline = (r.median("seconds", "step") for r in (row, self.baseline))
        return own / baseline if baseline else math.nan

    def score(self, row: Row) -> dict[str, int]:
        """Against how many of the others the row is better, worse, or neither significantly."""
        verdicts = [difference(row.losses, other.losses).verdict for other in self.rows if other is not row]
        return {verdict: verdicts.count(verdict) for verdict in ("better", "worse", "not significant")}


def require_packages() -> None:
    """Raises ImportError, with the extra to install, where a package of the study is missing."""
    for package in ("filelock", "jinja2", "markdown_it", "matplotlib", "scipy"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'studies need {package}: pip install "lora-rite[study]"')


def report(folder: Path) -> Path:
    """Writes report.md, report.html (one file, figures inside) and figures/ into the folder of a study, also of one
    that is not finished. Returns the path of the page.

    Args:
        folder: of the study, as ``lora-rite compare --out`` names it.

    Raises:
        LoRARiteValueError: no study.json there, or it or a result that it names is missing or damaged.
    """
    path = folder / "study.json"
    if not path.is_file():
        raise LoRARiteValueError(f"{folder} holds no study (no study.json); lora-rite compare writes it")
    require_packages()
    import jinja2
    from markdown_it import MarkdownIt

    study = read_json(path, "recipe", "data", "runs", "sweeps", "complete", "versions")
    cases = [Case(t, r, study, folder) for t in study["recipe"]["tasks"] for r in study["recipe"]["ranks"]]
    figures = {f"figures/{case.slug}.svg": figure(case, cases).encode() for case in cases if case.rows}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_rite.study", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(g=lambda x: f"{x:g}", link=lambda p: p.replace(" ", "%20"))
    environment.filters.update(plus_minus=_plus_minus, known=_known)
    text = environment.get_template("report.md.j2").render(
        study=study,
        cases=cases,
        versions=_versions(study, folder),
        good=GOOD,
        least=LEAST_SEEDS,
        isfinite=math.isfinite,
    )
    markdown = MarkdownIt("commonmark").enable("table")

    def inline(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        return figures[tokens[index].attrGet("src").replace("%20", " ")].decode()

    markdown.add_render_rule("image", inline)
    page = environment.get_template("report.html.j2").render(title=study["recipe"]["title"], body=markdown.render(text))
    (folder / "figures").mkdir(exist_ok=True)
    for name, content in figures.items():
        (folder / name).write_bytes(content)
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html"


def _known(value: float, form: str) -> str:
    return form % value if math.isfinite(value) else "–"


def _versions(study: dict[str, Any], folder: Path) -> dict[str, str]:
    """Versions and machine of the runs, all of them where they differ, and the study's date."""
    paths = [path for run in study["runs"] if (path := folder / run["path"]).is_file()]
    known = [read_json(path).get("versions", {}) for path in paths]
    values = {key: {str(part[key]): None for part in known if key in part} for key in study["versions"]}
    return {
        key: str(last) if key == "date" else ", ".join(values[key] or [str(last)])
        for key, last in study["versions"].items()
    }


def _plus_minus(value: float, half_width: float = math.nan, digits: int = 3) -> str:
    if not math.isfinite(value):
        return "diverged"
    text = f"{value:.{digits}f}" + ("" if math.isnan(half_width) else f" ± {half_width:.{digits}f}")
    return text.replace("-", "−")


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
