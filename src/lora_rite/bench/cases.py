"""``lora-rite bench``: what a step of LoRARite costs, beside its peers, in one run.

Times are medians over rounds in which every optimizer takes one step (so that a slow moment of the machine meets all of
them), and ratios are taken within a round. Peers that are not installed, or fail, are left out, and named.
"""

import math
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import LoRARiteValueError
from ..finetune.models import SHORT, configuration, fused_experts
from ..inputs import blame
from ..integrations.peft import create_lora_rite
from ..invariance.problems import Adapter, Shapes
from ..optim.optimizer import state_bytes
from ..plan.pairs import Shape, find_pairs
from ..rivals import LoRAMuon, PoLoRA, Shampoo

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BASELINE = "AdamW (fused)"
BOTH = (BASELINE, "LoRARite")
WARM_UP = 3


# ------------------------------------------------------------------------------------------------ models and adapters


def shallow(model: str, layers: int | None = None) -> Any:
    """transformers' configuration of a model, whose short name will do; cut to so many layers (of encoder and decoder
    each)."""
    config = configuration(SHORT.get(model, model), "--models")
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if hasattr(text, "num_decoder_layers"):
            text.num_decoder_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    return config


def network(model: str, layers: int | None, rank: int, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights and a PEFT adapter on all linear maps."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = shallow(model, layers)
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device(device), blame(f"--models {model}"), fused_experts():
        base = kind.from_config(config, dtype=dtype)
        return get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))


def linear_maps(model: str, layers: int | None = None, rank: int = 1) -> Shapes:
    """The pairs of an adapter on all linear maps, those of experts in one; no weights are made. (PEFT gives parameters
    that two maps share twice the rank.)"""
    return [pair.shape for pair in find_pairs(network(model, layers, rank, "meta")).pairs]


# ----------------------------------------------------------------------------------------------------------- measuring


def optimizers(adapter: nn.Module, device: str) -> dict[str, Callable[[], torch.optim.Optimizer]]:
    """Makers of the optimizers to compare. On CUDA, those named so are replayed as a CUDA graph."""
    params = [p for p in adapter.parameters() if p.requires_grad]

    def pytorch_optimizer() -> torch.optim.Optimizer:
        from pytorch_optimizer import LoRARite as Other  # type: ignore[import-not-found]

        return Other(params, lr=1e-4)

    def riemannian() -> torch.optim.Optimizer:
        from peft.optimizers import create_riemannian_optimizer  # type: ignore[attr-defined]

        return create_riemannian_optimizer(adapter, torch.optim.AdamW, lr=1e-4)  # type: ignore[arg-type]

    cuda = device == "cuda"
    graphs: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "LoRARite (CUDA graph)" if cuda else "LoRARite (capturable)": lambda: create_lora_rite(
            adapter, 1e-4, capturable=True
        )
    }
    if cuda:
        graphs["AdamW (fused, CUDA graph)"] = lambda: torch.optim.AdamW(params, 1e-4, fused=True, capturable=True)
    return {
        "LoRARite": lambda: create_lora_rite(adapter, lr=1e-4),
        **graphs,
        BASELINE: lambda: torch.optim.AdamW(params, lr=1e-4, fused=True),
        "AdamW (foreach)": lambda: torch.optim.AdamW(params, lr=1e-4, foreach=True),
        "pytorch_optimizer.LoRARite": pytorch_optimizer,
        "peft Riemannian (AdamW)": riemannian,
        "torch Muon": lambda: torch.optim.Muon(params, lr=1e-4),
        "PoLoRA": lambda: PoLoRA(adapter, lr=1e-4),
        "LoRA-Muon": lambda: LoRAMuon(adapter, lr=1e-4),
        "Shampoo": lambda: Shampoo(adapter, lr=1e-4),
    }


