"""The state of factors: what is in it, how it begins, and the tensors that hold that of many factors together."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra.basis import initial_basis
from ..algebra.rounding import checksum
from .layout import layouts
from .sharding import Shards, local

State = dict[str, Tensor]

#: Parameters of these dtypes are computed with in float32 and rounded stochastically.
LOW_PRECISION = (torch.bfloat16, torch.float16)
#: The r×r matrices of a factor's state, in the order of ``matrices``.
MATRICES = ("second_moment", "transport", "basis", "coordinates", "warm_basis")
#: The keys of a factor's state, see :func:`new_state`.
STATE_KEYS = ("step", "first_moment", "row_moment", "matrices", "numbers", "damped")
#: The further ones where the other factor is frozen: what of a state that one needs.
FROZEN_KEYS = ("frozen_matrices", "frozen_numbers")
#: The dtype of r×r matrices while they are computed with, but where :func:`algebra_dtype` says otherwise.
ALGEBRA = torch.float64
#: Types of device without float64, and without eigenvalues, as Apple's MPS is.
SINGLE = ("mps",)


class FactorPair(NamedTuple):
    """A (r, n), B (m, r) and the position of A among all parameters of the optimizer, in the order of the groups."""

    a: Tensor
    b: Tensor
    position: int


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where a factor is float64, float32 otherwise: the dtype of all arithmetic and of the state."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def moment_dtype(group: dict[str, Any], *factors: Tensor) -> torch.dtype:
    """The dtype in which the state keeps the first moments of factors of a group."""
    name = group.get("first_moment_dtype")
    return getattr(torch, name) if name else work_dtype(*factors)


def has_float64(device: torch.device) -> bool:
    """Whether a device has float64, and eigenvalues."""
    return device.type not in SINGLE


def algebra_dtype(group: dict[str, Any], *factors: Tensor) -> torch.dtype:
    """The dtype of r×r matrices while a step computes with them."""
    single = group.get("algebra_dtype") == "float32" or not has_float64(factors[0].device)
    return torch.float32 if single and work_dtype(*factors) == torch.float32 else ALGEBRA


class Numbers(NamedTuple):
    """Views of ``numbers`` (…, r + 2)."""

    checksum: Tensor  # (…, r)
    moment_norm: Tensor  # (…, 1), the Frobenius norm of the first moment
    escaped_mass: Tensor  # (…, 1), ρ

    @classmethod
    def of(cls, numbers: Tensor) -> "Numbers":
        return cls(*numbers.split([numbers.shape[-1] - 2, 1, 1], -1))


def new_state(group: dict[str, Any], pair: FactorPair) -> dict[Tensor, State]:
    """The states of A and of B before their first step. Memory: 4(m+n)(r+1) + 40r² + 8r + 26 bytes a pair in float32,
    2(m+n)r less with a first moment in bfloat16; about twice that in float64.

    Under each factor: ``step`` of the pair; ``first_moment`` (the factor's shape); ``row_moment`` (rows,);
    ``matrices`` (5, r, r): second moment and transport, in the basis of the other factor, then basis, coordinates and
    warm basis of the factor itself (:class:`lora_rite.algebra.basis.Basis`); ``numbers`` (r + 2,): a checksum (r), by
    which a change from outside is noticed, the Frobenius norm of the first moment, and the escaped mass; ``damped``,
    whether T⁺ of this factor is damped: of the one that starts at zero, else of B. Where a parameter holds several
    pairs, all but ``first_moment`` have a leading dimension for them.

    A frozen factor has no state: its constant basis and checksum are kept under the other one, as ``frozen_matrices``
    and ``frozen_numbers`` (distributed checkpoints restore no state of frozen parameters).
    """
    dtype, shards, sides = work_dtype(pair.a, pair.b), Shards(pair.a), layouts(group)
    shares = [shards.rows([p], layout.long_dim)[0] for layout, p in zip(sides, pair[:2], strict=True)]
    tall = [layout.tall([share], dtype) for layout, share in zip(sides, shares, strict=True)]
    a_zero, b_zero = (n == 0 for n in shards.total(*((x != 0).sum((1, 2)) for x in tall)))
    a_damped = a_zero & ~b_zero
    states = []
    for p, share, layout, x, damped in zip(pair[:2], shares, sides, tall, (a_damped, ~a_damped), strict=True):
        (blocks, local_rows, r), num_rows = x.shape, layout.num_rows(p)
        like = {"dtype": dtype, "device": p.device}
        place = p.device if has_float64(p.device) else torch.device("cpu")
        basis = initial_basis(x, ALGEBRA, lambda part: shards.total(part)[0], shards.largest, place)
        basis = [k.to(dtype).to(p.device) for k in basis]
        zeros = torch.zeros(blocks, r, r, **like)
        sums = shards.total(checksum(x, shards.start(num_rows)))[0]
        state = {
            "step": torch.zeros(blocks, dtype=torch.float32, device=p.device),
            "row_moment": torch.zeros(blocks, local_rows, **like),
            "matrices": torch.stack([zeros, zeros + torch.eye(r, **like), *basis], 1).to(dtype),
            "numbers": torch.cat([sums, torch.zeros(blocks, 2, **like)], 1),
            "damped": damped,
        }
        state = {key: value[0] for key, value in state.items()} if blocks == 1 else state
        zeros = torch.zeros(share.shape, dtype=moment_dtype(group, pair.a, pair.b), device=p.device)
        state["first_moment"] = shards.wrapped(zeros, p.shape, layout.long_dim)
        row_shape = (blocks, num_rows) if blocks > 1 else (num_rows,)
        state["row_moment"] = shards.wrapped(state["row_moment"], row_shape, len(row_shape) - 1)
        states.append(state)
    new: dict[Tensor, State] = dict(zip(pair[:2], states, strict=True))
    for p, other in ((pair.a, pair.b), (pair.b, pair.a)):
        if other.requires_grad and not p.requires_grad:
            frozen = new.pop(p)
            new[other].update({key: frozen[key.removeprefix("frozen_")] for key in FROZEN_KEYS})
    return new


def frozen_state(other: State) -> State:
    """What the arithmetic needs of the state of a frozen factor, from that of the other one."""
    return {"step": other["step"], **{key.removeprefix("frozen_"): other[key] for key in FROZEN_KEYS}}


class Arena:
    """The small state of 2p factors, those of A first, each kind in one tensor, so that a step gathers and scatters
    nothing: ``matrices`` (2p, 5, r, r), ``numbers`` (2p, r + 2), ``steps`` (2p,), ``damped`` (2p,). :meth:`views` are
    parts of them, to be put into the states.
    """

    def __init__(self, states: Sequence[State], blocks: int):
        """``states`` has one for each parameter, of ``blocks`` factors; frozen ones have no ``damped``."""
        self.blocks = blocks
        stacked = lambda key: torch.stack([state[key] for state in states])
        join = lambda x: x.flatten(0, 1) if blocks > 1 else x
        self.matrices, self.numbers, self.steps = (join(stacked(key)) for key in ("matrices", "numbers", "step"))
        has_damped = all("damped" in state for state in states)
        self.damped = join(stacked("damped")) if has_damped else None

    def views(self) -> list[State]:
        """For each parameter, its part of each tensor."""
        tensors = {"matrices": self.matrices, "numbers": self.numbers, "step": self.steps}
        if self.damped is not None:
            tensors["damped"] = self.damped
        parts = {
            key: (x.unflatten(0, (-1, self.blocks)) if self.blocks > 1 else x).unbind() for key, x in tensors.items()
        }
        return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def of_its_own(t: Tensor) -> Tensor:
    """t, copied where it is part of a larger tensor, which it would keep in memory."""
    mine = local(t)
    if mine.untyped_storage().nbytes() <= mine.numel() * mine.element_size():
        return t
    if mine is t:
        return t.clone()
    from torch.distributed.tensor import DTensor

    like: Any = t
    return DTensor.from_local(
        mine.clone(), like.device_mesh, like.placements, run_check=False, shape=t.shape, stride=t.stride()
    )


def moments(states: Sequence[State], key: str, dtype: torch.dtype) -> Tensor:
    """First or row moments of factors of one shape, one above the other, in one tensor (k, …) of ``dtype``: this
    process's rows."""
    return torch.stack([local(state[key]).to(dtype) for state in states])
