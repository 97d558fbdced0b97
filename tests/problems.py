"""Small problems in W = B·A that several tests train on."""

import torch

from lora_rite import LoRARite


def factors(r, n, m, *, zero_b=False, condition=1.0, dtype=torch.float64, seed=0):
    """A (r, n), B (m, r) in float64 on the CPU, then in ``dtype``; singular values of each from 1 to ``condition``."""
    g = torch.Generator().manual_seed(seed)
    s = torch.logspace(0, torch.log10(torch.tensor(condition)).item(), r, dtype=torch.float64)
    mixed = lambda rows: torch.linalg.qr(torch.randn(rows, r, generator=g, dtype=torch.float64))[0] * s
    turn = torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.float64))[0]
    a, b = (mixed(n) @ turn).mT.contiguous() / condition**0.5, mixed(m) @ turn / condition**0.5
    return a.to(dtype), (torch.zeros_like(b) if zero_b else b).to(dtype)


def random_matrix(r, condition, seed=0):
    """A random invertible K (r, r) of that condition number, float64."""
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.float64))[0] for _ in range(2))
    s = torch.logspace(0, -torch.log10(torch.tensor(float(condition))).item(), r, dtype=torch.float64)
    return u @ (s / s.prod() ** (1 / r)).diag() @ v


def regauged(a, b, k):
    """The same product B·A from other factors: (K⁻¹·A, B·K), computed in float64."""
    return torch.linalg.solve(k, a.double()).to(a.dtype).contiguous(), (b.double() @ k).to(b.dtype)


def gradients_of_w(steps, m, n, rank=None, seed=0, scale=0.1):
    """Gradients of W (steps, m, n) float64, of the given rank at each step (full where None)."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    if rank is None:
        return scale * draw(steps, m, n)
    return scale * draw(steps, m, rank) @ draw(steps, rank, n)


def set_gradients(a, b, g):
    a.grad, b.grad = b.detach().mT @ g.to(a.dtype), g.to(b.dtype) @ a.detach().mT


def train(pairs, gradients, *, steps=None, **options):
    """Trains pairs [(A, B), …] on given gradients of W, one (steps, m, n) a pair. Returns parameters, optimizer."""
    params = [[torch.nn.Parameter(x.clone()) for x in pair] for pair in pairs]
    optimizer = LoRARite([p for pair in params for p in pair], **options)
    for t in range(steps or len(gradients[0])):
        for (a, b), g in zip(params, gradients, strict=True):
            set_gradients(a, b, g[t])
        optimizer.step()
    return params, optimizer


def relative(got, expected):
    """‖got − expected‖/‖expected‖ in float64."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def w(pair):
    """B·A in float64."""
    a, b = (x.detach().double() for x in pair)
    return b @ a
