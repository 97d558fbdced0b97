"""``lora-rite report``: what a study came to, as a page that needs no server, and the same as Markdown."""

import importlib.util
import math
from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError
from ..run.console import number
from ..run.files import read_json
from ..run.processes import check_alone
from ..run.settings import RESULT, SETTINGS
from .cases import all_cases
from .measures import GOOD
from .plots import figure, figure_of_ranks, figure_of_run
from .recipe import tuned_adamw
from .statistics import LEAST_SEEDS, mean_interval, plus_minus


def require_packages() -> None:
    """Raises ImportError, with the extra to install, where a package of the study is missing."""
    for package in ("filelock", "jinja2", "markdown_it", "matplotlib", "scipy"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'studies need {package}: pip install "lora-rite[study]"')


def report(folder: Path) -> Path:
    """Writes report.md, report.html (one file, figures inside) and figures/ into the folder of a study, also of one
    that is not finished; into that of a single run, its loss curve, loss.png. Returns the path of what was written.

    Args:
        folder: of the study, as ``lora-rite compare --out`` names it, or of a run of ``lora-rite train``.

    Raises:
        LoRARiteValueError: neither is there, or a file of it is missing or damaged.
    """
    check_alone("lora-rite report")
    path = folder / "study.json"
    if path.is_file():
        return _report_study(folder, read_json(path, "recipe", "data", "runs", "sweeps", "complete", "versions"))
    if (folder / RESULT).is_file():
        result = read_json(folder / RESULT, "settings", "held_out")
        (folder / "loss.png").write_bytes(figure_of_run(result))
        return folder / "loss.png"
    if (folder / SETTINGS).is_file():
        raise LoRARiteValueError(f"the run in {folder} is not finished (no {RESULT}); lora-rite train --resume goes on")
    raise LoRARiteValueError(
        f"{folder} holds no study (no study.json, which lora-rite compare writes) and no run (no {RESULT})"
    )


def _report_study(folder: Path, study: dict[str, Any]) -> Path:
    require_packages()
    import jinja2
    from markdown_it import MarkdownIt

    cases = all_cases(study, folder)
    by_task = {task: [case for case in cases if case.task == task] for task in study["recipe"]["tasks"]}
    figures = {f"figures/{case.slug}.svg": figure(case, cases) for case in cases if case.rows}
    for task, of_ranks in by_task.items():
        if len(of_ranks) > 1 and any(row.validation for case in of_ranks for row in case.in_order):
            figures[f"figures/{task}-ranks.svg"] = figure_of_ranks(of_ranks)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_rite.study", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(g=lambda x: f"{x:g}", link=lambda p: p.replace(" ", "%20"))
    environment.filters.update(plus_minus=plus_minus, known=_known, number=number)
    environment.filters.update(
        reached=lambda found, unit="": "–" if found is None else found.text(unit),
        over_seeds=lambda losses: plus_minus(*mean_interval(list(losses.values()))),
    )
    text = environment.get_template("report.md.j2").render(
        study=study,
        cases=cases,
        by_task=by_task,
        figures=figures,
        adamw=tuned_adamw({name: c["optimizer"] for name, c in study["recipe"]["optimizers"].items()}),
        versions=_versions(study, folder),
        good=GOOD,
        least=LEAST_SEEDS,
        isfinite=math.isfinite,
    )
    markdown = MarkdownIt("commonmark").enable("table")

    def inline(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        return figures[tokens[index].attrGet("src").replace("%20", " ")]

    markdown.add_render_rule("image", inline)
    page = environment.get_template("report.html.j2").render(title=study["recipe"]["title"], body=markdown.render(text))
    (folder / "figures").mkdir(exist_ok=True)
    for name, content in figures.items():
        (folder / name).write_text(content, encoding="utf-8")
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
