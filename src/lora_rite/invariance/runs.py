"""One optimizer on one model, trained from several factorisations of the same W side by side."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LoRARiteError
from ..inputs import one_line
from ..optim.modes import evaluating, two_modes
from ..plan.layout import layouts
from ..plan.pairs import Pair, find_pairs
from .problems import Loss

#: Condition numbers of the random K.
CONDITIONS = (10.0, 1e2, 1e4, 1e6)
#: The largest error that passes. An optimizer that is not invariant errs by 0.1 to 1 and more.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.1}
#: BK and K⁻¹A are rounded, which changes W by condition(K) roundings before training begins. What one rounding comes to
#: in the end is measured (the control); a larger error than ``tolerance`` is put down to rounding up to MARGIN times
#: condition(K) times that.
MARGIN = 10


class Transform(NamedTuple):
    """K = scale·U·diag(σ)·Vᵀ, with random rotations U and V and σ between condition^-½ and condition^½; only scale·I
    where ``mixes`` is False. ``noise`` is the control: no K, but every element changed by one rounding."""

    label: str
    scale: float = 1.0
    condition: float = 1.0
    mixes: bool = True
    noise: bool = False

    def __call__(self, a: Tensor, b: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(K⁻¹·A, B·K), computed in float64, in the shapes and dtypes of A (r, n, …) and B (m, r, …)."""
        if self.noise:
            eps = torch.finfo(a.dtype).eps
            draw = lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)
            return tuple((p.double() * (1 + eps * draw(p))).to(p.dtype) for p in (a, b))  # type: ignore[return-value]
        r = a.shape[0]
        k, inverse = torch.eye(r, dtype=torch.float64) * self.scale, torch.eye(r, dtype=torch.float64) / self.scale
        if self.mixes:
            square = lambda: torch.randn(r, r, generator=generator, dtype=torch.float64)
            u, v = torch.linalg.qr(square())[0], torch.linalg.qr(square())[0]
            s = self.condition ** torch.linspace(0.5, -0.5, r, dtype=torch.float64)
            k, inverse = k @ (u * s) @ v.mT, inverse @ (v / s) @ u.mT
        k, inverse = k.to(a.device), inverse.to(a.device)
        new_a, new_b = inverse @ a.double().flatten(1), b.double().flatten(1) @ k
        return new_a.reshape(a.shape).to(a.dtype), new_b.reshape(b.shape).to(b.dtype)


def transforms(conditions: Sequence[float] = CONDITIONS) -> list[Transform]:
    """The control (rounding), scalings by 10^±3, a rotation, and random K of the given condition numbers."""
    fixed = [
        Transform("rounding", noise=True),
        Transform("scale 1e-3", scale=1e-3, mixes=False),
        Transform("scale 1e3", scale=1e3, mixes=False),
        Transform("rotation"),
    ]
    short = lambda c: f"{c:g}".replace("e+0", "e") if c < 1e4 else f"{c:.0e}".replace("e+0", "e")
    return fixed + [Transform(f"cond {short(c)}", condition=float(c)) for c in conditions]


class CannotTrain(LoRARiteError):
    """The optimizer raised while it was made, or in a step."""


def audit_one(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    model: nn.Module,
    loss: Loss,
    start: str,
    changes: list[Transform],
    steps: int,
    tolerance: float | None,
    seed: int,
) -> list[dict[str, Any]]:
    """Rows of one model and start. All runs go side by side, so that no trajectory has to be kept."""
    runs = [Trajectory(make, model)] + [Trajectory(make, model, change, seed) for change in changes]
    kinds = [_layer_kind(pair) for pair in runs[0].pairs]
    errors: dict[tuple[str, int], list[float]] = {(kind, i): [] for kind in kinds for i in range(len(changes))}
    moved: dict[str, float] = {}
    for step in range(1, steps + 1):
        for run in runs:
            run.step(loss, step, seed)
        changes_of_w = [run.change_of_w() for run in runs]
        for kind in dict.fromkeys(kinds):
            own = [i for i, k in enumerate(kinds) if k == kind]
            moved[kind] = norm_of([changes_of_w[0][i] for i in own])
            parts = [
                (left.norm(dim=(1, 2)), right.norm(dim=(1, 2))) for left, right in (changes_of_w[0][i] for i in own)
            ]
            still = 1e-14 * sum(float((left * right).sum()) for left, right in parts)
            for j in range(len(changes)):
                difference = norm_of([minus(changes_of_w[0][i], changes_of_w[j + 1][i]) for i in own])
                error = difference / moved[kind] if moved[kind] > still else math.inf
                errors[kind, j].append(error if math.isfinite(error) else math.inf)
    dtype = runs[0].pairs[0].a.dtype
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    rows = []
    for (kind, j), values in errors.items():
        change, worst = changes[j], max(values)
        explained = MARGIN * change.condition * max(errors[kind, 0])  # the control comes first
        if change.noise:
            verdict = "control"
        elif worst <= limit:
            verdict = "passed"
        else:
            verdict = "rounding" if math.isfinite(worst) and worst <= explained else "failed"
        rows.append(
            {"layer": kind, "start": start, "dtype": str(dtype).removeprefix("torch."), "transform": change.label,
             "condition": change.condition, "errors": values, "worst": worst, "moved": moved[kind], "tolerance": limit,
             "verdict": verdict}
        )  # fmt: skip
    return rows


