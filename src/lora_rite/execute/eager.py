"""The phases of a step for one bucket, in PyTorch: from the gradients to the new factors.

``begin``, ``measure``, ``precondition`` and ``decide`` only read; ``move`` writes, and cannot fail. The optimizer
decides between them. The r×r equations are those of :mod:`lora_rite.algebra.step`, the tall products those of
:class:`lora_rite.execute.tall.Tall`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..algebra import step as equations
from ..algebra.basis import NOISE, Basis, orthonormalise, warm_basis
from ..algebra.linalg import eye_like, finite, gram, row_sums, trace
from ..algebra.rounding import checksum
from ..options import lr_scale, product_scale
from ..plan.plan import Bucket, constant
from ..plan.state import Numbers
from .phases import Measured, Moved, Moves, Preconditioned, Start, Verdict
from .tall import Tall

#: kᵀ(xᵀx)k serves as (xk)ᵀ(xk) where ‖kᵀk‖·tr(xᵀx), to which rounding is relative, is less than this times its trace.
LOSSY = 64


def begin(bucket: Bucket, workspace: list[Tensor], with_gradients: bool = True) -> Start:
    """Reads hyperparameters, state, factors and gradients."""
    group, device, arena = bucket.group, bucket.device, bucket.arena
    # Segments that wait for each other, as those of sharded factors do, cannot share temporaries.
    own = lambda: workspace if bucket.shards.mesh is None else [torch.empty_like(x) for x in workspace]
    betas = constant(tuple(float(b) for b in (*group["betas"], group["row_beta"])), bucket.algebra, device)
    second_moment, transport, *basis = arena.matrices.to(bucket.algebra).unbind(1)
    return Start(
        lr=scalar(group["lr"], bucket.algebra, device) * lr_scale(group.get("scaling"), bucket.rank),
        decays=equations.bias_corrected_decay(
            arena.steps.to(bucket.algebra)[:, None, None] + 1, betas[:, None, None, None]
        ),
        second_moment=second_moment,
        transport=transport,
        basis=Basis(*basis),
        numbers=arena.numbers[:, None],
        tall=tuple(Tall.of(segment, own(), with_gradients) for segment in bucket.segments),
    )


def unmagnifier(bucket: Bucket, start: Start) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """D of each factor: T⁺ of the other one, damped on one side of each pair; and S and δ of the damping.

    Where one side is frozen, there is no product of two steps that damping would have to keep small, and none is done.
    """
    n, damping = bucket.count, bucket.group["damping"]
    inverse = bucket.partners(start.basis.basis)
    if not damping or bucket.one_sided or bucket.arena.damped is None:
        return inverse, None
    t, damps_a = start.basis.coordinates, bucket.arena.damped[:n, None, None]
    delta = damping * start.lr * torch.where(damps_a, bucket.num_rows[:n], bucket.num_rows[n:]).sqrt()
    y, x = torch.where(damps_a, t[:n], t[n:]), torch.where(damps_a, t[n:], t[:n])
    product = y @ x.mT
    damped = x.mT @ equations.damped_inverse(product, delta)
    return torch.where(torch.cat([~damps_a, damps_a]), damped.repeat(2, 1, 1), inverse), (product, delta)


def measure(bucket: Bucket, start: Start) -> Measured:
    """Unmagnified gradients, by their Gram matrices, and the checksums of the factors."""
    d, product = unmagnifier(bucket, start)
    squares = []
    for tall, by in zip(start.tall, bucket.by_segment(d), strict=True):
        if not tall.segment.moves:
            squares.append(torch.zeros_like(by))
        elif tall.segment.direct:
            squares.append(tall.gram_of(tall.gradients))
        else:
            unmagnified = tall.gradient_times(by)
            squares.append(gram(unmagnified, unmagnified))
    sums = torch.cat([tall.checksums() for tall in start.tall])
    grams, checksums = bucket.shards.total(torch.cat(squares), sums)
    grams = _gram_of_products(bucket, start, grams, d, Tall.gradient_times)
    kept = torch.ones_like(bucket.num_rows, dtype=torch.bool)
    if limit := bucket.group["update_skipping"] * scaling(bucket):
        kept = ~(trace(grams) / (bucket.num_rows * bucket.rank) > limit**2)
        grams = grams * kept
    return Measured(d, grams, kept, checksums, product)


def scaling(bucket: Bucket) -> float:
    """What the model multiplies B·A by, where the group says so; else 1."""
    return product_scale(bucket.group.get("scaling"))


def norm_square(bucket: Bucket, measured: Measured) -> Tensor:
    """The sum of the squares of all unmagnified gradients with respect to scaling·B·A, a scalar."""
    return trace(measured.squares).sum() / scaling(bucket) ** 2


def _gram_of_products(
    bucket: Bucket, start: Start, grams: Tensor, k: Tensor, product: Callable[[Tall, Tensor], Tensor]
) -> Tensor:
    """(xk)ᵀ(xk) for the tall x of each factor, from xᵀx where factors are multiplied as they lie; of all others
    ``grams`` holds it already. ``product`` makes x·k.

    kᵀ(xᵀx)k takes no tall product, and loses digits as κ(k)² does: where these are too many, x·k is made. (In
    training κ is 2 to 5.)
    """
    grams = grams.to(bucket.algebra)
    if not any(tall.segment.direct for tall in start.tall):
        return grams
    turned, size = k.mT @ grams @ k, trace(grams)
    exact = torch.linalg.matrix_norm(k.mT @ k, keepdim=True) * size < LOSSY * trace(turned)
    info = torch.finfo(bucket.dtype)
    # After an underflow the trace is too small to tell; after an overflow ``turned`` is NaN, and the comparison false.
    exact = exact & (size > info.tiny / info.eps)
    counts = [tall.segment.count for tall in start.tall]
    parts = []
    for tall, *of_segment in zip(start.tall, *(x.split(counts) for x in (grams, turned, exact, k)), strict=True):
        own, cheap, good, by = of_segment
        if tall.segment.direct and tall.segment.moves:
            if good.all().tolist():
                own = cheap
            else:
                y = product(tall, by.to(bucket.dtype))
                own = bucket.shards.total(gram(y, y))[0].to(bucket.algebra)
        parts.append(own)
    return torch.cat(parts)


def precondition(bucket: Bucket, start: Start, measured: Measured, norm: Tensor) -> Preconditioned:
    """Second moments and preconditioners, from the norm of all unmagnified gradients together, which is clipped."""
    group, clip = bucket.group, bucket.group["clip_unmagnified_grad"]
    scale = clip / norm.to(bucket.device).clamp_min(clip) if clip else 1.0
    squares = measured.squares * scale**2
    moment = equations.second_moment(
        start.second_moment, squares / bucket.num_rows, start.decays[1], summed=group["betas"][1] == 1
    )
    numbers = Numbers.of(start.numbers)
    escaped = start.decays[1] * numbers.escaped_mass.to(bucket.algebra)
    eps = group["eps"] * scaling(bucket)
    root = equations.preconditioner(moment, escaped, eps, group["relative_eps"], bucket.iterate, bucket.asks)
    square = trace(root @ squares @ root)  # ‖S‖², which the equilibration of rows leaves as it is
    last = numbers.moment_norm.to(bucket.algebra)
    sign = -1.0 if group["maximize"] else 1.0
    return Preconditioned(
        second_moment=moment,
        escaped_mass=escaped,
        preconditioner=measured.unmagnifier @ root * (measured.kept * (scale * sign)),
        moment_norm=start.decays[0] * last + (1 - start.decays[0]) * square.clamp_min(0).sqrt(),
    )


def decide(bucket: Bucket, start: Start, measured: Measured, preconditioned: Preconditioned) -> Verdict:
    """Whether what ``move`` will use is finite in the state's dtype, and the factors are what the last step left: their
    checksums are, to rounding (false for NaN)."""
    used = [preconditioned.second_moment, preconditioned.preconditioner, measured.unmagnifier]
    lengths = start.basis.coordinates.square().sum(-2).sqrt()
    tolerance = 128 * torch.finfo(bucket.dtype).eps * bucket.num_rows[..., 0].sqrt()
    same = (measured.checksums - Numbers.of(start.numbers).checksum[:, 0]).abs() <= tolerance * lengths
    return Verdict(_of_parameters(bucket, finite(torch.cat(used, -1).to(bucket.dtype))), _of_parameters(bucket, same))


def _of_parameters(bucket: Bucket, flags: Tensor) -> Tensor:
    """(number of pairs of parameters,): whether that is so for both factors of all pairs that two parameters hold,
    from (2p, …)."""
    return flags.reshape(2, len(bucket.pairs), -1).all(-1).all(0)


def _gate(bucket: Bucket, measured: Measured, ok: Tensor | None) -> Tensor | None:
    """(2p, 1, 1), the factors to move; None is all of them. Of several pairs in one parameter (experts), those without
    any gradient are passed over."""
    gate = ok
    if bucket.group.get("blocks", 1) > 1:
        seen = trace(measured.squares) > 0
        seen = seen | bucket.partners(seen)
        gate = seen if gate is None else seen & gate
    if bucket.one_sided:
        gate = bucket.moves if gate is None else bucket.moves & gate
    return None if gate is None else gate.expand(2 * bucket.count, 1, 1)


def move(bucket: Bucket, start: Start, measured: Measured, pre: Preconditioned, ok: Tensor | None = None) -> None:
    """Moves the factors, measures their new bases, carries the second moments over. With ``ok``, a scalar, nothing
    where that is False."""
    old, gate = start.basis, _gate(bucket, measured, ok)
    moves, warm, shrink = _moves(bucket, start, measured, pre, gate)
    by_segment = [Moves(*parts) for parts in zip(*map(bucket.by_segment, moves), strict=True)]
    results = _move_segments(bucket, start.tall, by_segment, ok)
    sums = zip(*((m.gram, m.shift, m.checksums, m.moment_square) for m in results), strict=True)
    gram_z, shift, checksums, moment_square = bucket.shards.total(*map(torch.cat, sums))
    gram_z = _gram_of_products(bucket, start, gram_z, warm.to(bucket.algebra), Tall.param_times)
    basis, c, inverse_warm = orthonormalise(warm.to(bucket.algebra), gram_z, bucket.iterate, bucket.asks)
    # zᵀ·X_old, with z = X_new·K_w, follows from X_old = (X_new + what it moved by)/shrink.
    cross = (gram_z @ inverse_warm + shift.to(bucket.algebra)) / shrink
    transport = bucket.partners(c.mT @ cross @ old.basis)
    if bucket.one_sided:
        eye = torch.eye(bucket.rank, dtype=bucket.algebra, device=bucket.device)
        transport = torch.where(bucket.partners(bucket.moves), transport, eye)
    moved, escaped = equations.transport(pre.second_moment, transport), pre.escaped_mass
    if bucket.group["apply_escape"]:
        escaped = escaped + equations.escaped_mass(pre.second_moment, moved)
    if bucket.group["balance_param"] and not bucket.one_sided:
        basis, checksums = _balance(bucket, start, basis, checksums, gate)
    matrices = torch.stack([moved, transport, *basis], 1)
    numbers = torch.cat([checksums[:, None], moment_square.sqrt()[:, None, None], escaped.to(bucket.dtype)], -1)
    _keep(bucket, start, matrices, numbers, gate)


def _moves(
    bucket: Bucket, start: Start, measured: Measured, pre: Preconditioned, gate: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """The fields of :class:`Moves` for all factors; and K_w after the step in the state's dtype, and ``shrink``.

    Factors that are not to move are multiplied by 1, and what is added to them by 0."""
    gated = lambda new, old: new if gate is None else torch.where(gate, new, old)
    zero, beta = start.lr.new_zeros(()), start.decays[0]
    eye = torch.eye(bucket.rank, out=torch.empty_like(zero))
    step = gated(start.lr * measured.unmagnifier.mT, zero)
    decay = scalar(bucket.group["lr"], bucket.algebra, bucket.device) * bucket.group["weight_decay"]
    shrink = gated((1 - decay).expand(2 * bucket.count, 1, 1), zero + 1)
    row_decay = gated(start.decays[2], zero + 1)
    # NOISE's margin is for float32 and float64: eps of bfloat16 and float16 to that power would be a part of the factor
    # that is no noise.
    least = torch.finfo(bucket.dtype).eps ** NOISE
    noise = [max(least, torch.finfo(s.params[0].dtype).eps) for s in bucket.segments for _ in range(s.count)]
    # The state keeps K_w in its own dtype, so what is measured must be that.
    warm = warm_basis(
        start.basis,
        step,
        gated(pre.moment_norm, zero),
        constant(tuple(noise), bucket.algebra, bucket.device)[:, None, None],
    ).to(bucket.dtype)
    moves = (
        gated(pre.preconditioner, zero),
        gated(beta * start.transport.mT, eye),
        gated(1 - beta, zero),
        row_decay,
        (1 - row_decay) / bucket.rank,
        step,
        warm,
        shrink,
    )
    return moves, warm, shrink


def _move_segments(bucket: Bucket, tall: tuple[Tall, ...], moves: list[Moves], ok: Tensor | None) -> list[Moved]:
    """One segment after the other where factors are whole, so that its temporaries stay in the cache; all side by side
    where they are cut over processes, so that one collective serves all."""
    mine = [(t, by) for t, by in zip(tall, moves, strict=True) if t.segment.moves]
    if bucket.shards.mesh is None:
        moved = [result for one in mine for result in _move_together(bucket, [one], ok)]
    else:
        moved = _move_together(bucket, mine, ok)
    results = iter(moved)
    return [next(results) if t.segment.moves else _still(t) for t in tall]


def _move_together(bucket: Bucket, segments: list[tuple[Tall, Moves]], ok: Tensor | None) -> list[Moved]:
    """X ← X·shrink − M·step, M ← M·transport + rest·S, with the rows of S = g·preconditioner equilibrated."""
    group, total = bucket.group, bucket.shards.total
    preconditioned = [tall.gradient_times(by.preconditioner, ok) for tall, by in segments]
    scales = [by.rest for _, by in segments]
    if group["row_equilibration"]:
        rows = [_rows(tall, by, s) for (tall, by), s in zip(segments, preconditioned, strict=True)]
        means = total(*(moment.sum(-2, keepdim=True) for _, moment in rows))
        rows = [
            equations.row_scales(*of_rows, mean / tall.segment.num_rows)
            for (tall, _), of_rows, mean in zip(segments, rows, means, strict=True)
        ]
        norms = [sums.split(1, -1) for sums in total(*(sums for _, sums in rows))]
        scales = [
            factors.mul_(rest * (before / after.clamp_min(1e-30)).sqrt())
            for (factors, _), rest, (before, after) in zip(rows, scales, norms, strict=True)
        ]
    moments = [
        tall.advance_moment(s.mul_(scale), by.transport)
        for (tall, by), s, scale in zip(segments, preconditioned, scales, strict=True)
    ]
    squares = [torch.linalg.vector_norm(m, dim=(-2, -1)).square() for m in moments]
    steps = [by.step for _, by in segments]
    if cap := group["update_capping"]:
        norms = [square.sqrt() for square in total(*(square[:, None, None] for square in squares))]
        steps = [
            equations.capped(step, norm, tall.segment.num_rows, cap)
            for (tall, _), step, norm in zip(segments, steps, norms, strict=True)
        ]
    return [
        Moved(*tall.advance(m, step, by.shrink if group["weight_decay"] else None, by.warm), square)
        for (tall, by), m, step, square in zip(segments, moments, steps, squares, strict=True)
    ]


def _rows(tall: Tall, by: Moves, s: Tensor) -> tuple[Tensor, Tensor]:
    """For :func:`lora_rite.algebra.step.row_scales`: the sums of the squares of the rows of S, and the rows' moments,
    advanced in the state."""
    squares = row_sums(torch.mul(s, s, out=tall.second))
    moment: Any = tall.segment.row_moment
    moment = moment.view(len(s), -1, 1).mul_(by.row_decay).addcmul_(squares, by.row_rest)
    return squares, moment


def _still(tall: Tall) -> Moved:
    """In place of what is measured of factors that move, for frozen ones; nothing is made of it."""
    zeros = tall.first.new_zeros(tall.segment.count, tall.segment.rank, tall.segment.rank)
    return Moved(zeros + eye_like(zeros), zeros, zeros[:, 0], zeros[:, 0, 0])


def _balance(
    bucket: Bucket, start: Start, basis: Basis, checksums: Tensor, gate: Tensor | None
) -> tuple[Basis, Tensor]:
    """Both factors rescaled to the same Frobenius norm; as they are where one is zero, or lr, or the gate shut."""
    norms = torch.linalg.matrix_norm(basis.coordinates, keepdim=True)
    others = bucket.partners(norms)
    ratio = ((others + 1e-6) / (norms + 1e-6)).sqrt()  # 1e-6 as in the authors' code
    open_ = (norms > 0) & (others > 0) & (start.lr != 0)
    ratio = torch.where(open_ if gate is None else open_ & gate, ratio, 1)
    sums = []
    for tall, factor in zip(start.tall, bucket.by_segment(ratio), strict=True):
        segment = tall.segment
        x = tall.rounded(segment.layout.tall(tall.params, segment.dtype, tall.first) * factor)
        tall.commit(x)
        sums.append(checksum(x.to(segment.dtype), segment.start))
    (checksums,) = bucket.shards.total(torch.cat(sums))
    return Basis(basis.basis / ratio, basis.coordinates * ratio, basis.warm / ratio), checksums


def _keep(bucket: Bucket, start: Start, matrices: Tensor, numbers: Tensor, gate: Tensor | None) -> None:
    """Writes the small state of the factors that were moved."""
    arena = bucket.arena
    if gate is None:
        arena.steps += 1
    else:
        before = torch.stack([start.second_moment, start.transport, *start.basis], 1)
        matrices = torch.where(gate[..., None], matrices, before)
        numbers = torch.where(gate, numbers, start.numbers)
        # A frozen factor counts the steps of its partner.
        arena.steps += (gate | bucket.partners(gate))[:, 0, 0]
    arena.matrices.copy_(matrices)
    arena.numbers.copy_(numbers[:, 0])


def dead(bucket: Bucket) -> list[bool]:
    """Whether both factors of a pair are zero, or a frozen one is: it has no gradient and never gets one."""
    zero = Basis(*bucket.arena.matrices[:, 2:].unbind(1)).coordinates.flatten(1).any(1).logical_not()
    if bucket.one_sided:
        zero = zero | bucket.moves[:, 0, 0]
    return zero.reshape(2, -1).all(0).tolist()


def update_squares(bucket: Bucket, workspace: list[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """scaling²·‖δB·A‖² or scaling²·‖B·δA‖² of the step that the present first moment of each factor makes, (2p,); and S
    and δ.

    δB·A = −lr·M_B·(T_A·D_B)ᵀ·Q_Aᵀ, and Q_A is orthonormal."""
    start = begin(bucket, workspace, with_gradients=False)
    d, product = unmagnifier(bucket, start)
    seen = start.transport.mT @ (bucket.partners(start.basis.coordinates) @ d).mT * start.lr
    norm, cap = Numbers.of(start.numbers).moment_norm, bucket.group["update_capping"]
    seen = equations.capped(seen, norm, bucket.num_rows, cap)
    squares = [
        tall.moment_times(part).square_().sum((-2, -1)) if tall.segment.moves else part.new_zeros(len(part))
        for tall, part in zip(start.tall, bucket.by_segment(seen), strict=True)
    ]
    return bucket.shards.total(torch.cat(squares) * scaling(bucket) ** 2)[0], product


def scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A hyperparameter as a tensor, without a copy from the host where it is a number."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)
