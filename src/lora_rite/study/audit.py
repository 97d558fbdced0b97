"""``lora-rite audit``: :func:`lora_rite.audit` on synthetic problems or a language model, as table and picture."""

import math
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError
from ..finetune.optimizers import check_arguments
from ..inputs import resolve, resolve_values
from ..options import PUBLISHED
from ..run.console import table
from ..run.processes import check_alone

#: Optimizers to show beside the audited one: label, import path, keyword arguments (values that are import paths are
#: resolved).
PEERS: list[tuple[str, str, dict[str, Any]]] = [
    ("LoRARite", "lora_rite:LoRARite", {}),
    ("LoRARite, PUBLISHED", "lora_rite:LoRARite", PUBLISHED),
    ("LoRARite (pytorch_optimizer)", "pytorch_optimizer:LoRARite", {}),
    ("AdamW", "torch.optim:AdamW", {}),
    ("LoRA+ (AdamW)", "peft.optimizers:create_loraplus_optimizer", {"optimizer_cls": "torch.optim:AdamW",
                                                                    "loraplus_lr_ratio": 4.0}),
    ("Riemannian (SGD)", "peft.optimizers:create_riemannian_optimizer", {"optimizer_cls": "torch.optim:SGD"}),
    ("Riemannian (AdamW)", "peft.optimizers:create_riemannian_optimizer", {"optimizer_cls": "torch.optim:AdamW"}),
    ("Muon, a factor each", "torch.optim:Muon", {}),
    ("LoRA-Muon", "lora_rite.rivals:LoRAMuon.for_model", {}),
    ("PoLoRA", "lora_rite.rivals:PoLoRA.for_model", {}),
    ("Shampoo", "lora_rite.rivals:Shampoo.for_model", {}),
    ("Lamb", "pytorch_optimizer:Lamb", {}),
]  # fmt: skip
#: The mark of a table's cell: of the worst verdict in it.
MARKS = {"failed": "✗", "rounding": "~", "passed": ""}


def audit_command(
    *,
    optimizer: str,
    lr: float,
    optimizer_args: dict[str, Any] | None,
    takes: Any,
    model: str | None,
    adapter: Path | None,
    data: Path | None,
    rank: int,
    target_modules: str | list[str],
    dtypes: list[str] | None,
    conditions: list[float],
    steps: int | None,
    tolerance: float | None,
    peers: bool,
    seed: int,
    out: Path | None,
    trust_remote_code: bool,
) -> int:
    """Audits, prints the tables, writes ``audit.json`` and ``audit.png`` into ``out``. Returns 0, or 3 where the
    optimizer does not pass. For the arguments see ``lora-rite audit --help``."""
    from ..invariance.audit import audit
    from ..run.files import check_folder, prepare_folder, write_json
    from ..run.versions import versions

    if model is None and (adapter or data):
        raise LoRARiteValueError(f"--{'adapter' if adapter else 'data'} is for a --model; give one")
    check_alone("lora-rite audit")
    resolve(optimizer)  # the names of lora-rite train are none here
    check_arguments(optimizer, optimizer_args)
    if rank < 1:
        raise LoRARiteValueError(f"--rank must be at least 1, got {rank}")
    if out is not None:
        check_folder("--out", out)
    network = loss = None
    if model is not None:
        network, loss = _model_and_loss(model, adapter, data, rank, target_modules, seed, trust_remote_code)
    if out is not None:
        prepare_folder("--out", out)
    shared = {"dtypes": dtypes, "conditions": conditions, "steps": steps, "tolerance": tolerance, "seed": seed}
    result = audit(optimizer, network, loss, options={"lr": lr, **(optimizer_args or {})}, takes=takes, **shared)
    result["label"] = optimizer.rpartition(":")[2]
    own = (optimizer, optimizer_args or {})
    others = _audit_peers([peer for peer in PEERS if peers and peer[1:] != own], network, loss, lr, shared)
    print(_tables(result, others))
    if out is not None:
        packages = {name: _version(name) for name in ("pytorch_optimizer",)}
        for row in result["rows"]:
            row["errors"] = [float(f"{error:.3g}") for error in row["errors"]]
        write_json(out / "audit.json", {**result, "peers": others, "versions": {**versions(), **packages}})
        _plot(result, others, out / "audit.png")
        print(f"Figures: {out / 'audit.json'}, picture: {out / 'audit.png'}")
    return 0 if result["passed"] else 3


