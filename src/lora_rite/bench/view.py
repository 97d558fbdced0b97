"""Tables and pictures of ``lora-rite bench``."""

from pathlib import Path
from typing import Any

from ..run import console
from .contenders import BASELINE


def table(result: dict[str, Any]) -> str:
    """The figures as text, ratios first."""
    device = result["device"]
    if result["benchmark"] == "scaling":
        rows = [
            (sweep, optimizer, f"{exponent['all']:.2f}", f"{exponent['upper']:.2f}", ", ".join(map(str, values["x"])))
            for sweep, values in result["sweeps"].items()
            for optimizer, exponent in values["exponents"].items()
        ]
        headings = ("x", "optimizer", "e", "e, upper ⅔", "at")
        return console.as_text(
            console.table(f"seconds of a step ~ xᵉ, {result['dtype']}, {device}", headings, rows), width=140
        )
    if result["benchmark"] == "host":
        return "".join(map(_host, result["cases"]))
    texts = []
    for case in result["cases"]:
        title = f"{case['model']}, {case['layers']} layers, rank {case['rank']}, {case['dtype']}, {device}"
        if result["benchmark"] == "train":
            title += f", {case['batch_size']} × {case['length']} tokens"
            headings = ("optimizer", "share of a step", "quartiles", "its ms", "forward and backward, ms")
            rows = [
                (row["optimizer"], f"{row['share']:.2%}", "{:.2%} – {:.2%}".format(*row["share_quartiles"]),
                 f"{1e3 * row['seconds']:.2f}", f"{1e3 * row['model_seconds']:.1f}")
                for row in case["rows"]
            ]  # fmt: skip
            texts.append(console.as_text(console.table(title, headings, rows), width=140))
            continue
        headings = (
            "optimizer",
            "× fused AdamW",
            "quartiles",
            "ms",
            "state, MB",
            "÷ AdamW's",
            "extra ÷ params",
            "syncs",
        )
        adamw = next(row["state_bytes"] for row in case["rows"] if row["optimizer"] == BASELINE)
        rows = [
            (row["optimizer"], f"{row['ratio']:.2f}", "{:.2f} – {:.2f}".format(*row["ratio_quartiles"]),
             f"{1e3 * row['seconds']:.2f}", f"{row['state_bytes'] / 1e6:.2f}", f"{row['state_bytes'] / adamw:.3f}",
             f"{row['extra_bytes'] / case['parameter_bytes']:.2f}", str(row["synchronisations"]))
            for row in case["rows"]
        ]  # fmt: skip
        texts.append(console.as_text(console.table(f"{title}, {case['pairs']} pairs", headings, rows), width=140))
        megabytes = case["formula_bytes"] / 1e6
        texts.append(f"LoRARite's state by Σ 4(m+n)(r+1) + 40r² + 8r + 26 bytes a pair: {megabytes:.2f} MB\n")
        texts += [f"Left out: {name}, {reason}\n" for name, reason in case["left_out"].items()]
    return "".join(texts)


def _host(case: dict[str, Any]) -> str:
    title = f"{case['pairs']} pairs, width {case['width']}, rank {case['rank']}, one thread"
    headings = ("part of a step", "µs", "quartiles", "Python calls", "× foreach AdamW", "quartiles")
    rows = [
        (row["part"], f"{1e6 * row['seconds']:.1f}", "{:.1f} – {:.1f}".format(*(1e6 * q for q in row["quartiles"])),
         str(row["calls"]), f"{row['ratio']:.2f}" if "ratio" in row else "",
         "{:.2f} – {:.2f}".format(*row["ratio_quartiles"]) if "ratio" in row else "")
        for row in case["rows"]
    ]  # fmt: skip
    return console.as_text(console.table(title, headings, rows), width=140)


def plot(result: dict[str, Any], path: Path) -> None:
    """Step: ratios to fused AdamW, a panel a case. Scaling: seconds over x, a panel a sweep."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scaling = result["benchmark"] == "scaling"
    panels = list(result["sweeps"].items()) if scaling else result["cases"]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.5 * columns + 1, 3.4 * lines), squeeze=False, layout="constrained", sharey=True
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    if scaling:
        for axis, (name, sweep) in zip(axes.flat, panels, strict=True):
            _plot_sweep(axis, name, sweep)
    else:
        names = list(dict.fromkeys(row["optimizer"] for case in panels for row in case["rows"]))[::-1]
        for axis, case in zip(axes.flat, panels, strict=False):
            _plot_case(axis, case, names)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_sweep(axis: Any, name: str, sweep: dict[str, Any]) -> None:
    for i, (optimizer, exponent) in enumerate(sweep["exponents"].items()):
        label = f"{optimizer}: {exponent['all']:.2f}, upper ⅔ {exponent['upper']:.2f}"
        axis.plot(sweep["x"], [1e3 * case["rows"][i]["seconds"] for case in sweep["cases"]], "o-", label=label)
    axis.set(xscale="log", yscale="log", xlabel=name, ylabel="ms a step")
    axis.legend(title="exponent", fontsize="small")
    axis.grid(alpha=0.3)


def _plot_case(axis: Any, case: dict[str, Any], names: list[str]) -> None:
    rows = {row["optimizer"]: row for row in case["rows"]}
    measured = [name for name in names if name in rows]
    ratios = [rows[name]["ratio"] for name in measured]
    sides = zip(*(rows[name]["ratio_quartiles"] for name in measured), strict=True)
    errors = [[abs(end - ratio) for end, ratio in zip(side, ratios, strict=True)] for side in sides]
    colors = ["tab:blue" if name.startswith("LoRARite") else "tab:gray" for name in measured]
    bars = axis.barh([names.index(name) for name in measured], ratios, xerr=errors, color=colors)
    axis.bar_label(bars, fmt=" %.3g", fontsize="small")
    axis.set_yticks(range(len(names)), names)
    axis.set(xscale="log", xlabel="× fused AdamW", xlim=(min(ratios) / 1.5, max(ratios) * 3))
    axis.set_title("{model}, layers: {layers}, r = {rank}, {dtype}".format(**case), fontsize="medium")
    axis.grid(alpha=0.3)
