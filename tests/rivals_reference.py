"""The rivals slowly: one pair, float64, A (r, n) and B (m, r) as the papers write them, every matrix function by SVD.

Written from the formulas of the papers, without any function of the package.
"""

import torch


def power(s, exponent):
    """S^exponent of a positive definite matrix."""
    u, values, _ = torch.linalg.svd(s)
    return u @ torch.diag(values**exponent) @ u.mT


def msign(x):
    u, values, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ torch.diag((values > 0).double()) @ vh


def norm(x):
    return torch.linalg.matrix_norm(x, ord=2)


class PoLoRA:
    def __init__(self, a, b, lr, betas=(0.9, 0.99), damping=1e-4):
        self.lr, self.betas, self.damping = lr, betas, damping
        self.m_a, self.m_b = torch.zeros_like(a), torch.zeros_like(b)
        self.q = torch.full((a.shape[1],), 1e-12, dtype=a.dtype)
        self.p = torch.full((b.shape[0],), 1e-12, dtype=a.dtype)

    def damped(self, c):
        return c + max(self.damping * norm(c), 1e-12) * torch.eye(len(c), dtype=c.dtype)

    def step(self, a, b, g_a, g_b):
        beta, beta_curvature = self.betas
        self.m_a, self.m_b = beta * self.m_a + (1 - beta) * g_a, beta * self.m_b + (1 - beta) * g_b
        ahead_a, ahead_b = beta * self.m_a + (1 - beta) * g_a, beta * self.m_b + (1 - beta) * g_b
        p = torch.diag(self.p / self.p.max() + self.damping)
        q = torch.diag(self.q / self.q.max() + self.damping)
        c_a, c_b = self.damped(b.mT @ p @ b), self.damped(a @ q @ a.mT)
        half = lambda s: power(s, -1 / 2)
        d_a = half(c_a) @ msign(half(c_a) @ ahead_a @ half(q)) @ half(q)
        d_b = half(p) @ msign(half(p) @ ahead_b @ half(c_b)) @ half(c_b)
        rho = self.lr / (norm(a) + norm(b))
        self.q = beta_curvature * self.q + (1 - beta_curvature) * (g_a.mT @ power(c_a, -1) @ g_a).diagonal() / len(a)
        self.p = beta_curvature * self.p + (1 - beta_curvature) * (g_b @ power(c_b, -1) @ g_b.mT).diagonal() / len(a)
        return a - rho * (d_a / norm(d_a) if d_a.any() else 0), b - rho * d_b / norm(d_b)


class LoRAMuon:
    def __init__(self, a, b, lr, beta=0.9, weight_decay=0.0):
        self.lr, self.beta, self.decay = lr, beta, weight_decay
        self.m_a, self.m_b = torch.zeros_like(a), torch.zeros_like(b)

    def root(self, s):
        size = s.norm()
        return power(s / size + 1e-5 * torch.eye(len(s), dtype=s.dtype), -1 / 2) / size**0.5 if s.any() else 0 * s

    def step(self, a, b, g_a, g_b):
        self.m_a, self.m_b = (self.beta * m + (1 - self.beta) * g for m, g in ((self.m_a, g_a), (self.m_b, g_b)))
        root_a, root_b = self.root(b.mT @ b), self.root(a @ a.mT)
        d_a, d_b = root_a @ msign(root_a @ self.m_a), msign(self.m_b @ root_b) @ root_b
        s = (1 - self.lr * self.decay) ** 0.5
        return s * a - self.lr / 2 * d_a / s, s * b - self.lr / 2 * d_b / s


class Shampoo:
    def __init__(self, a, b, lr, betas=(0.9, 0.999), damping=1e-6, max_side=1024):
        self.lr, self.betas, self.damping, self.max_side, self.t = lr, betas, damping, max_side, 0
        self.history = []

    def average(self, values, beta):
        """Of all gradients so far, with the weights of an exponential average."""
        weights = [beta ** (self.t - 1 - i) for i in range(self.t)]
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    def damped(self, s):
        return s + max(self.damping * norm(s), 1e-30) * torch.eye(len(s), dtype=s.dtype)

    def step(self, a, b, g_a, g_b):
        self.t += 1
        self.history.append((g_a.mT, g_b))
        moved = []
        for x, gradients in zip((a.mT, b), zip(*self.history, strict=True), strict=True):
            step = self.average(gradients, self.betas[0])
            right = self.damped(self.average([g.mT @ g for g in gradients], self.betas[1]))
            if len(x) <= self.max_side:
                left = self.damped(self.average([g @ g.mT for g in gradients], self.betas[1]))
                step = power(left, -1 / 4) @ step @ power(right, -1 / 4)
            else:
                step = step @ power(right, -1 / 2)
            moved.append(x - self.lr * step)
        return moved[0].mT, moved[1]
