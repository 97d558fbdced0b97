"""The verbs of the command line: signature and docstring are the options and their texts; the work is elsewhere.

Heavy imports are inside. No verb has a name of :mod:`lora_rite` itself (``audit``): jsonargparse looks there
first, and would import torch for ``--help``.
"""

from pathlib import Path
from typing import Any, Literal


def demo(out: Path = Path("demo"), seeds: int = 2, progress: bool = True) -> None:
    """Fine-tunes the embedded model with AdamW and with LoRA-RITE, each at its best learning rate, and compares.

    Offline, about four minutes on two cores. Writes result.json and curves.png into OUT.

    Args:
        out: folder for the results; an earlier demo in it is replaced.
        seeds: number of runs of each optimizer, with seeds 0, 1, ….
        progress: show progress bars, on a terminal; elsewhere each run is a line.
    """
    from ..study.demo import demo as run

    run(out, seeds=seeds, progress=progress)


def train(**kwargs: Any) -> None:
    from ..finetune.header import summary
    from ..finetune.train import train as run

    if result := run(**kwargs):
        print(summary(result))


def evaluate(**kwargs: Any) -> None:
    from ..finetune.evaluate import evaluate as run
    from ..finetune.evaluate import table

    if (result := run(**kwargs)) and not kwargs["dry_run"]:
        print(table(result), end="")


def compare(**kwargs: Any) -> None:
    from ..study.compare import compare as run

    run(**kwargs)


def report(folder: Path) -> None:
    """Writes the report of a study, or the loss curve of a run.

    Of a study, also of one that is not finished: report.html (one file that needs no server), report.md and figures/.
    Of a run: loss.png.

    Args:
        folder: folder of the study, the --out of lora-rite compare, or of a run, the --out of lora-rite train.
    """
    from ..study.report import report as run

    print(run(folder))


def pairs(
    model: str = "tiny",
    adapter: Path | None = None,
    target_modules: str | list[str] = "all-linear",
    rank: int = 16,
    trust_remote_code: bool = False,
) -> None:
    """Shows which factors LoRARite pairs in a model with an adapter, and what it leaves to AdamW, and why.

    A line for each kind of layer. Of the model its configuration is read alone, no weights.

    Args:
        model: hub id, local folder or GGUF file of a language model; "tiny" is the one inside this package.
        adapter: folder of a PEFT adapter; without it, a new LoRA adapter is attached.
        target_modules: layers that get a new adapter: all-linear, a list of names, or a regular expression.
        rank: rank of a new adapter.
        trust_remote_code: allow the model's own code to run.
    """
    from ..study.shapes import pairs_of

    print(pairs_of(model, adapter, target_modules, rank, trust_remote_code))


def audit_verb(
    optimizer: str = "lora_rite:LoRARite",
    lr: float = 1e-2,
    optimizer_args: dict[str, Any] | None = None,
    takes: Literal["params", "named", "model"] | None = None,
    model: str | None = None,
    adapter: Path | None = None,
    data: Path | None = None,
    rank: int = 16,
    target_modules: str | list[str] = "all-linear",
    dtypes: list[str] | None = None,
    conditions: list[float] = [10.0, 1e2, 1e4, 1e6],  # noqa: B006
    steps: int | None = None,
    tolerance: float | None = None,
    peers: bool = False,
    seed: int = 0,
    out: Path | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Measures whether an optimizer's step depends on how W = BA is factorised: any optimizer, on your own model.

    Trains from (B, A) and from (BK, K⁻¹A), for scalings, a rotation and random K, and compares what training has
    written into W. The exit code is 0 where that agrees and 3 where it does not, or where rounding hides it.

    Args:
        optimizer: import path of a class or function, like torch.optim:AdamW or my_package.optimizers:make.
        lr: its learning rate.
        optimizer_args: its further keyword arguments.
        takes: what it is called with, the list of parameters, (name, parameter) pairs, or the model; by default a class
            gets parameters (LoRARite groups), and a function the model unless its first parameter is called params.
        model: hub id, local folder or GGUF file of a causal language model, or "tiny", the one inside this package;
            without it, synthetic problems (linear maps, embeddings, convolutions).
        adapter: folder of a PEFT adapter of the model; without it, a new LoRA adapter is attached.
        data: training text for the model as in lora-rite train; without it, random tokens.
        rank: rank of a new adapter.
        target_modules: layers that get a new adapter: all-linear, a list of names, or a regular expression.
        dtypes: dtypes to audit in (float64, float32, bfloat16, float16); by default float64 and float32 for the
            synthetic problems, and a model's own.
        conditions: condition numbers of the random K.
        steps: optimizer steps of each run; by default 50 on the synthetic problems and 10 on a model, whose training by
            itself amplifies rounding over more.
        tolerance: largest relative difference of the changes of W that passes; by default 1e-4 in float64, 1e-2 in
            float32, 0.3 in bfloat16, 0.1 in float16.
        peers: show other optimizers beside it (AdamW, LoRA+, Riemannian, Muon, LoRA-Muon, PoLoRA, Shampoo, Lamb, the
            published step).
        seed: of the problems, the transformations and the adapter.
        out: folder for audit.json and audit.png.
        trust_remote_code: allow the model's own code to run.
    """
    arguments = locals()
    from ..study.audit import audit_command

    return audit_command(**arguments)


def theory(
    experiment: Literal[
        "width", "transfer", "ranks", "regret", "factors", "cost", "damping", "few_tokens", "noise", "ablation"
    ],
    out: Path | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Puts the paper's theorems, the costs and our own additions to the test: figures, a picture and a paragraph each.

    width: Theorem 1, the change of the output through A and through B over the width. transfer: the best lr over width
    and rank. ranks: one lr for every rank? regret: Theorems 3 and 4. factors: how much A and B learn, on the embedded
    model. cost: operations, time and memory over width and rank. damping: where the published step blows up;
    few_tokens: the same where it occurs. noise: 20,000 steps of noise. ablation: every part of the step taken out or
    exchanged. Each takes one to ten minutes on one core.

    Args:
        experiment: which one to run.
        out: folder for EXPERIMENT.json and EXPERIMENT.png.
        settings: keyword arguments of the experiment's run function, to make it smaller or larger.
    """
    from ..theory import theory as run

    run(experiment, out, **(settings or {}))
