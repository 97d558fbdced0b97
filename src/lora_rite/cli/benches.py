"""``lora-rite bench step | train | scaling | host``."""

from pathlib import Path
from typing import Any, Literal


def bench_step(
    models: list[str] = ["gemma-2b"],  # noqa: B006
    layers: int | None = None,
    ranks: list[int] = [16],  # noqa: B006
    dtypes: list[Literal["float32", "bfloat16"]] = ["float32"],  # noqa: B006
    device: Literal["cpu", "cuda"] = "cpu",
    capturable: bool = False,
    rounds: int = 10,
    out: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Times a step of LoRARite beside its peers on the adapters of real models, without the models.

    Prints, for every model, rank and dtype: ratios to fused AdamW in one run, state, extra memory, synchronisations.

    Args:
        models: gemma-2b, gemma-7b, mt5-xxl, tiny, or any model's config.json (or folder, GGUF file or hub id).
        layers: number of layers; by default each model's.
        ranks: ranks of the adapter.
        dtypes: float32, bfloat16: of factors and gradients.
        device: where to run.
        capturable: on a CPU too, measure LoRARite(capturable=True), which is slow there; on CUDA it always is, as a
            CUDA graph.
        rounds: timed steps of each optimizer.
        out: file for the figures as JSON, with versions and hardware.
        plot: file for the picture (.png, .svg or .pdf).
    """
    _bench("bench_step", locals())


def bench_train(
    models: list[str] = ["tiny"],  # noqa: B006
    layers: int | None = None,
    rank: int = 16,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: Literal["cpu", "cuda"] = "cpu",
    batch_size: int = 8,
    length: int = 128,
    rounds: int = 10,
    out: Path | None = None,
) -> None:
    """Measures the optimizer's share of a whole training step, for fused AdamW and LoRARite.

    Weights and tokens are random, and the adapter is in float32.

    Args:
        models: tiny, gemma-2b, gemma-7b, mt5-xxl, or any model's config.json (or folder, GGUF file or hub id).
        layers: number of layers; by default each model's.
        rank: rank of the adapter.
        dtype: of the model's weights.
        device: where to run.
        batch_size: sequences in a step.
        length: tokens in a sequence.
        rounds: timed training steps of each optimizer.
        out: file for the figures as JSON, with versions and hardware.
    """
    _bench("bench_train", locals())


def bench_scaling(
    pairs: list[int] = [1, 4, 16, 64, 256, 1000, 2000],  # noqa: B006
    widths: list[int] = [256, 512, 1024, 2048, 4096, 8192, 16384],  # noqa: B006
    ranks: list[int] = [4, 8, 16, 32, 64, 128, 256],  # noqa: B006
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: Literal["cpu", "cuda"] = "cpu",
    rounds: int = 5,
    out: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Measures how the step grows with the number of pairs, the width and the rank, and fits exponents.

    Args:
        pairs: numbers of pairs, of width 512 and rank 16.
        widths: widths (in and out) of 8 pairs of rank 16.
        ranks: ranks of 8 pairs of width 2048.
        dtype: of factors and gradients.
        device: where to run.
        rounds: timed steps of each optimizer.
        out: file for the figures as JSON, with versions and hardware.
        plot: file for the picture (.png, .svg or .pdf).
    """
    _bench("bench_scaling", locals())


def bench_host(
    pairs: list[int] = [126, 2000],  # noqa: B006
    width: int = 64,
    rank: int = 4,
    rounds: int = 20,
    engine: Literal["eager", "triton"] = "eager",
    out: Path | None = None,
) -> None:
    """Measures what a step costs in Python: planning, checks and bookkeeping, beside whole steps and AdamW's.

    In float32 and one thread of a CPU; times are processor time. With the engine triton no GPU is needed: its launches
    are prepared for one of compute capability 9.0, and nothing is launched.

    Args:
        pairs: numbers of pairs.
        width: their width, in and out: small ones have little arithmetic.
        rank: their rank.
        rounds: timed steps of each optimizer.
        engine: what makes LoRARite's steps.
        out: file for the figures as JSON, with versions and hardware.
    """
    _bench("bench_host", locals())


def _bench(name: str, arguments: dict[str, Any]) -> None:
    from ..bench import cases as bench
    from ..bench import host as bench_host
    from ..bench import view as bench_view
    from ..run.files import prepare_file, write_json
    from ..run.versions import versions

    out, plot = arguments.pop("out"), arguments.pop("plot", None)
    if out is not None:
        prepare_file("--out", out)
    if plot is not None:
        prepare_file("--plot", plot, (".png", ".svg", ".pdf"))
    result = getattr(bench_host if name == "bench_host" else bench, name)(**arguments)
    print(bench_view.table(result), end="")
    if out is not None:
        write_json(out, {**result, "versions": {**versions(), **bench.hardware()}})
    if plot is not None:
        bench_view.plot(result, plot)
