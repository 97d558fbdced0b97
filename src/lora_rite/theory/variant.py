"""LoRA-RITE slowly, with every part of it exchangeable: what the experiments take apart.

One pair at a time, in float64, by the functions of :mod:`lora_rite.simple`. Equal to :class:`lora_rite.LoRARite` where
nothing is exchanged (tested), and no optimizer to train with: several times slower, and without its safeguards.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from .. import simple
from ..options import LR


class Variant(torch.optim.Optimizer):
    """LoRA-RITE on a flat list A, B, A, B, … with A (r, n) and B (m, r).

    Args (those of LoRARite have its meaning and defaults):
        transport: carry V and M into the new basis (P); False leaves them as they are.
        second_moment: False whitens with this step's gradient alone (S is then a polar factor, as in Muon).
        momentum: the first moment of the preconditioned gradient ("after"), or of the unmagnified gradient, which is
            preconditioned then ("before").
        clip_scope: one norm over all pairs ("all"), or one for each ("pair").
        rows: equilibrate rows before the momentum ("before": row_equilibration of LoRARite), after it ("after", as
            NorMuon), element by element in the eigenbasis of V ("element", as SOAP), or not at all (None).
        row_floor: added to the root mean square of each row, in units of that of all rows.
        null: singular values of a factor up to this share of the largest count as 0; by default 1e-11 for float64
            factors and 1e-6 for others (torch.linalg.pinv, and so the authors' code, has about 2e-15 and 1e-6).
    """

    def __init__(
        self,
        params: Any,
        lr: float = LR,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        *,
        damping: float = 20.0,
        row_beta: float = 0.99,
        relative_eps: float = 1e-3,
        clip_unmagnified_grad: float = 1.0,
        update_skipping: float = 0.0,
        apply_escape: bool = False,
        transport: bool = True,
        second_moment: bool = True,
        momentum: Literal["after", "before"] = "after",
        clip_scope: Literal["all", "pair"] = "all",
        rows: Literal["before", "after", "element"] | None = "before",
        row_floor: float = 1e-2,
        null: float | None = None,
    ):
        options = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            pairs = list(zip(group["params"][::2], group["params"][1::2], strict=True))
            measured = [self._measure(a, b, group) for a, b in pairs]
            every = [g for sides in measured for _, g, _, _ in sides]
            for (a, b), sides in zip(pairs, measured, strict=True):
                own = every if group["clip_scope"] == "all" else [g for _, g, _, _ in sides]
                scale = simple.clip_scale(own, group["clip_unmagnified_grad"])
                for p, (x, g, q, d), kept in zip((a, b), sides, self.state[b]["pair"][:2], strict=True):
                    new = _move(x, scale * g, q, d, kept, group)
                    p.copy_((new.mT if p is a else new).to(p.dtype))

    def _measure(self, a: Tensor, b: Tensor, group: dict[str, Any]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For A and B: X, its unmagnified gradient ḡ, and Q and D of the other factor."""
        x_a, x_b = a.double(), b.double()
        if not self.state[b]:
            self.state[b]["pair"] = simple.initial_state(x_a, x_b)
        null = group["null"] if group["null"] is not None else 1e-11 if a.dtype == torch.float64 else 1e-6
        (q_a, d_a), (q_b, d_b) = simple.bases(x_a, x_b, self.state[b]["pair"][2], _options(group, null=null))
        g_a, g_b = a.grad.mT.double() @ d_b, b.grad.double() @ d_a  # type: ignore[union-attr]
        skip = group["update_skipping"]
        g_a, g_b = (0 * g if skip and g.square().mean() > skip**2 else g for g in (g_a, g_b))
        return [(x_a.mT, g_a, q_b, d_b), (x_b, g_b, q_a, d_a)]


def _options(group: dict[str, Any], **others: Any) -> simple.Options:
    """``second_moment`` off is β₂ = 0."""
    same = ("lr", "eps", "relative_eps", "damping")
    betas = group["betas"] if group["second_moment"] else (group["betas"][0], 0.0)
    return simple.Options(betas=betas, escape=group["apply_escape"], **{k: group[k] for k in same}, **others)


def _move(x: Tensor, g: Tensor, q: Tensor, d: Tensor, kept: simple.Moments, group: dict[str, Any]) -> Tensor:
    """:func:`lora_rite.simple.move` with its parts exchanged."""
    o = _options(group)
    if not group["transport"]:
        kept.basis = None
    p = simple.transport_and_accumulate(g, q, kept, o)
    beta = simple.bias_corrected(o.betas[0], kept.t)
    mixed = lambda new: beta * kept.first @ p.mT + (1 - beta) * new
    if group["momentum"] == "before":
        g = kept.first = mixed(g)
    even = group["rows"] == "element"
    s = _evened_elements(g, kept, o, group["row_beta"]) if even else g @ simple.inverse_root(kept, o)
    if group["rows"] == "before":
        s = simple.equilibrated(s, kept, group["row_beta"], group["row_floor"])
    if group["momentum"] == "after":
        s = kept.first = mixed(s)
    if group["rows"] == "after":
        s = simple.equilibrated(s, kept, group["row_beta"], group["row_floor"])
    return x - o.lr * s @ d.mT


def _evened_elements(g: Tensor, kept: simple.Moments, o: simple.Options, row_beta: float) -> Tensor:
    """ḡ over the root mean square of each element in the eigenbasis of V, in place of V^-½."""
    values, u = torch.linalg.eigh(kept.second)
    turned, beta = g @ u, simple.bias_corrected(row_beta, kept.t)
    kept.rows = beta * kept.rows + (1 - beta) * turned.square()
    largest = (values[-1].clamp(min=0) + kept.escaped).sqrt()
    # The floor is in the units of the whitened gradient.
    return turned / (kept.rows.sqrt() + o.eps + o.relative_eps * largest) @ u.mT
