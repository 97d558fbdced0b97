"""Which runs of a study are due: the choice of each learning rate, and the runs that follow from it."""

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from ..finetune.checks import DEFAULT_STEPS
from ..run.console import number
from .recipe import Recipe

#: Learning rates tried beyond the recipe's grid where the best lies on its edge.
MAX_EXTENSIONS = 4
#: So many of the best rates are tried with all of the sweep's seeds.
FINALISTS = 2


class Trial(NamedTuple):
    """One run of a study: trained on the task's training split, judged on ``split``; with so many ``steps`` where these
    are one of the recipe's budgets, else with the task's."""

    task: str
    rank: int
    optimizer: str
    lr: float
    seed: int
    split: str
    steps: int | None = None

    @property
    def folder(self) -> str:
        name = f"lr{self.lr:g}-seed{self.seed}-{self.split}" + (f"-{self.steps}steps" if self.steps else "")
        return f"runs/{self.task}/r{self.rank}/{self.optimizer}/{name}"

    def __str__(self) -> str:
        steps = f", {number(self.steps, 'step')}" if self.steps else ""
        return f"{self.task}, rank {self.rank}, {self.optimizer}, lr {self.lr:g}, seed {self.seed}{steps}"


class Line(NamedTuple):
    """One optimizer in one case."""

    task: str
    rank: int
    optimizer: str


Losses = dict[Trial, float]


class Search(NamedTuple):
    """The choice of a learning rate: the rates to try, the mean validation losses that there are, the runs that are
    due, and the chosen rate once none is."""

    grid: list[float]
    scores: dict[float, float]
    due: list[Trial]
    best: float | None


