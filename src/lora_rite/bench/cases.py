"""``lora-rite bench``: what a step of LoRARite costs, beside its peers, in one run.

Times are medians over rounds in which every optimizer takes one step (so that a slow moment of the machine meets all of
them), and ratios are taken within a round. Peers that are not installed, or fail, are left out, and named.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import LoRARiteValueError
from ..finetune.models import fused_experts
from ..invariance.problems import Shapes
from ..optim.optimizer import state_bytes
from ..plan.pairs import Shape
from ..run.versions import processor
from .contenders import BASELINE, WARM_UP, TimedOptimizer, optimizers
from .shapes import formula, linear_maps, network, shallow
from .watch import seconds, spread

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BOTH = (BASELINE, "LoRARite")


def measure(names: Sequence[str], shapes: Shapes, dtype: str, device: str, rounds: int) -> dict[str, Any]:
    """Measures the optimizers of those names, each on an adapter of these pairs.

    Returns:
        ``rows``: for each optimizer ``ratio`` to fused AdamW (median of the ratios within rounds, and
        ``ratio_quartiles``), ``seconds`` (and ``quartiles``), ``state_bytes``, ``extra_bytes`` and ``synchronisations``
        (:meth:`TimedOptimizer.watch`). ``left_out``: reasons by name. ``parameters``, ``parameter_bytes``,
        ``formula_bytes`` (:func:`formula`).
    """
    torch.manual_seed(0)
    made: dict[str, TimedOptimizer] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            made[name] = TimedOptimizer(name, shapes, DTYPES[dtype], device)
        except ImportError as error:
            left_out[name] = f"not installed ({error})"
        except (RuntimeError, ValueError, TypeError) as error:
            if name in (BASELINE, "LoRARite"):
                raise
            left_out[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, contender in made.items():
            times[name].append(contender.seconds())
    rows = []
    for name, contender in made.items():
        ratio, ratio_quartiles = spread([a / b for a, b in zip(times[name], times[BASELINE], strict=True)])
        median, quartiles = spread(times[name])
        rows.append({
            "optimizer": name, "ratio": ratio, "ratio_quartiles": ratio_quartiles, "seconds": median,
            "quartiles": quartiles, "state_bytes": state_bytes(contender.optimizer), **contender.watch(),
        })  # fmt: skip
    elements = sum(shape.elements for shape in shapes)
    return {
        "dtype": dtype, "pairs": sum(shape.blocks for shape in shapes), "parameters": elements,
        "parameter_bytes": elements * DTYPES[dtype].itemsize, "formula_bytes": formula(shapes), "rows": rows,
        "left_out": left_out,
    }  # fmt: skip


def check(device: str, rounds: int, **sizes: Any) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise LoRARiteValueError("--device cuda: torch sees no CUDA device")
    for name, values in {"rounds": rounds, **sizes}.items():
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                raise LoRARiteValueError(f"--{name} must be at least 1, got {value}")


def bench_step(
    models: list[str],
    layers: int | None,
    ranks: list[int],
    dtypes: list[str],
    device: str,
    capturable: bool,
    rounds: int,
) -> dict[str, Any]:
    """Every model with every rank and dtype: ``cases`` of :func:`measure`, with ``model`` and ``layers``."""
    check(device, rounds, layers=layers, ranks=ranks)
    names = [name for name in optimizers(nn.Module(), device) if capturable or "capturable" not in name]
    cases = []
    for model in models:
        depth = shallow(model, layers).get_text_config().num_hidden_layers
        for rank in ranks:
            shapes = linear_maps(model, layers, rank)
            for dtype in dtypes:
                of = {"model": model, "layers": depth, "rank": rank}
                cases.append({**of, **measure(names, shapes, dtype, device, rounds)})
    return {"benchmark": "step", "device": device, "rounds": rounds, "cases": cases}


def bench_train(
    models: list[str],
    layers: int | None,
    rank: int,
    dtype: str,
    device: str,
    batch_size: int,
    length: int,
    rounds: int,
) -> dict[str, Any]:
    """The optimizer's share of training steps (forward, backward, step) on random tokens. Both optimizers take turns on
    one model, each with an adapter of its own, in float32.

    Returns:
        ``cases`` with ``rows``: ``share`` of the optimizer (median of the shares of single training steps, and
        ``share_quartiles``), ``seconds`` of its step, ``model_seconds`` of forward and backward pass.
    """
    check(device, rounds, layers=layers, rank=rank, batch_size=batch_size, length=length)
    cases = []
    for model in models:
        torch.manual_seed(0)
        trained = network(model, layers, rank, device, DTYPES[dtype]).train()
        with fused_experts():
            trained.add_adapter("second", trained.peft_config["default"])
        config = trained.config.get_text_config()
        tokens = torch.randint(config.vocab_size, (batch_size, length), device=device)
        made = {}
        for adapter, name in zip(("default", "second"), BOTH, strict=True):
            trained.set_adapter(adapter)
            made[adapter] = optimizers(trained, device)[name]()
        times: dict[str, list[tuple[float, float]]] = {adapter: [] for adapter in made}
        for i in range(WARM_UP + rounds):
            for adapter, optimizer in made.items():
                trained.set_adapter(adapter)
                passes = seconds(lambda: trained(input_ids=tokens, labels=tokens).loss.backward(), device)  # noqa: B023
                own = seconds(optimizer.step, device)
                optimizer.zero_grad()
                if i >= WARM_UP:
                    times[adapter].append((own, passes))
        rows = []
        for name, pairs in zip(BOTH, times.values(), strict=True):
            share, quartiles = spread([own / (own + passes) for own, passes in pairs])
            own, passes = (statistics.median(values) for values in zip(*pairs, strict=True))
            rows.append({"optimizer": name, "share": share, "share_quartiles": quartiles, "seconds": own,
                         "model_seconds": passes})  # fmt: skip
        cases.append({"model": model, "layers": config.num_hidden_layers, "rank": rank, "dtype": dtype,
                      "batch_size": batch_size, "length": length, "rows": rows})  # fmt: skip
    return {"benchmark": "train", "device": device, "rounds": rounds, "cases": cases}


def bench_scaling(
    pairs: list[int], widths: list[int], ranks: list[int], dtype: str, device: str, rounds: int
) -> dict[str, Any]:
    """LoRARite and fused AdamW over the number of pairs (width 512, rank 16), the width of 8 pairs (rank 16), and the
    rank of 8 pairs (width 2,048).

    Returns:
        ``sweeps`` by name: ``x``, ``cases`` of :func:`measure`, and by optimizer ``exponents``, the slope of log
        seconds over log x by least squares: over ``all`` points and over the ``upper`` two thirds, where fixed
        costs count for less.
    """
    sizes = {"pairs": pairs, "widths": widths, "ranks": ranks}
    check(device, rounds, **sizes)
    for name, values in sizes.items():
        if len(set(values)) < 3:
            raise LoRARiteValueError(f"--{name}: an exponent needs three different values, got {values}")
    plans: dict[str, tuple[list[int], Callable[[int], Shapes]]] = {
        "pairs": (pairs, lambda x: [Shape(512, 512, 16)] * x),
        "width": (widths, lambda x: [Shape(x, x, 16)] * 8),
        "rank": (ranks, lambda x: [Shape(2048, 2048, x)] * 8),
    }
    sweeps = {}
    for name, (values, plan) in plans.items():
        xs = sorted(set(values))
        cases = [{"rank": plan(x)[0].rank, **measure(BOTH, plan(x), dtype, device, rounds)} for x in xs]
        exponents = {}
        for i, optimizer in enumerate(BOTH):
            points = [(math.log(x), math.log(c["rows"][i]["seconds"])) for x, c in zip(xs, cases, strict=True)]
            slope = lambda points: statistics.linear_regression(*zip(*points, strict=True)).slope
            exponents[optimizer] = {"all": slope(points), "upper": slope(points[len(points) // 3 :])}
        sweeps[name] = {"x": xs, "cases": cases, "exponents": exponents}
    return {"benchmark": "scaling", "dtype": dtype, "device": device, "rounds": rounds, "sweeps": sweeps}


def hardware() -> dict[str, Any]:
    """What :func:`lora_rite.run.versions.versions` does not say."""
    from importlib import metadata, util

    found = util.find_spec("pytorch_optimizer") is not None
    return {
        "cpu": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "pytorch_optimizer": metadata.version("pytorch_optimizer") if found else None,
    }
