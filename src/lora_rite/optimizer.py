"""``LoRARite``: its groups, and the order in which a step is checked, planned, measured, decided and made."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate, chain
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import kernels
from .errors import LoRARiteTypeError, LoRARiteValueError, NonFiniteError, warn
from .execute import eager
from .execute.engine import Decided, measure
from .optim.adamw import adamw_step, finite_gradients
from .optim.checks import all_finite, changed_shape, check_tensors, meant_option, names_of, sparse_gradient
from .optim.load import match_state
from .optim.precision import full_precision
from .optim.statistics import MAX_DROPPED_IN_A_ROW, Statistics
from .options import check as check_options
from .pairs import check_order, check_pair, is_cut_through, overlapping_storage, param_groups
from .plan.layout import LAYOUT_KEYS, layout_options, rank_of
from .plan.plan import Limits, Marks, Plan, make_plan
from .plan.sharding import is_sharded, local
from .plan.state import FactorPair, new_state, work_dtype

#: Non-finite gradients in so many steps in a row are an error.
MAX_SKIPPED_IN_A_ROW = 3
#: So many steps in a row in which no parameter has a gradient are worth a warning.
MAX_IDLE_IN_A_ROW = 10

Step = TypeVar("Step", bound=Callable[..., Any])

_ATTACH = "attach an adapter first (peft.get_peft_model), and pass model.named_parameters()"


def _untraced(function: Step) -> Step:
    """Kept out of torch.compile: a graph of a whole step would be made anew with every change of the pairs."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


