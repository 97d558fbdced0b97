"""``lora_rite.audit``: does an optimizer's step on W = BA depend on how W is factorised? Any optimizer, any LoRA model.

An optimizer is transformation invariant (Definition 1 of the paper) if training from (B, A) and from (BK, K⁻¹A) gives
the same W for every invertible K. The audit trains both ways, with the optimizer's moments, on the same batches, and
compares the changes of W after each step. Needs torch alone.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import LoRARiteError, LoRARiteValueError
from ..inputs import one_line, resolve
from ..optim.modes import evaluating, two_modes
from ..optim.optimizer import LoRARite
from ..plan.layout import layouts
from ..plan.pairs import Pair, find_pairs, param_groups

Loss = Callable[[Any, int], Tensor]
Takes = Literal["params", "named", "model"]

#: Condition numbers of the random K.
CONDITIONS = (10.0, 1e2, 1e4, 1e6)
#: Steps of a run on the synthetic problems, and on a model. On the embedded one, in float32, one rounding of the start
#: stays within TOLERANCE for 25 steps and comes to 6e-2 after 50, so that nothing could be told.
STEPS, MODEL_STEPS = 50, 10
#: The largest error that passes. An optimizer that is not invariant errs by 0.1 to 1 and more.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.1}
#: BK and K⁻¹A are rounded, which changes W by condition(K) roundings before training begins. What one rounding comes to
#: in the end is measured (the control); a larger error than ``tolerance`` is put down to rounding up to MARGIN times
#: condition(K) times that.
MARGIN = 10
#: The synthetic problems: kind of layer, and of its gradient ("few samples": rank of the gradient below the adapter's).
SYNTHETIC = ("linear", "linear, few samples", "embedding", "convolution")


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


def audit(
    optimizer: str | Callable[..., torch.optim.Optimizer],
    model: nn.Module | None = None,
    loss: Loss | None = None,
    *,
    options: dict[str, Any] | None = None,
    takes: Takes | None = None,
    dtypes: Sequence[str] | None = None,
    conditions: Sequence[float] = CONDITIONS,
    steps: int | None = None,
    tolerance: float | None = None,
    problems: Sequence[str] = SYNTHETIC,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures how far an optimizer's training of W = BA depends on the factorisation of W.

    From each start it trains the model as it is, and from (BK, K⁻¹A) for scalings, a rotation and random K, all on the
    same batches, and compares what training has written into W: ‖ΔW − ΔW'‖/‖ΔW‖ (Frobenius norms over all pairs of a
    kind of layer, ΔW against the own start, in float64), after every step.

    Args:
        optimizer: a class (``torch.optim.AdamW``), a function, or the import path of one (``"torch.optim:AdamW"``).
        model: any model with LoRA pairs that :func:`lora_rite.find_pairs` finds. It is copied, not changed; frozen
            parameters are not copied. Without a model, synthetic problems are used: linear maps, embeddings and
            convolutions, each from a zero and from a dense start.
        loss: ``loss(model, step)`` gives the scalar loss of step 1, 2, …, the same for the same step. Without it, a
            causal language model predicts random tokens.
        options: keyword arguments of the optimizer (``{"lr": 1e-3}``).
        takes: what the optimizer is called with: "params", the list of trainable parameters, A before B; "named", the
            pairs of name and parameter; or "model". By default a class gets "params" (LoRARite the groups of
            ``param_groups(model)``), and a function "model", unless its first parameter is called ``params``,
            ``parameters`` or ``named_parameters``.
        dtypes: names of torch dtypes to convert the model to, one audit each. By default float64 and float32 for the
            synthetic problems, and a model stays as it is.
        conditions: condition numbers of the random K.
        steps: optimizer steps of each run. By default 50 on the synthetic problems and 10 on a model, whose training by
            itself amplifies rounding over more.
        tolerance: the largest error that passes; by default 1e-4, 1e-2, 0.3 and 0.1 for float64, float32, bfloat16 and
            float16.
        problems: names in :data:`SYNTHETIC` to use where there is no model.
        seed: of the problems, of K, and (the same in every step of all runs) of torch, for dropout.

    Returns:
        ``rows``: a dict for each layer, start, dtype and transform, with ``errors`` of each step, ``worst`` (the
        largest of them), ``moved`` (‖ΔW‖ at the end), ``tolerance`` and ``verdict``:

        - "control": no K, but every element changed by one rounding of its dtype: what training itself makes of noise;
        - "passed": ``worst`` is within the tolerance;
        - "rounding": it is not, but within 10·condition(K) times the control's: this dtype cannot tell;
        - "failed": the step depends on the factorisation (also: W did not move, is not finite, or K alone raises).

        ``passed``: nothing failed, and for each layer, start and dtype something passed. ``failures``: problems
        that the optimizer cannot train, and why (they do not count). ``settings``.

    Raises:
        LoRARiteValueError: no pairs, no such optimizer, arguments out of range, or an optimizer that can train none of
            the problems.
    """
    steps = (STEPS if model is None else MODEL_STEPS) if steps is None else steps
    if steps < 1:
        raise LoRARiteValueError(f"steps must be at least 1, got {steps}")
    if not conditions or min(conditions) < 1:
        raise LoRARiteValueError(f"conditions must be numbers ≥ 1, got {list(conditions)}")
    if unknown := set(problems) - set(SYNTHETIC):
        raise LoRARiteValueError(f"unknown problem {sorted(unknown)[0]!r}: choose from {', '.join(SYNTHETIC)}")
    make = _maker(optimizer, options or {}, takes)
    kinds = [_dtype(name) for name in dtypes or (["float64", "float32"] if model is None else [])] or [None]
    rows, failures = [], []
    for start, problem, problem_loss in _problems(model, loss, problems, seed):
        for dtype in kinds:
            subject = problem if dtype is None else copy.deepcopy(problem).to(dtype)
            try:
                rows += _audit_one(make, subject, problem_loss, start, transforms(conditions), steps, tolerance, seed)
            except _CannotTrain as error:
                failures.append({"start": start, "dtype": str(dtype or "as it is"), "reason": str(error)})
    if not rows:
        raise LoRARiteValueError(f"{_label(optimizer)} cannot train any of the problems: {failures[0]['reason']}")
    return {
        "optimizer": _label(optimizer),
        "settings": {"options": {k: _plain(v) for k, v in (options or {}).items()}, "steps": steps, "seed": seed,
                     "model": type(model).__name__ if model is not None else "synthetic"},
        "rows": rows,
        "failures": failures,
        "passed": _passed(rows),
    }  # fmt: skip