class Contender:
    """An optimizer on an adapter of its own, warmed up."""

    def __init__(self, name: str, shapes: Shapes, dtype: torch.dtype, device: str):
        adapter = Adapter(shapes, dtype, device)
        self.params, self.device = [p for p in adapter.parameters() if p.requires_grad], device
        self.gradients = [torch.randn_like(p) * 1e-3 for p in self.params]
        self.optimizer = optimizers(adapter, device)[name]()
        self.step: Callable[[], Any] = self.optimizer.step
        for _ in range(WARM_UP):
            self.seconds()
        if "CUDA graph" in name:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.optimizer.step()
            self.step = graph.replay

    def reset_gradients(self) -> None:
        """Some peers write into them; a graph reads them at the same address."""
        for p, g in zip(self.params, self.gradients, strict=True):
            if p.grad is None:
                p.grad = torch.empty_like(g)
            p.grad.copy_(g)

    def seconds(self) -> float:
        self.reset_gradients()
        return seconds(self.step, self.device)

    def watch(self) -> dict[str, int]:
        """Bytes at the peak of what a step (in eager mode) allocates and does not keep; reads of the device by the
        host in what is timed."""
        self.reset_gradients()
        with Watch(self.device) as eager:
            self.optimizer.step()
        peak = eager.peak
        if self.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.optimizer.step()
            peak = torch.cuda.max_memory_allocated() - before
        graph = self.step != self.optimizer.step
        return {"extra_bytes": peak, "synchronisations": 0 if graph else eager.synchronisations}


def seconds(call: Callable[[], Any], device: str) -> float:
    """Of one call, on CUDA by events on the device."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(names: Sequence[str], shapes: Shapes, dtype: str, device: str, rounds: int) -> dict[str, Any]:
    """Measures the optimizers of those names, each on an adapter of these pairs.

    Returns:
        ``rows``: for each optimizer ``ratio`` to fused AdamW (median of the ratios within rounds, and
        ``ratio_quartiles``), ``seconds`` (and ``quartiles``), ``state_bytes``, ``extra_bytes`` and ``synchronisations``
        (:meth:`Contender.watch`). ``left_out``: reasons by name. ``parameters``, ``parameter_bytes``,
        ``formula_bytes`` (:func:`formula`).
    """
    torch.manual_seed(0)
    made: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            made[name] = Contender(name, shapes, DTYPES[dtype], device)
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


def formula(shapes: Shapes) -> int:
    """Bytes of LoRARite's state for float32, bfloat16 and float16 factors: the first moment and a number a row, five
    r×r matrices a factor, and a few numbers."""
    return sum(blocks * (4 * (n + m) * (r + 1) + 40 * r**2 + 8 * r + 26) for n, m, r, blocks, _ in shapes)


def spread(values: list[float]) -> tuple[float, list[float]]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return median, [low, high]


def check(device: str, rounds: int, **sizes: Any) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise LoRARiteValueError("--device cuda: torch sees no CUDA device")
    for name, values in {"rounds": rounds, **sizes}.items():
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                raise LoRARiteValueError(f"--{name} must be at least 1, got {value}")


# ----------------------------------------------------------------------------------------------------- the benchmarks


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

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    found = util.find_spec("pytorch_optimizer") is not None
    return {
        "cpu": names[0] if names else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "pytorch_optimizer": metadata.version("pytorch_optimizer") if found else None,
    }


class Watch(TorchDispatchMode):
    """Bytes of tensors that live at the same time and were made inside (without what single operations use
    inwardly), and reads of values on the device by the host."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.live: dict[int, list[int]] = {}  # storage → [tensors on it, bytes]
        self.now = self.peak = self.synchronisations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        self.synchronisations += "_local_scalar_dense" in str(func) and args[0].device.type == self.device
        for t in _tensors(out):
            storage = t.untyped_storage()
            key = storage._cdata
            if key in inputs and key not in self.live:
                continue  # a view of what was there before
            entry = self.live.setdefault(key, [0, storage.nbytes()])
            if entry[0] == 0:
                self.now += entry[1]
                self.peak = max(self.peak, self.now)
            entry[0] += 1
            weakref.finalize(t, self._dropped, key)
        return out

    def _dropped(self, key: int) -> None:
        entry = self.live[key]
        entry[0] -= 1
        if entry[0] == 0:
            self.now -= entry[1]
            del self.live[key]


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
