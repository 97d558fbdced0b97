"""What each pair does: the figures of ``LoRARite.report()``, pair by pair."""

from typing import Any

import torch

from ..execute import eager
from ..plan.layout import rank_of
from ..plan.names import plain_names
from ..plan.plan import make_plan
from ..plan.state import ALGEBRA, MATRICES
from .checks import names_by_position
from .optimizer import LoRARite
from .precision import full_precision
from .selection import alike, with_state


@torch.no_grad()
def layer_report(optimizer: LoRARite) -> list[dict[str, Any]]:
    """One dict of plain numbers a pair of parameters that has been stepped, in the order of the optimizer's groups.
    Where two parameters hold several pairs, over all of these.

    ====================  ==================================================================================
    ``name``              name of A without what wrappers put into it (a running number where there are no names)
    ``rank``              r
    ``damped_share``      share of the singular directions of B·A with σ < δ (0 without damping)
    ``sigma_over_delta``  median of σ/δ (None without damping, or at lr 0)
    ``update_norm``       Frobenius norm of the change of B·A in one step, as in ``LoRARite.report()``
    ``product_norm``      Frobenius norm of B·A (which PEFT multiplies by alpha/r)
    ====================  ==================================================================================

    δ = damping·lr·√rows, with the rows of the damped side, is what a direction must have to be followed; see
    ``docs/tuning.md``. Takes a few r×r decompositions a pair and synchronises with the device: for logging, not for
    every step.
    """
    groups, states, rows = optimizer.param_groups, optimizer.state, []
    names = plain_names(names_by_position(groups))
    with full_precision(groups), optimizer._at_last_lr():
        for group, pairs in alike(groups, states, lambda a, b: with_state(a, b, states)):
            for pair in pairs:
                plan = make_plan([(group, [pair])], states, optimizer._limits)
                (bucket,), (workspace,) = plan.buckets, plan.workspaces()
                square, product = eager.update_square(bucket, workspace)
                t = bucket.arena.matrices[:, MATRICES.index("coordinates")].to(ALGEBRA).cpu()
                sigma = torch.linalg.svdvals(t[bucket.count :] @ t[: bucket.count].mT)
                delta = product[1][..., 0].cpu() if product is not None else torch.zeros(())
                rows.append(
                    {
                        "name": names[pair.position],
                        "rank": rank_of(group, pair.a),
                        "damped_share": float((sigma < delta).double().mean()),
                        "sigma_over_delta": float((sigma / delta).median()) if delta.any() else None,
                        "update_norm": float(square) ** 0.5,
                        "product_norm": float(sigma.square().sum().sqrt()),
                    }
                )
    return rows