class LoRARite(torch.optim.Optimizer):
    r"""LoRA-RITE: each factor of B·A is preconditioned in the orthonormal basis of the other one, so that the step on
    W = B·A does not depend on how W is factorised (transformation invariance).

    For a tall factor X (Aᵀ or B) with gradient g, the other factor Y = Q_Y·T_Y, and t the 1-based step::

        D = T_Y⁺, damped where Y started at zero      (``damping``: δ = damping·lr·√rows(Y))
        ḡ = g·D, clipped over all pairs together      (``clip_unmagnified_grad``)
        V ← β₂ₜ·P V Pᵀ + (1−β₂ₜ)·ḡᵀḡ/rows             P = Q_Y,newᵀ·Q_Y,old
        S = ḡ·(√V + eps + relative_eps·√λ_max)⁻¹
        S_i ← S_i/(√R_i + 0.01·√mean(R)), norm of S kept   (``row_equilibration``; R_i the mean square of row i,
                                                       averaged by ``row_beta``)
        M ← β₁ₜ·M Pᵀ + (1−β₁ₜ)·S                      β_t = β(1−βᵗ⁻¹)/(1−βᵗ)
        X ← X − lr·(M·Dᵀ + weight_decay·X)

    Args:
        params: ``model.named_parameters()`` (pairs by name: ``lora_A``/``lora_B`` of PEFT, also ``lora_embedding_…``,
            ``lora_down``/``lora_up``, ``lora_a``/``lora_b``; experts by the frozen weights among them), a flat list A,
            B, A, B, … with A (r, n) and B (m, r), or groups from :func:`lora_rite.param_groups`. Frozen parameters are
            left out, but where they are the partner of a trained factor (LoRA-FA, MiCA): that one then moves alone,
            undamped, in a basis that does not change.
        lr: the learning rate, a float or a tensor of one element. A step changes W by about lr·√(rows·r) in Frobenius
            norm. All hyperparameters are per group and read at each step.
        betas: decays of the first and the second moment. A second of 1 sums V over all steps (Algorithm 1 of the paper,
            Theorems 3 and 4), as Adagrad does, so that steps shrink as t^-½; lr then is that of the first step.
        eps: added to the root of the eigenvalues of V.
        weight_decay: decoupled, on both factors.
        damping: how many steps' worth of W must lie along a direction of B·A before the factor opposite to the zero one
            follows it. 0 is the published step.
        row_equilibration: divide each row of the preconditioned gradient by its running root mean square, to which a
            hundredth of that of all rows is added, so that rows of rounding noise do not become as large as the others.
        row_beta: decay of that mean square.
        relative_eps: eps in units of √λ_max(V): makes the step independent of the gradient's scale.
        clip_unmagnified_grad: largest norm of the unmagnified gradients of all pairs together; 0 is off.
        update_skipping: drop a factor's gradient in this step where its unmagnified root mean square exceeds this; 0 is
            off.
        update_capping: largest root mean square of M in the update; 0 is off.
        apply_escape: add the mass of V that the new basis does not see (ρ of Algorithm 1) to its eigenvalues.
        balance_param: rescale both factors to equal Frobenius norms after each step.
        maximize: ascend instead of descend.
        capturable: never let the host wait for the device in a step, so that a CUDA graph can hold it: a step with a
            non-finite gradient, or with a factor that was changed from outside, is skipped on the device, and
            ``report()`` says so. Take a first step before the capture, and give ``lr`` as a tensor if it is to change.
            Not with ``apply_escape``. One value for all groups.
        engine: what makes the step: "eager", PyTorch's operations, or "triton", ten kernels for all factors together
            (the extra ``kernels``; for NVIDIA's GPUs, and on a CPU with TRITON_INTERPRET=1, to try it out). What the
            latter does not do the former does, with a warning, and ``report()["engine"]`` says which one stepped:
            ``apply_escape``, ``update_capping``, ``balance_param``, DTensors, float64, ranks above 64. None chooses.
            Both keep the same state.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: for the trainable parameters that are not factors (they
            become ``lr``, ``betas``, … of a group of kind "adamw", so that schedulers act on it too). Without
            ``adamw_lr`` such parameters are an error: LoRA-RITE's learning rate does not suit them.

    Raises:
        LoRARiteValueError, LoRARiteTypeError: parameters that do not form pairs, hyperparameters out of range.
        NonFiniteError: from ``step()``, a parameter has NaN or Inf (nothing is written), or gradients had it in three
            steps in a row. One such step alone is skipped as a whole, with a warning that names the parameter:
            parameters, moments and step counters stay as they are, and ``report()["skipped"]`` goes up.

    Note:
        Deviations from the paper (Algorithm 1): V is a bias-corrected average instead of a sum, and M is
        bias-corrected; gradients are clipped; ρ is off (``apply_escape``); all three as in the authors' code.
        Deviations from the authors' code, with :data:`PUBLISHED` none but these:

        - the orthonormal basis comes from Gram matrices in the previous basis instead of a QR decomposition (every
          orthonormal basis gives the same step), and the state holds no tall basis;
        - directions of a factor that are rounding noise count as null instead of being inverted (there they make W blow
          up where the gradient's rank, or n, is below r);
        - negative eigenvalues of V that are rounding noise are 0 (there: NaN, and the update vanishes);
        - ``weight_decay`` of the group is honoured; ``balance_param`` does nothing where lr is 0 or a factor is zero;
        - a gradient with NaN or Inf skips the step instead of entering the state; a pair without gradient is passed
          over;
        - bfloat16 and float16 factors are computed in float32 and rounded stochastically.

        Ours, in neither (off in :data:`PUBLISHED`): ``damping``, ``row_equilibration`` with its floor,
        ``relative_eps``; and ``update_skipping``, which is 1 there, is off by default.

        The defaults of lr and damping rest on runs of small models; start from the lr that is good for AdamW on the
        same adapter and try up to five times that; see the README.
    """

    _limits: ClassVar[Limits] = Limits()

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        damping: float = 20.0,
        row_equilibration: bool = True,
        row_beta: float = 0.99,
        relative_eps: float = 1e-3,
        clip_unmagnified_grad: float = 1.0,
        update_skipping: float = 0.0,
        update_capping: float = 0.0,
        apply_escape: bool = False,
        balance_param: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        engine: str | None = None,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
    ):
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "damping": damping,
            "row_equilibration": row_equilibration, "row_beta": row_beta, "relative_eps": relative_eps,
            "clip_unmagnified_grad": clip_unmagnified_grad, "update_skipping": update_skipping,
            "update_capping": update_capping, "apply_escape": apply_escape, "balance_param": balance_param,
            "maximize": maximize, "capturable": capturable, "skipped": 0,
        }  # fmt: skip
        _check_hyperparameters(defaults)
        kernels.check_engine(engine)
        self._engine = engine
        self._adamw = {"lr": adamw_lr, "betas": adamw_betas, "eps": adamw_eps, "weight_decay": adamw_weight_decay}
        if isinstance(params, torch.nn.Module):
            raise LoRARiteTypeError("params is a model; pass model.named_parameters(), which names the factors")
        given: Any = params if isinstance(params, Tensor) else list(params)
        if isinstance(given, list) and not given:
            raise LoRARiteValueError(f"no LoRA pairs: params is empty; {_ATTACH}")
        self._begin()
        super().__init__(given, defaults)
        if not any(group["kind"] == "lora" for group in self.param_groups):
            raise LoRARiteValueError(f"no LoRA pairs among the trainable parameters; {_ATTACH}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_adamw", {"lr": None})
        self.__dict__.setdefault("_engine", None)
        self._begin()

    def _begin(self) -> None:
        """What is counted and said since this optimizer was made or loaded."""
        self._statistics, self._skipped_in_a_row, self._warned_one_sided = Statistics(), 0, False
        self._idle_in_a_row, self._warned_idle, self._warned_eager = 0, False, False
        self._plan: Plan | None = None
        self._empty_plan: Plan | None = None
        self._last_lr: list[float | Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_adamw": self._adamw, "_engine": self._engine}

    # ------------------------------------------------------------------------------------------------- construction

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group: of kind "lora" (A, B, A, B, …), of kind "adamw", or, without ``kind``, named parameters of both
        sorts or a flat list A, B, A, B, … Nothing is added where anything is wrong with it. Keys that are none of
        LoRARite's (``name``, ``lr_scale``, those of a scheduler or of an optimizer around it) are kept, also in
        ``state_dict``, as torch's optimizers do; one that looks like a misspelt option is an error.
        """
        if not isinstance(param_group, dict):
            raise LoRARiteTypeError(f"param_group must be a dict, but got {type(param_group).__name__}")
        foreign = self._foreign(param_group)
        if isinstance(param_group["params"], set):
            raise LoRARiteTypeError("params is a set, whose order changes between runs: pass a list")
        given = param_group["params"]
        params: list[Any] = [given] if isinstance(given, Tensor) else list(given)
        options = {k: v for k, v in param_group.items() if k != "params"}
        named = bool(params) and isinstance(params[0], tuple)
        if not named and "param_names" in options:
            params, named = list(zip(options["param_names"], params, strict=True)), True
        options.pop("param_names", None)
        offset = sum(len(group["params"]) for group in self.param_groups)
        labelled: list[tuple[str, Any]] = (
            params if named else [(f"parameter {offset + i}", p) for i, p in enumerate(params)]
        )
        # (a frozen base, of integers where it is quantised, may be among named parameters)
        check_tensors([(n, p) for n, p in labelled if not (named and isinstance(p, Tensor) and not p.requires_grad)])
        if "kind" in options:
            groups = [{"params": labelled, **options}]
        elif named:
            groups = param_groups(labelled, **options)
        else:
            trainable = [(name, p) for name, p in labelled if p.requires_grad]
            groups = [{"params": trainable, "kind": "lora", **options}] if trainable else []
        groups = [{**foreign, **group} for group in groups]
        for group in groups:
            check_tensors(group["params"])  # frozen factors of pairs too
            self._check_group(group, named)
        everything = [
            *zip(self._names_by_position(), chain.from_iterable(g["params"] for g in self.param_groups), strict=True),
            *chain.from_iterable(group["params"] for group in groups),
        ]
        if shared := overlapping_storage(everything):
            raise LoRARiteValueError(
                f"{shared[0]} and {shared[1]} are the same tensor or share storage (tied, or passed twice): each may "
                "be updated once only. Untie them, or freeze one, with its partner where it is a factor"
            )
        for group in groups:
            if not named:
                group["params"] = [p for _, p in group["params"]]
            super().add_param_group(group)

    def _foreign(self, param_group: dict[str, Any]) -> dict[str, Any]:
        """What of a group is not for LoRARite; LoRARiteValueError where it looks as if it were meant to be."""
        own = ["params", "param_names", "kind", *LAYOUT_KEYS, *self.defaults]
        foreign = {key: value for key, value in param_group.items() if key not in own}
        for key in (key for key in foreign if isinstance(key, str)):
            if key.removeprefix("adamw_") in self._adamw:
                raise LoRARiteValueError(
                    f"{key} is an option of the optimizer; in a parameter group of kind adamw it is called "
                    f"{key.removeprefix('adamw_')}"
                )
            if (meant := meant_option(key, own)) is not None:
                raise LoRARiteValueError(f"unknown key {key!r} in a parameter group: did you mean {meant!r}?")
        if "params" not in param_group:
            raise LoRARiteValueError("a parameter group without 'params'")
        return foreign

    def _check_group(self, group: dict[str, Any], named: bool) -> None:
        kind, params = group["kind"], group["params"]
        if kind == "lora":
            if len(params) % 2:
                raise LoRARiteValueError(
                    f"unpaired factor {params[-1][0]}: {len(params)} parameters are not pairs A, B, A, B, …; pass "
                    "model.named_parameters()"
                )
            for (a_name, a), (b_name, b) in zip(params[::2], params[1::2], strict=True):
                if not named and not set(LAYOUT_KEYS) & set(group):
                    check_order(a, b, a_name, b_name)
                check_pair(a, b, a_name, b_name, **layout_options(group))
        elif kind == "adamw":
            for key, value in self._adamw.items():
                group.setdefault(key, value)
            if group["lr"] is None:
                names = [name for name, _ in params]
                raise LoRARiteValueError(
                    f"{len(names)} trainable parameters are not LoRA factors ({', '.join(names[:3])}"
                    f"{', …' if len(names) > 3 else ''}): pass adamw_lr=… to train them by AdamW (LoRA-RITE's lr does "
                    "not suit them), or freeze them"
                )
        else:
            raise LoRARiteValueError(f'kind is "lora" or "adamw", not {kind!r}')
        _check_hyperparameters({**self.defaults, **group})

    # --------------------------------------------------------------------------------------------------------- step

    @_untraced
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One step. Everything that can fail is computed before anything is written.

        Args:
            closure: evaluates the model anew and returns the loss, which ``step`` returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_idle()
        others = [group for group in self.param_groups if group["kind"] == "adamw"]
        with self._full_precision():
            self._check_settings()
            self._check_adamw()
            decided = self._measure(self._current_plan(), others)
            if decided is None:
                return loss
            plan, moves, ok = decided
            if not plan.installed and plan.adopts(self.state):
                plan.install(self.state)
            for move in moves:
                move(ok)
            offset = 0
            for group in self.param_groups:
                if group["kind"] == "adamw":
                    adamw_step(group, self.state, offset, ok)
                offset += len(group["params"])
            if not plan.installed:
                plan.write_back(self.state)
            elif plan.marks is None:  # not before AdamW has made its states
                plan.marks, self._plan = Marks(self.param_groups, self.state), plan
            lrs = (group["lr"] for group in self.param_groups)  # a tensor is changed in place by schedulers
            self._last_lr = [lr.clone() if isinstance(lr, Tensor) else lr for lr in lrs]
        return loss

    def _current_plan(self) -> Plan:
        """The plan of the last step where it still holds, else a new one, which is kept once a step is made by it."""
        for plan in (self._plan, self._empty_plan):
            if plan is not None and plan.marks.hold(self.param_groups, self.state):  # type: ignore[union-attr]
                return plan
        plan = self._plan
        if plan is not None and not plan.marks.hold(self.param_groups, self.state, gradients=False):  # type: ignore[union-attr]
            self._plan = None  # else this step alone is of other pairs
        plan = make_plan(self._alike(_have_gradients), self.state, self._limits)
        if not plan.buckets:
            plan.marks, self._empty_plan = Marks(self.param_groups, self.state), plan
        return plan

    def _plan_of_states(self) -> Plan:
        """The plan of the last step where it is about all pairs that have a state, else one that is not kept."""
        stepped = list(self._alike(self._with_state))
        plan, positions = self._plan, sorted(pair.position for _, pairs in stepped for pair in pairs)
        holds = plan is not None and plan.marks.hold(self.param_groups, self.state, gradients=False)  # type: ignore[union-attr]
        if plan is not None and holds and sorted(pair.position for pair in plan.pairs) == positions:
            return plan
        return make_plan(stepped, self.state, self._limits)

    def _full_precision(self) -> AbstractContextManager[None]:
        return full_precision({p.device.type for group in self.param_groups for p in group["params"]})

    @contextmanager
    def _at_last_lr(self) -> Iterator[None]:
        """Within, each group has the lr of the last step: when that is reported, the scheduler has moved on."""
        present = [group["lr"] for group in self.param_groups]
        for group, lr in zip(self.param_groups, self._last_lr, strict=False):  # (groups may have been added)
            group["lr"] = lr
        try:
            yield
        finally:
            for group, lr in zip(self.param_groups, present, strict=True):
                group["lr"] = lr

    def _check_settings(self) -> None:
        """What schedulers and callers may have made of the groups since they were checked, as far as the host knows."""
        first = self.param_groups[0]
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            if group["capturable"] != first["capturable"]:
                raise LoRARiteValueError("capturable is not the same in all parameter groups: set one value")
            if isinstance(lr, Tensor):
                continue
            if not math.isfinite(lr):
                raise LoRARiteValueError(f"lr={lr} is not finite: look at the learning-rate scheduler")
            if lr * decay >= 1:
                raise LoRARiteValueError(f"lr={lr} with weight_decay={decay} wipes out the weights in one step")

    def _check_idle(self) -> None:
        """Warns, once, of parameters that nothing computes gradients for any more."""
        idle = all(p.grad is None for group in self.param_groups for p in group["params"])
        self._idle_in_a_row = self._idle_in_a_row + 1 if idle else 0
        if self._idle_in_a_row >= MAX_IDLE_IN_A_ROW and not self._warned_idle:
            self._warned_idle = True
            warn(
                f"no parameter of this optimizer has had a gradient in {MAX_IDLE_IN_A_ROW} steps in a row: either none "
                "was computed, or they are no longer the model's (after merge_and_unload, delete_adapter or an "
                "exchange of its layers make a new optimizer). This is said once"
            )

    def _measure(
        self, plan: Plan, others: list[dict[str, Any]]
    ) -> tuple[Plan, Sequence[Callable[[Tensor | None], None]], Tensor | None] | None:
        """All buckets, measured: what makes the step, and, where the device is to decide, whether it is taken; None
        where it is to be skipped. Reads parameters, gradients and state only."""
        decided = self._by_engine(plan, [finite_gradients(group) for group in others])
        flags, ok = decided.flags, decided.ok
        if self.param_groups[0]["capturable"]:
            self._statistics.add(plan.buckets, decided)
            self._statistics.skip(plan.pairs, decided)
            return plan, decided.moves, ok
        if not ok:  # the one host synchronisation of a step
            good, changed = _read(plan.pairs, flags)
            if changed:
                self._warn_of_change(changed, plan.fresh)
                return self._measure(make_plan(self._alike(_have_gradients), self.state, self._limits, changed), others)
            self._skipped_in_a_row += 1
            self._count_skipped(1)
            self._complain(plan.pairs, others, good, self._skipped_in_a_row)
            return None
        self._skipped_in_a_row = 0
        self._statistics.add(plan.buckets, decided)
        if self._statistics.dropped_in_a_row(plan.buckets, decided.kept) >= MAX_DROPPED_IN_A_ROW:
            warn(
                f"update_skipping has dropped gradients in {MAX_DROPPED_IN_A_ROW} steps in a row: their unmagnified "
                "root mean square is above it; raise it, or set it to 0"
            )
        return plan, decided.moves, None

    def _by_engine(self, plan: Plan, others: list[Tensor]) -> Decided:
        """The first half of a step, by the engine that is asked for, or that suits the plan."""
        wanted = self._engine or ("triton" if kernels.PASSED else "eager")
        reason = kernels.supports(plan) if wanted == "triton" else None
        if wanted == "eager" or reason:
            if reason and self._engine and plan.buckets and not self._warned_eager:
                self._warned_eager = True
                warn(f'engine="triton" does not step {reason}: the eager engine does. This is said once')
            return measure(plan, others)
        counts = self._statistics.counts_on(plan.buckets[0].device)
        return kernels.measure(plan, others, counts, self.param_groups[0]["capturable"])

    def _alike(self, wanted: Callable[[Tensor, Tensor], Any]) -> Iterator[tuple[dict[str, Any], list[FactorPair]]]:
        """Pairs (A, B) that are wanted, by group, rank, dtype of the arithmetic and device."""
        position, one_sided = 0, []
        for number, group in enumerate(self.param_groups):
            params, layout = group["params"], layout_options(group)
            named = group.get("param_names", params)
            if group["kind"] == "lora" and (len(params) != len(named) or len(params) % 2):
                raise LoRARiteValueError(
                    f"group {number} holds {len(params)} parameters instead of its factors A, B, A, B, …: DeepSpeed "
                    "ZeRO flattens and splits them. Use DeepSpeed's stage 0, DDP or FSDP2"
                )
            alike: dict[Any, list[FactorPair]] = {}
            for k in range(0, len(params) if group["kind"] == "lora" else 0, 2):
                a, b = params[k : k + 2]
                if not wanted(a, b):
                    if a.requires_grad and b.requires_grad and (a.grad is None) != (b.grad is None):
                        one_sided.append(position + k)
                    continue
                wrong = self._altered(a) or self._altered(b) or self._newly_frozen(a, b) or self._retyped(a, b)
                if wrong or is_cut_through(b, **layout):
                    self._explain(group, a, b, names_of(self.param_groups)[number][k : k + 2])
                pair = FactorPair(a, b, position + k)
                moving = self._with_state(a, b) or (a.requires_grad, b.requires_grad)
                mesh = getattr(a, "device_mesh", None)
                key = rank_of(group, a), work_dtype(a, b), a.device, mesh, is_sharded(b), moving
                alike.setdefault(key, []).append(pair)
            position += len(params)
            yield from ((group, pairs) for pairs in alike.values())
        if one_sided and not self._warned_one_sided:
            self._warned_one_sided = True
            warn(
                f"{self._names_by_position()[one_sided[0]]} and its partner: one has a gradient and the other none, so "
                f"neither is moved ({len(one_sided)} such pairs; this is said once)"
            )

    def _altered(self, p: Tensor) -> bool:
        """Whether p cannot be stepped: sharded, of another shape than its state was made for, or a sparse gradient."""
        state = self.state.get(p)
        sparse = p.grad is not None and p.grad.layout != torch.strided
        swapped = is_sharded(p) != is_sharded(state["first_moment"]) if state else False
        return p.ndim < 2 or sparse or swapped or (bool(state) and state["first_moment"].shape != p.shape)

    def _retyped(self, a: Tensor, b: Tensor) -> bool:
        """Whether the state of a pair is of another dtype than its arithmetic is to be in."""
        state = self.state.get(a) or self.state.get(b)
        return bool(state) and state["matrices"].dtype != work_dtype(a, b)

    def _check_adamw(self) -> None:
        """Raises LoRARiteValueError where AdamW would fail, half a step done."""
        for number, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"] if group["kind"] == "adamw" else ()):
                moment = self.state.get(p, {}).get("exp_avg", p)
                if p.grad is None or (p.grad.layout == torch.strided and moment.shape == p.shape):
                    continue
                name = names_of(self.param_groups)[number][i]
                sparse = p.grad.layout != torch.strided
                raise LoRARiteValueError(sparse_gradient(name) if sparse else changed_shape(name, moment, p))

    def _with_state(self, a: Tensor, b: Tensor) -> tuple[bool, bool] | None:
        """Which of two factors have a state: both, or the one that is not frozen; None where the pair has none yet."""
        have = bool(self.state.get(a)), bool(self.state.get(b))
        return have if any(have) else None

    def _newly_frozen(self, a: Tensor, b: Tensor) -> bool:
        """Whether other factors of a pair are trained than its state was made for. (A pair that is frozen as a whole,
        an adapter that is not active, keeps its state.)"""
        trained = a.requires_grad, b.requires_grad
        return any(trained) and self._with_state(a, b) not in (None, trained)

    def _explain(self, group: dict[str, Any], a: Tensor, b: Tensor, names: list[str]) -> None:
        check_pair(a, b, names[0], names[1], **layout_options(group))
        for p, name in zip((a, b), names, strict=True):
            if p.grad is not None and p.grad.layout != torch.strided:
                raise LoRARiteValueError(sparse_gradient(name))
            if self.state.get(p) and is_sharded(p) != is_sharded(self.state[p]["first_moment"]):
                raise LoRARiteValueError(
                    f"{name} is sharded and its state is not, or the reverse: shard the model (fully_shard) before the "
                    "optimizer's first step, and load states by torch.distributed.checkpoint"
                )
            if self.state.get(p) and p.shape != self.state[p]["first_moment"].shape:
                raise LoRARiteValueError(changed_shape(name, self.state[p]["first_moment"], p))
            if self._retyped(a, b):
                raise LoRARiteValueError(
                    f"{name} changed its dtype to {p.dtype} since its state was made: save the optimizer's state_dict, "
                    "make a new optimizer, and load it there"
                )
            if self._newly_frozen(a, b) and p.requires_grad != bool(self.state.get(p)):
                raise LoRARiteValueError(
                    f"{name} is {'trained' if p.requires_grad else 'frozen'}, and was not when its state was made: "
                    "make a new optimizer, or remove the state of both factors (optimizer.state.pop) to start anew"
                )

    def _warn_of_change(self, changed: list[FactorPair], fresh: set[Tensor]) -> None:
        """Says that pairs were changed since the last step, or raises NonFiniteError where a new state (``fresh``: made
        in this step) would not help."""
        names = self._names_by_position()
        for pair in changed:
            for p, name in zip(pair[:2], names[pair.position :], strict=False):
                if not all_finite(p):
                    raise NonFiniteError(f"parameter {name} contains NaN or Inf: restore a checkpoint")
                if pair.a in fresh or pair.b in fresh:  # a state that was made in this step
                    raise NonFiniteError(f"parameter {name} is too large: sums of its values overflow")
        first = names[changed[0].position]
        warn(
            f"{len(changed)} pairs were changed from outside since the last step "
            f"({first}{', …' * (len(changed) > 1)}): their moments start anew. Load the optimizer's state "
            "together with the weights to keep them"
        )

    def _group_at(self, position: int) -> dict[str, Any]:
        ends = accumulate(len(group["params"]) for group in self.param_groups)
        return next(group for group, end in zip(self.param_groups, ends, strict=True) if position < end)

    def _count_skipped(self, steps: int) -> None:
        for group in self.param_groups:
            group["skipped"] += steps

    def _complain(
        self, pairs: list[FactorPair], others: list[dict[str, Any]], finite: list[bool], in_a_row: int
    ) -> None:
        """Names the parameters that made a step be skipped: a warning, or an error where it were too many in a row."""
        names = self._names_by_position()
        suspects = [p for pair, ok in zip(pairs, finite, strict=False) if not ok for p in pair[:2]]
        suspects += [p for group in others for p in group["params"]]
        suspects = [p for p in suspects if p.grad is not None]
        bad = [p for p in suspects if not all_finite(p.grad)]  # type: ignore[arg-type]
        what = "non-finite gradient" if bad else "overflow from the gradient"
        bad = bad or suspects
        positions = {p: i for i, p in enumerate(chain.from_iterable(g["params"] for g in self.param_groups))}
        name = names[positions[bad[0]]]
        message = f"{what} of {name}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}"
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{message}, {in_a_row} steps in a row: lower the learning rate, or look for the first "
                "non-finite loss. Parameters and state are those of the last good step"
            )
        warn(f"{message}: step skipped ({self.param_groups[0]['skipped']} so far)")

    def _names_by_position(self) -> list[str]:
        return [name for names in names_of(self.param_groups) for name in names]

    # ------------------------------------------------------------------------------------------------------ reporting

    @torch.no_grad()
    def report(self) -> dict[str, Any]:
        """What the optimizer holds and what it did; plain numbers, for logs and JSON. Synchronises with the device.

        ==========================  ==========================================================================
        ``pairs``, ``ranks``        number of pairs, and of pairs by rank
        ``other_parameters``        number of tensors updated by AdamW
        ``state_bytes``             bytes of all state tensors
        ``steps``, ``skipped``      steps applied to the oldest pair; steps skipped for a non-finite gradient
        ``pairs_preconditioned``    pairs that the last step moved: those that had gradients
        ``dead_pairs``              pairs with both factors zero, which cannot learn
        ``gradient_norm``           norm of all unmagnified gradients in the last step, before clipping
        ``clip_rate``               share of steps that were clipped, since this optimizer was made or loaded
        ``damped_share``            share of singular directions of B·A with σ < δ in the last step
        ``sigma_over_delta``        median of σ/δ over pairs and directions in the last step (None without damping)
        ``engine``                  what made the last step, "eager" or "triton"; None before the first
        ``update_norm``             Frobenius norm, to first order, of the change of W = B·A that the present first
                                    moments make in one step at the lr of the last one
        ==========================  ==========================================================================
        """
        self._settle()
        lora = [group for group in self.param_groups if group["kind"] == "lora"]
        ranks = [
            rank_of(group, group["params"][k])
            for group in lora
            for k in range(0, len(group["params"]), 2)
            for _ in range(group.get("blocks", 1))
        ]
        states = [state for state in self.state.values() if "matrices" in state]
        with self._full_precision(), self._at_last_lr():
            plan = self._plan_of_states()
            of_buckets = zip(plan.buckets, plan.workspaces(), strict=True)
            squares = [eager.update_square(bucket, workspace)[0] for bucket, workspace in of_buckets]
            update_norm = sum(map(float, squares)) ** 0.5
        return {
            "pairs": len(ranks),
            "ranks": {rank: ranks.count(rank) for rank in sorted(set(ranks))},
            "other_parameters": sum(len(g["params"]) for g in self.param_groups if g["kind"] == "adamw"),
            "state_bytes": state_bytes(self),
            "steps": max((int(state["step"].max()) for state in states), default=0),
            "skipped": self.param_groups[0]["skipped"],
            "dead_pairs": sum(int(dead) for bucket in plan.buckets for dead in eager.dead(bucket)),
            "update_norm": update_norm,
            **self._statistics.summary(),
        }

    def _settle(self) -> None:
        """With ``capturable``: takes over what the device has counted, and says what a step would have said."""
        if self._statistics.flags is None:
            return
        pairs, flags = self._statistics.flags
        in_a_row, skipped = self._statistics.counts[2:].tolist()
        self._statistics.counts[3] = 0
        self._count_skipped(int(skipped))
        finite, changed = _read(pairs, flags)
        if changed:
            self._warn_of_change(changed, set())
            for pair in changed:
                for p, state in new_state(self._group_at(pair.position), pair).items():
                    for key, value in state.items():
                        self.state[p][key].copy_(value)  # in place, where a graph finds it
        if not all(finite):
            self._complain(pairs, [g for g in self.param_groups if g["kind"] == "adamw"], finite, int(in_a_row))

    # ----------------------------------------------------------------------------------------------------- state dict

    def state_dict(self) -> dict[str, Any]:
        """As torch's; tensors, numbers and strings alone."""
        if self._statistics.flags is not None:
            self._count_skipped(int(self._statistics.counts[3]))
            self._statistics.counts[3] = 0
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of LoRARite. State comes in the dtype of the arithmetic, float32 or for float64 factors
        float64 (torch would cast it to the parameters'), and where both sides have names, it goes to the parameters of
        those names, whatever their order.

        Raises:
            LoRARiteValueError: a state of another optimizer, of other parameters or shapes. Nothing is loaded.
        """
        matched: dict[str, Any] = {}

        def match(optimizer: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            matched.update(match_state(loaded, self.param_groups))
            return matched

        hook = self.register_load_state_dict_pre_hook(match)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for group, saved in zip(self.param_groups, matched["param_groups"], strict=True):
            lora = group["kind"] == "lora"
            for i, (p, saved_id) in enumerate(zip(group["params"], saved["params"], strict=True)):
                dtype = work_dtype(p, *([group["params"][i ^ 1]] if lora else []))
                for key, value in matched["state"].get(saved_id, {}).items():
                    if isinstance(value, Tensor):
                        device = "cpu" if key == "step" and not (lora or group["capturable"]) else p.device  # torch's
                        kept = key == "step" or not value.is_floating_point()
                        self.state[p][key] = value.detach().to(device, value.dtype if kept else dtype, copy=True)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors of an optimizer in this process, also of those in lists and dictionaries."""
    tensors = [local(t) for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _have_gradients(a: Tensor, b: Tensor) -> bool:
    """Whether the factors that are trained, both or one, have gradients."""
    trained = [p for p in (a, b) if p.requires_grad]
    return bool(trained) and all(p.grad is not None for p in trained)


def _read(pairs: list[FactorPair], flags: Tensor) -> tuple[list[bool], list[FactorPair]]:
    """What is finite, pair by pair and then AdamW group by group, and the pairs that were changed from outside."""
    values = flags.tolist()
    n = len(values) - len(pairs)
    return values[:n], [pair for pair, same in zip(pairs, values[n:], strict=True) if not same]


def _check_hyperparameters(values: dict[str, Any]) -> None:
    check_options(values, _number)


def _number(name: str, value: Any) -> Any:
    """lr may be a tensor."""
    if name != "lr" or not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise LoRARiteValueError("lr must be a number or a tensor of one element")
    return value.item()
