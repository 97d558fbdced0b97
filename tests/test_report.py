"""``lora-rite report``: the statistics are scipy's on paired seeds, and the page says what the runs say."""

import itertools
import json
import math
import re
import statistics
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("jinja2")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("markdown_it")
pytest.importorskip("jsonargparse")

from lora_rite.cli import main
from lora_rite.study.cases import ROUNDING, Case
from lora_rite.study.measures import Reached, good_rates
from lora_rite.study.statistics import curve, difference, mean_interval, smoothed, step_at


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
        validation = [[lr, losses[20]] for split, n, lr, _, losses in runs if split == "validation" and n == name]
        sweeps.append({"task": "sums", "rank": 4, "optimizer": name, "grid": [0.01, 0.02], "best": best,
                       "validation_loss": validation})  # fmt: skip
    entries = []
    for split, name, lr, seed, losses in runs:
        path = f"runs/sums/r4/{name}/lr{lr:g}-seed{seed}-{split}/result.json"
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(json.dumps(result(seed, lr, losses)))
        entries.append({"task": "sums", "rank": 4, "optimizer": name, "lr": lr, "seed": seed, "split": split,
                        "loss": losses[20], "path": path})  # fmt: skip
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
    points = curve(result(0, 0.1, {0: 5.0, 10: 4.0, 20: 3.0}))
    assert step_at(points, 3.5) == 15
    assert step_at(points, 3.0) == 20
    assert step_at(points, 6.0) == 0
    assert step_at(points, 2.9) is None


@settings(deadline=None, derandomize=True)  # the first call imports scipy
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=20))
def test_a_smoothed_curve_falls_and_reaches_what_it_ends_at(losses):
    """It never rises, keeps the mean, leaves a falling curve as it is, and is at its last loss by its last step: AdamW
    needs no more steps to AdamW's loss than it has."""
    points = [(10 * n, loss) for n, loss in enumerate(losses)]
    fit = smoothed(points)
    assert [step for step, _ in fit] == [step for step, _ in points]
    assert all(after <= before + 1e-12 for (_, before), (_, after) in itertools.pairwise(fit))
    assert statistics.fmean(v for _, v in fit) == pytest.approx(statistics.fmean(losses))
    falling = sorted(points, key=lambda point: -point[1])
    falling = [(step, loss) for (step, _), (_, loss) in zip(points, falling, strict=True)]
    assert [v for _, v in smoothed(falling)] == pytest.approx([v for _, v in falling])
    assert step_at(fit, losses[-1] * (1 + ROUNDING)) is not None


def test_a_dip_is_no_end():
    """One lucky measurement, followed by worse ones, does not count: half of the curve's noise would."""
    points = [(0, 5.0), (10, 4.0), (20, 2.9), (30, 3.5), (40, 3.2), (50, 2.8)]
    assert step_at(points, 3.0) < 20
    assert 40 < step_at(smoothed(points), 3.0) < 50


@pytest.mark.parametrize(
    ("when", "text"),
    [
        ([80.0, 90.0, 85.0], "85.0 ± 12.4"),
        ([180.0, 190.0, 185.0], "185 ± 12"),
        ([80.0], "80.0"),
        ([80.0, None, 90.0], "90.0 (median; reached on 2 of 3 seeds)"),
        ([80.0, None, None], "reached on 1 of 3 seeds"),
        ([80.0, None], "reached on 1 of 2 seeds"),
        ([None, None], "not reached"),
    ],
)
def test_what_is_not_reached_is_said(when, text):
    """A seed that does not get there is neither left out of a mean nor a number."""
    found = Reached(dict(enumerate(when)))
    assert found.text() == text
    assert found.times(2.0).when == {s: None if v is None else 2 * v for s, v in enumerate(when)}
    assert (found.as_json()["mean"] is None) == (None in when)


def test_good_rates_are_interpolated_and_open_at_the_grids_end():
    """Linear in log(lr): from 2.0 at 0.01 to 2.04 at 0.04, 1% is half-way, at 0.02."""
    rates = good_rates({0.0025: math.inf, 0.005: 3.0, 0.01: 2.0, 0.04: 2.04})
    assert rates[:3] == (0.01, pytest.approx(0.01 * 0.5 ** (0.02 / 1.0)), pytest.approx(0.02))
    assert rates[3:] == (False, False)
    assert rates.text == "0.0099 to 0.02"
    assert rates.width == "2.0 ×"
    assert good_rates({0.01: math.inf, 0.02: 2.0, 0.04: math.inf})[1:] == (0.02, 0.02, False, False)
    rates = good_rates({0.01: 2.01, 0.02: 2.0, 0.04: 2.001})
    assert rates == (0.02, 0.01, 0.04, True, True)
    assert rates.text == "≤ 0.01 to ≥ 0.04"
    assert rates.width == "≥ 4.0 ×"
    assert good_rates({}) is None
    assert good_rates({0.01: math.inf}) is None


