"""The values that a step hands from phase to phase, and nothing else: ``begin`` → :class:`Start` → ``measure`` →
:class:`Measured` → ``precondition`` → :class:`Preconditioned` → ``decide`` → :class:`Verdict` → ``move``.

All are frozen. r×r matrices are (2p, r, r) in the ``algebra`` dtype of the bucket, float64 or float32, the factors of A
first and then those of B; numbers of a factor are (2p, 1, 1). All phases but the last only read, so that what fails
there has changed nothing.
"""

from dataclasses import dataclass

from torch import Tensor

from ..algebra.basis import Basis
from .tall import Tall


@dataclass(frozen=True)
class Start:
    """What a bucket's step begins with: hyperparameters and state as tensors, and the factors.

    lr            (), in the algebra's dtype
    decays        (3, 2p, 1, 1), bias-corrected, of the first, the second and the rows' moment
    second_moment V, in the last step's basis, carried over into the present one
    transport     P, from the last step's basis into the present one
    basis         of each factor
    numbers       (2p, 1, r + 2), see :class:`lora_rite.plan.state.Numbers`
    tall          for each segment, its factors, gradients and moments
    """

    lr: Tensor
    decays: Tensor
    second_moment: Tensor
    transport: Tensor
    basis: Basis
    numbers: Tensor
    tall: tuple[Tall, ...]


@dataclass(frozen=True)
class Measured:
    """unmagnifier  D of each factor: ḡ = g·D, and the step is M·Dᵀ
    squares      ḡᵀ·ḡ
    kept         (2p, 1, 1) bool, False where ``update_skipping`` drops the gradient
    checksums    (2p, r), in the dtype of the state
    product      S = T_Y·T_Xᵀ (p, r, r) and δ (p, 1, 1) of the damped side; None without damping
    """

    unmagnifier: Tensor
    squares: Tensor
    kept: Tensor
    checksums: Tensor
    product: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Preconditioned:
    """second_moment     V of this step
    escaped_mass      ρ of this step, (2p, 1, 1)
    preconditioner    g to S: D·(V^½ + eps)⁻¹, with the scale of the clip and the sign of ``maximize``
    moment_norm       a bound of ‖M‖ after the step, (2p, 1, 1)
    """

    second_moment: Tensor
    escaped_mass: Tensor
    preconditioner: Tensor
    moment_norm: Tensor


@dataclass(frozen=True)
class Verdict:
    """For each pair of parameters: ``finite``, whether all that ``move`` will use is so; ``unchanged``, whether both
    factors are what the last step left."""

    finite: Tensor
    unchanged: Tensor


@dataclass(frozen=True)
class Moves:
    """What ``move`` does to the factors of a segment, in the work dtype; where a factor is not to move, the identity.

    preconditioner  (count, r, r), g to S
    transport       (count, r, r), β₁ₜ·Pᵀ: M ← M·``transport`` + ``rest``·S
    rest            (count, 1, 1)
    row_decay       (count, 1, 1), of the rows' moment, and ``row_rest``, that of a new row divided by r
    step            (count, r, r), lr·Dᵀ: X ← ``shrink``·X − M·``step``
    shrink          (count, 1, 1)
    warm            (count, r, r), K_w of the factor after the step
    """

    preconditioner: Tensor
    transport: Tensor
    rest: Tensor
    row_decay: Tensor
    row_rest: Tensor
    step: Tensor
    warm: Tensor
    shrink: Tensor


@dataclass(frozen=True)
class Moved:
    """What is measured of factors that have moved, sums over rows that are wanted over all processes.

    gram          zᵀz with z = X·K_w (where factors are multiplied as they lie, XᵀX), (count, r, r)
    shift         zᵀ·(X_old·shrink − X), (count, r, r)
    checksums     (count, r)
    moment_square ‖M‖², (count,)
    """

    gram: Tensor
    shift: Tensor
    checksums: Tensor
    moment_square: Tensor
