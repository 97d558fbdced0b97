"""A study's runs by case (a task at a rank) and optimizer, with the figures that the report has of them."""

import math
import statistics
from pathlib import Path
from typing import Any

from ..run.files import read_json
from .statistics import Difference, difference, mean_interval, plus_minus, step_at

#: A learning rate is good where its validation loss exceeds the optimizer's best by no more than this share.
GOOD = 0.01


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
        text = plus_minus(mean, half_width, digits=2)
        return f"**{text}**" if others and difference(values, others[0]).verdict == "worse" else text

    def accuracy_against_baseline(self, row: Row, metric: str) -> str:
        """Mean ± interval of the difference to the baseline over paired seeds: what is smaller cannot be detected."""
        pair = [r.accuracies.get(metric, {}) for r in (row, self.baseline)]
        return "–" if row is self.baseline or not all(pair) else plus_minus(*difference(*pair)[:2], digits=2)

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