def columns(text):
    return next(line for line in text.splitlines() if line.startswith("| optimizer | best lr"))


def test_without_adamw_or_a_curve_there_are_no_steps_to_its_loss(study):
    """What is not known is left out, and the page says why where that could be mended."""
    for path in study.glob("runs/sums/r4/*/*test/result.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "held_out_losses": []}))
    text, page = render(study)
    assert "steps to" not in columns(text)
    assert "Steps to AdamW's loss are not known: the held-out loss was measured at the ends alone (eval_every)." in text
    assert "training loss" not in page  # none was logged either
    rewrite(study, lambda content: content["recipe"]["optimizers"]["AdamW"].update(optimizer="torch.optim:AdamW"))
    text, _ = render(study)
    assert "steps to" not in columns(text)
    assert "Steps to" not in text


def test_without_measurements_the_training_loss_is_drawn(study):
    for path in study.glob("runs/sums/r4/*/*test/result.json"):
        losses = [{"step": n, "loss": 5 - 0.1 * n} for n in range(1, 21)]
        path.write_text(json.dumps({**json.loads(path.read_text()), "held_out_losses": [], "losses": losses}))
    _, page = render(study)
    assert "training loss (running mean) over steps" in page
    assert "test loss over steps" not in page


def add_budgets(content, ends):
    """Runs of the second optimizer with other numbers of steps, that end at AdamW's losses plus ``ends``."""
    content["recipe"]["budgets"] = sorted(ends)
    adamw = {r["seed"]: r["loss"] for r in content["runs"] if r["optimizer"] == "AdamW" and r["split"] == "test"}
    for steps, end in ends.items():
        for seed, loss in adamw.items():
            run = {"task": "sums", "rank": 4, "optimizer": "LoRA-RITE", "lr": 0.02, "seed": seed, "split": "test"}
            content["runs"].append({**run, "steps": steps, "loss": loss + end, "path": content["runs"][0]["path"]})


@pytest.mark.parametrize(
    ("ends", "budget"),
    [({10: 0.5, 15: 0.0}, "15"), ({10: 0.5, 15: 0.1}, "20"), ({10: -0.1, 15: 0.1, 40: -1}, "10")],
)
def test_the_budget_is_the_shortest_run_that_reaches_it(study, ends, budget):
    """Of runs with schedules of their own, by the mean over seeds; the full run is one of them."""
    rewrite(study, lambda content: add_budgets(content, ends))
    text, page = render(study)
    heading = columns(text).split(" | ")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| LoRA-RITE |")]
    assert rows[0][heading.index("budget")] == budget
    lengths = sorted({*ends, 20})
    shown = next(line.split(" | ")[1:-1] for line in text.splitlines() if re.match(r"\| optimizer \| \d", line))
    assert shown == [str(steps) for steps in lengths]
    cells = next(r for r in rows[1:] if len(r) == len(lengths) + 2)[1:-1]
    assert [steps for steps, cell in zip(lengths, cells, strict=True) if cell.startswith("**")] == [int(budget)]
    assert "test loss over budget" in page
    rewrite(study, lambda content: [run.update(loss=9.0) for run in content["runs"] if run["optimizer"] == "LoRA-RITE"])
    text, _ = render(study)
    ours = next(line.split(" | ") for line in text.splitlines() if line.startswith("| LoRA-RITE |"))
    assert ours[heading.index("budget")] == "not reached"


def test_nothing_is_measured_by_an_adamw_that_diverged(study):
    """An infinite loss is reached by everybody."""

    def change(content):
        add_budgets(content, {10: 0.0})
        for run in content["runs"]:
            if run["optimizer"] == "AdamW" and run["split"] == "test":
                run["loss"] = math.inf

    rewrite(study, change)
    text, _ = render(study)
    ours = next(line.split(" | ") for line in text.splitlines() if line.startswith("| LoRA-RITE |"))
    heading = columns(text).split(" | ")
    found = dict(zip(heading, ours, strict=True))
    assert found["budget"] == "not reached"
    assert found["steps to AdamW's loss"] == found["time to it"] == "–"


def test_ranks_share_a_table_and_a_picture_of_learning_rates(study):
    def change(content):
        content["recipe"]["ranks"] = [4, 16]
        content["runs"] += [{**run, "rank": 16} for run in content["runs"]]
        content["sweeps"] += [{**sweep, "rank": 16} for sweep in content["sweeps"]]

    rewrite(study, change)
    text, page = render(study)
    assert "| task | optimizer | rank 4 | rank 16 |" in text
    cell = "0.02: 0.016 to ≥ 0.02 (≥ 1.2 ×)"
    assert f"| sums | LoRA-RITE | {cell} | {cell} |" in text
    assert "figures/sums-ranks.svg" in text
    assert (study / "figures" / "sums-ranks.svg").is_file()
    assert "rank 16" in page


def test_the_page_has_the_figures_and_bold_where_significant(study):
    text, page = render(study)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| LoRA-RITE |", "| AdamW |"))]
    (ours, adamw) = rows[:2]
    assert ours[:2] == ["| LoRA-RITE", "0.02"]
    assert ours[2].startswith("**3.190 ± ")
    assert ours[3].startswith("−0.110 ± ")
    assert adamw[2].startswith("3.300 ± ")
    # 0.4 over 20 − 10 steps: the last 0.1 to 0.12 takes 2.5 to 3 steps, of half a second each
    assert ours[4:6] == ["17.2 ± 0.6", "8.6 ± 0.3 s"]
    assert adamw[4:6] == ["20.0 ± 0.0", "10.0 ± 0.0 s"]
    assert "measured every 10 steps of 20:" in text
    assert ours[6] == "0.016 to ≥ 0.02"
    assert ours[9] == "2.00 MB"
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
    assert ours[7:9] == ["–", "25.0%"]
    assert adamw[7:9] == ["–", "–"]
    assert (ours[5] == "–", adamw[5]) == (False, "–")


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
    assert "holds no study (no study.json, which lora-rite compare writes) and no run (no result.json)" in (
        capsys.readouterr().err
    )
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


def pixels(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


def shares(path):
    """The shares of a picture that are blue (training) and orange (held out)."""
    red, green, blue = (pixels(path)[..., i] for i in range(3))
    return ((blue > red + 0.3) & (blue > 0.5)).mean(), ((red > blue + 0.5) & (green < 0.7)).mean()


def test_a_single_run_has_a_loss_curve(tmp_path, capsys):
    """Of training and held out, as PNG beside its result; the result stays as it is."""
    content = result(0, 0.01, {0: 5.0, 10: 4.0, 20: 3.0})
    content["losses"] = [{"step": n, "loss": 5 - 0.1 * n + 0.2 * (n % 2)} for n in range(1, 21)]
    path = tmp_path / "result.json"
    path.write_text(json.dumps(content))
    before = path.read_bytes()
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "loss.png")
    blue, orange = shares(tmp_path / "loss.png")
    assert blue > 0.002
    assert orange > 0.002
    assert path.read_bytes() == before
    path.write_text(json.dumps({**content, "losses": []}))
    assert main(["report", str(tmp_path)]) == 0
    assert shares(tmp_path / "loss.png")[0] == 0


@pytest.mark.parametrize(
    "content",
    [
        {"settings": {"steps": 20, "lr": 9.0}, "held_out": {"after": math.inf}, "diverged": "the loss is nan"},
        {**result(0, 1.0, {0: 5.0, 20: math.inf}), "losses": [{"step": 1, "loss": 5.0}, {"step": 2, "loss": math.nan}]},
    ],
)
def test_a_run_that_has_diverged_has_a_picture_all_the_same(content, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(content))
    assert main(["report", str(tmp_path)]) == 0
    assert pixels(tmp_path / "loss.png").size


def test_a_run_that_is_not_finished_is_said_to_be_so(tmp_path, capsys):
    (tmp_path / "settings.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    assert "is not finished (no result.json); lora-rite train --resume goes on" in capsys.readouterr().err


def test_a_result_of_something_else_is_refused(tmp_path, capsys):
    """As that of a demo."""
    (tmp_path / "result.json").write_text('{"table": []}')
    assert main(["report", str(tmp_path)]) == 2
    assert "result.json is damaged (it has no settings)" in capsys.readouterr().err
    assert not (tmp_path / "loss.png").exists()
