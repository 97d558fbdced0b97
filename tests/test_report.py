"""``lora-rite report``: the statistics are scipy's on paired seeds, and the page says what the runs say."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("markdown_it")
pytest.importorskip("jsonargparse")

from lora_rite.cli import main
from lora_rite.study.cases import Case
from lora_rite.study.statistics import difference, mean_interval, step_at


def result(seed, lr, curve):
    steps = sorted(curve)
    return {
        "settings": {"steps": steps[-1], "seed": seed, "lr": lr},
        "held_out": {"before": curve[0], "after": curve[steps[-1]]},
        "held_out_losses": [{"step": s, "held_out_loss": curve[s]} for s in steps[1:]],
        "seconds": {"step": 0.5, "optimizer_share": 0.25},
        "optimizer": {"state_bytes": 2_000_000},
    }


@pytest.fixture
def study(tmp_path):
    """Two optimizers, three seeds: the second is better by about 0.1 on each seed, although seeds differ by more."""
    folder = tmp_path / "study"
    names = {"AdamW": 0.01, "LoRA-RITE": 0.02}
    recipe = {
        "title": "A <small> study",
        "notes": "Notes.",
        "tasks": {"sums": {}},
        "ranks": [4],
        "seeds": [0, 1, 2],
        "sweep_seeds": [100],
        "optimizers": {name: {"optimizer": name.lower(), "lr": [0.01, 0.02], "optimizer_args": {}} for name in names},
        "train": {"steps": 20},
    }
    runs, sweeps = [], []
    for name, best in names.items():
        gain = 0.1 if name == "LoRA-RITE" else 0.0
        for lr in (0.01, 0.02):
            loss = 3.0 + abs(lr - best) * 10 - gain
            runs.append(("validation", name, lr, 100, {0: 5.0, 20: loss}))
        for seed in (0, 1, 2):
            end = 3.0 + 0.3 * seed - gain - 0.01 * seed * (gain > 0)
            runs.append(("test", name, best, seed, {0: 5.0, 10: end + 0.4, 20: end}))
        validation = [[lr, curve[20]] for split, n, lr, _, curve in runs if split == "validation" and n == name]
        sweeps.append({"task": "sums", "rank": 4, "optimizer": name, "grid": [0.01, 0.02], "best": best,
                       "validation_loss": validation})  # fmt: skip
    entries = []
    for split, name, lr, seed, curve in runs:
        path = f"runs/sums/r4/{name}/lr{lr:g}-seed{seed}-{split}/result.json"
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(json.dumps(result(seed, lr, curve)))
        entries.append({"task": "sums", "rank": 4, "optimizer": name, "lr": lr, "seed": seed, "split": split,
                        "loss": curve[20], "path": path})  # fmt: skip
    content = {"recipe": recipe, "data": {}, "runs": entries, "sweeps": sweeps, "complete": True, "versions": {}}
    (folder / "study.json").write_text(json.dumps(content))
    return folder


def rewrite(folder, change):
    content = json.loads((folder / "study.json").read_text())
    change(content)
    (folder / "study.json").write_text(json.dumps(content))


def render(folder):
    assert main(["report", str(folder)]) == 0
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def test_interval_and_paired_test_are_those_of_the_textbook():
    """Mean ± t·s/√n with t(0.975, 2) = 4.3027, and the paired t of 1, 2, 4: mean 7/3, s = 1.5275, t = 2.6458."""
    mean, half_width = mean_interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half_width == pytest.approx(4.302653 * 1.527525 / math.sqrt(3), rel=1e-5)
    found = difference({0: 11.0, 1: 2.0, 2: 9.0, 7: 0.0}, {0: 10.0, 1: 0.0, 2: 5.0, 8: 9.0})
    assert found.seeds == 3
    assert found[:2] == (pytest.approx(mean), pytest.approx(half_width))
    assert found.p == pytest.approx(0.118, abs=1e-3)
    assert found.verdict == "not significant"


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ({0: 1.0, 1: 2.01, 2: 3.0}, {0: 2.0, 1: 3.0, 2: 4.0}, "better"),
        ({0: 2.0, 1: 3.0, 2: 4.0}, {0: 1.0, 1: 2.01, 2: 3.0}, "worse"),
        ({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}, "not significant"),
        ({0: 1.0, 1: 2.001}, {0: 2.0, 1: 3.0}, "not significant"),  # p = 0.0003, of two seeds
        ({0: 1.0}, {0: 2.0}, "not significant"),
        ({0: math.inf, 1: 1.0}, {0: 2.0, 1: 2.0}, "not significant"),
        ({}, {0: 2.0}, "not significant"),
    ],
)
def test_verdicts(a, b, verdict):
    assert difference(a, b).verdict == verdict


def test_step_at_interpolates_and_may_never_come():
    run = result(0, 0.1, {0: 5.0, 10: 4.0, 20: 3.0})
    assert step_at(run, 3.5) == 15
    assert step_at(run, 3.0) == 20
    assert step_at(run, 6.0) == 0
    assert step_at(run, 2.9) is None


def test_the_page_has_the_figures_and_bold_where_significant(study):
    text, page = render(study)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| LoRA-RITE |", "| AdamW |"))]
    (ours, adamw) = rows[:2]
    assert ours[:2] == ["| LoRA-RITE", "0.02"]
    assert ours[2].startswith("**3.190 ± ")
    assert ours[3].startswith("−0.110 ± ")
    assert adamw[2].startswith("3.300 ± ")
    # 0.8 over 20 − 10 steps: the last 0.1 to 0.12 of 0.4 takes 2.5 to 3 steps
    assert ours[4] == "17"
    assert ours[5] == "0.02 to 0.02"
    assert adamw[4] == "20"
    assert ours[8] == "2.00 MB"
    assert "LoRA-RITE − AdamW: −0.110 ± 0.025, p = 0.0027 (3 seeds)" in text
    assert "paired t-test" in text
    assert "| LoRA-RITE | −0.110 ± 0.025 (better) |" in text
    assert "| AdamW | 0 – 1 – 0 |" in text
    numbers = re.findall(r"\d+\.\d+", text.split("## Settings")[0].replace("runs/", ""))
    assert all(number in page for number in numbers)


def test_without_significance_nothing_is_bold(study):
    def change(content):
        for r in content["runs"]:
            if r["optimizer"] == "LoRA-RITE" and r["seed"] == 1:
                r["loss"] = 3.5

    rewrite(study, change)
    text, _ = render(study)
    assert "**3" not in text.split("## Learning rates")[0]
    assert "(not significant)" in text


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.tags = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.found += [v for k, v in attrs if k in ("href", "src", "xlink:href") and v]


def test_the_page_is_self_contained_and_its_links_lead_to_the_runs(study):
    text, page = render(study)
    links = Links()
    links.feed(page)
    assert "svg" in links.tags
    assert not links.tags & {"img", "script", "link"}
    files = {link for link in links.found if not link.startswith("#")}
    assert files == {r["path"] for r in json.loads((study / "study.json").read_text())["runs"]} | {"study.json"}
    assert all((study / file).is_file() for file in files)
    figures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert [ElementTree.parse(study / f.replace("%20", " ")).getroot().tag for f in figures] == [
        "{http://www.w3.org/2000/svg}svg"
    ]
    assert "A &lt;small&gt; study" in page


def test_all_versions_that_runs_are_of_are_listed(study):
    rewrite(study, lambda content: content.update(versions={"torch": "2.13.0", "git_commit": "bb", "date": "today"}))
    for n, r in enumerate(json.loads((study / "study.json").read_text())["runs"]):
        content = json.loads((study / r["path"]).read_text())
        versions = {"torch": "2.12.0" if n == 0 else "2.13.0", "git_commit": "aa", "date": f"day {n}"}
        (study / r["path"]).write_text(json.dumps({**content, "versions": versions}))
    text, _ = render(study)
    assert "| torch | 2.12.0, 2.13.0 |" in text
    assert "| git_commit | aa |" in text  # not that of the report
    assert "| date | today |" in text


def test_a_report_is_the_same_when_it_is_made_again(study):
    assert render(study) == render(study)


def test_an_unfinished_study_has_a_report(study):
    def change(content):
        content["complete"] = False
        content["runs"] = [r for r in content["runs"] if r["optimizer"] == "AdamW"]
        content["sweeps"][1].update(best=None, validation_loss=[])

    rewrite(study, change)
    text, _ = render(study)
    assert "Not finished" in text
    assert "| AdamW | 0.01 | 3.300 ± " in text
    assert "| LoRA-RITE | – |" in text


def test_a_diverged_seed_is_shown_and_decides_nothing(study):
    def change(content):
        for r in content["runs"]:
            if r["optimizer"] == "LoRA-RITE" and r["seed"] == 1:
                r["loss"] = math.inf
                (study / r["path"]).write_text(json.dumps({"settings": {}, "held_out": {}, "diverged": "nan"}))

    rewrite(study, change)
    text, _ = render(study)
    assert "| LoRA-RITE | 0.02 | diverged | diverged |" in text


@pytest.mark.parametrize("unknown", [None, 0.0])
def test_times_that_are_not_known_are_dashes(study, unknown):
    """Not even the baseline's, which all are divided by."""
    for path in study.glob("runs/sums/r4/AdamW/*/result.json"):
        content = json.loads(path.read_text())
        content["seconds"].update(step=unknown, optimizer_share=None)
        path.write_text(json.dumps(content))
    text, _ = render(study)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| LoRA-RITE |", "| AdamW |"))]
    (ours, adamw) = rows[:2]
    assert ours[6:8] == ["–", "25.0%"]
    assert adamw[6:8] == ["–", "–"]


