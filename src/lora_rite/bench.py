"""``lora-rite bench``: what a step of LoRARite costs, beside its peers, in one run.

Times are medians over rounds in which every optimizer takes one step (so that a slow moment of the machine meets all of
them), and ratios are taken within a round. Needs torch alone; peers that are not installed are left out, and named.
"""

import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import LoRARiteValueError
from .optimizer import LoRARite, state_bytes

#: (in, out) of the linear maps of one layer, and the number of layers: what an adapter on all of them has.
#: From the models' public configurations.
SHAPES: dict[str, tuple[list[tuple[int, int]], int]] = {
    "gemma-2b": (
        [(2048, 2048), (2048, 256), (2048, 256), (2048, 2048), (2048, 16384), (2048, 16384), (16384, 2048)],
        18,
    ),
    "gemma-7b": (
        [(3072, 4096), (3072, 4096), (3072, 4096), (4096, 3072), (3072, 24576), (3072, 24576), (24576, 3072)],
        28,
    ),
    # a layer of the encoder (self-attention, gated feed-forward) and one of the decoder (cross-attention too)
    "mt5-xxl": ([(4096, 4096)] * 12 + [(4096, 10240), (4096, 10240), (10240, 4096)] * 2, 24),
}


class Adapter(nn.Module):
    """The factors of a PEFT adapter (and their names), without a model."""

    def __init__(self, shapes: list[tuple[int, int]], rank: int, dtype: torch.dtype, device: str):
        super().__init__()
        self.layers = nn.ModuleList()
        for n, m in shapes:
            layer = nn.Module()
            layer.lora_A = nn.ModuleDict({"default": nn.Linear(n, rank, bias=False, dtype=dtype, device=device)})
            layer.lora_B = nn.ModuleDict({"default": nn.Linear(rank, m, bias=False, dtype=dtype, device=device)})
            self.layers.append(layer)


def peers(adapter: Adapter) -> dict[str, Callable[[], torch.optim.Optimizer]]:
    """Makers of the optimizers to compare, LoRARite and fused AdamW first."""
    named, params = list(adapter.named_parameters()), list(adapter.parameters())

    def pytorch_optimizer() -> torch.optim.Optimizer:
        from pytorch_optimizer import LoRARite as Other  # type: ignore[import-not-found]

        return Other(params, lr=1e-4)

    def riemannian() -> torch.optim.Optimizer:
        from peft.optimizers import create_riemannian_optimizer  # type: ignore[attr-defined]

        return create_riemannian_optimizer(adapter, torch.optim.AdamW, lr=1e-4)  # type: ignore[arg-type]

    return {
        "LoRARite": lambda: LoRARite(named, lr=1e-4),
        "AdamW (fused)": lambda: torch.optim.AdamW(params, lr=1e-4, fused=True),
        "AdamW (foreach)": lambda: torch.optim.AdamW(params, lr=1e-4, foreach=True),
        "pytorch_optimizer.LoRARite": pytorch_optimizer,
        "peft Riemannian (AdamW)": riemannian,
        "torch Muon": lambda: torch.optim.Muon(params, lr=1e-4),
    }


