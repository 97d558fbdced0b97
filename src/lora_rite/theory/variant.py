"""LoRA-RITE slowly, with every part of it exchangeable: what the experiments take apart.

One pair at a time, float64, tall orthonormal bases by SVD. Equal to :class:`lora_rite.LoRARite` where nothing is
exchanged (tested), and no optimizer to train with: several times slower, and without its safeguards.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from ..rite import ROW_FLOOR


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
        lr: float = 2e-4,
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
        row_floor: float = ROW_FLOOR,
        null: float | None = None,
    ):
        options = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            pairs = list(zip(group["params"][::2], group["params"][1::2], strict=True))
            sides = [self._measure(a, b, group) for a, b in pairs]
            norms = [sum(g.square().sum() for _, g, _, _ in pair) ** 0.5 for pair in sides]
            clip = group["clip_unmagnified_grad"]
            for pair, (a, b), norm in zip(sides, pairs, norms, strict=True):
                norm = norm if group["clip_scope"] == "pair" else sum(n**2 for n in norms) ** 0.5
                scale = min(1.0, clip / float(norm)) if clip and norm > 0 else 1.0
                for p, (x, g, q, k) in zip((a, b), pair, strict=True):
                    new = self._move(x, scale * g, q, k, self.state[p], group)
                    p.copy_((new.mT if p is a else new).to(p.dtype))

    def _measure(self, a: Tensor, b: Tensor, group: dict[str, Any]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For A and B: X, its unmagnified gradient ḡ, the basis Q of the other factor, and the (damped) T⁺."""
        if not self.state[b]:
            self.state[b]["damped"] = not (not a.any() and b.any())
        null = group["null"] if group["null"] is not None else 1e-11 if a.dtype == torch.float64 else 1e-6
        x_a, x_b = a.mT.double(), b.double()
        (q_a, t_a, k_a), (q_b, t_b, k_b) = _basis(x_a, null), _basis(x_b, null)
        if group["damping"]:
            if self.state[b]["damped"]:
                k_b = _damped(t_b, t_a, group["damping"] * group["lr"] * len(x_b) ** 0.5)
            else:
                k_a = _damped(t_a, t_b, group["damping"] * group["lr"] * len(x_a) ** 0.5)
        g_a, g_b = a.grad.mT.double() @ k_b, b.grad.double() @ k_a  # type: ignore[union-attr]
        skip = group["update_skipping"]
        g_a, g_b = (0 * g if skip and g.square().mean() > skip**2 else g for g in (g_a, g_b))
        return [(x_a, g_a, q_b, k_b), (x_b, g_b, q_a, k_a)]

    def _move(self, x: Tensor, g: Tensor, q: Tensor, k: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        r = g.shape[1]
        if "t" not in state:
            state.update(t=0, m=torch.zeros_like(g), v=g.new_zeros(r, r), r=0.0, rho=0.0, q=q)
        state["t"] += 1
        b1, b2, b_row = (_decay(state["t"], beta) for beta in (*group["betas"], group["row_beta"]))
        p = q.mT @ state["q"] if group["transport"] else torch.eye(r, dtype=g.dtype)
        old, moved = state["v"], p @ state["v"] @ p.mT
        state["q"] = q
        if group["apply_escape"]:
            lost = torch.linalg.eigvalsh(old) - torch.linalg.eigvalsh(moved)
            state["rho"] += float(min(lost.max().clamp(min=0), (old.trace() - moved.trace()).clamp(min=0)))
            state["rho"] *= b2
        gram = g.mT @ g / len(g)
        if not group["second_moment"]:
            state["v"] = gram
        else:
            state["v"] = b2 * moved + (1 if group["betas"][1] == 1 else 1 - b2) * gram
        m = state["m"] @ p.mT
        if group["momentum"] == "before":
            g = m = b1 * m + (1 - b1) * g
        values, u = torch.linalg.eigh(state["v"])
        root = (values.clamp(min=0) + state["rho"]).sqrt()
        if group["rows"] == "element":
            state["r"] = b_row * state["r"] + (1 - b_row) * (g @ u).square()
            # in the units of the whitened gradient
            s = (g @ u) / (state["r"].sqrt() + group["eps"] + group["relative_eps"] * root[-1]) @ u.mT
        else:
            s = g @ (u / (root + group["eps"] + group["relative_eps"] * root[-1])) @ u.mT
        if group["rows"] == "before":
            s = self._even(s, b_row, state, group)
        if group["momentum"] == "after":
            m = s = b1 * m + (1 - b1) * s
        if group["rows"] == "after":
            s = self._even(s, b_row, state, group)
        state["m"] = m
        return x - group["lr"] * s @ k.mT

    @staticmethod
    def _even(s: Tensor, decay: float, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        state["r"] = decay * state["r"] + (1 - decay) * s.square().mean(1, keepdim=True)
        root = state["r"].sqrt()
        even = s / (root + group["row_floor"] * state["r"].mean().sqrt() + 1e-12)
        return even * s.norm() / max(even.norm(), 1e-30)


def _decay(t: int, beta: float) -> float:
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t) if beta < 1 else 1.0


def _basis(y: Tensor, null: float) -> tuple[Tensor, Tensor, Tensor]:
    """Q (rows, r) with orthonormal columns, T = QᵀY and T⁺; singular values up to ``null``·σ_max are 0."""
    u, s, vh = torch.linalg.svd(y, full_matrices=False)
    live = (s > null * s[0]).to(s.dtype) if s[0] > 0 else torch.zeros_like(s)
    return u * live, (s * live)[:, None] * vh, vh.mT * torch.where(live > 0, 1 / s, 0)


def _damped(t_y: Tensor, t_x: Tensor, delta: float) -> Tensor:
    """T_Y⁻¹ times σ²/(σ² + δ²) along the singular directions of Y·Xᵀ."""
    u, s, vh = torch.linalg.svd(t_y @ t_x.mT)
    f = torch.where(s > 1e-15 * s[0], s / (s**2 + delta**2), 0)
    return t_x.mT @ (vh.mT * f) @ u.mT
