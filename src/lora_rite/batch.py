"""Pairs computed together: gathered from parameters and state, measured, moved, written back.

``measure`` and ``precondition`` only read, ``apply`` writes and cannot fail; the optimizer decides between them.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import rite
from .sharding import Shards, local

State = dict[str, Tensor]

#: Parameters of these dtypes are computed with in float32 and rounded stochastically.
LOW_PRECISION = (torch.bfloat16, torch.float16)

#: Tall products are done for factors of one shape together, up to this number of elements: on a GPU (64 MiB of float32
#: a temporary), and on a CPU (4 MiB, so that temporaries stay in the cache); where that is more than 2^18, up to an
#: eighth of all elements too.
BATCH_ELEMENTS = (2**24, 2**20)
#: On a CPU, factors of so many elements are multiplied one by one, as they lie, instead of stacked and then together:
#: the copy takes as long as the product.
DIRECT_ELEMENTS = 2**13
#: kᵀ(xᵀx)k serves as (xk)ᵀ(xk) where ‖kᵀk‖·tr(xᵀx), to which rounding is relative, is less than this times its trace.
LOSSY = 64


class FactorPair(NamedTuple):
    """A (r, n), B (m, r) and the position of A among all parameters of the optimizer, in the order of the groups."""

    a: Tensor
    b: Tensor
    position: int


#: The r×r matrices of a factor's state, in the order of ``matrices``.
MATRICES = ("second_moment", "transport", "basis", "coordinates", "warm_basis")
#: The keys of a factor's state, see :func:`new_state`.
STATE_KEYS = ("step", "first_moment", "row_moment", "matrices", "numbers", "damped")
#: The further ones where the other factor is frozen: what of a state that one needs.
FROZEN_KEYS = ("frozen_matrices", "frozen_numbers")
#: The dtype of r×r matrices while they are computed with.
ALGEBRA = torch.float64


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where a factor is float64, float32 otherwise: the dtype of all arithmetic and of the state."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class Layout(NamedTuple):
    """How a parameter holds the factor of ``blocks`` pairs: A (blocks·r, n, …), one after the other; B (blocks·m, r, …)
    likewise, or, where ``columns`` is "interleaved", (m, r·blocks), the pair running fastest (PEFT's experts), or,
    "side by side", (m, blocks·r), the pair running slowest (a block-diagonal A)."""

    rank_first: bool
    blocks: int = 1
    columns: str = ""

    @property
    def long_dim(self) -> int:
        """The dimension of a parameter along which the rows of its tall factor lie."""
        return int(self.rank_first)

    def rows(self, p: Tensor) -> int:
        """The number of rows of a tall factor."""
        return p.shape[1:].numel() if self.rank_first else p.shape[0] // (1 if self.columns else self.blocks)

    def tall(self, tensors: Sequence[Tensor], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """(p, rows, r), tall factors, from parameters or what has their shape; a view where there is one tensor of that
        dtype, else in ``out`` where that is given."""
        flat = [t.flatten(1) for t in tensors]
        if len(flat) == 1:
            stacked = flat[0][None].to(dtype)
        elif out is not None and self.blocks == 1:
            stacked = out.mT if self.rank_first else out
            torch._foreach_copy_(list(stacked.unbind()), flat)  # (torch.stack uses one core)
        else:
            stacked = torch.stack(flat).to(dtype)
        return self.apart(stacked)

    def apart(self, stacked: Tensor) -> Tensor:
        """(p, rows, r), tall factors, from parameters' matrices one above the other; a view where a parameter holds one
        factor."""
        if self.columns == "interleaved":
            stacked = stacked.unflatten(2, (-1, self.blocks)).movedim(3, 1).flatten(0, 1)
        elif self.columns:
            stacked = stacked.unflatten(2, (self.blocks, -1)).movedim(2, 1).flatten(0, 1)
        elif self.blocks > 1:
            stacked = stacked.unflatten(1, (self.blocks, -1)).flatten(0, 1)
        return stacked.mT if self.rank_first else stacked

    def flat(self, x: Tensor) -> Tensor:
        """The opposite of :meth:`apart`: (p / blocks, …) laid out as the parameters are, flattened to matrices."""
        x = x.mT if self.rank_first else x
        if self.columns:
            return x.unflatten(0, (-1, self.blocks)).movedim(1, 3 if self.columns == "interleaved" else 2).flatten(2)
        return x.unflatten(0, (-1, self.blocks)).flatten(1, 2)


def layouts(group: dict[str, Any]) -> tuple[Layout, Layout]:
    """Of A and of B in a group."""
    blocks = group.get("blocks", 1)
    return Layout(True, blocks), Layout(False, blocks, group.get("columns", ""))


def rank_of(group: dict[str, Any], a: Tensor) -> int:
    """The rank of a pair of the group whose A is part of ``a``."""
    return a.shape[0] // group.get("blocks", 1)


def new_state(group: dict[str, Any], pair: FactorPair) -> dict[Tensor, State]:
    """The states of A and of B before their first step. Memory: 4(m+n)(r+1) + 40r² + 8r + 26 bytes a pair in float32;
    about twice that in float64.

    Under each factor: ``step`` of the pair; ``first_moment`` (the factor's shape); ``row_moment`` (rows,);
    ``matrices`` (5, r, r): second moment and transport, in the basis of the other factor, then basis, coordinates and
    warm basis of the factor itself (:class:`lora_rite.rite.Basis`); ``numbers`` (r + 2,): a checksum (r), by which a
    change from outside is noticed, the Frobenius norm of the first moment, and the escaped mass; ``damped``, whether T⁺
    of this factor is damped: of the one that starts at zero, else of B. Where a parameter holds several pairs, all but
    ``first_moment`` have a leading dimension for them.

    A frozen factor has no state: its constant basis and checksum are kept under the other one, as ``frozen_matrices``
    and ``frozen_numbers`` (distributed checkpoints restore no state of frozen parameters).
    """
    dtype, shards, sides = work_dtype(pair.a, pair.b), Shards(pair.a), layouts(group)
    shares = [shards.rows([p], layout.long_dim)[0] for layout, p in zip(sides, pair[:2], strict=True)]
    tall = [layout.tall([share], dtype) for layout, share in zip(sides, shares, strict=True)]
    sums = [(x != 0).sum((1, 2)) for x in tall]
    a_zero, b_zero = (n == 0 for n in shards.total(*sums))
    a_damped = a_zero & ~b_zero
    states = []
    for p, share, layout, x, damped in zip(pair[:2], shares, sides, tall, (a_damped, ~a_damped), strict=True):
        (blocks, local_rows, r), rows = x.shape, layout.rows(p)
        like = {"dtype": dtype, "device": p.device}
        basis = rite.initial_basis(x, ALGEBRA, shards)
        zeros = torch.zeros(blocks, r, r, **like)
        checksum = shards.total(rite.checksum(x, shards.start(rows)))[0]
        state = {
            "step": torch.zeros(blocks, dtype=torch.float32, device=p.device),
            "row_moment": torch.zeros(blocks, local_rows, **like),
            "matrices": torch.stack([zeros, zeros + torch.eye(r, **like), *basis], 1).to(dtype),
            "numbers": torch.cat([checksum, torch.zeros(blocks, 2, **like)], 1),
            "damped": damped,
        }
        state = {key: value[0] for key, value in state.items()} if blocks == 1 else state
        state["first_moment"] = shards.wrapped(torch.zeros(share.shape, **like), p.shape, layout.long_dim)
        row_shape = (blocks, rows) if blocks > 1 else (rows,)
        state["row_moment"] = shards.wrapped(state["row_moment"], row_shape, len(row_shape) - 1)
        states.append(state)
    new: dict[Tensor, State] = dict(zip(pair[:2], states, strict=True))
    for p, other in ((pair.a, pair.b), (pair.b, pair.a)):
        if other.requires_grad and not p.requires_grad:
            frozen = new.pop(p)
            new[other].update({key: frozen[key.removeprefix("frozen_")] for key in FROZEN_KEYS})
    return new


def _frozen_state(other: State) -> State:
    """What the arithmetic needs of the state of a frozen factor, from that of the other one."""
    return {"step": other["step"], **{key.removeprefix("frozen_"): other[key] for key in FROZEN_KEYS}}


class Chunk:
    """Factors of one shape, dtype and side: a run of the batch's factors, on which tall products are done.

    Of factors that are cut over processes, this one's rows.
    """

    def __init__(
        self,
        params: list[Tensor],
        states: list[State],
        positions: list[int],
        layout: Layout,
        shards: Shards,
        direct: bool,
    ):
        self.whole, self.states, self.positions, self.layout, self.shards = params, states, positions, layout, shards
        self.moves = "first_moment" in states[0]  # else the factors are frozen
        self.params = shards.rows(params, layout.long_dim)
        gradients: list[Any] = [p.grad for p in params if self.moves and p.grad is not None]
        self.gradients = shards.rows(gradients, layout.long_dim) if gradients else []
        self.dtype = states[0]["matrices"].dtype
        self.rows = layout.rows(params[0])
        self.start, self.local_rows = shards.start(self.rows), layout.rows(self.params[0])
        self.count = len(params) * layout.blocks
        self.direct = (
            direct
            and layout.blocks == 1
            and params[0].numel() >= DIRECT_ELEMENTS * shards.size  # (alike in all processes, however the rows are cut)
            and all(p.is_contiguous() for p in self.params)
            and all(t.dtype == self.dtype for t in (*self.params, *self.gradients))
        )

    def scratch(self, workspace: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """(p, rows, r) tensors to write into, laid out as the factors are: two, and one to stack factors in, unless
        they are multiplied as they lie."""
        size = sum(p.numel() for p in self.params)
        rank = self.states[0]["matrices"].shape[-1]
        shape = (self.count, *((rank, self.local_rows) if self.layout.rank_first else (self.local_rows, rank)))
        buffers = [buffer[:size].view(shape) for buffer in workspace[: 2 if self.direct else 3]]
        first, second, *spare = [buffer.mT for buffer in buffers] if self.layout.rank_first else buffers
        return first, second, spare[0] if spare else None

    def tall(self, tensors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """(p, rows, r) from what has the shape of the factors, see :meth:`Layout.tall`."""
        return self.layout.tall(tensors, self.dtype, out)

    def times(
        self, tensors: list[Tensor], k: Tensor, out: Tensor, spare: Tensor | None, ok: Tensor | None = None
    ) -> Tensor:
        """x·k, in ``out``, of gradients, first moments or parameters x; 0 without ``ok``, a scalar (which is None where
        x is multiplied as it lies: the device decides nothing then)."""
        if self.direct:
            for y, x, by in zip(self._matrices(out), self._matrices(tensors), k.unbind(), strict=True):
                self._add_times_(y, x, by, beta=0)
            return out
        x = self.tall(tensors, spare)
        if ok is not None:
            x = torch.where(ok, x, x.new_zeros(()))  # NaN is not undone by a factor of 0
        return rite.times(x, k, out)

    def gram(self, tensors: list[Tensor]) -> Tensor:
        """xᵀ·x (p, r, r), of factors that are multiplied as they lie, or of what has their shape."""
        return torch.stack([self._gram(x, x) for x in self._matrices(tensors)])

    def _gram(self, x: Tensor, y: Tensor) -> Tensor:
        """xᵀ·y (r, r), of one factor."""
        if self.layout.rank_first:
            return x @ y.mT
        if x.numel() < 2**17 or x.shape[0] % 8:
            return x.mT @ y
        return torch.bmm(x.view(8, -1, x.shape[1]).mT, y.view(8, -1, x.shape[1])).sum(0)  # (x.mT @ y uses one core)

    def accumulate(self, s: Tensor, carry: Tensor, spare: Tensor | None) -> Tensor:
        """M ← M·carry + s, in the state and in s."""
        moments = self.state("first_moment")
        if not self.direct:
            m = rite.add_times_(s, self.tall(moments, spare), carry)
            self.put(moments, m)
            return m
        for m, old, by in zip(self._matrices(s), self._matrices(moments), carry.unbind(), strict=True):
            self._add_times_(m, old, by)
            old.copy_(m)  # (while it is in the cache)
        return s

    def advance(
        self, m: Tensor, step: Tensor, shrink: Tensor | None, warm: Tensor, out: Tensor, spare: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """X ← X·shrink − M·step. Returns zᵀz (XᵀX of what is multiplied as it lies) and zᵀ·(X_old·shrink − X), with
        z = X·K_w, and the checksums of X."""
        if self.direct:
            if shrink is not None:
                torch._foreach_mul_(self.params, list(shrink.unbind()))
            squares, products = [], []
            for x, by, k in zip(self._matrices(self.params), self._matrices(m), step.unbind(), strict=True):
                self._add_times_(x, by, k, alpha=-1)
                squares.append(self._gram(x, x))
                products.append(self._gram(x, by))
            self.share()
            return torch.stack(squares), warm.mT @ torch.stack(products) @ step, self.checksum()
        x = self.tall(self.params, spare)
        x = x if shrink is None else x.mul_(shrink)
        if self.params[0].dtype == self.dtype:
            x = rite.add_times_(x, m, step, alpha=-1)
            self.commit(x)
            z = rite.times(x, warm, out)
            return rite.gram(z, z), rite.gram(z, m) @ step, rite.checksum(x, self.start)
        new = self.rounded(rite.add_times_(x.clone(), m, step, alpha=-1))
        self.commit(new)
        new = new.to(self.dtype)
        z = rite.times(new, warm, out)
        return rite.gram(z, z), rite.gram(z, x.sub_(new)), rite.checksum(new, self.start)

    def _matrices(self, x: Tensor | list[Tensor]) -> Sequence[Tensor]:
        """One a factor, laid out as the parameters are."""
        if isinstance(x, Tensor):
            return (x.mT if self.layout.rank_first else x).unbind()
        return [t.flatten(1) for t in x]

    def _add_times_(self, y: Tensor, x: Tensor, k: Tensor, alpha: float = 1, beta: float = 1) -> None:
        """y ← beta·y + alpha·x·k, of one factor, laid out as its parameter is."""
        y.addmm_(*((k.mT, x) if self.layout.rank_first else (x, k)), alpha=alpha, beta=beta)

    def checksum(self) -> Tensor:
        """(p, r), of the factors as they are."""
        if self.layout.blocks > 1:
            return rite.checksum(self.tall(self.params), self.start)
        rows = rite.CHECKED_ROWS
        some = [p.flatten(1)[:, :rows] if self.layout.rank_first else p[:rows] for p in self.params]
        return rite.checksum(self.tall(some), self.start)

    def state(self, key: str) -> list[Tensor]:
        return [local(state[key]) for state in self.states]

    def put(self, tensors: list[Tensor], value: Tensor) -> None:
        """Writes (p, rows, r) into factors, or into state of their shape."""
        flat = self.layout.flat(value)
        if flat.data_ptr() != tensors[0].data_ptr():  # else it is a view, and there already
            torch._foreach_copy_(tensors, list(flat.reshape(len(tensors), *tensors[0].shape).unbind()))

    def still(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In place of what :meth:`Batch._move` returns, for frozen factors; nothing is made of it."""
        r, like = self.states[0]["matrices"].shape[-1], {"dtype": self.dtype, "device": self.whole[0].device}
        zeros = torch.zeros(self.count, r, r, **like)
        return zeros + torch.eye(r, **like), zeros, zeros[:, 0], zeros[:, 0, 0]

    def commit(self, x: Tensor) -> None:
        """Sets the factors to x (p, rows, r)."""
        self.put(self.params, x)
        self.share()

    def share(self) -> None:
        """Brings this process's rows of the factors, which it has written, to where they belong."""
        if self.shards.mesh is not None:
            self.shards.put_back(self.whole, self.params, self.layout.long_dim)

    def rounded(self, x: Tensor) -> Tensor:
        """x (p, rows, r) in the dtype of the factors."""
        dtype = self.params[0].dtype
        if dtype not in LOW_PRECISION:
            return x.to(dtype)
        # in the parameter's own layout, so that the noise belongs to elements whatever the batch
        flat = self.layout.flat(x).contiguous()
        steps = torch.stack(self.state("step")).reshape(len(self.params), -1).amax(1)
        width = self.rows if self.layout.rank_first else flat.shape[-1]  # (of the whole parameter)
        first = self.start if self.layout.rank_first else self.start * width
        flat = rite.stochastic_round(flat, dtype, rounding_key(steps, self.positions), first, width)
        return self.layout.apart(flat)


class Batch:
    """Pairs of one group, rank, dtype and device. r×r algebra is done for all their factors together, those of A first
    and then those of B; tall products in chunks of factors of the same shape. One side may be frozen in all of them:
    it is measured once, and does not move.

    ``fresh`` takes the states of pairs that have none yet; the optimizer keeps them when it commits.
    """

    inverse: Tensor  # D of each factor: ḡ = g·D, and the step is M·Dᵀ
    squares: Tensor  # ḡᵀ·ḡ
    second_moment: Tensor
    escaped_mass: Tensor
    whiten: Tensor  # g to S
    moment_norm: Tensor  # a bound of ‖M‖ after the step
    workspace: list[Tensor]  # tall temporaries, for all chunks in turn: fresh memory is slower than the arithmetic

    def __init__(
        self,
        group: dict[str, Any],
        pairs: list[FactorPair],
        states: dict[Tensor, State],
        fresh: dict[Tensor, State],
    ):
        for pair in pairs:
            if not any(fresh.get(p) or states.get(p) for p in pair[:2]):
                fresh.update(new_state(group, pair))
        self.group = group
        # same shapes side by side, so that chunks are runs
        kind = lambda p: (tuple(p.shape), str(p.dtype))
        self.pairs = sorted(pairs, key=lambda pair: (kind(pair.a), kind(pair.b)))
        self.shards = Shards(pairs[0].a)
        factors = [pair.a for pair in self.pairs] + [pair.b for pair in self.pairs]
        own = [fresh.get(p) or states.get(p) for p in factors]
        partners = own[len(pairs) :] + own[: len(pairs)]
        self.states = [state or _frozen_state(other) for state, other in zip(own, partners, strict=True)]  # type: ignore[arg-type]
        self.one_sided = not all(own)
        self.device, self.dtype = pairs[0].a.device, work_dtype(*pairs[0][:2])
        #: r×r matrices are not decomposed by LAPACK, nor by its slow, waiting likes on other devices
        self.iterate = group["capturable"] or self.device.type != "cpu"
        self.chunks = list(self._chunks(factors))
        self.count = sum(c.count for c in self.chunks) // 2
        sizes = [(sum(p.numel() for p in c.params), c.direct) for c in self.chunks]
        size, stacked = max(sizes)[0], max((size for size, direct in sizes if not direct), default=0)
        self.workspace_sizes = size, size, stacked
        step = self.gather("step", 1).to(ALGEBRA) + 1
        betas = torch.stack([scalar(float(b), ALGEBRA, self.device) for b in (*group["betas"], group["row_beta"])])
        self.decays = rite.bias_corrected_decay(step, betas[:, None, None, None]).unbind()
        self.rows = constant(tuple(c.rows for c in self.chunks for _ in range(c.count)), ALGEBRA, self.device)
        self.moves = constant(tuple(c.moves for c in self.chunks for _ in range(c.count)), torch.bool, self.device)
        self.lr = scalar(group["lr"], ALGEBRA, self.device)
        r = rank_of(group, factors[0])
        matrices = self.gather("matrices", len(MATRICES), r, r).to(ALGEBRA)
        self.old_moment, self.transport, self.basis, self.coordinates, self.warm = matrices.unbind(1)
        self.numbers = self.gather("numbers", 1, r + 2)  # (2p, 1, r + 2)

    def _chunks(self, factors: list[Tensor]) -> Iterator[Chunk]:
        begin, n = 0, len(self.pairs)
        limit = min(BATCH_ELEMENTS[self.device.type == "cpu"], max(2**18, sum(p.numel() for p in factors) // 8))
        limit *= self.shards.size
        positions = [pair.position for pair in self.pairs] + [pair.position + 1 for pair in self.pairs]
        for end in range(1, 2 * n + 1):
            first = factors[begin]
            other = factors[end] if end not in (n, 2 * n) else None  # no chunk has factors of both sides
            alike = other is not None and (other.shape, other.dtype) == (first.shape, first.dtype)
            if not alike or (end + 1 - begin) * first.numel() > limit:
                run = slice(begin, end)
                layout = layouts(self.group)[begin >= n]
                yield Chunk(factors[run], self.states[run], positions[run], layout, self.shards, not self.iterate)
                begin = end

    def gather(self, key: str, *shape: int) -> Tensor:
        """State of all factors, (2p, 1, 1) or (2p, *shape)."""
        return torch.stack([state[key] for state in self.states]).reshape(-1, *(shape if len(shape) > 1 else (1, 1)))

    def scatter(self, key: str, value: Tensor) -> None:
        tensors = [state[key] for state in self.states]
        torch._foreach_copy_(tensors, list(value.to(tensors[0].dtype).reshape(-1, *tensors[0].shape).unbind()))

    def _by_chunk(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (2p, …) in the work dtype, cut into what belongs to each chunk."""
        return x.to(self.dtype).split([c.count for c in self.chunks])

    def partners(self, x: Tensor) -> Tensor:
        """What belongs to the other factor of each pair."""
        return x.roll(self.count, 0)

    def measure(self) -> Tensor:
        """Unmagnified gradients. Returns the sum of their squares, a scalar."""
        self._invert()
        squares = []
        for c, inverse in zip(self.chunks, self._by_chunk(self.inverse), strict=True):
            out, _, spare = c.scratch(self.workspace)
            if not c.moves:
                squares.append(torch.zeros_like(inverse))
            elif c.direct:
                squares.append(c.gram(c.gradients))
            else:
                unmagnified = c.times(c.gradients, inverse, out, spare)
                squares.append(rite.gram(unmagnified, unmagnified))
        checksums = torch.cat([c.checksum() for c in self.chunks])
        squares, self.checksum = self.shards.total(torch.cat(squares), checksums)
        self.squares = self._gram_of_products(squares, self.inverse, lambda c: c.gradients)
        self.kept = torch.ones_like(self.rows, dtype=torch.bool)
        if self.group["update_skipping"]:
            mean_square = rite.trace(self.squares) / (self.rows * self.squares.shape[-1])
            self.kept = ~(mean_square > self.group["update_skipping"] ** 2)
            self.squares = self.squares * self.kept
        return rite.trace(self.squares).sum()

    def _gram_of_products(self, grams: Tensor, k: Tensor, tall: Callable[[Chunk], list[Tensor]]) -> Tensor:
        """(xk)ᵀ(xk) for the tall x of each factor, from xᵀx where factors are multiplied as they lie; of all others
        ``grams`` holds it already.

        kᵀ(xᵀx)k takes no tall product, and loses digits as κ(k)² does: where these are too many, x·k is made. (In
        training κ is 2 to 5.)
        """
        grams = grams.to(ALGEBRA)
        if not any(c.direct for c in self.chunks):
            return grams
        turned, size = k.mT @ grams @ k, rite.trace(grams)
        exact = torch.linalg.matrix_norm(k.mT @ k, keepdim=True) * size < LOSSY * rite.trace(turned)
        info = torch.finfo(self.dtype)
        exact = exact & (size > info.tiny / info.eps)  # (nothing has underflowed; after an overflow turned is NaN)
        counts = [c.count for c in self.chunks]
        parts = []
        for c, *of_chunk in zip(self.chunks, *(x.split(counts) for x in (grams, turned, exact, k)), strict=True):
            gram, product, good, by = of_chunk
            if c.direct and c.moves and good.all().tolist():
                gram = product
            elif c.direct and c.moves:
                out, _, spare = c.scratch(self.workspace)
                y = c.times(tall(c), by.to(c.dtype), out, spare)
                gram = self.shards.total(rite.gram(y, y))[0].to(ALGEBRA)
            parts.append(gram)
        return torch.cat(parts)

    def _invert(self) -> None:
        """T⁺ of the other factor for each; damped for one side of each pair, unless the other one is frozen: then there
        is no product of two steps that damping would have to keep small."""
        n, damping = self.count, self.group["damping"]
        self.inverse = self.partners(self.basis)
        self.product: tuple[Tensor, Tensor] | None = None  # S = T_Y·T_Xᵀ (p, r, r), and δ (p, 1, 1)
        if damping and not self.one_sided:
            t, damps_a = self.coordinates, self.gather("damped", 1)[:n]
            delta = damping * self.lr * torch.where(damps_a, self.rows[:n], self.rows[n:]).sqrt()
            y, x = torch.where(damps_a, t[:n], t[n:]), torch.where(damps_a, t[n:], t[:n])
            product = y @ x.mT
            damped = x.mT @ rite.damped_inverse(product, delta)
            self.product = product, delta
            self.inverse = torch.where(torch.cat([~damps_a, damps_a]), damped.repeat(2, 1, 1), self.inverse)

    def precondition(self, norm: Tensor) -> None:
        """Second moments and preconditioners, from the norm of all unmagnified gradients together."""
        group, clip = self.group, self.group["clip_unmagnified_grad"]
        scale = clip / norm.to(self.device).clamp_min(clip) if clip else 1.0
        squares = self.squares * scale**2
        self.second_moment, self.escaped_mass, root = rite.second_moment(
            self.old_moment,
            self.numbers[..., -1:].to(ALGEBRA),
            squares / self.rows,
            self.decays[1],
            summed=group["betas"][1] == 1,
            eps=group["eps"],
            relative_eps=group["relative_eps"],
            iterate=self.iterate,
        )
        self.whiten = self.inverse @ root * (self.kept * (scale * (-1.0 if group["maximize"] else 1.0)))
        square = rite.trace(root @ squares @ root)  # ‖S‖²; equilibration of rows leaves it as it is
        last = self.numbers[..., -2:-1].to(ALGEBRA)
        self.moment_norm = self.decays[0] * last + (1 - self.decays[0]) * square.clamp_min(0).sqrt()

    def _of_parameters(self, flags: Tensor) -> Tensor:
        """(number of pairs of parameters,): whether that is so for both factors of all pairs that two parameters hold,
        from (2p, …)."""
        return flags.reshape(2, len(self.pairs), -1).all(-1).all(0)

    def finite(self) -> Tensor:
        """For each pair of parameters, whether everything that ``apply`` will use is finite in the state's dtype."""
        matrices = torch.cat([self.second_moment, self.whiten, self.inverse], -1).to(self.dtype)
        return self._of_parameters(rite.finite(matrices))

    def unchanged(self) -> Tensor:
        """For each pair of parameters, whether both are what the last step left: their checksums are, to rounding.
        False for NaN."""
        lengths = self.coordinates.square().sum(-2).sqrt()
        tolerance = 128 * torch.finfo(self.dtype).eps * self.rows[..., 0].sqrt()
        return self._of_parameters((self.checksum - self.numbers[:, 0, :-2]).abs() <= tolerance * lengths)

    def _gate(self, ok: Tensor | None) -> Tensor | None:
        """(2p, 1, 1), the factors to move; None is all of them. Of several pairs in one parameter (experts), those
        without any gradient are passed over."""
        gate = ok
        if self.group.get("blocks", 1) > 1:
            seen = rite.trace(self.squares) > 0
            seen = seen | self.partners(seen)
            gate = seen if gate is None else seen & gate
        if self.one_sided:
            gate = self.moves if gate is None else self.moves & gate
        return None if gate is None else gate.expand(2 * self.count, 1, 1)

    def apply(self, ok: Tensor | None = None) -> None:
        """Moves the factors, measures their new bases, carries the second moments over. With ``ok``, a scalar, nothing
        where that is False."""
        old = rite.Basis(self.basis, self.coordinates, self.warm)
        gate = self._gate(ok)
        gated = lambda new, old: new if gate is None else torch.where(gate, new, old)
        zero = self.lr.new_zeros(())
        # factors that are not to move are multiplied by 1, and what is added to them by 0
        rest = gated(1 - self.decays[0], zero)
        eye = torch.eye(old.basis.shape[-1], out=torch.empty_like(zero))
        carry = gated(self.decays[0] * self.transport.mT, eye)
        step = gated(self.lr * self.inverse.mT, zero)
        shrink = gated((1 - self.lr * self.group["weight_decay"]).expand(2 * self.count, 1, 1), zero + 1)
        row_decay = gated(self.decays[2], zero + 1)
        whiten, moment_norm = gated(self.whiten, zero), gated(self.moment_norm, zero)
        # (of bfloat16 without the margin: a quarter of the factor is no noise)
        floor = torch.finfo(self.dtype).eps ** rite.NOISE
        rounding = [max(floor, torch.finfo(c.whole[0].dtype).eps) for c in self.chunks]
        rounding = tuple(eps for eps, c in zip(rounding, self.chunks, strict=True) for _ in range(c.count))
        noise = constant(rounding, ALGEBRA, self.device)
        # what the state keeps is what is measured: rounded to the work dtype first
        warm = rite.warm_basis(old, step, moment_norm, noise).to(self.dtype)
        matrices = (whiten, carry, rest, row_decay, (1 - row_decay) / step.shape[-1], step, warm, shrink)
        by_chunk = zip(self.chunks, *map(self._by_chunk, matrices), strict=True)
        moved_chunks = iter(_together([self._move(c, ok, *parts) for c, *parts in by_chunk if c.moves], self.shards))
        results = [next(moved_chunks) if c.moves else c.still() for c in self.chunks]
        sums = self.shards.total(*(torch.cat(parts) for parts in zip(*results, strict=True)))
        gram_z, shift, checksum, norm_square = sums
        norm = norm_square.sqrt()
        gram_z = self._gram_of_products(gram_z, warm.to(ALGEBRA), lambda c: c.params)
        basis, c, inverse_warm = rite.orthonormalise(warm.to(ALGEBRA), gram_z, self.iterate)
        # zᵀ·X_old, z = X_new·K_w, from X_old = (X_new + what it moved by)/shrink
        cross = (gram_z @ inverse_warm + shift.to(ALGEBRA)) / shrink
        transport = self.partners(c.mT @ cross @ old.basis)
        if self.one_sided:
            transport = torch.where(self.partners(self.moves), transport, eye)
        moved = rite.transport(self.second_moment, transport)
        if self.group["apply_escape"]:
            lost = rite.escaped_mass(self.second_moment, moved)
            self.escaped_mass = self.escaped_mass + lost
        if self.group["balance_param"] and not self.one_sided:
            basis, checksum = self._balance(basis, checksum, gate)
        news = torch.stack([moved, transport, *basis], 1)
        numbers = torch.cat([checksum[:, None], norm[:, None, None], self.escaped_mass.to(self.dtype)], -1)
        steps = [state["step"] for state in self.states]
        if gate is None:
            torch._foreach_add_(steps, 1)
        else:
            news = torch.where(gate[..., None], news, torch.stack([self.old_moment, self.transport, *old], 1))
            numbers = torch.where(gate, numbers, self.numbers)
            torch._foreach_add_(steps, list(gate.to(steps[0].dtype).reshape(-1, *steps[0].shape).unbind()))
        self.scatter("matrices", news)
        self.scatter("numbers", numbers)

    def _move(
        self,
        c: Chunk,
        ok: Tensor | None,
        whiten: Tensor,
        carry: Tensor,
        rest: Tensor,
        row_decay: Tensor,
        row_rest: Tensor,
        step: Tensor,
        warm: Tensor,
        shrink: Tensor,
    ) -> Generator[Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The step of a chunk, X·shrink − M·step. Returns zᵀz and zᵀ·(X_old·shrink − X_new) (z = X·K_w after the step),
        the checksums of the factors, and ‖M‖². The arguments are (p, r, r) or (p, 1, 1), in the work dtype.

        Yields what is a sum over rows and is wanted whole."""
        # (chunks that wait for each other cannot share memory)
        own = self.workspace if c.shards.mesh is None else [torch.empty_like(x) for x in self.workspace]
        first, second, spare = c.scratch(own)
        s = c.times(c.gradients, whiten, first, spare, ok)
        if self.group["row_equilibration"]:
            squares = rite.row_sums(torch.mul(s, s, out=second))
            moments = c.state("row_moment")
            moment = torch.stack(moments).reshape(c.count, c.local_rows, 1).mul_(row_decay).addcmul_(squares, row_rest)
            torch._foreach_copy_(moments, list(moment.reshape(len(moments), *moments[0].shape).unbind()))
            mean = (yield moment.sum(-2, keepdim=True)) / c.rows
            factors, sums = rite.row_factors(squares, moment, mean)
            before, after = (yield sums).split(1, -1)
            rest = factors.mul_(rest * (before / after.clamp_min(1e-30)).sqrt())
        m = c.accumulate(s.mul_(rest), carry, spare)
        square = torch.linalg.vector_norm(m, dim=(-2, -1)).square()
        if self.group["update_capping"]:
            step = self._capped(step, (yield square[:, None, None]).sqrt(), c.rows)
        return *c.advance(m, step, shrink if self.group["weight_decay"] else None, warm, second, spare), square

    def _capped(self, step: Tensor, norm: Tensor, rows: Tensor | int) -> Tensor:
        """``step`` (p, r, r), smaller where M (of that many rows, with Frobenius norm ``norm`` (p, 1, 1)) has a root
        mean square above update_capping."""
        cap = self.group["update_capping"]
        return step / (norm / (rows * step.shape[-1]) ** 0.5 / cap).clamp_min(1) if cap else step

    def _balance(self, basis: rite.Basis, checksum: Tensor, gate: Tensor | None) -> tuple[rite.Basis, Tensor]:
        """Both factors rescaled to the same Frobenius norm; as they are where one is zero, or lr, or the gate shut."""
        norms = torch.linalg.matrix_norm(basis.coordinates, keepdim=True)
        others = self.partners(norms)
        ratio = ((others + 1e-6) / (norms + 1e-6)).sqrt()  # 1e-6 as in the authors' code
        open_ = (norms > 0) & (others > 0) & (self.lr != 0)
        ratio = torch.where(open_ if gate is None else open_ & gate, ratio, 1)
        sums = []
        for c, factor in zip(self.chunks, self._by_chunk(ratio), strict=True):
            x = c.rounded(c.tall(c.params, c.scratch(self.workspace)[0]) * factor)
            c.commit(x)
            sums.append(rite.checksum(x.to(c.dtype), c.start))
        (checksum,) = self.shards.total(torch.cat(sums))
        return rite.Basis(basis.basis / ratio, basis.coordinates * ratio, basis.warm / ratio), checksum

    def dead(self) -> list[bool]:
        """Whether both factors of a pair are zero, or a frozen one is: it has no gradient and never gets one."""
        zero = self.coordinates.flatten(1).any(1).logical_not()
        if self.one_sided:
            zero = zero | self.moves[:, 0, 0]
        return zero.reshape(2, -1).all(0).tolist()

    def update_square(self) -> Tensor:
        """‖δB·A‖² + ‖B·δA‖² of the step that the present first moments make, summed over pairs, a scalar.

        δB·A = −lr·M_B·(T_A·D_B)ᵀ·Q_Aᵀ, and Q_A is orthonormal."""
        self._invert()
        seen = self.transport.mT @ (self.partners(self.coordinates) @ self.inverse).mT * self.lr
        seen = self._capped(seen, self.numbers[..., -2:-1], self.rows)
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        for c, part in zip(self.chunks, self._by_chunk(seen), strict=True):
            if c.moves:
                out, _, spare = c.scratch(self.workspace)
                total += c.times(c.state("first_moment"), part, out, spare).square_().sum()
        return self.shards.total(total)[0]


def make_batches(
    alike: Iterable[tuple[dict[str, Any], list[FactorPair]]], states: dict[Tensor, State], fresh: dict[Tensor, State]
) -> list[Batch]:
    """A batch for each (group, pairs). They take their temporaries from the same memory, one after the other."""
    batches = [Batch(group, pairs, states, fresh) for group, pairs in alike]
    for kind in {(batch.device, batch.dtype) for batch in batches}:
        of_kind = [batch for batch in batches if (batch.device, batch.dtype) == kind]
        sizes = map(max, zip(*(batch.workspace_sizes for batch in of_kind), strict=True))
        workspace = [torch.empty(n, device=kind[0], dtype=kind[1]) for n in sizes]
        for batch in of_kind:
            batch.workspace = workspace
    return batches


def _together(moves: list[Generator[Tensor, Tensor, Any]], shards: Shards) -> list[Any]:
    """Runs generators to their ends, handing back what they yield, summed over processes. Returns what they return.

    One after the other where factors are whole (temporaries stay in the cache); else side by side, so that one
    collective serves all.
    """
    if shards.mesh is None:
        return [result for move in moves for result in _side_by_side([move], shards)]
    return _side_by_side(moves, shards)


def _side_by_side(moves: list[Generator[Tensor, Tensor, Any]], shards: Shards) -> list[Any]:
    values: list[Any] = [None] * len(moves)
    while True:
        results = []
        for i, move in enumerate(moves):
            try:
                values[i] = move.send(values[i])
            except StopIteration as end:
                results.append(end.value)
        if results:
            return results
        values = shards.total(*values)


@lru_cache(maxsize=1024)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(p, 1, 1), made once."""
    return torch.tensor(values, dtype=dtype).to(device)[:, None, None]


def scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A hyperparameter as a tensor, without a copy from the host where it is a number."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def rounding_key(steps: Tensor, positions: list[int]) -> Tensor:
    """The keys (p,) of the rounding noise: by step and by the position of the parameter in the optimizer."""
    return steps.to(torch.int64) * 0x1000003 + constant(tuple(positions), torch.int64, steps.device)[:, 0, 0]
