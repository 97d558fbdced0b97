"""Pairs computed together: gathered from parameters and state, measured, moved, written back.

``measure`` and ``precondition`` only read, ``apply`` writes and cannot fail; the optimizer decides between them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import rite

State = dict[str, Tensor]

#: Parameters of these dtypes are computed with in float32 and rounded stochastically.
LOW_PRECISION = (torch.bfloat16, torch.float16)

#: Tall products are done for factors of one shape together, up to this number of elements: on a GPU (64 MiB of float32
#: a temporary), and on a CPU (1 MiB, so that temporaries stay in the cache).
BATCH_ELEMENTS = (2**24, 2**18)


class FactorPair(NamedTuple):
    """A (r, n), B (m, r) and the position of A among all parameters of the optimizer, in the order of the groups."""

    a: Tensor
    b: Tensor
    position: int


#: The keys of a factor's state, see :func:`new_state`.
STATE_KEYS = (
    "step", "first_moment", "moment_norm", "second_moment", "row_moment", "escaped_mass", "transport", "basis",
    "coordinates", "warm_basis", "checksum", "damped",
)  # fmt: skip


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


def new_state(pair: FactorPair) -> tuple[State, State]:
    """The state of A and of B before their first step. Memory: 4(m+n)(r+1) + 40r² bytes a pair, and some scalars, in
    float32; twice that in float64.

    Under each factor: ``step`` of the pair; ``first_moment`` (the factor's shape) and its Frobenius norm
    ``moment_norm``, ``second_moment`` (r, r) and ``transport`` (r, r), in the basis of the other factor;
    ``row_moment`` (rows,); ``escaped_mass``; ``basis``, ``coordinates``, ``warm_basis`` (r, r) of the factor itself
    (:class:`lora_rite.rite.Basis`); ``checksum`` (r,), by which a change from outside is noticed;
    ``damped``, whether T⁺ of this factor is damped: of the one that starts at zero, else of B.
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
        "moment_norm": torch.zeros((), **like),
        "transport": torch.eye(r, **like),
        "basis": basis.basis[0].to(dtype),
        "coordinates": basis.coordinates[0].to(dtype),
        "warm_basis": basis.warm[0].to(dtype),
        "checksum": rite.checksum(x)[0],
        "damped": damped,
    }


class Chunk:
    """Factors of one shape, dtype and orientation: a run of the batch's factors, on which tall products are done."""

    def __init__(self, run: slice, params: list[Tensor], states: list[State], rank_first: bool, dtype: torch.dtype):
        self.run, self.params, self.states, self.rank_first, self.dtype = run, params, states, rank_first, dtype
        self.rows = params[0].numel() // states[0]["second_moment"].shape[0]

    def tall(self, tensors: Sequence[Tensor]) -> Tensor:
        """(p, rows, r) from factors (r, n, …) or (m, r, …); a view where there is one tensor of the work dtype."""
        return tall(tensors, self.rank_first, self.dtype)

    def gradient(self) -> Tensor:
        return self.tall([p.grad for p in self.params])  # type: ignore[misc]

    def state(self, key: str) -> list[Tensor]:
        return [state[key] for state in self.states]

    def put(self, tensors: list[Tensor], value: Tensor) -> None:
        """Writes (p, rows, r) into factors, or into state of their shape."""
        flat = value.mT if self.rank_first else value
        torch._foreach_copy_(tensors, list(flat.reshape(-1, *tensors[0].shape).unbind()))

    def write(self, x: Tensor, positions: list[int]) -> Tensor:
        """Sets the factors to x, rounded to their dtype. Returns x as it is now, (p, rows, r) in the work dtype."""
        p = self.params[0]
        if p.dtype in LOW_PRECISION:
            # in the parameter's own layout, so that the noise belongs to elements whatever the batch
            flat = (x.mT if self.rank_first else x).contiguous()
            key = rounding_key(torch.stack(self.state("step")), positions).to(p.device)
            rounded = rite.stochastic_round(flat, p.dtype, key)
            x = rounded.mT if self.rank_first else rounded
        x = x.to(p.dtype)
        self.put(self.params, x)
        return x.to(self.dtype)