def _model_and_loss(
    model: str,
    adapter: Path | None,
    data: Path | None,
    rank: int,
    target_modules: str | list[str],
    seed: int,
    trust_remote_code: bool,
) -> tuple[Any, Any]:
    """The model with its adapter, and its loss on the text in ``data``; None, for one on random tokens, without it."""
    import torch

    from ..finetune.load import attach_adapter, load_model

    network, tokenizer = load_model(model, trust_remote_code=trust_remote_code)
    network.set_experts_implementation("eager")  # grouped products know no float64
    torch.manual_seed(seed)
    network = attach_adapter(network, adapter=adapter, rank=rank, target_modules=target_modules).train()
    return network, _loss_on(data, tokenizer) if data else None


def _audit_peers(
    peers: list[tuple[str, str, dict[str, Any]]], network: Any, loss: Any, lr: float, shared: dict[str, Any]
) -> list[dict[str, Any]]:
    """The audits of other optimizers, without their errors by step; one that cannot be audited is said to be so."""
    from ..invariance.audit import audit

    others = []
    for label, path, options in peers:
        try:
            other = audit(path, network, loss, options={"lr": lr, **resolve_values(options)}, **shared)
        except LoRARiteValueError as error:
            print(f"{label}: {error}")
            continue
        for row in other["rows"]:
            del row["errors"]
        others.append({**other, "label": label})
    return others


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _loss_on(path: Path, tokenizer: Any, batch_size: int = 2, length: int = 64) -> Any:
    """The loss on text: windows in order, ``batch_size`` a step, from the start again after the last."""
    from transformers import DataCollatorForSeq2Seq

    from ..finetune.data import read_examples
    from ..finetune.windows import IGNORED, windows

    rows = windows(read_examples(path), tokenizer, length).rows
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def loss(network: Any, step: int) -> Any:
        first = (step - 1) * batch_size
        batch = collator([dict(rows[i % len(rows)]) for i in range(first, first + batch_size)])
        return network(**batch.to(network.device)).loss

    return loss