def _passed(rows: list[dict[str, Any]]) -> bool:
    """Nothing failed, and each layer, start and dtype has something that passed: where the control itself is large,
    rounding explains every error, and shows nothing."""
    problem = lambda row: (row["layer"], row["start"], row["dtype"])
    shown = {problem(row) for row in rows if row["verdict"] == "passed"}
    return all(row["verdict"] != "failed" and problem(row) in shown for row in rows)


class _CannotTrain(LoRARiteError):
    """The optimizer raised while it was made, or in a step."""


def _audit_one(
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
    runs = [_Run(make, model)] + [_Run(make, model, change, seed) for change in changes]
    kinds = [_layer_kind(pair) for pair in runs[0].pairs]
    errors: dict[tuple[str, int], list[float]] = {(kind, i): [] for kind in kinds for i in range(len(changes))}
    moved: dict[str, float] = {}
    for step in range(1, steps + 1):
        for run in runs:
            run.step(loss, step, seed)
        changes_of_w = [run.change_of_w() for run in runs]
        for kind in dict.fromkeys(kinds):
            own = [i for i, k in enumerate(kinds) if k == kind]
            moved[kind] = _norm([changes_of_w[0][i] for i in own])
            parts = [
                (left.norm(dim=(1, 2)), right.norm(dim=(1, 2))) for left, right in (changes_of_w[0][i] for i in own)
            ]
            still = 1e-14 * sum(float((left * right).sum()) for left, right in parts)
            for j in range(len(changes)):
                difference = _norm([_minus(changes_of_w[0][i], changes_of_w[j + 1][i]) for i in own])
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


class _Run:
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
            raise _CannotTrain(f"{type(error).__name__}: {one_line(error)}") from error

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
                    raise _CannotTrain(f"step {step}: {type(error).__name__}: {one_line(error)}") from error
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


def _minus(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([x[0], -y[0]], -1), torch.cat([x[1], y[1]], -2)


def _norm(products: list[tuple[Tensor, Tensor]]) -> float:
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


def _maker(
    optimizer: str | Callable[..., torch.optim.Optimizer], options: dict[str, Any], takes: Takes | None
) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """What makes the optimizer of a model."""
    target: Any = resolve(optimizer) if isinstance(optimizer, str) else optimizer
    if not callable(target):
        raise LoRARiteValueError(f"optimizer must be a class, a function or an import path, got {target!r}")
    if takes is None and isinstance(target, type) and issubclass(target, LoRARite):
        return lambda model: target(param_groups(model), **options)
    if takes is None:
        takes = _what_it_takes(target)

    def make(model: nn.Module) -> Any:
        if takes == "model":
            return target(model, **options)
        if takes == "named":
            return target(list(model.named_parameters()), **options)
        return target([p for p in model.parameters() if p.requires_grad], **options)

    return make


def _what_it_takes(target: Any) -> Takes:
    if isinstance(target, type):
        return "params"
    first = next(iter(inspect.signature(target).parameters), "")
    if first == "named_parameters":
        return "named"
    return "params" if first in ("params", "parameters") else "model"


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if dtype not in TOLERANCE:
        known = ", ".join(str(d).removeprefix("torch.") for d in TOLERANCE)
        raise LoRARiteValueError(f"unknown dtype {name!r}: choose from {known}")
    return dtype


def _label(optimizer: Any) -> str:
    return optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", type(optimizer).__name__)


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it."""
    return value if isinstance(value, (int, float, str, bool, list, tuple, dict, type(None))) else _label(value)


# ------------------------------------------------------------------------------------------------------------- problems


def _problems(
    model: nn.Module | None, loss: Loss | None, names: Sequence[str], seed: int
) -> Iterator[tuple[str, nn.Module, Loss]]:
    """(name of the start, model, loss) of what is to be audited."""
    if model is None:
        for name in names:
            for zero in (True, False):
                problem = _Synthetic(name, zero, seed)
                yield f"{name}, {'zero' if zero else 'dense'}", problem, _Synthetic.loss
        return
    if not find_pairs(model).pairs:
        raise LoRARiteValueError("the model has no LoRA pairs; attach an adapter first (peft.get_peft_model)")
    if loss is None:
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        if vocabulary is None:
            raise LoRARiteValueError("loss is needed: the model has no vocabulary to draw random tokens from")
        loss = random_tokens(int(vocabulary), seed)
    yield "as it is", model, loss


def random_tokens(vocabulary: int, seed: int = 0, *, batch: int = 2, length: int = 32) -> Loss:
    """The loss of a causal language model on random tokens, other ones in each step."""

    def loss(model: nn.Module, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        tokens = torch.randint(vocabulary, (batch, length), generator=generator)
        tokens = tokens.to(next(model.parameters()).device)
        return model(input_ids=tokens, labels=tokens).loss

    return loss


class _Layer(nn.Module):
    """A frozen map and its adapter of rank 4, with the names that PEFT gives."""

    def __init__(self, kind: str, n: int, m: int, zero: bool):
        super().__init__()
        r = 4
        if kind == "convolution":
            a, b = nn.Conv2d(n, r, 3, bias=False), nn.Conv2d(r, m, 1, bias=False)
            self.lora_A, self.lora_B = nn.ModuleDict({"default": a}), nn.ModuleDict({"default": b})
            pair = a.weight, b.weight
        elif kind == "embedding":
            pair = nn.Parameter(torch.empty(r, n)), nn.Parameter(torch.empty(m, r))
            self.lora_embedding_A = nn.ParameterDict({"default": pair[0]})
            self.lora_embedding_B = nn.ParameterDict({"default": pair[1]})
        else:
            a, b = nn.Linear(n, r, bias=False), nn.Linear(r, m, bias=False)
            self.lora_A, self.lora_B = nn.ModuleDict({"default": a}), nn.ModuleDict({"default": b})
            pair = a.weight, b.weight
        for p in pair:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
        if zero:  # as PEFT: A of embeddings, B elsewhere
            nn.init.zeros_(pair[0] if kind == "embedding" else pair[1])
        shape = (m, n, 3, 3) if kind == "convolution" else (m, n)
        self.weight = nn.Parameter(torch.randn(shape) * (m * n) ** -0.25, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "lora_embedding_A"):
            a, b = self.lora_embedding_A["default"], self.lora_embedding_B["default"]
            return F.embedding(x, self.weight.mT) + F.embedding(x, a.mT) @ b.mT
        path = self.lora_B["default"](self.lora_A["default"](x))
        return (F.linear if self.weight.ndim == 2 else F.conv2d)(x, self.weight) + path


class _Synthetic(nn.Module):
    """Two adapted layers with a tanh between them, which learn a fixed random linear map."""

    def __init__(self, name: str, zero: bool, seed: int):
        super().__init__()
        kind, _, few = name.partition(", ")
        self.kind, self.samples, self.seed = kind, 2 if few else 16, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = _Layer(kind, *((3, 8) if kind == "convolution" else (20, 12)), zero)
            second = kind if kind == "convolution" else "linear"
            self.second = _Layer(second, *((8, 6) if kind == "convolution" else (12, 10)), zero)
            self.teacher = nn.Parameter(torch.randn(20, 10), requires_grad=False)

    def loss(self, step: int) -> Tensor:
        g = torch.Generator().manual_seed(1000 * self.seed + step)
        dtype = self.teacher.dtype
        if self.kind == "embedding":
            x = torch.randint(20, (self.samples,), generator=g)
            y = self.teacher[x]
        elif self.kind == "convolution":
            x = torch.randn(2, 3, 8, 8, generator=g, dtype=torch.float64).to(dtype)
            y = F.conv2d(x, self.teacher[:18, :9].reshape(6, 3, 3, 3))[..., 1:-1, 1:-1]
        else:
            x = torch.randn(self.samples, 20, generator=g, dtype=torch.float64).to(dtype)
            y = x @ self.teacher
        return (self.second(self.first(x).tanh()) - y).square().mean()
