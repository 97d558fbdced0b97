"""What each pair does: the figures of ``LoRARite.report()``, pair by pair."""

from typing import Any

import torch

from .batch import make_batches, rank_of
from .names import plain_names
from .optimizer import LoRARite


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
    names, rows = plain_names(optimizer._names_by_position()), []
    with optimizer._full_precision(), optimizer._at_last_lr():
        for group, pairs in optimizer._alike(optimizer._with_state):
            for pair in pairs:
                (batch,) = make_batches([(group, [pair])], optimizer.state, {})
                update_norm = float(batch.update_square()) ** 0.5
                t = batch.coordinates.cpu()
                sigma = torch.linalg.svdvals(t[batch.count :] @ t[: batch.count].mT)
                delta = batch.product[1][..., 0].cpu() if batch.product is not None else torch.zeros(())
                rows.append(
                    {
                        "name": names[pair.position],
                        "rank": rank_of(group, pair.a),
                        "damped_share": float((sigma < delta).double().mean()),
                        "sigma_over_delta": float((sigma / delta).median()) if delta.any() else None,
                        "update_norm": update_norm,
                        "product_norm": float(sigma.square().sum().sqrt()),
                    }
                )
    return rows
