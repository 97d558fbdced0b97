"""``lora-rite report``: what a study came to, as a page that needs no server, and the same as Markdown."""

import importlib.util
import math
from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError
from ..run.files import read_json
from .cases import GOOD, Case
from .plots import figure
from .statistics import LEAST_SEEDS, plus_minus


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
    environment.filters.update(plus_minus=plus_minus, known=_known)
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
