"""``LoRARite``: its groups, and the order in which a step is checked, planned, measured, decided and made."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..errors import LoRARiteTypeError, LoRARiteValueError, warn
from ..options import LR, OPTIONS
from ..plan.plan import Limits, Plan, make_plan
from ..plan.state import new_state
from .adamw import adamw_step, check_gradients
from .engines import check_engine, measure_by
from .groups import at_lrs, check_hyperparameters, check_settings, group_at, new_groups
from .guard import Guard, complain, count_skipped, read_flags, warn_of_change
from .load import match_state, put_states
from .precision import full_precision
from .selection import alike, have_gradients, with_state
from .statistics import MAX_DROPPED_IN_A_ROW, Statistics, report, state_bytes

__all__ = ["LoRARite", "state_bytes"]

#: Of so many pairs at once the moments are copied for a report, where no plan of them all is kept.
PAIRS_AT_ONCE = 64

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
        algebra_dtype: the dtype of r×r matrices while a step computes with them: "float32" is for devices whose float64
            is slow; None is float64, where there is one. (Apple's MPS has none, and float64 factors are computed in
            float64 always.) As exact up to conditions of about 10⁴, see ``docs/scaling.md``. The state is the same.
        first_moment_dtype: the dtype of M in the state: "bfloat16" halves its memory, rounded stochastically after each
            step; None is that of the arithmetic. The step itself is computed as without. A state of the other dtype is
            converted: by ``load_state_dict``, which keeps this option of the optimizer that loads, and where the option
            of a group is changed between two steps.
        scaling: what the model multiplies B·A by (alpha/r; rsLoRA: alpha/√r). lr, clipping and eps are then those of W,
            lr at rank 16: one value suits every alpha and, nearly, every rank. None: they are those of B·A as it is.
            :func:`lora_rite.create_lora_rite` and :func:`lora_rite.param_groups` read it off the model's layers.
        engine: what makes the step: "eager", PyTorch's operations, or "triton", ten kernels for all factors together
            (the extra ``kernels``; for NVIDIA's GPUs, and on a CPU with TRITON_INTERPRET=1, to try it out). What the
            latter does not do the former does, with a warning, and ``report()["engine"]`` says which one stepped:
            ``apply_escape``, ``update_capping``, ``balance_param``, ``first_moment_dtype``, DTensors, float64,
            ranks above 64. None chooses. Both keep the same state.
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

        The default of damping rests on runs of small models, and that of lr is a careful one for larger ones; start
        from the lr that is good for AdamW on the same adapter, half and twice that; see ``docs/tuning.md``.
    """

    _limits: ClassVar[Limits] = Limits()

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = LR,
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
        algebra_dtype: str | None = None,
        first_moment_dtype: str | None = None,
        scaling: float | None = None,
        engine: str | None = None,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
    ):
        arguments = locals()
        defaults = {**{name: arguments[name] for name in OPTIONS}, "skipped": 0}
        check_hyperparameters(defaults)
        check_engine(engine)
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
        last_lr = state.get("_last_lr", [])  # of a copy; load_state_dict gives none
        super().__setstate__(state)
        self.__dict__.setdefault("_adamw", {"lr": None})
        self.__dict__.setdefault("_engine", None)
        self._begin()
        self._last_lr = last_lr

    def _begin(self) -> None:
        """What is counted and said since this optimizer was made or loaded."""
        self._statistics, self._guard = Statistics(), Guard()
        self._plan: Plan | None = None
        self._empty_plan: Plan | None = None
        self._last_lr: list[float | Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        self._count_skipped_on_device()
        own = {"_adamw": self._adamw, "_engine": self._engine, "_last_lr": self._last_lr}
        return {**super().__getstate__(), **own}

    # ------------------------------------------------------------------------------------------------- construction

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group: of kind "lora" (A, B, A, B, …), of kind "adamw", or, without ``kind``, named parameters of both
        sorts or a flat list A, B, A, B, … Nothing is added where anything is wrong with it. Keys that are none of
        LoRARite's (``name``, ``lr_scale``, those of a scheduler or of an optimizer around it) are kept, also in
        ``state_dict``, as torch's optimizers do; one that looks like a misspelt option is an error.
        """
        for group in new_groups(param_group, self.param_groups, self.defaults, self._adamw):
            super().add_param_group(group)

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
        self._check()
        with full_precision(self.param_groups):
            decided = self._measure(self._current_plan())
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
            elif plan is not self._plan and plan is not self._empty_plan:
                plan.keep(self.param_groups, self.state)  # Kept earlier, it would lack the states that AdamW makes.
                self._plan = plan
            lrs = (group["lr"] for group in self.param_groups)  # a tensor is changed in place by schedulers
            self._last_lr = [lr.clone() if isinstance(lr, Tensor) else lr for lr in lrs]
        return loss

    def _check(self) -> None:
        """What can be wrong with a step, before anything is planned."""
        self._guard.look_for_idleness(self.param_groups)
        check_settings(self.param_groups)
        check_gradients(self.param_groups, self.state)

    def _current_plan(self) -> Plan:
        """The plan of the last step where it still holds, else a new one, which is kept once a step is made by it."""
        plan, empty = self._plan, self._empty_plan
        if plan is not None and not plan.holds(self.param_groups, self.state):
            plan = self._plan = None
        if plan is not None and plan.gradients_hold():
            return plan
        if empty is not None and empty.gradients_hold() and empty.holds(self.param_groups, self.state):
            return empty
        plan = make_plan(alike(self.param_groups, self.state, have_gradients), self.state, self._limits)
        self._guard.look_for_one_sided_pairs(self.param_groups)
        if not plan.buckets:
            plan.keep(self.param_groups, self.state)
            self._empty_plan = plan
        return plan

    def _plans_of_states(self) -> Iterator[Plan]:
        """The plan of the last step where it is about all pairs that have a state, else plans of a few pairs each: a
        new plan copies the moments of its pairs."""
        stepped = list(alike(self.param_groups, self.state, lambda a, b: with_state(a, b, self.state)))
        positions, plan = {pair.position for _, pairs in stepped for pair in pairs}, self._plan
        holds = plan is not None and plan.holds(self.param_groups, self.state)
        if plan is not None and holds and {pair.position for pair in plan.pairs} == positions:
            yield plan
            return
        for group, pairs in stepped:
            for k in range(0, len(pairs), PAIRS_AT_ONCE):
                yield make_plan([(group, pairs[k : k + PAIRS_AT_ONCE])], self.state, self._limits)

    def _measure(self, plan: Plan) -> tuple[Plan, Sequence[Callable[[Tensor | None], None]], Tensor | None] | None:
        """All buckets, measured: what makes the step, and, where the device is to decide, whether it is taken; None
        where it is to be skipped. Reads parameters, gradients and state only."""
        decided = measure_by(self._engine, plan, self.param_groups, self._statistics, self._guard)
        flags, ok = decided.flags, decided.ok
        if self.param_groups[0]["capturable"]:
            self._statistics.add(plan.buckets, decided)
            self._statistics.skip(plan.pairs, decided)
            return plan, decided.moves, ok
        if not ok:  # the one host synchronisation of a step (up to rank 64, see Limits.asks_rank)
            good, changed = read_flags(plan.pairs, flags)
            if changed:
                warn_of_change(self.param_groups, changed, plan.fresh)
                stepped = alike(self.param_groups, self.state, have_gradients)
                return self._measure(make_plan(stepped, self.state, self._limits, changed))
            self._guard.skipped_in_a_row += 1
            count_skipped(self.param_groups, 1)
            complain(self.param_groups, plan.pairs, good, self._guard.skipped_in_a_row)
            return None
        self._guard.skipped_in_a_row = 0
        self._statistics.add(plan.buckets, decided)
        if self._statistics.dropped_in_a_row(plan.buckets, decided.kept) >= MAX_DROPPED_IN_A_ROW:
            warn(
                f"update_skipping has dropped gradients in {MAX_DROPPED_IN_A_ROW} steps in a row: their unmagnified "
                "root mean square is above it; raise it, or set it to 0"
            )
        return plan, decided.moves, None

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
        ``gradient_norm``           norm of all unmagnified gradients in the last step, before clipping: with
                                    ``scaling``, that of W's
        ``clip_rate``               share of steps that were clipped, since this optimizer was made or loaded
        ``damped_share``            share of singular directions of B·A with σ < δ in the last step
        ``sigma_over_delta``        median of σ/δ over pairs and directions in the last step (None without damping)
        ``engine``                  what made the last step, "eager" or "triton"; None before the first
        ``update_norm``             Frobenius norm, to first order, of the change of W (of B·A, where ``scaling`` is
                                    None) that the present first moments make in one step at the lr of the last
                                    one; after ``load_state_dict``, at the present lr until a step is made
        ==========================  ==========================================================================
        """
        self._settle()
        with full_precision(self.param_groups), at_lrs(self.param_groups, self._last_lr):
            return report(self, self._plans_of_states(), self._statistics)

    def _settle(self) -> None:
        """With ``capturable``: takes over what the device has counted, and says what a step would have said."""
        if self._statistics.flags is None:
            return
        pairs, flags = self._statistics.flags
        in_a_row, skipped = self._statistics.counts[2:].tolist()
        self._statistics.counts[3] = 0
        count_skipped(self.param_groups, int(skipped))
        finite, changed = read_flags(pairs, flags)
        if changed:
            warn_of_change(self.param_groups, changed, set())
            for pair in changed:
                for p, state in new_state(group_at(self.param_groups, pair.position), pair).items():
                    for key, value in state.items():
                        self.state[p][key].copy_(value)  # in place, where a graph finds it
        if not all(finite):
            complain(self.param_groups, pairs, finite, int(in_a_row))

    # ----------------------------------------------------------------------------------------------------- state dict

    def state_dict(self) -> dict[str, Any]:
        """As torch's; tensors, numbers and strings alone. The tensors are the optimizer's own, as torch's are, and most
        are parts of larger ones: ``torch.save`` of the whole stores each once, but of one parameter's state alone, all
        that lies beside it, unless its tensors are cloned."""
        self._count_skipped_on_device()
        return super().state_dict()

    def _count_skipped_on_device(self) -> None:
        """With ``capturable``: adds the steps to ``skipped`` that the device has skipped since that was last asked."""
        if self._statistics.flags is not None:
            count_skipped(self.param_groups, int(self._statistics.counts[3]))
            self._statistics.counts[3] = 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of LoRARite. State comes in the dtype of the arithmetic, float32 or for float64 factors
        float64 (torch would cast it to the parameters'), first moments in this optimizer's ``first_moment_dtype``
        whatever that of the saved run was (``algebra_dtype`` stays this optimizer's too), and where both sides have
        names, it goes to the parameters of those names, whatever their order.

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
        put_states(self.state, self.param_groups, matched)