def bench_step(
    model: str = "gemma-2b",
    layers: int | None = None,
    rank: int = 16,
    dtype: str = "float32",
    device: str = "cpu",
    rounds: int = 10,
) -> dict[str, Any]:
    """Step time, state bytes, extra memory and host synchronisations of each optimizer, on an adapter's shapes alone.

    Args:
        model: a name in :data:`SHAPES`.
        layers: number of layers; by default the model's.
        rank: rank of the adapter.
        dtype: float32 or bfloat16, of the factors and gradients.
        device: cpu or cuda.
        rounds: timed steps of each optimizer, after three that are not.

    Returns:
        ``rows``: for each optimizer ``seconds`` (median, and quartiles), ``ratio`` to fused AdamW (median of the ratios
        within rounds), ``state_bytes``, ``extra_bytes`` (peak of what a step allocates and does not keep), and
        ``synchronisations`` of the host with the device in a step. ``parameters``: number of elements.
    """
    if (layers is not None and layers < 1) or rank < 1 or rounds < 1:
        raise LoRARiteValueError(f"layers, rank and rounds must be at least 1, got {layers}, {rank}, {rounds}")
    maps, depth = SHAPES[model]
    shapes = maps * (depth if layers is None else layers)
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    made: dict[str, tuple[Adapter, list[torch.Tensor], torch.optim.Optimizer]] = {}
    missing = []
    torch.manual_seed(0)
    names = list(peers(Adapter([(2, 2)], 1, kind, "cpu")))
    for name in names:
        adapter = Adapter(shapes, rank, kind, device)
        gradients = [torch.randn_like(p) * 1e-3 for p in adapter.parameters()]
        try:
            optimizer = peers(adapter)[name]()
        except ImportError:
            missing.append(name)
            continue
        made[name] = adapter, gradients, optimizer
        for _ in range(3):
            _timed(*made[name], device)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, parts in made.items():
            seconds[name].append(_timed(*parts, device))
    rows = []
    for name, (adapter, gradients, optimizer) in made.items():
        ratios = [own / fused for own, fused in zip(seconds[name], seconds["AdamW (fused)"], strict=True)]
        _set_gradients(adapter, gradients)
        with _Watch() as watch:
            optimizer.step()
        quartiles = statistics.quantiles(seconds[name], n=4) if rounds > 1 else [seconds[name][0]] * 3
        rows.append(
            {
                "optimizer": name,
                "seconds": statistics.median(seconds[name]),
                "quartiles": [quartiles[0], quartiles[2]],
                "ratio": statistics.median(ratios),
                "state_bytes": state_bytes(optimizer),
                "extra_bytes": watch.peak,
                "synchronisations": watch.synchronisations,
            }
        )
    parameters = sum(p.numel() for p in made["LoRARite"][0].parameters())
    return {
        "settings": {"model": model, "layers": layers or depth, "rank": rank, "dtype": dtype, "device": device,
                     "rounds": rounds, "pairs": len(shapes)},
        "parameters": parameters,
        "parameter_bytes": parameters * kind.itemsize,
        "rows": rows,
        "not_installed": missing,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The rows of :func:`bench_step` as text, ratios first."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    settings = result["settings"]
    out = Table(title="{model}, {layers} layers, {pairs} pairs, rank {rank}, {dtype}, {device}".format(**settings))
    headings = ("optimizer", "× fused AdamW", "ms", "quartiles", "state ÷ AdamW's", "extra ÷ parameters", "syncs")
    for i, heading in enumerate(headings):
        out.add_column(heading, justify="right" if i else "left")
    adamw = next(row["state_bytes"] for row in result["rows"] if row["optimizer"] == "AdamW (fused)")
    for row in result["rows"]:
        low, high = row["quartiles"]
        out.add_row(
            row["optimizer"],
            f"{row['ratio']:.2f}",
            f"{1e3 * row['seconds']:.2f}",
            f"{1e3 * low:.2f} – {1e3 * high:.2f}",
            f"{row['state_bytes'] / adamw:.3f}",
            f"{row['extra_bytes'] / result['parameter_bytes']:.2f}",
            str(row["synchronisations"]),
        )
    text = StringIO()
    Console(file=text, width=120).print(out)
    missing = f"Not installed: {', '.join(result['not_installed'])}\n" if result["not_installed"] else ""
    return text.getvalue() + missing


def _set_gradients(adapter: Adapter, gradients: list[torch.Tensor]) -> None:
    for p, g in zip(adapter.parameters(), gradients, strict=True):
        p.grad = g.clone()  # some peers write into it


def _timed(adapter: Adapter, gradients: list[torch.Tensor], optimizer: torch.optim.Optimizer, device: str) -> float:
    _set_gradients(adapter, gradients)
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


class _Watch(TorchDispatchMode):
    """Bytes of tensors that live at the same time and were made inside (without what single operations use
    inwardly), and reads of device values by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, list[int]] = {}  # storage → [tensors on it, bytes]
        self.now = self.peak = self.synchronisations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        self.synchronisations += "_local_scalar_dense" in str(func)
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
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    return [t for item in tree for t in _tensors(item)]