def _tables(result: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
    """The audited optimizer by problem, then all optimizers by dtype (the largest error over the problems)."""
    from io import StringIO

    from rich.console import Console

    labels = list(dict.fromkeys(row["transform"] for row in result["rows"]))

    def errors(title: str, first: str, lines: dict[str, list[dict[str, Any]]]) -> Any:
        found = [
            (name, *(cell([row for row in rows if row["transform"] == label]) for label in labels))
            for name, rows in lines.items()
        ]
        return table(title, [first, *labels], found)

    def cell(rows: list[dict[str, Any]]) -> str:
        if not rows:
            return "–"
        worst, verdicts = max(rows, key=lambda row: row["worst"]), {row["verdict"] for row in rows}
        mark = "!" if worst["worst"] > worst["tolerance"] else ""
        if "control" not in verdicts:
            mark = next(m for verdict, m in MARKS.items() if verdict in verdicts)
        return f"{worst['worst']:.0e} {mark}".rstrip()

    def grouped(rows: list[dict[str, Any]], name: Any) -> dict[str, list[dict[str, Any]]]:
        return {key: [r for r in rows if name(r) == key] for key in dict.fromkeys(map(name, rows))}

    steps = result["settings"]["steps"]
    text = StringIO()
    console = Console(file=text, width=130)
    problem = lambda r: f"{r['start']} ({r['layer']}), {r['dtype']}" if r["start"] == "as it is" else (
        f"{r['start']}{'' if r['start'].startswith(r['layer']) else ' (' + r['layer'] + ')'}, {r['dtype']}"
    )  # fmt: skip
    title = f"{result['label']}: ‖ΔW − ΔW'‖/‖ΔW‖, the largest of {steps} steps"
    console.print(errors(title, "problem", grouped(result["rows"], problem)))
    if others:
        lines = {
            f"{r['label']}, {dtype}": rows
            for r in (result, *others)
            for dtype, rows in grouped(r["rows"], lambda row: row["dtype"]).items()
        }
        console.print(errors("all: the largest error over all problems", "optimizer", lines))
    say = lambda line: console.print(line, soft_wrap=True, markup=False, highlight=False)
    say('✗ depends on the factorisation; ~ within what rounding explains; "rounding" is no K but each element rounded')
    say("once (the control), and ! there: this training amplifies rounding itself")
    for r in (result, *others):
        for reason, failures in grouped(r["failures"], lambda failure: failure["reason"]).items():
            where = "; ".join(dict.fromkeys(failure["start"] for failure in failures))
            say(f"{r['label']}: not run on {where}: {reason}")
    counts = {v: sum(row["verdict"] == v for row in result["rows"]) for v in ("passed", "rounding", "failed")}
    verdict = "invariant" if result["passed"] else "not invariant" if counts["failed"] else "not shown to be invariant"
    say(
        f"{result['label']} is {verdict}: {counts['passed']} passed, {counts['rounding']} within rounding, "
        f"{counts['failed']} failed"
    )
    return text.getvalue().rstrip()


def _plot(result: dict[str, Any], others: Sequence[dict[str, Any]], path: Path) -> None:
    """Error over steps of the audited optimizer (the largest over problems), a panel a dtype; then all optimizers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = lambda value: min(max(value, 1e-17), 1e4)  # what is not finite is at the upper edge
    rows = result["rows"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    labels = list(dict.fromkeys(row["transform"] for row in rows))
    panels = len(dtypes) + (len(dtypes) if others else 0)
    figure, axes = plt.subplots(
        1, panels, figsize=(5.2 * panels, 4.8), layout="constrained", squeeze=False, sharey=True
    )
    colors = plt.get_cmap("viridis")
    for axis, dtype in zip(axes[0], dtypes, strict=False):
        for i, label in enumerate(labels):
            curves = [row["errors"] for row in rows if row["dtype"] == dtype and row["transform"] == label]
            worst = [shown(max(values)) for values in zip(*curves, strict=True)]
            style = {"color": "black", "linestyle": ":"} if label == "rounding" else {"color": colors(i / len(labels))}
            axis.plot(range(1, len(worst) + 1), worst, label=label, **style)
        axis.axhline(next(r["tolerance"] for r in rows if r["dtype"] == dtype), color="tab:red", linewidth=0.8)
        axis.set(title=f"{result['label']}, {dtype}", xlabel="step", yscale="log")
    axes[0][0].set_ylabel("‖ΔW − ΔW'‖ / ‖ΔW‖")
    axes[0][0].legend(fontsize="small")
    for axis, dtype in zip(axes[0][len(dtypes) :], dtypes, strict=False):
        for i, other in enumerate((result, *others)):
            of = lambda label, other=other, dtype=dtype: [
                row["worst"] for row in other["rows"] if row["dtype"] == dtype and row["transform"] == label
            ]
            worst = [shown(max(of(label), default=math.nan)) for label in labels]
            axis.plot(labels, worst, marker="o", markersize=3, label=other["label"], color=f"C{i}")
        axis.tick_params(axis="x", rotation=60)
        axis.set(title=f"all, {dtype}: the largest of all steps")
    if others:
        axes[0][-1].legend(fontsize="small")
    for axis in axes[0]:
        axis.set(ylim=(1e-17, 2e4))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
