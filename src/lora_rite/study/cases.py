"""A study's runs by case (a task at a rank) and optimizer, with the figures that the report has of them."""

import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..run.files import read_json
from .measures import GOOD, Rates, Reached, good_rates
from .recipe import tuned_adamw
from .statistics import Difference, curve, difference, mean_interval, plus_minus, smoothed, step_at

#: Measurements of a held-out loss below which it is no curve: before, after, and one between.
LEAST_POINTS = 3
#: By so much of it, the mean of equal losses may be above them: a curve that ends there has reached it.
ROUNDING = 1e-12


def all_cases(study: dict[str, Any], folder: Path) -> list["Case"]:
    """The cases of a study.json in its folder."""
    recipe = study["recipe"]
    return [Case(task, rank, study, folder) for task in recipe["tasks"] for rank in recipe["ranks"]]


class Outcome:
    """One optimizer in one case: its runs on the test split by seed, and its sweep."""

    def __init__(
        self,
        name: str,
        sweep: dict[str, Any],
        runs: list[dict[str, Any]],
        budgets: dict[int, dict[int, float]],
        tried_paths: dict[float, list[str]],
        folder: Path,
    ):
        self.name, self.lr, self.grid = name, sweep["best"], sweep["grid"]
        self.validation = dict(sweep["validation_loss"])
        self.tried_paths, self.budgets = tried_paths, budgets
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
    def rates(self) -> Rates | None:
        """The good learning rates."""
        return good_rates(self.validation)


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
            budgets: dict[int, dict[int, float]] = {}
            for run in own:
                if run.get("steps"):
                    budgets.setdefault(run["steps"], {})[run["seed"]] = run["loss"]
            own = [run for run in own if not run.get("steps")]
            self.in_order.append(Outcome(name, sweep, own, budgets, tried, folder))
        self.rows = sorted((row for row in self.in_order if row.losses), key=lambda row: row.mean)
        self.baseline = self.in_order[0]
        adamw = tuned_adamw({name: c["optimizer"] for name, c in study["recipe"]["optimizers"].items()})
        self.adamw = next((row for row in self.rows if row.name == adamw), None)
        finished = [result for row in self.in_order for result in row.finished]
        self.steps = finished[0]["settings"]["steps"] if finished else None
        curves = [curve(result) for result in finished]
        self.curves = bool(curves) and min(map(len, curves)) >= LEAST_POINTS
        #: Steps between two measurements of the held-out loss, at most.
        self.resolution = max((b[0] - a[0] for points in curves for a, b in pairwise(points)), default=0)
        self.lead = difference(self.rows[0].losses, self.rows[1].losses) if len(self.rows) > 1 else None

    @property
    def title(self) -> str:
        return f"{self.task}, rank {self.rank}"

    def is_best(self, row: Outcome) -> bool:
        """Whether the row leads by a difference that is significant."""
        return self.lead is not None and row is self.rows[0] and self.lead.verdict == "better"

    @property
    def metrics(self) -> list[str]:
        """The names of the evaluations."""
        return sorted({name for row in self.rows for name in row.accuracies})

    def accuracy(self, row: Outcome, metric: str) -> str:
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

    def accuracy_against_baseline(self, row: Outcome, metric: str) -> str:
        """Mean ± interval of the difference to the baseline over paired seeds: what is smaller cannot be detected."""
        pair = [r.accuracies.get(metric, {}) for r in (row, self.baseline)]
        return "–" if row is self.baseline or not all(pair) else plus_minus(*difference(*pair)[:2], digits=2)

    def against_baseline(self, row: Outcome) -> Difference:
        return difference(row.losses, self.baseline.losses)

    def steps_to_adamw(self, row: Outcome) -> Reached | None:
        """The steps after which the smoothed held-out curve of each seed is at AdamW's final loss of that seed; None
        where there is no AdamW, or the loss was measured at the ends alone."""
        if self.adamw is None or not self.curves:
            return None
        targets = {seed: loss for seed, loss in self.adamw.losses.items() if math.isfinite(loss) and seed in row.losses}
        curves = {seed: row.results[seed] for seed in targets if "diverged" not in row.results[seed]}
        points = {seed: smoothed(curve(result)) for seed, result in curves.items()}
        limits = {seed: loss + ROUNDING * abs(loss) for seed, loss in targets.items()}
        when = {s: step_at(points[s], limit) if s in points else None for s, limit in limits.items()}
        return Reached(when) if when else None

    def seconds_to_adamw(self, row: Outcome) -> Reached | None:
        """Those steps times the row's median step time; None where that is not known."""
        steps, time = self.steps_to_adamw(row), row.median("seconds", "step")
        return None if steps is None or not time > 0 else steps.times(time)

    @property
    def budgets(self) -> list[int]:
        """All numbers of steps that runs of the case have."""
        return sorted({steps for row in self.rows for steps in self.by_budget(row)})

    def by_budget(self, row: Outcome) -> dict[int, dict[int, float]]:
        """The row's losses by seed after each number of steps that it was run with, the full one among them, in
        order."""
        full = {} if self.steps is None else {self.steps: row.losses}
        return dict(sorted({**row.budgets, **full}.items()))

    def budget_to_adamw(self, row: Outcome) -> int | None:
        """Steps of the shortest run whose mean loss over seeds is no higher than AdamW's full run's; None where
        none is."""
        if self.adamw is None or not math.isfinite(self.adamw.mean):
            return None
        mean = lambda losses: statistics.fmean(losses.values()) if losses else math.inf
        reached = (steps for steps, losses in self.by_budget(row).items() if mean(losses) <= self.adamw.mean)
        return next(reached, None)

    def measures(self, row: Outcome) -> dict[str, Any]:
        """The row's figures for study.json."""
        steps, seconds, rates = self.steps_to_adamw(row), self.seconds_to_adamw(row), row.rates
        budgets = {
            "loss_by_budget": {steps: mean_interval(list(found.values())) for steps, found in row.budgets.items()},
            "budget_to_adamw": self.budget_to_adamw(row),
        }
        return {
            "task": self.task,
            "rank": self.rank,
            "optimizer": row.name,
            "loss": {"mean": row.mean, "half_width": row.half_width},
            "steps_to_adamw": None if steps is None else steps.as_json(),
            "seconds_to_adamw": None if seconds is None else seconds.as_json(),
            "good_rates": None if rates is None else {**rates._asdict(), "within": GOOD},
            **(budgets if row.budgets else {}),
        }

    def time_ratio(self, row: Outcome) -> float:
        """The row's time of a step over the baseline's."""
        own, baseline = (r.median("seconds", "step") for r in (row, self.baseline))
        return own / baseline if baseline else math.nan

    def score(self, row: Outcome) -> dict[str, int]:
        """Against how many of the others the row is better, worse, or neither significantly."""
        verdicts = [difference(row.losses, other.losses).verdict for other in self.rows if other is not row]
        return {verdict: verdicts.count(verdict) for verdict in ("better", "worse", "not significant")}
