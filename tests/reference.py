"""LoRA-RITE slowly, for many pairs: loops around :mod:`lora_rite.simple`, and what that leaves out.

That is the clip over all pairs, frozen factors, skipping, capping, balancing and maximizing.
"""

from lora_rite import simple


class Reference:
    """pairs: list of [A (r, n), B (m, r)] float64 tensors, replaced at each step. ``frozen``: for each pair None, or 0
    or 1, the factor (A or B) that stays as it is."""

    def __init__(
        self, pairs, *, damping=0.0, relative_eps=0.0, row_equilibration=False, row_beta=0.99, apply_escape=False,
        clip_unmagnified_grad=1.0, update_skipping=0.0, update_capping=0.0, balance_param=False, maximize=False,
        scaling=None, frozen=None, **options,
    ):  # fmt: skip
        assert scaling is None, "the step of B·A as it is"
        self.pairs, self.frozen = pairs, frozen or [None] * len(pairs)
        self.options = simple.Options(
            damping=damping, relative_eps=relative_eps, row_beta=row_beta if row_equilibration else None,
            clip=clip_unmagnified_grad, escape=apply_escape, **options,
        )  # fmt: skip
        self.skipping, self.capping, self.balance = update_skipping, update_capping, balance_param
        self.sign = -1 if maximize else 1
        self.states = [simple.initial_state(a, b) for a, b in pairs]

    def step(self, gradients):
        """gradients: list of (gradient of A (r, n), gradient of B (m, r))."""
        work = [self.measure(*args) for args in zip(self.pairs, gradients, self.states, self.frozen, strict=True)]
        scale = simple.clip_scale([g for sides in work for _, g, _, _ in sides], self.options.clip)
        for i, (sides, (*moments, _), frozen) in enumerate(zip(work, self.states, self.frozen, strict=True)):
            new = [self.move(x, scale * g, q, d, kept) for (x, g, q, d), kept in zip(sides, moments, strict=True)]
            if frozen is not None:
                new[frozen] = sides[frozen][0]
            elif self.balance and all(x.any() for x in new):
                norms = [x.norm() + 1e-6 for x in new]
                new = [x * (norms[0] * norms[1]).sqrt() / n for x, n in zip(new, norms, strict=True)]
            self.pairs[i] = [new[0].mT, new[1]]

    def measure(self, pair, gradients, state, frozen):
        """For A and B: X, its unmagnified gradient, and Q and D of the other factor."""
        (a, b), (g_a, g_b) = pair, gradients
        o = self.options if frozen is None else self.options._replace(damping=0.0)
        of_a, of_b = simple.bases(a, b, state[2], o)
        sides = [(a.mT, g_a.mT, *of_b), (b, g_b, *of_a)]
        return [(x, self.kept(self.sign * g @ d, x.numel(), i == frozen), q, d) for i, (x, g, q, d) in enumerate(sides)]

    def kept(self, g, size, frozen):
        """ḡ, or zeros where the factor is frozen or the root mean square of ḡ too large."""
        skipped = self.skipping and (g.square().sum() / size).sqrt() > self.skipping
        return 0 * g if frozen or skipped else g

    def move(self, x, g, q, d, kept):
        """As that of simple, but with M, in the step alone, of no larger root mean square than the cap."""
        new, shrunk = simple.move(x, g, q, d, kept, self.options), x - self.options.lr * self.options.weight_decay * x
        rms = kept.first.norm() / x.numel() ** 0.5
        return shrunk + (new - shrunk) / max(1, rms / self.capping) if self.capping else new