class Study:
    """The runs of a recipe: which are due, given the losses that there are."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.lines = [
            Line(task, rank, optimizer)
            for task in recipe.tasks
            for rank in recipe.ranks
            for optimizer in recipe.optimizers
        ]

    def search(self, line: Line, losses: Losses) -> Search:
        """Where the choice of a line's learning rate stands.

        The first of the sweep's seeds tries the whole grid, the others the :data:`FINALISTS` best rates; the least mean
        is chosen. Where that lies on the edge of the grid, the grid is extended and the search goes on.
        """
        grid, seeds = sorted(self.recipe.optimizers[line.optimizer].lr), self.recipe.sweep_seeds
        if len(grid) == 1:
            return Search(grid, {}, [], grid[0])
        most = len(grid) + MAX_EXTENSIONS
        while True:
            sweep = {lr: [Trial(*line, lr, seed, "validation") for seed in seeds] for lr in grid}
            found = {lr: [losses[run] for run in runs if run in losses] for lr, runs in sweep.items()}
            scores = {lr: statistics.fmean(values) for lr, values in found.items() if values}
            finalists = sorted(grid, key=lambda lr: scores.get(lr, math.inf))[:FINALISTS]
            due = [runs[0] for runs in sweep.values() if runs[0] not in losses]
            due = due or [run for lr in finalists for run in sweep[lr] if run not in losses]
            if due:
                return Search(grid, scores, due, None)
            best = finalists[0]
            if len(grid) == most or grid[0] < best < grid[-1]:
                return Search(grid, scores, [], best)
            if best == grid[0]:
                grid = [_round(best * best / grid[1]), *grid]
            else:
                grid = [*grid, _round(best * best / grid[-2])]

    def runs(self, line: Line, losses: Losses) -> list[Trial]:
        """All runs of a line that are known by now, those that are done first."""
        search, seeds = self.search(line, losses), self.recipe.sweep_seeds
        done = [Trial(*line, lr, seed, "validation") for seed in seeds for lr in search.scores]
        finals = []
        if search.best is not None:
            lengths = (None, *self.budgets(line.task))
            finals = [Trial(*line, search.best, seed, "test", steps) for steps in lengths for seed in self.recipe.seeds]
        return [run for run in done if run in losses] + search.due + finals

    def due(self, losses: Losses) -> list[Trial]:
        """The runs to do, in this order: in each case first those that choose the learning rates, then the final ones
        seed by seed, then those of the budgets, so that a study that is stopped has as many seeds of each optimizer."""
        cases, seeds, budgets = [line[:2] for line in self.lines], self.recipe.seeds, [None, *self.recipe.budgets]
        runs = [run for line in self.lines for run in self.runs(line, losses) if run not in losses]

        def order(run: Trial) -> tuple[int, ...]:
            final = run.split == "test"
            return cases.index(run[:2]), final, budgets.index(run.steps), final and seeds.index(run.seed)

        return sorted(runs, key=order)

    def planned(self, losses: Losses, task: str | None = None) -> int:
        """Number of runs in all, or of a task, as far as they are known: the final ones count before their lr is
        chosen."""
        lines = [line for line in self.lines if task in (None, line.task)]
        return sum(len(self.runs(n, losses)) + self.later(n, losses) for n in lines)

    def later(self, line: Line, losses: Losses) -> int:
        """The number of a line's final runs while their learning rate is not known, then 0."""
        if self.search(line, losses).best is not None:
            return 0
        return len(self.recipe.seeds) * (1 + len(self.budgets(line.task)))

    def budgets(self, task: str) -> list[int]:
        """The recipe's budgets that are not the task's own number of steps."""
        return [steps for steps in self.recipe.budgets if steps != self.steps()[task]]

    def planned_steps(self) -> int:
        """Optimizer steps of all runs that are known before any of them is done."""
        seeds, total = len(self.recipe.seeds), 0
        for task, steps in self.steps().items():
            budgets, lines = self.budgets(task), sum(line.task == task for line in self.lines)
            total += self.planned({}, task) * steps + lines * seeds * sum(budget - steps for budget in budgets)
        return total

    def train_options(self, task: str) -> dict[str, Any]:
        """The recipe's options of ``lora-rite train`` for a task: those that all runs share, and its own over them."""
        return {**self.recipe.train, **self.recipe.tasks[task].train}

    def steps(self) -> dict[str, int]:
        """The steps of a run, by task."""
        return {task: self.train_options(task).get("steps") or DEFAULT_STEPS for task in self.recipe.tasks}

    def steps_text(self) -> str:
        """The steps of a run, as in "200 steps" or "210 to 2500 steps"."""
        steps = {*self.steps().values(), *self.recipe.budgets}
        return number(min(steps), "step") if len(steps) == 1 else f"{min(steps)} to {max(steps)} steps"

    def options(self, run: Trial, out: Path) -> dict[str, Any]:
        """The options of ``lora-rite train`` for a run."""
        contender, data = self.recipe.optimizers[run.optimizer], out / "data" / run.task
        shared = self.train_options(run.task)
        if run.split == "validation" and "eval_every" in shared:
            shared["eval_every"] = 0  # a rate is chosen by its final loss: a curve would cost a third of a small run
        return {
            **shared,
            "data": data / "train.jsonl",
            "validation": data / f"{run.split}.jsonl",
            "optimizer": contender.optimizer,
            "optimizer_args": contender.optimizer_args or None,
            "lr": run.lr,
            "rank": run.rank,
            "seed": run.seed,
            "out": out / run.folder,
            **({"steps": run.steps} if run.steps else {}),
        }

    def evaluation(self, run: Trial, out: Path, data_dir: Path | None) -> dict[str, Any]:
        """The options of ``lora-rite eval`` for a final run."""
        options = self.options(run, out)
        weights = ("model", "bf16", "dtype", "load_in_4bit", "load_in_8bit", "trust_remote_code")
        shared = (*weights, "batch_size", "max_length")
        return {
            "tasks": self.recipe.tasks[run.task].evaluate if run.split == "test" and not run.steps else [],
            "adapter": out / run.folder / "adapter",
            "data_dir": data_dir,
            "out": out / run.folder / "evaluation",
            **{key: options[key] for key in shared if key in options},
        }


def _round(lr: float) -> float:
    return float(f"{lr:.3g}")
