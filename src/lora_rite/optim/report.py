"""What each pair does: the figures of ``LoRARite.report()``, pair by pair."""

from typing import Any

import torch
from torch import Tensor

from ..execute import eager
from ..plan.names import plain_names
from ..plan.plan import Bucket
from ..plan.state import ALGEBRA, MATRICES
from .checks import names_by_position
from .groups import at_lrs
from .optimizer import LoRARite
from .precision import full_precision


@torch.no_grad()
def layer_report(optimizer: LoRARite) -> list[dict[str, Any]]:
    """One dict of plain numbers a pair of parameters that has been stepped, in the order of the optimizer's groups.
    Where two parameters hold several pairs, over all of these.

    ====================  ==================================================================================
    ``name``              name of A without what wrappers put into it (a running number where there are no names)
    ``rank``              r
    ``damped_share``      share of the singular directions of B·A with σ < δ (0 without damping)
    ``sigma_over_delta``  median of σ/δ (None without damping, or at lr 0)
    ``update_norm``       Frobenius norm of the change of W in one step, as in ``LoRARite.report()``
    ``product_norm``      Frobenius norm of B·A (which PEFT multiplies by alpha/r)
    ====================  ==================================================================================

    δ = damping·lr·√rows, with the rows of the damped side (and the lr of B·A, where ``scaling`` is given), is what a
    direction must have to be followed; see ``docs/tuning.md``. Takes a few r×r decompositions a pair and synchronises
    with the device: for logging, not for every step.
    """
    names = plain_names(names_by_position(optimizer.param_groups))
    rows: dict[int, dict[str, Any]] = {}
    with full_precision(optimizer.param_groups), at_lrs(optimizer.param_groups, optimizer._last_lr):
        for plan in optimizer._plans_of_states():
            for bucket, workspace in zip(plan.buckets, plan.workspaces(), strict=True):
                of_bucket = zip(bucket.pairs, *_figures(bucket, workspace), strict=True)
                for pair, square, sigma, delta in of_bucket:
                    rows[pair.position] = {
                        "name": names[pair.position],
                        "rank": bucket.rank,
                        "damped_share": float((sigma < delta).double().mean()),
                        "sigma_over_delta": float((sigma / delta).median()) if delta.any() else None,
                        "update_norm": float(square) ** 0.5,
                        "product_norm": float(sigma.square().sum().sqrt()),
                    }
    return [rows[position] for position in sorted(rows)]


def _figures(bucket: Bucket, workspace: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each pair of parameters, on the CPU: the square of its update's norm (k,), the singular values of its products
    B·A (k, blocks, r), and δ (k, blocks, 1), 0 without damping."""
    squares, product = eager.update_squares(bucket, workspace)
    t = bucket.arena.matrices[:, MATRICES.index("coordinates")].cpu().to(ALGEBRA)
    sigma = torch.linalg.svdvals(t[bucket.count :] @ t[: bucket.count].mT)
    delta = torch.zeros(bucket.count, 1, dtype=ALGEBRA) if product is None else product[1][..., 0].cpu()
    by_pair = lambda x: x.unflatten(0, (len(bucket.pairs), -1))
    return squares.view(2, len(bucket.pairs), -1).sum((0, 2)).cpu(), by_pair(sigma), by_pair(delta)