class Batch:
    """Pairs of one group, rank, dtype and device. r×r algebra is done for all their factors together, those of A first
    and then those of B; tall products in chunks of factors of the same shape.

    ``fresh`` takes the states of pairs that have none yet; the optimizer keeps them when it commits.
    """

    inverse: Tensor  # D of each factor: ḡ = g·D, and the step is M·Dᵀ
    second_moment: Tensor
    escaped_mass: Tensor
    whiten: Tensor  # g to S
    moment_norm: Tensor  # a bound of ‖M‖ after the step

    def __init__(
        self,
        group: dict[str, Any],
        pairs: list[FactorPair],
        states: dict[Tensor, State],
        fresh: dict[Tensor, State],
    ):
        for pair in pairs:
            if pair.a not in fresh and not states.get(pair.a):
                fresh[pair.a], fresh[pair.b] = new_state(pair)
        self.group = group
        # same shapes side by side, so that chunks are runs
        self.pairs = sorted(
            pairs, key=lambda pair: (*pair.a.shape, *pair.b.shape, str(pair.a.dtype), str(pair.b.dtype))
        )
        self.factors = [pair.a for pair in self.pairs] + [pair.b for pair in self.pairs]
        self.positions = [pair.position for pair in self.pairs] + [pair.position + 1 for pair in self.pairs]
        self.states = [fresh.get(p) or states[p] for p in self.factors]
        self.device, self.dtype = pairs[0].a.device, work_dtype(*pairs[0][:2])
        self.algebra = algebra_dtype(self.device)
        self.chunks = list(self._chunks())
        step = torch.stack([state["step"] for state in self.states]).to(self.algebra) + 1
        self.decays = [
            rite.bias_corrected_decay(step, float(beta))[:, None, None].to(self.device)
            for beta in (*group["betas"], group["row_beta"])
        ]
        rows = [p.numel() // pairs[0].a.shape[0] for p in self.factors]
        self.rows = torch.tensor(rows, dtype=self.algebra, device=self.device)[:, None, None]
        lr = group["lr"]
        self.lr = torch.as_tensor(lr, dtype=self.algebra).detach().reshape(()).to(self.device)

    def _chunks(self) -> Iterator[Chunk]:
        begin, n = 0, len(self.pairs)
        limit = BATCH_ELEMENTS[self.device.type == "cpu"]
        for end in range(1, 2 * n + 1):
            first = self.factors[begin]
            other = self.factors[end] if end not in (n, 2 * n) else None  # no chunk has factors of both sides
            alike = other is not None and (other.shape, other.dtype) == (first.shape, first.dtype)
            if not alike or (end + 1 - begin) * first.numel() > limit:
                run = slice(begin, end)
                yield Chunk(run, self.factors[run], self.states[run], begin < n, self.dtype)
                begin = end

    def small(self, key: str) -> Tensor:
        """State of r×r or less of all factors, (2p, …), in the algebra dtype."""
        return torch.stack([state[key] for state in self.states]).to(self.algebra)

    def put_small(self, key: str, value: Tensor) -> None:
        torch._foreach_copy_([state[key] for state in self.states], list(value.unbind()))

    def partners(self, x: Tensor) -> Tensor:
        """What belongs to the other factor of each pair."""
        return x.roll(len(self.pairs), 0)

    def measure(self) -> Tensor:
        """Unmagnified gradients. Returns the sum of their squares, a scalar."""
        self._invert()
        self.squares = torch.cat([rite.unmagnified_gram(c.gradient(), self.inverse[c.run]) for c in self.chunks])
        self.kept = torch.ones_like(self.rows, dtype=torch.bool)
        if self.group["update_skipping"]:
            mean_square = rite.trace(self.squares) / (self.rows * self.squares.shape[-1])
            self.kept = ~(mean_square > self.group["update_skipping"] ** 2)
            self.squares = self.squares * self.kept
        return rite.trace(self.squares).sum()

    def _invert(self) -> None:
        """T⁺ of the other factor for each; damped for one side of each pair."""
        n, damping = len(self.pairs), self.group["damping"]
        self.coordinates = self.small("coordinates")
        self.basis = self.small("basis")
        self.inverse = self.partners(self.basis)
        self.sigma_over_delta: Tensor | None = None  # (p, r)
        if damping:
            t, damps_a = self.coordinates, torch.stack([s["damped"] for s in self.states[:n]])[:, None, None]
            delta = damping * self.lr * torch.where(damps_a, self.rows[:n], self.rows[n:]).sqrt()
            y, x = torch.where(damps_a, t[:n], t[n:]), torch.where(damps_a, t[n:], t[:n])
            damped, sigma = rite.damped_inverse(y, x, delta)
            for_a, for_b = self.inverse[:n], self.inverse[n:]
            self.inverse = torch.cat([torch.where(damps_a, for_a, damped), torch.where(damps_a, damped, for_b)])
            self.sigma_over_delta = sigma / delta[..., 0]

    def precondition(self, norm: Tensor) -> None:
        """Second moments and preconditioners, from the norm of all unmagnified gradients together."""
        group, clip = self.group, self.group["clip_unmagnified_grad"]
        scale = clip / norm.to(self.device).clamp_min(clip) if clip else 1.0
        self.second_moment, self.escaped_mass, root = rite.second_moment(
            self.small("second_moment"),
            self.small("escaped_mass")[:, None, None],
            self.squares * scale**2 / self.rows,
            self.decays[1],
            eps=group["eps"],
            relative_eps=group["relative_eps"],
        )
        self.whiten = self.inverse @ root * (self.kept * (scale * (-1.0 if group["maximize"] else 1.0)))
        square = rite.trace(root @ (self.squares * scale**2) @ root)  # ‖S‖²; equilibration of rows leaves it as it is
        last = self.small("moment_norm")[:, None, None]
        self.moment_norm = self.decays[0] * last + (1 - self.decays[0]) * square.clamp_min(0).sqrt()

    def finite(self) -> Tensor:
        """(p,) whether everything that ``apply`` will use is finite in the dtype of the state."""
        matrices = torch.stack([self.second_moment, self.whiten, self.inverse]).to(self.dtype)
        return matrices.isfinite().flatten(2).all(-1).all(0).reshape(2, -1).all(0)

    def unchanged(self) -> Tensor:
        """(p,) whether both factors are what the last step left: their checksums are, to rounding. False for NaN."""
        same = []
        lengths = torch.linalg.vector_norm(self.coordinates, dim=-2)
        for c in self.chunks:
            tolerance = 128 * torch.finfo(self.dtype).eps * c.rows**0.5
            difference = (rite.checksum(c.tall(c.params)) - torch.stack(c.state("checksum"))).abs()
            same.append((difference <= tolerance * lengths[c.run]).all(-1))
        return torch.cat(same).reshape(2, -1).all(0)

    def apply(self) -> None:
        """Moves the factors, measures their new bases, carries the second moments over."""
        old = rite.Basis(self.basis, self.coordinates, self.small("warm_basis"))
        rest = 1 - self.decays[0]
        carry = self.decays[0] * self.small("transport").mT
        step = self.lr * self.inverse.mT
        # (of bfloat16 without the margin: a quarter of the factor is no noise)
        work_eps = torch.finfo(self.dtype).eps
        rounding = [max(work_eps, torch.finfo(p.dtype).eps / rite.NOISE) for p in self.factors]
        noise = torch.tensor(rounding, dtype=self.algebra, device=self.device)[:, None, None]
        # what the state keeps is what is measured: rounded to the work dtype first
        warm = rite.warm_basis(old, step, self.moment_norm, noise).to(self.dtype)
        matrices = [m.to(self.dtype) for m in (self.whiten, carry, rest, self.decays[2], step)] + [warm]
        results = [self._move(c, *(m[c.run] for m in matrices)) for c in self.chunks]
        gram_z, cross, checksum, moment_norm = (torch.cat(parts) for parts in zip(*results, strict=True))
        basis, c = rite.orthonormalise(warm.to(self.algebra), gram_z, self.rows)
        transport = self.partners(c.mT @ cross @ old.basis)
        moved = rite.transport(self.second_moment, transport)
        if self.group["apply_escape"]:
            self.escaped_mass = self.escaped_mass + rite.escaped_mass(self.second_moment, moved)
        if self.group["balance_param"]:
            basis, checksum = self._balance(basis, checksum)
        new = {
            "basis": basis.basis, "coordinates": basis.coordinates, "warm_basis": basis.warm, "second_moment": moved,
            "escaped_mass": self.escaped_mass[:, 0, 0], "transport": transport, "checksum": checksum,
            "moment_norm": moment_norm,
        }  # fmt: skip
        for key, value in new.items():
            self.put_small(key, value)
        torch._foreach_add_([state["step"] for state in self.states], 1)

    def _move(
        self, c: Chunk, whiten: Tensor, carry: Tensor, rest: Tensor, row_decay: Tensor, step: Tensor, warm: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The step of a chunk, X − M·step. Returns zᵀz and zᵀ·X_old (z = X·K_w after the step), the checksums of the
        factors, and ‖M‖. The arguments are (p, r, r) or (p, 1, 1), in the work dtype."""
        group = self.group
        s = rite.times(c.gradient(), whiten)
        if group["row_equilibration"]:
            row_moment = torch.stack(c.state("row_moment"))[..., None]
            factors, row_moment = rite.equilibrate_rows(s, row_moment, row_decay)
            torch._foreach_copy_(c.state("row_moment"), list(row_moment[..., 0].unbind()))
            rest = rest * factors
        m = rite.times(c.tall(c.state("first_moment")), carry).addcmul_(s, rest)
        c.put(c.state("first_moment"), m)
        norm = torch.linalg.vector_norm(m, dim=(-2, -1))
        step = self._capped(step, norm[:, None, None], c.rows)
        x = c.tall(c.params)
        x_old = x.clone() if len(c.params) == 1 else x
        if group["weight_decay"]:
            x = x * (1 - self.lr * group["weight_decay"]).to(c.dtype)
        x_new = c.write(rite.minus_times(x, m, step), self.positions[c.run])
        z = rite.times(x_new, warm)
        return rite.gram(z, z, self.algebra), rite.gram(z, x_old, self.algebra), rite.checksum(x_new), norm

    def _capped(self, step: Tensor, norm: Tensor, rows: Tensor | int) -> Tensor:
        """``step`` (p, r, r), smaller where M (of that many rows, with Frobenius norm ``norm`` (p, 1, 1)) has a root
        mean square above update_capping."""
        cap = self.group["update_capping"]
        return step / (norm / (rows * step.shape[-1]) ** 0.5 / cap).clamp_min(1) if cap else step

    def _balance(self, basis: rite.Basis, checksum: Tensor) -> tuple[rite.Basis, Tensor]:
        """Both factors rescaled to the same Frobenius norm; as they are where one is zero or lr is 0."""
        norms = torch.linalg.matrix_norm(basis.coordinates, keepdim=True)
        others = self.partners(norms)
        ratio = ((others + 1e-6) / (norms + 1e-6)).sqrt()  # 1e-6 as in the authors' code
        ratio = torch.where((norms > 0) & (others > 0) & (self.lr != 0), ratio, 1)
        sums = []
        for c in self.chunks:
            x = c.tall(c.params) * ratio[c.run].to(c.dtype)
            sums.append(rite.checksum(c.write(x, self.positions[c.run])))
        return rite.Basis(basis.basis / ratio, basis.coordinates * ratio, basis.warm / ratio), torch.cat(sums)

    def dead(self) -> list[bool]:
        """Whether both factors are zero: such a pair has no gradient and never gets one."""
        return [not (pair.a.any() or pair.b.any()) for pair in self.pairs]

    def update_square(self) -> Tensor:
        """‖δB·A‖² + ‖B·δA‖² of the step that the present first moments make, summed over pairs, a scalar.

        δB·A = −lr·M_B·(T_A·D_B)ᵀ·Q_Aᵀ, and Q_A is orthonormal."""
        self._invert()
        seen = self.small("transport").mT @ (self.partners(self.coordinates) @ self.inverse).mT * self.lr
        seen = self._capped(seen, self.small("moment_norm")[:, None, None], self.rows)
        moments = [rite.times(c.tall(c.state("first_moment")), seen[c.run].to(c.dtype)) for c in self.chunks]
        return sum((m.square().sum() for m in moments), torch.zeros((), device=self.device))


def rounding_key(steps: Tensor, positions: list[int]) -> Tensor:
    """The keys (p,) of the rounding noise: by step and by the position of the parameter in the optimizer."""
    return steps.to(torch.int64) * 0x1000003 + torch.tensor(positions, device=steps.device)