class Trajectory:
    """A copy of the model with its factors transformed, and its optimizer."""

    def __init__(
        self, make: Callable[[nn.Module], torch.optim.Optimizer], model: nn.Module, change: Any = None, seed: int = 0
    ):
        factors = {id(p) for pair in find_pairs(model).pairs for p in (pair.a, pair.b)}
        shared = {id(p): p for p in model.parameters() if not p.requires_grad and id(p) not in factors}
        self.model = copy.deepcopy(model, shared)
        self.transformed, self.broken = change is not None, False
        self.pairs = find_pairs(self.model).pairs
        generator = torch.Generator().manual_seed(seed)
        for pair in self.pairs if change else ():
            _refactorise(pair, change, generator)
        self.start = [_products(pair) for pair in self.pairs]
        try:
            self.optimizer = make(self.model)
        except Exception as error:
            raise CannotTrain(f"{type(error).__name__}: {one_line(error)}") from error

    def step(self, loss: Loss, step: int, seed: int) -> None:
        if self.broken:
            return
        self.optimizer.zero_grad()
        if (inner := two_modes(self.optimizer)) is not None:
            inner.train()
        with torch.random.fork_rng():
            torch.manual_seed(seed + step)
            loss(self.model, step).backward()
            try:
                self.optimizer.step()
            except Exception as error:
                if not self.transformed:
                    raise CannotTrain(f"step {step}: {type(error).__name__}: {one_line(error)}") from error
                self.broken = True  # what trains from (B, A) and not from (BK, K⁻¹A) is not invariant

    def change_of_w(self) -> list[tuple[Tensor, Tensor]]:
        """B·A − B₀·A₀ of each pair as one product [B −B₀]·[A; A₀] of :func:`_products`; NaN after a failed step."""
        factor = math.nan if self.broken else 1.0
        with evaluating(None if self.broken else self.optimizer):
            return [
                (torch.cat([b, -b_0], 2) * factor, torch.cat([a, a_0], 1))
                for (a, b), (a_0, b_0) in zip(map(_products, self.pairs), self.start, strict=True)
            ]


def _products(pair: Pair) -> tuple[Tensor, Tensor]:
    """A (p, r, n) and B (p, m, r) of the p pairs that the parameters hold, as float64 copies on the CPU."""
    tall = [
        layout.tall([p.detach()], torch.float64).to("cpu", copy=True)
        for layout, p in zip(layouts({"blocks": pair.blocks, "columns": pair.columns}), (pair.a, pair.b), strict=True)
    ]
    return tall[0].mT, tall[1]


def _refactorise(pair: Pair, change: Transform, generator: torch.Generator) -> None:
    """Each of the pairs that the parameters hold from (B, A) to (B·K, K⁻¹·A), with a K of its own."""
    dtype = pair.a.dtype
    a, b = (x.to(dtype) for x in _products(pair))
    changed = [change(*product, generator) for product in zip(a, b, strict=True)]
    tall = torch.stack([x.mT for x, _ in changed]), torch.stack([x for _, x in changed])
    sides = layouts({"blocks": pair.blocks, "columns": pair.columns})
    for layout, p, x in zip(sides, (pair.a, pair.b), tall, strict=True):
        p.data.copy_(layout.flat(x).reshape(p.shape))


def minus(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([x[0], -y[0]], -1), torch.cat([x[1], y[1]], -2)


def norm_of(products: list[tuple[Tensor, Tensor]]) -> float:
    """The Frobenius norm of all left·right together, from r×r matrices (left and right are tall and wide, or stacks of
    such)."""
    square = 0.0
    for left, right in products:
        if not (left.isfinite().all() and right.isfinite().all()):
            return math.nan  # LAPACK is not asked
        factors = [torch.linalg.qr(x, mode="r")[1] if x.shape[-2] > x.shape[-1] else x for x in (left, right.mT)]
        square += float((factors[0] @ factors[1].mT).square().sum())
    return math.sqrt(square)


def _layer_kind(pair: Pair) -> str:
    if "lora_embedding" in pair.a_name:
        return "embedding"
    if pair.columns == "interleaved":
        return "experts"
    return "linear" if pair.a.ndim == 2 else "convolution"
