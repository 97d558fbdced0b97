"""LoRA-RITE slowly: one pair at a time, float64, tall orthonormal bases by SVD, ordinary loops.

Written from the formulas (the paper's Algorithm 1, the authors' step, and our damping and row equilibration), without
any function of the package. The basis of Y is an explicit tall matrix Q here, Y = Q·T, and everything is done in it.
"""

import torch


def decay(t, beta):
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t) if beta < 1 else 1.0


def basis(y, null):
    """Q (rows, r) with orthonormal columns, T = QᵀY and T⁺, by SVD; singular values up to ``null``·σ_max are 0."""
    short = max(y.shape[1] - len(y), 0)  # rows of zeros, where r exceeds the rows of y
    u, s, vh = torch.linalg.svd(torch.nn.functional.pad(y, (0, 0, 0, short)), full_matrices=False)
    u = u[: len(y)]
    live = (s > null * s[0]).double() if s[0] > 0 else torch.zeros_like(s)
    return u * live, (s * live)[:, None] * vh, vh.mT * torch.where(live > 0, 1 / s, 0)


class Side:
    def __init__(self, rows, r):
        self.m = torch.zeros(rows, r, dtype=torch.float64)
        self.v = torch.zeros(r, r, dtype=torch.float64)
        self.rows = torch.zeros(rows, 1, dtype=torch.float64)
        self.rho = 0.0
        self.q_old = None


class Reference:
    """pairs: list of [A (r, n), B (m, r)] float64 tensors, replaced at each step. ``frozen``: for each pair None, or 0
    or 1, the factor (A or B) that stays as it is."""

    def __init__(
        self, pairs, *, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, damping=0.0, row_equilibration=False,
        row_beta=0.99, row_floor=1e-2, relative_eps=0.0, clip_unmagnified_grad=1.0, update_skipping=0.0,
        update_capping=0.0, apply_escape=False, balance_param=False, maximize=False, null=1e-11, frozen=None,
    ):  # fmt: skip
        self.__dict__.update({k: v for k, v in locals().items() if k != "self"})
        self.t = 0
        self.frozen = frozen or [None] * len(pairs)
        self.sides = [(Side(a.shape[1], a.shape[0]), Side(b.shape[0], b.shape[1])) for a, b in pairs]
        self.damp_a = [not a.any() and bool(b.any()) for a, b in pairs]

    def step(self, gradients):
        """gradients: list of (gradient of A (r, n), gradient of B (m, r))."""
        self.t += 1
        sign = -1 if self.maximize else 1
        work = []
        for (a, b), (g_a, g_b), damp_a, frozen in zip(self.pairs, gradients, self.damp_a, self.frozen, strict=True):
            q_a, t_a, k_a = basis(a.mT, self.null)
            q_b, t_b, k_b = basis(b, self.null)
            if self.damping and frozen is None:
                k_a, k_b = (self.damped(t_a, t_b, a.shape[1]), k_b) if damp_a else (k_a, self.damped(t_b, t_a, len(b)))
            work.append([[q_b, k_b, sign * g_a.mT @ k_b], [q_a, k_a, sign * g_b @ k_a]])
            if frozen is not None:
                work[-1][frozen][2] *= 0
        for sides in work:
            for side in sides:
                if self.update_skipping and side[2].square().mean().sqrt() > self.update_skipping:
                    side[2] = 0 * side[2]
        norm = sum(g.square().sum() for sides in work for _, _, g in sides).sqrt()
        clip = self.clip_unmagnified_grad
        c = clip / norm if clip and norm > clip else 1.0
        for i, ((a, b), sides) in enumerate(zip(self.pairs, work, strict=True)):
            new = [
                self.move(x, c * g, q, k, side)
                for x, (q, k, g), side in zip((a.mT, b), sides, self.sides[i], strict=True)
            ]
            if self.frozen[i] is not None:
                new[self.frozen[i]] = (a.mT, b)[self.frozen[i]]
            elif self.balance_param and all(x.any() for x in new):
                norms = [x.norm() + 1e-6 for x in new]
                new = [x * (norms[0] * norms[1]).sqrt() / n for x, n in zip(new, norms, strict=True)]
            self.pairs[i] = [new[0].mT, new[1]]

    def damped(self, t_y, t_x, rows):
        """T_Y⁻¹ times σ²/(σ² + δ²) along the singular directions of Y·Xᵀ."""
        u, s, vh = torch.linalg.svd(t_y @ t_x.mT)
        delta = self.damping * self.lr * rows**0.5
        f = torch.where(s > 1e-15 * s[0], s / (s**2 + delta**2), 0)
        return t_x.mT @ vh.mT @ f.diag() @ u.mT

    def move(self, x, g, q, k, side):
        b1, b2, br = (decay(self.t, beta) for beta in (*self.betas, self.row_beta))
        p = q.mT @ side.q_old if side.q_old is not None else torch.eye(q.shape[1], dtype=q.dtype)
        moved = p @ side.v @ p.mT
        if self.apply_escape:
            old_values, new_values = torch.linalg.eigvalsh(side.v), torch.linalg.eigvalsh(moved)
            escaped = min((old_values - new_values).max().clamp(min=0), (side.v.trace() - moved.trace()).clamp(min=0))
            side.rho = b2 * (side.rho + escaped)
        side.v = b2 * moved + (1 - b2 if b2 < 1 else 1.0) * g.mT @ g / len(g)
        values, u = torch.linalg.eigh(side.v)
        root = (values.clamp(min=0) + side.rho).sqrt()
        s = g @ u @ (1 / (root + self.eps + self.relative_eps * root[-1])).diag() @ u.mT
        if self.row_equilibration:
            side.rows = br * side.rows + (1 - br) * s.square().mean(1, keepdim=True)
            even = s / (side.rows.sqrt() + self.row_floor * side.rows.mean().sqrt() + 1e-12)
            s = even * s.norm() / max(even.norm(), 1e-30)
        side.m = b1 * side.m @ p.mT + (1 - b1) * s
        side.q_old = q
        rms = side.m.square().mean().sqrt()
        m = side.m / max(1, rms / self.update_capping) if self.update_capping else side.m
        return x - self.lr * (m @ k.mT + self.weight_decay * x)
