"""AdamW, for the trainable parameters that are no factors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..algebra.rounding import rounding_key, stochastic_round
from ..errors import LoRARiteValueError
from ..plan.plan import constant
from ..plan.sharding import Shards, is_sharded, local
from ..plan.state import LOW_PRECISION, State
from .checks import changed_shape, names_of, sparse_gradient

#: The keys of a parameter's state, as torch's AdamW has them.
ADAMW_STATE_KEYS = ("step", "exp_avg", "exp_avg_sq")


def adamw_step(group: dict[str, Any], states: dict[Tensor, State], offset: int, ok: Tensor | None) -> None:
    """torch's AdamW on the parameters of a group; in float32 where they are of less precision, rounded
    stochastically. With ``ok``, a scalar, nothing where that is False."""
    params = [(offset + i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
    if not params:
        return
    for _, p in params:
        if not states[p]:
            dtype = torch.float32 if p.dtype in LOW_PRECISION else p.dtype
            moments = {key: torch.zeros_like(p, dtype=dtype) for key in ADAMW_STATE_KEYS[1:]}
            on = p.device if group["capturable"] else "cpu"
            states[p].update(step=torch.zeros((), dtype=torch.float32, device=on), **moments)
    work = [p.float() if p.dtype in LOW_PRECISION else p for _, p in params]
    adamw(
        work,
        [p.grad.to(w.dtype) for (_, p), w in zip(params, work, strict=True)],  # type: ignore[union-attr]
        [states[p]["exp_avg"] for _, p in params],
        [states[p]["exp_avg_sq"] for _, p in params],
        [],
        [states[p]["step"] for _, p in params],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        fused=ok is not None or None,
        found_inf=None if ok is None else (~ok).to(torch.float32),
    )
    for (position, p), w in zip(params, work, strict=True):
        if w is not p:  # (values that the dtype has stay as they are, so an untouched w leaves p as it was)
            step = states[p]["step"][None]
            key = rounding_key(step, constant((position,), torch.int64, step.device))
            _round_into(p, w, key.to(p.device))


def check_gradients(groups: list[dict[str, Any]], states: Mapping[Tensor, Any]) -> None:
    """Raises LoRARiteValueError where AdamW would fail, half a step done."""
    for number, group in enumerate(groups):
        for i, p in enumerate(group["params"] if group["kind"] == "adamw" else ()):
            moment: Tensor = states.get(p, {}).get("exp_avg", p)
            if p.grad is None or (p.grad.layout == torch.strided and moment.shape == p.shape):
                continue
            name = names_of(groups)[number][i]
            sparse = p.grad.layout != torch.strided
            raise LoRARiteValueError(sparse_gradient(name) if sparse else changed_shape(name, moment, p))


def _round_into(p: Tensor, value: Tensor, key: Tensor) -> None:
    """Stochastically; the noise belongs to elements of the whole, where p is a DTensor."""
    shards, mine = Shards(p), local(value)
    if not mine.numel():
        return
    outer, inner = p.shape[: shards.dim].numel(), p.shape[shards.dim + 1 :].numel()
    length = p.numel() // (outer * inner)  # of the dimension that is cut
    mine = mine.reshape(1, outer, -1)
    rounded = stochastic_round(mine, p.dtype, key, shards.start(length) * inner, length * inner)
    local(p).copy_(rounded.view(local(p).shape))


def finite_gradients(group: dict[str, Any]) -> Tensor:
    """(1,) whether all gradients of a group are finite."""
    gradients = [p.grad for p in group["params"] if p.grad is not None]
    shares = [share for share in map(local, gradients) if share.numel()]
    device = shares[0].device if shares else torch.device("cpu")
    norms = torch._foreach_norm(shares, torch.inf) if shares else []
    largest = torch.stack([torch.zeros((), device=device), *(n.to(device, torch.float32) for n in norms)])
    largest = largest.nan_to_num(torch.inf, torch.inf).amax()
    for mesh in dict.fromkeys(g.device_mesh for g in gradients if is_sharded(g)):  # type: ignore[attr-defined]
        largest = Shards(next(g for g in gradients if getattr(g, "device_mesh", None) == mesh)).largest(largest)
    return largest.isfinite()[None]
