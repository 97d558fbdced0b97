"""What a study's folder says: the runs that are finished, and study.json."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError, warn
from ..run.files import read_json, write_json
from ..run.versions import versions
from .cases import all_cases
from .search import Losses, Study


def plain(value: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))


def finished(study: Study, out: Path, losses: Losses) -> Losses:
    """The losses, and those of further runs that are due and are finished in the folder already."""
    losses, unfinished = dict(losses), set()
    while True:
        found = {run: out / run.folder / "result.json" for run in study.due(losses) if run not in unfinished}
        found = {run: path for run, path in found.items() if path.is_file()}
        if not found:
            return losses
        for run, path in found.items():
            result = read_json(path)
            expected = plain(study.options(run, out))
            free = {"out", "data", "validation"} | ({"eval_every"} if run.split == "validation" else set())
            for key in set(expected) - free:
                if result["settings"].get(key) != expected[key]:
                    raise LoRARiteValueError(
                        f"{path} is of a run with {key} {result['settings'].get(key)!r}, the recipe says "
                        f"{expected[key]!r}; choose another --out"
                    )
            wanted = len(study.evaluation(run, out, None)["tasks"])
            if "diverged" in result or len(list(path.parent.glob("evaluation/*.json"))) >= wanted:
                losses[run] = result["held_out"]["after"]
            else:
                unfinished.add(run)


def warn_of_other_versions(study: Study, out: Path, losses: Losses) -> None:
    """Warns where the finished runs, and those to come, are not all of the same versions."""
    found = [read_json(out / run.folder / "result.json") for run in losses]
    known = [result.get("versions", {}) for result in found] + [versions()] * bool(study.due(losses))
    keys = set().union(*known) - {"date", "machine", "device", "processor", "threads"}
    if mixed := sorted(key for key in keys if len({str(part[key]) for part in known if key in part}) > 1):
        warn(f"runs of {out} are of different {', '.join(mixed)}, which may be what they differ by; the report has all")


def write_study(study: Study, out: Path, data: dict[str, Any], losses: Losses) -> dict[str, Any]:
    """study.json: the recipe, the data, every run with its loss, what each sweep chose, and, once all runs are done,
    the report's measures."""
    result: dict[str, Any] = {
        "recipe": plain(asdict(study.recipe)),
        "data": data,
        "runs": [{**run._asdict(), "loss": loss, "path": f"{run.folder}/result.json"} for run, loss in losses.items()],
        "sweeps": [
            {
                **line._asdict(),
                "grid": search.grid,
                "best": search.best,
                "validation_loss": list(search.scores.items()),
            }
            for line in study.lines
            for search in [study.search(line, losses)]
        ],
        "complete": not study.due(losses),
        "versions": versions(),
    }
    if result["complete"]:
        cases = all_cases(result, out)
        result["measures"] = [case.measures(row) for case in cases for row in case.rows]
    write_json(out / "study.json", result)
    return result
