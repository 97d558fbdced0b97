"""LoRA-Muon (Cesista, Crowson, Simal, Biderman 2026, arXiv:2606.12921)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoRARiteValueError
from ..plan.state import State
from .base import PairOptimizer, Side
from .iterations import inverse_root, polar_factors


class LoRAMuon(PairOptimizer):
    """LoRA-Muon's Algorithm 1: Muon's step in W, half of it by each factor.

    With G the gradients, B (m, r) and A (r, n)::

        M ← βM + (1 − β)G                                                         of both factors
        ΔA = −lr/2 · (BᵀB)^-½ msign((BᵀB)^-½ M_A),  ΔB = −lr/2 · msign(M_B (AAᵀ)^-½) (AAᵀ)^-½
        s = √(1 − lr·weight_decay),  A ← sA + ΔA/s,  B ← sB + ΔB/s

    The inverse roots are those of S/‖S‖ + 1e-5 (Frobenius norm), as the paper's Algorithm 4 has it; the iterations that
    compute them take PoLoRA's coefficients instead of the paper's two tables, to the same roots. A zero B, which the
    paper does not treat, has the inverse root zero: A stays until B has moved. The paper's optional rebalancing of the
    factors, which changes rounding alone, is left out, as is its momentum's default: **β = 0.9 is assumed** (we could
    not read the paper's settings; two public ports have 0.9 and 0.95), and so is lr = 0.1, its best lr for training
    from nothing.

    Args:
        params: the model, or its ``named_parameters()``.
        lr: the spectral norm that a step writes into W = BA at most, to first order.
        beta: of the momentum.
        weight_decay: of W, split over the factors; lr·weight_decay must stay below 1.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 0.1,
        beta: float = 0.9,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    def new_state(self, x: Tensor) -> State:
        return {"momentum": torch.zeros_like(x)}

    def update(self, sides: tuple[Side, Side], group: dict[str, Any]) -> list[Tensor]:
        lr, decay = group["lr"], group["lr"] * group["weight_decay"]
        if decay >= 1:
            raise LoRARiteValueError(f"lr·weight_decay is {float(decay):g}, and must be below 1 for LoRAMuon")
        for side in sides:
            side.state["momentum"] = side.state["momentum"].lerp(side.grad, 1 - group["beta"])
        gram = torch.stack([side.x.mT @ side.x for side in sides])
        size = torch.linalg.matrix_norm(gram, keepdim=True)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        roots = inverse_root(gram / size.clamp_min(1e-30) + 1e-5 * eye) / size.clamp_min(1e-30).sqrt()
        roots = torch.where(size > 0, roots, 0).flip(0)  # A is stepped in the metric of B, and B in that of A
        signs = polar_factors([side.state["momentum"] @ root for side, root in zip(sides, roots, strict=True)])
        shrink = (1 - decay) ** 0.5
        return [
            shrink * side.x - (lr / 2 / shrink) * (sign @ root)
            for side, sign, root in zip(sides, signs, roots, strict=True)
        ]
