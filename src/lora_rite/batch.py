"""Same-shape pairs computed together: gathered from parameters and state, measured, moved, written back.

``measure`` and ``precondition`` only read, ``apply`` writes and cannot fail; the optimizer decides between them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import rite

State = dict[str, Tensor]


class FactorPair(NamedTuple):
    """A (r, n), B (m, r) and the position of A among all parameters of the optimizer, in the order of the groups."""

    a: Tensor
    b: Tensor
    position: int


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where a factor is float64, float32 otherwise: the dtype of all arithmetic and of the state."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def algebra_dtype(device: torch.device) -> torch.dtype:
    """The dtype of r×r matrices while they are computed with."""
    return torch.float32 if device.type == "mps" else torch.float64


def tall(tensors: Sequence[Tensor], rank_first: bool, dtype: torch.dtype) -> Tensor:
    """(p, rows, r) from factors (r, n, …) or (m, r, …); a view where there is one tensor of that dtype."""
    flat = [t.flatten(1) for t in tensors]
    stacked = (flat[0][None] if len(flat) == 1 else torch.stack(flat)).to(dtype)
    return stacked.mT if rank_first else stacked


def untall(x: Tensor, rank_first: bool, shape: torch.Size) -> list[Tensor]:
    """The inverse of :func:`tall`."""
    return list((x.mT if rank_first else x).reshape(-1, *shape).unbind())


def new_state(pair: FactorPair) -> tuple[State, State]:
    """The state of A and of B before their first step. Memory: 4(m+n)(r+1) + 40r² bytes a pair, and some scalars, in
    float32; twice that in float64.

    Under each factor: ``step`` of the pair; ``first_moment`` (the factor's shape), ``second_moment`` (r, r) and
    ``transport`` (r, r) in the basis of the other factor, ``row_moment`` (rows,), ``escaped_mass``; ``basis``,
    ``coordinates``, ``warm_basis`` (r, r) of the factor itself (:class:`lora_rite.rite.Basis`); ``checksum`` (r,), the
    sum of its rows, by which a change from outside is noticed; ``damped``, whether T⁺ of this factor is damped: of the
    one that starts at zero, else of B.
    """
    dtype = work_dtype(pair.a, pair.b)
    a_zero, b_zero = (~p.any() for p in pair[:2])
    a_damped = a_zero & ~b_zero
    return tuple(
        _new_factor_state(p, rank_first, damped, dtype)
        for p, rank_first, damped in ((pair.a, True, a_damped), (pair.b, False, ~a_damped))
    )  # type: ignore[return-value]


def _new_factor_state(p: Tensor, rank_first: bool, damped: Tensor, dtype: torch.dtype) -> State:
    x = tall([p], rank_first, dtype)
    rows, r = x.shape[1:]
    like = {"dtype": dtype, "device": p.device}
    basis = rite.initial_basis(x, algebra_dtype(p.device))
    return {
        "step": torch.zeros(()),
        "first_moment": torch.zeros(p.shape, **like),
        "second_moment": torch.zeros(r, r, **like),
        "row_moment": torch.zeros(rows, **like),
        "escaped_mass": torch.zeros((), **like),
        "transport": torch.eye(r, **like),
        "basis": basis.basis[0].to(dtype),
        "coordinates": basis.coordinates[0].to(dtype),
        "warm_basis": basis.warm[0].to(dtype),
        "checksum": x[0].sum(0),
        "damped": damped,
    }


class Side:
    """One factor of each pair of a batch, with what ``measure`` finds for it (p pairs, r×r matrices (p, r, r))."""

    inverse: Tensor  # D: ḡ = g·D, and the step is M·Dᵀ
    squares: Tensor  # ḡᵀ·ḡ, before clipping
    kept: Tensor  # (p, 1, 1) False where update_skipping drops the gradient
    second_moment: Tensor
    escaped_mass: Tensor
    whiten: Tensor  # ḡ to S

    def __init__(self, params: list[Tensor], states: list[State], rank_first: bool, dtype: torch.dtype):
        self.params, self.states, self.rank_first, self.dtype = params, states, rank_first, dtype
        self.algebra = algebra_dtype(params[0].device)

    def gradient(self) -> Tensor:
        return self.tall([p.grad for p in self.params])  # type: ignore[misc]

    def tall(self, tensors: list[Tensor]) -> Tensor:
        return tall(tensors, self.rank_first, self.dtype)

    def state(self, key: str) -> list[Tensor]:
        return [state[key] for state in self.states]

    def small(self, key: str) -> Tensor:
        """State of r×r or less, (p, …), in the algebra dtype."""
        return torch.stack(self.state(key)).to(self.algebra)

    def put(self, key: str, value: Tensor) -> None:
        torch._foreach_copy_(self.state(key), list(value.unbind()))

    def put_tall(self, tensors: list[Tensor], value: Tensor) -> None:
        torch._foreach_copy_(tensors, untall(value, self.rank_first, tensors[0].shape))

    def tall_rows(self) -> Tensor:
        """The row moment, (p, rows, 1)."""
        return torch.stack(self.state("row_moment"))[..., None]

    def unchanged(self) -> Tensor:
        """(p,) whether each factor is still what the last step left: its row sum is, to rounding. False for NaN."""
        x = self.tall(self.params)
        tolerance = 128 * torch.finfo(x.dtype).eps * x.shape[1] ** 0.5
        lengths = torch.linalg.vector_norm(self.small("coordinates"), dim=-2)
        difference = (x.sum(1) - torch.stack(self.state("checksum"))).abs()
        return (difference <= tolerance * lengths).all(-1)


class Batch:
    """Pairs of one group, of the same shapes, dtypes and device.

    ``fresh`` takes the states of pairs that have none yet; the optimizer keeps them when it commits.
    """

    def __init__(
        self,
        group: dict[str, Any],
        pairs: list[FactorPair],
        states: dict[Tensor, State],
        fresh: dict[Tensor, State],
    ):
        self.group, self.pairs = group, pairs
        for pair in pairs:
            if pair.a not in fresh and not states.get(pair.a):
                fresh[pair.a], fresh[pair.b] = new_state(pair)
        dtype = work_dtype(*pairs[0][:2])
        self.a, self.b = (
            Side(params, [fresh.get(p) or states[p] for p in params], rank_first, dtype)
            for params, rank_first in (([p.a for p in pairs], True), ([p.b for p in pairs], False))
        )
        self.device = pairs[0].a.device
        step = torch.stack(self.a.state("step")).to(self.a.algebra) + 1
        beta1, beta2 = group["betas"]
        self.decays = [
            rite.bias_corrected_decay(step, float(beta))[:, None, None].to(self.device)
            for beta in (beta1, beta2, group["row_beta"])
        ]
        self.lr = group["lr"]
        if isinstance(self.lr, Tensor):
            self.lr = self.lr.detach().reshape(()).to(self.device, dtype)

    def measure(self) -> Tensor:
        """Unmagnified gradients of both sides. Returns the sum of their squares, a scalar."""
        self._invert()
        group, a, b = self.group, self.a, self.b
        total = torch.zeros((), dtype=a.algebra, device=self.device)
        for side in (a, b):
            side.squares = rite.unmagnified_gram(side.gradient(), side.inverse)
            side.kept = torch.ones_like(self.decays[0], dtype=torch.bool)
            if group["update_skipping"]:
                mean_square = _trace(side.squares) / side.params[0].numel()
                side.kept = ~(mean_square > group["update_skipping"] ** 2)[:, None, None]
                side.squares = side.squares * side.kept
            total = total + _trace(side.squares).sum()
        return total

    def _invert(self) -> None:
        """T⁺ of the other factor, for both sides; damped for one of them."""
        group, a, b = self.group, self.a, self.b
        a.inverse, b.inverse = b.small("basis"), a.small("basis")
        t_a, t_b = a.small("coordinates"), b.small("coordinates")
        self.sigma_over_delta: Tensor | None = None  # (p, r)
        if group["damping"]:
            a_damped = torch.stack(a.state("damped"))[:, None, None]
            rows_a, rows_b = (side.params[0].numel() // t_a.shape[-1] for side in (a, b))
            lr = torch.as_tensor(self.lr, dtype=t_a.dtype, device=self.device)
            delta = group["damping"] * lr * torch.where(a_damped, rows_a, rows_b).to(t_a.dtype).sqrt()
            damped, sigma = rite.damped_inverse(torch.where(a_damped, t_a, t_b), torch.where(a_damped, t_b, t_a), delta)
            self.sigma_over_delta = sigma / delta[..., 0]
            a.inverse, b.inverse = torch.where(a_damped, a.inverse, damped), torch.where(a_damped, damped, b.inverse)

    def dead(self) -> list[bool]:
        """Whether both factors are zero: such a pair has no gradient and never gets one."""
        return [not (a.any() or b.any()) for a, b, _ in self.pairs]

    def update_square(self) -> Tensor:
        """‖δB·A‖² + ‖B·δA‖² of the step that the present first moments make, summed over pairs, a scalar.

        δB·A = −lr·M_B·(T_A·D_B)ᵀ·Q_Aᵀ, and Q_A is orthonormal."""
        self._invert()
        total = torch.zeros((), dtype=self.a.algebra, device=self.device)
        for side, other in ((self.a, self.b), (self.b, self.a)):
            seen = side.small("transport").mT @ (other.small("coordinates") @ side.inverse).mT
            m = side.tall(side.state("first_moment")) @ seen.to(side.dtype)
            total = total + (self.lr * m).square().sum()
        return total

    def precondition(self, norm: Tensor) -> None:
        """Second moments and preconditioners, from the norm of all unmagnified gradients together."""
        group, clip = self.group, self.group["clip_unmagnified_grad"]
        scale = clip / norm.to(self.device).clamp_min(clip) if clip else 1.0
        for side in (self.a, self.b):
            rows = side.params[0].numel() // side.squares.shape[-1]
            side.second_moment, side.escaped_mass, root = rite.second_moment(
                side.small("second_moment"),
                side.small("escaped_mass")[:, None, None],
                side.squares * (scale**2 / rows),
                self.decays[1],
                eps=group["eps"],
                relative_eps=group["relative_eps"],
            )
            sign = -1.0 if group["maximize"] else 1.0
            side.whiten = side.inverse @ root * (side.kept * (sign * scale))

    def finite(self) -> Tensor:
        """(p,) whether everything that ``apply`` will use is finite in the dtype of the state."""
        matrices = [m for side in (self.a, self.b) for m in (side.second_moment, side.whiten, side.inverse)]
        return torch.stack([m.to(self.a.dtype).isfinite().flatten(1).all(-1) for m in matrices]).all(0)

    def unchanged(self) -> Tensor:
        """(p,) whether both factors are what the last step left."""
        return self.a.unchanged() & self.b.unchanged()

    def apply(self) -> None:
        """Moves the factors, measures their new bases, carries the second moments over."""
        a, b = self.a, self.b
        old = [side.tall(side.params) for side in (a, b)]
        old = [x.clone() if len(self.pairs) == 1 else x for x in old]
        new = [self._move(side, x) for side, x in zip((a, b), old, strict=True)]
        if self.group["balance_param"]:
            new = self._balance(new)
        transports = []
        for i, (side, x_old, x_new) in enumerate(zip((a, b), old, new, strict=True)):
            self._write(side, x_new, keys=[pair.position + i for pair in self.pairs])
            x_new = side.tall(side.params)  # as rounded
            q_old = x_old @ side.small("basis").to(side.dtype)
            basis, z, c = rite.rebase(x_new, x_new - x_old, side.small("warm_basis"))
            transports.append(c.mT @ rite.gram(z, q_old, side.algebra))
            for key, value in zip(("basis", "coordinates", "warm_basis"), basis, strict=True):
                side.put(key, value)
            side.put("checksum", x_new.sum(1))
        for side, p in zip((a, b), reversed(transports), strict=True):
            moved = rite.transport(side.second_moment, p)
            if self.group["apply_escape"]:
                side.escaped_mass = side.escaped_mass + rite.escaped_mass(side.second_moment, moved)
            side.put("second_moment", moved)
            side.put("escaped_mass", side.escaped_mass[:, 0, 0])
            side.put("transport", p)
            torch._foreach_add_(side.state("step"), 1)

    def _move(self, side: Side, x: Tensor) -> Tensor:
        """The factor after the step; writes the first and the row moment."""
        group, dtype = self.group, side.dtype
        beta1, _, row_beta = self.decays
        s = side.gradient() @ side.whiten.to(dtype)
        if group["row_equilibration"]:
            s, rows = rite.equilibrate_rows(s, side.tall_rows(), row_beta.to(dtype))
            side.put("row_moment", rows[..., 0])
        m = side.tall(side.state("first_moment")) @ (beta1 * side.small("transport").mT).to(dtype)
        m = m + (1 - beta1).to(dtype) * s
        side.put_tall(side.state("first_moment"), m)
        if group["update_capping"]:
            rms = m.square().mean((-2, -1), keepdim=True).sqrt()
            m = m / (rms / group["update_capping"]).clamp_min(1)
        x_new = x - self.lr * (m @ side.inverse.mT.to(dtype))
        return x_new - self.lr * group["weight_decay"] * x if group["weight_decay"] else x_new

    def _balance(self, new: list[Tensor]) -> list[Tensor]:
        """Both factors rescaled to the same Frobenius norm; as they are where one is zero or lr is 0."""
        norm_a, norm_b = (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in new)
        ratio = ((norm_b + 1e-6) / (norm_a + 1e-6)).sqrt()  # 1e-6 as in the authors' code
        ratio = torch.where((norm_a > 0) & (norm_b > 0) & torch.as_tensor(self.lr != 0), ratio, 1)
        return [new[0] * ratio, new[1] / ratio]

    def _write(self, side: Side, x: Tensor, keys: list[int]) -> None:
        if side.params[0].dtype in (torch.bfloat16, torch.float16):
            # in the parameter's own layout, so that noise belongs to elements whatever the batch
            key = rounding_key(torch.stack(side.state("step")), keys)
            flat = torch.stack(untall(x, side.rank_first, side.params[0].shape))
            rounded = rite.stochastic_round(flat, side.params[0].dtype, key.to(self.device))
            torch._foreach_copy_(side.params, list(rounded.unbind()))
        else:
            side.put_tall(side.params, x)


def rounding_key(steps: Tensor, positions: list[int]) -> Tensor:
    """The keys (p,) of the rounding noise: by step and by the position of the parameter in the optimizer."""
    return steps.to(torch.int64) * 0x1000003 + torch.tensor(positions, device=steps.device)


def _trace(m: Tensor) -> Tensor:
    return m.diagonal(dim1=-2, dim2=-1).sum(-1)