def test_accuracies_are_shown_with_what_can_be_detected(study):
    for r in json.loads((study / "study.json").read_text())["runs"]:
        if r["split"] == "test":
            folder = (study / r["path"]).parent / "evaluation"
            folder.mkdir()
            value = 0.5 + 0.1 * r["seed"] + (0.02 + 0.001 * r["seed"]) * (r["optimizer"] == "LoRA-RITE")
            record = {
                "task": "gsm8k",
                "results": {"metric": "exact_match,strict", "metrics": {"exact_match,strict": value}},
            }
            (folder / "gsm8k.json").write_text(json.dumps(record))
    text, _ = render(study)
    assert "| optimizer | gsm8k, exact_match | − AdamW |" in text
    assert "| LoRA-RITE | **62.10 ± " in text
    assert "| 2.10 ± 0.25 |" in text


def test_a_missing_study_or_run_is_named(study, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no study" in capsys.readouterr().err
    path = next(r["path"] for r in json.loads((study / "study.json").read_text())["runs"] if r["split"] == "test")
    (study / path).unlink()
    assert main(["report", str(study)]) == 2
    assert path in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{}", "[]", '"recipe data runs sweeps complete versions"', '{"recipe": '])
def test_a_damaged_study_or_result_is_named(study, text, capsys):
    path = next(study.glob("runs/sums/r4/AdamW/*test/result.json"))
    for file in (path, study / "study.json"):
        file.write_text(text)
        assert main(["report", str(study)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{file} is damaged (" in line


def test_cases_are_ordered_by_loss(study):
    case = Case("sums", 4, json.loads((study / "study.json").read_text()), study)
    assert [row.name for row in case.rows] == ["LoRA-RITE", "AdamW"]
    assert case.baseline.name == "AdamW"
