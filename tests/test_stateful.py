"""LoRARite under any sequence of what can happen to it: a state machine of hypothesis.

Actions: steps on gradients of any rank and scale, with non-finite or missing ones; saving, loading into a fresh
optimizer (by torch.save and weights_only) or into the same one, copies, and going on with one; further groups; other
learning rates; factors moved to another dtype or place in memory, exchanged, frozen, unfrozen, as pairs or one of two,
or changed from outside; gradients elsewhere or laid out otherwise; states forgotten, exchanged and moved.
After each action the invariants hold, and each step equals that of a copy, which plans it anew: no plan is stale.
"""

import copy
import io
import math
import pickle
import warnings
from itertools import product

import pytest
import torch
from engines import use
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RULE_MARKER,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from problems import set_gradients
from test_numerics import equal, snapshot

from lora_rite import LoRARite, LoRARiteError, NonFiniteError, kernels
from lora_rite.plan.state import MATRICES

SHAPES = [(4, 9, 7), (2, 5, 8), (8, 4, 3)]
seeds = st.integers(0, 2**16)
choices = {
    "damping": st.sampled_from([0.0, 3.0]),
    "weight_decay": st.just(0.1),
    "row_equilibration": st.booleans(),
    "apply_escape": st.booleans(),
    "balance_param": st.booleans(),
    "update_skipping": st.just(1.0),
    "update_capping": st.just(0.5),
    "maximize": st.booleans(),
    "clip_unmagnified_grad": st.sampled_from([0.0, 0.01]),
}


class World:
    """Pairs, one parameter of AdamW, and the optimizer of them all."""

    def __init__(self, dtype, zero_b, options):
        self.pairs, self.options = [], {"lr": 1e-2, "adamw_lr": 1e-2, **options}
        named = self.new_pair(dtype, zero_b, 0) + self.new_pair(dtype, False, 1)
        self.head = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        self.optimizer = LoRARite([*named, ("head", self.head)], **self.options)

    def new_pair(self, dtype, zero_b, seed):
        i, generator = len(self.pairs), torch.Generator().manual_seed(seed)
        r, n, m = SHAPES[i % 3]
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
        self.pairs.append([torch.nn.Parameter(draw(r, n)), torch.nn.Parameter(draw(m, r) * (not zero_b))])
        return [(f"layer{i}.lora_{x}.weight", p) for x, p in zip("AB", self.pairs[-1], strict=True)]

    def forget(self, pair):
        for p in pair:
            self.optimizer.state.pop(p, None)

    def params(self):
        return [*(p for pair in self.pairs for p in pair), self.head]

    def set_gradients(self, seed, rank=None, scale=0.1):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        for a, b in self.pairs:
            m, n = b.shape[0], a.shape[1]
            set_gradients(a, b, scale * (draw(m, n) if rank is None else draw(m, rank) @ draw(rank, n)))
            for p in (a, b):
                p.grad = p.grad if p.requires_grad else None
        self.head.grad = draw(3).to(self.head.dtype)

    def step(self):
        """A step; what it warned of, but for steps without gradients in a row, which a copy counts anew."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.optimizer.step()
        return [m for w in caught if "has had a gradient in" not in (m := str(w.message))]

    def everything(self):
        """Copies of parameters and state, bitwise comparable."""
        return snapshot([*self.pairs, [self.head]], self.optimizer)

    def reloaded(self):
        """Copies of the parameters under a fresh optimizer, with the state as it comes from a file."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        twin = copy.deepcopy(self)
        names = ("kind", "params")
        groups = [
            {**{k: g[k] for k in names}, "params": list(zip(g["param_names"], g["params"], strict=True))}
            for g in twin.optimizer.param_groups
        ]
        twin.optimizer = LoRARite(groups, **self.options)
        twin.optimizer.load_state_dict(torch.load(file, weights_only=True))
        return twin


class Training(RuleBasedStateMachine):
    """``by_kernels``: begins with what Triton's kernels take."""

    world, by_kernels = None, False

    @initialize(
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        zero_b=st.booleans(),
        options=st.fixed_dictionaries({}, optional=choices),
    )
    def begin(self, dtype, zero_b, options):
        if self.by_kernels:
            dtype = torch.float32 if dtype == torch.float64 else dtype
            options = {key: value for key, value in options.items() if key not in kernels.EAGER_OPTIONS}
        self.world, self.skipped, self.bad_in_a_row = World(dtype, zero_b, options), 0, 0

    def step(self):
        """What it warned of."""
        self.bad_in_a_row = 0
        twin = copy.deepcopy(self.world)  # which has no plan
        for p, q in zip(self.world.params(), twin.params(), strict=True):
            if p.grad is not None:
                data, q.data = q.data, q.data.to(p.grad.dtype)  # (torch takes no gradient of another dtype)
                q.grad, q.data = p.grad.clone(), data
        warned = self.world.step()
        assert twin.step() == warned
        assert equal(twin.everything(), self.world.everything())
        return warned

    @rule(seed=seeds, rank=st.sampled_from([None, 1, 2]), scale=st.sampled_from([0.1, 1e-6, 1e3, 0.0]))
    def good_step(self, seed, rank, scale):
        """All pairs are moved, without a word; gradients are not modified."""
        self.world.set_gradients(seed, rank, scale)
        gradients = [copy.deepcopy(p.grad) for p in self.world.params()]
        assert not self.step()
        assert equal([p.grad for p in self.world.params()], gradients)
        assert self.world.optimizer.report()["pairs_preconditioned"] == len(self.world.pairs)

    @rule(seed=seeds, where=seeds, bad=st.sampled_from([math.nan, math.inf, -math.inf]))
    def non_finite_step(self, seed, where, bad):
        """Bitwise as it was, counted, said; the third in a row raises."""
        self.world.set_gradients(seed)
        params = [p for p in self.world.params() if p.grad is not None]
        params[where % len(params)].grad.view(-1)[where % 2] = bad
        before = self.world.everything()
        self.skipped += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= 3:
            with pytest.raises(NonFiniteError):
                self.world.step()
        else:
            (message,) = self.world.step()
            assert "step skipped" in message
        assert equal(self.world.everything(), before)

    @rule(seed=seeds, which=st.integers(0, 3))
    def step_without_gradients_of_a_pair(self, seed, which):
        """That pair and its state stay bitwise, and the others are moved."""
        pair = self.world.pairs[which % len(self.world.pairs)]
        self.world.set_gradients(seed)
        for p in pair:
            p.grad = None
        own = lambda: copy.deepcopy([(p.detach(), dict(self.world.optimizer.state.get(p, {}))) for p in pair])
        before = own()
        self.step()
        assert equal(own(), before)
        assert self.world.optimizer.report()["pairs_preconditioned"] == len(self.world.pairs) - 1

    @rule()
    def step_without_gradients(self):
        """Nothing."""
        self.world.optimizer.zero_grad()
        before = self.world.everything()
        self.step()
        assert equal(self.world.everything(), before)

    @rule(seed=seeds)
    def save_and_load(self, seed):
        """A fresh optimizer with the state from a file makes the same next step, bit for bit."""
        twin = self.world.reloaded()
        assert equal(twin.everything(), self.world.everything())
        for world in (self.world, twin):
            world.set_gradients(seed)
        assert twin.step() == self.step() == []
        assert equal(twin.everything(), self.world.everything())

    @rule(seed=seeds)
    def step_of_a_copy(self, seed):
        """Leaves this one alone."""
        before = self.world.everything()
        twin = copy.deepcopy(self.world)
        twin.set_gradients(seed, 1)
        twin.step()
        assert equal(self.world.everything(), before)

    @precondition(lambda self: len(self.world.pairs) < 4)
    @rule(zero_b=st.booleans(), seed=st.integers(0, 9))
    def add_a_group(self, zero_b, seed):
        """The others stay as they are."""
        before = [p.detach().clone() for p in self.world.params()]
        old = self.world.params()
        pair = self.world.new_pair(self.world.head.dtype, zero_b, seed)
        self.world.optimizer.add_param_group({"params": pair, "lr": 3e-3})
        assert equal([p.detach() for p in old], before)

    @rule(lr=st.sampled_from([0.0, 1e-4, 3e-2]), as_tensor=st.booleans())
    def change_lr(self, lr, as_tensor):
        for group in self.world.optimizer.param_groups:
            group["lr"] = torch.tensor(lr) if as_tensor and group["kind"] == "lora" else lr

    @rule(seed=seeds)
    def step_at_lr_zero(self, seed):
        """Moves nothing."""
        groups = self.world.optimizer.param_groups
        rates, before = [group["lr"] for group in groups], self.world.everything()[0]
        for group in groups:
            group["lr"] = 0.0
        self.world.set_gradients(seed)
        self.step()
        assert equal(self.world.everything()[0], before)
        for group, lr in zip(groups, rates, strict=True):
            group["lr"] = lr

    @precondition(lambda self: self.world.head.dtype != torch.float64)
    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=seeds, late=st.booleans())
    def move_to_another_dtype(self, dtype, seed, late):
        """As ``model.to(dtype)`` does, before its gradients are made, or afterwards (``late``), which leaves them: what
        is rounded by that has changed from outside, and that is all.

        Not where it would overflow: with damping 0, a factor opposite to a small one becomes as large as it takes."""
        if any(p.abs().max() > torch.finfo(dtype).max for p in self.world.params()):
            return
        self.world.set_gradients(seed)
        for p in self.world.params():
            p.data = p.data.to(dtype)
        if not late:
            self.world.optimizer.zero_grad()
            self.world.set_gradients(seed)
        assert all("changed from outside" in message for message in self.step())

    @rule(which=st.integers(0, 3), factor=st.sampled_from([0.5, 3.0]), seed=seeds)
    def change_from_outside(self, which, factor, seed):
        """Is noticed: the pair starts anew."""
        pair = self.world.pairs[which % len(self.world.pairs)]
        states = [state for p in pair if (state := self.world.optimizer.state.get(p))]
        with torch.no_grad():
            pair[0].mul_(factor)
        self.world.set_gradients(seed)
        self.step()
        assert all(self.world.optimizer.state[p]["step"] == 1 for p in pair if p.requires_grad) or not states

    @rule(seed=seeds)
    def load_an_earlier_state(self, seed):
        """Into the same optimizer, with the weights of then: the same step comes out again."""
        params, saved = self.world.params(), copy.deepcopy(self.world.optimizer.state_dict())
        weights = [p.detach().clone() for p in params]
        results = []
        for _ in range(2):
            self.world.set_gradients(seed)
            self.step()
            results.append(self.world.everything())
            with torch.no_grad():
                for p, w in zip(params, weights, strict=True):
                    p.copy_(w)
            self.world.optimizer.load_state_dict(copy.deepcopy(saved))
        assert equal(*results)

    @rule(seed=seeds, which=st.integers(0, 3))
    def forget_a_pair(self, seed, which):
        """It starts anew, and it alone."""
        pair = self.world.pairs[which % len(self.world.pairs)]
        counts = {p: int(state["step"]) for p, state in self.world.optimizer.state.items()}
        self.world.forget(pair)
        self.world.set_gradients(seed)
        self.step()
        for p, state in self.world.optimizer.state.items():
            assert int(state["step"]) == (1 if any(p is q for q in pair) else counts.get(p, 0) + 1)

    @rule(seed=seeds)
    def forget_everything(self, seed):
        """All starts anew, without a word."""
        self.world.optimizer.state.clear()
        self.world.set_gradients(seed)
        assert not self.step()
        assert all(state["step"] == 1 for state in self.world.optimizer.state.values())

    @rule(seed=seeds, how=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, seed, how):
        """It steps as its original does, of whose further steps it knows nothing."""
        original = self.world
        self.world = copy.deepcopy(original) if how == "deepcopy" else pickle.loads(pickle.dumps(original))
        for world in (original, self.world):
            world.set_gradients(seed)
        assert self.step() == original.step() == []
        before = self.world.everything()
        assert equal(before, original.everything())
        original.step()
        assert equal(self.world.everything(), before)

    @rule(seed=seeds, which=st.integers(0, 3), with_state=st.booleans())
    def exchange_a_parameter(self, seed, which, with_state):
        """As Accelerate's FSDP2 does: another tensor in the group's list, with the state of the one before; without
        it, the pair starts anew."""
        pair = self.world.pairs[which % len(self.world.pairs)]
        states, before = self.world.optimizer.state, list(pair)
        for k, old in enumerate(before):
            pair[k] = new = torch.nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
            for group in self.world.optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            if old in states and with_state:
                states[new] = states.pop(old)
        self.world.set_gradients(seed)
        if with_state:
            assert not self.step()
        else:  # (torch makes no state_dict while there is a state of a parameter that is in no group)
            assert not self.world.step()
            self.bad_in_a_row = 0
            assert all(states[p]["step"] == 1 for p in pair if p.requires_grad)
            self.world.forget(before)

    @rule(seed=seeds, which=st.integers(0, 3), late=st.booleans())
    def freeze_and_unfreeze_a_pair(self, seed, which, late):
        """As an adapter that is not active: it stays as it is, bitwise, and goes on afterwards. Frozen after its
        gradients were made (``late``), it has them still."""
        pair = self.world.pairs[which % len(self.world.pairs)]
        before = [p.detach().clone() for p in pair]
        trained = [p.requires_grad for p in pair]
        for flags in ([False, False], trained):
            if late:
                self.world.set_gradients(seed)
            for p, flag in zip(pair, flags, strict=True):
                p.requires_grad_(flag)
            if not late or flags == trained:
                self.world.set_gradients(seed)
            assert not self.step()
            assert flags == trained or equal([p.detach() for p in pair], before)

    @rule(seed=seeds, which=st.integers(0, 3), trained=st.sampled_from([(True, False), (False, True), (True, True)]))
    def train_other_factors_of_a_pair(self, seed, which, trained):
        """An error where the pair has a state for others, and nothing is changed; without it, it starts anew, and a
        frozen factor stays as it is."""
        pair = self.world.pairs[which % len(self.world.pairs)]
        new = trained != tuple(p.requires_grad for p in pair) and any(self.world.optimizer.state.get(p) for p in pair)
        for p, flag in zip(pair, trained, strict=True):
            p.requires_grad_(flag)
        self.world.set_gradients(seed)
        if new:
            before = self.world.everything()
            with pytest.raises(LoRARiteError, match="was not when its state was made"):
                self.world.step()
            assert equal(self.world.everything(), before)
            self.world.forget(pair)
        frozen = [(p, p.detach().clone()) for p in pair if not p.requires_grad]
        assert not self.step()
        assert equal(*([x.detach() for x in one] for one in zip(*frozen, strict=True))) if frozen else True
        assert not new or all(self.world.optimizer.state[p]["step"] == 1 for p in pair if p.requires_grad)

    @precondition(lambda self: self.world.head.dtype != torch.float64)
    @rule(seed=seeds)
    def move_to_float64(self, seed):
        """An error where there are states, in which nothing is changed; a new optimizer goes on with them."""
        params = self.world.params()
        for p in params:
            p.data, p.grad = p.data.double(), None
        self.world.set_gradients(seed)
        if any("matrices" in state for state in self.world.optimizer.state.values()):
            before = self.world.everything()
            with pytest.raises(LoRARiteError, match="changed its dtype"):
                self.world.step()
            assert equal(self.world.everything(), before)
            self.world = self.world.reloaded()
        self.world.set_gradients(seed)
        assert all("changed from outside" in message for message in self.step())

    @rule(seed=seeds, which=st.integers(0, 3), what=st.sampled_from(["data", "grad"]), turned=st.booleans())
    def put_values_elsewhere(self, seed, which, what, turned):
        """Another tensor in ``p.data``, as FSDP2 and ``Module.to`` put there, or in ``p.grad``; or laid out
        otherwise."""
        pair = self.world.pairs[which % len(self.world.pairs)]
        elsewhere = lambda x: x.mT.clone(memory_format=torch.contiguous_format).mT if turned else x.clone()
        for first in (True, False):
            self.world.set_gradients(seed + (not first))
            for p in pair if first else ():
                if (old := getattr(p, what)) is not None:
                    setattr(p, what, elsewhere(old))
            assert not self.step()

    @rule(seed=seeds, how=st.sampled_from(["exchanged", "moved"]))
    def put_states_elsewhere(self, seed, how):
        """As offloading them and bringing them back does: other tensors, or the same tensors elsewhere in memory."""
        for state in self.world.optimizer.state.values():
            for key, value in state.items():
                if how == "moved":
                    value.data = value.data.clone()
                else:
                    state[key] = value.clone()
        self.world.set_gradients(seed)
        assert not self.step()

    @invariant()
    def all_is_well(self):
        if self.world is None:
            return
        optimizer, report = self.world.optimizer, self.world.optimizer.report()
        assert report["pairs"] == len(self.world.pairs)
        assert report["skipped"] == self.skipped
        assert all(p.isfinite().all() for p in self.world.params())
        for p, state in optimizer.state.items():
            tensors = [t for t in state.values() if t.is_floating_point()]
            assert all(t.dtype in (torch.float32, torch.float64) and t.grad_fn is None for t in tensors)
            assert all(t.isfinite().all() for t in tensors)
            if "matrices" in state:
                v = state["matrices"][MATRICES.index("second_moment")].double()
                assert state["first_moment"].shape == p.shape
                assert (v - v.mT).abs().max() <= 1e-5 * v.abs().max()
                assert torch.linalg.eigvalsh((v + v.mT) / 2).min() >= -1e-5 * v.abs().max()


OPTIONS = {
    "deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate],  # shrinking a failure takes minutes: leave this line out to have it
}  # fmt: skip


@pytest.fixture
def any_engine(engine, monkeypatch):
    """Where the kernels step, the eager engine may between their steps: events lead to what they do not take."""
    use(monkeypatch, engine, alone=False)
    monkeypatch.setattr(Training, "by_kernels", engine.kernels)
    return engine


@pytest.mark.parametrize(("runs", "actions"), [(10, 15), pytest.param(70, 50, marks=pytest.mark.slow)])
def test_any_sequence_of_events(runs, actions, any_engine):
    """So many runs of at most so many actions, by the kernels fewer."""
    runs, actions = any_engine.choose((runs, actions), kernels=(2 + runs // 20, actions // 3))
    run_state_machine_as_test(Training, settings=settings(max_examples=runs, stateful_step_count=actions, **OPTIONS))


def _ways(**choices):
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


#: Event → the ways in which it can happen to the first pair after a step; all but the last few make a kept plan stale.
EVENTS = {
    "non_finite_step": _ways(seed=[1], where=[0], bad=[math.nan]),
    "step_without_gradients_of_a_pair": _ways(seed=[1], which=[0]),
    "step_without_gradients": [{}],
    "save_and_load": _ways(seed=[1]),
    "load_an_earlier_state": _ways(seed=[1]),
    "step_of_a_copy": _ways(seed=[1]),
    "go_on_with_a_copy": _ways(seed=[1], how=["deepcopy", "pickle"]),
    "add_a_group": _ways(zero_b=[False, True], seed=[1]),
    "change_lr": _ways(lr=[3e-2], as_tensor=[False, True]),
    "move_to_another_dtype": _ways(dtype=[torch.bfloat16], seed=[1], late=[False, True]),
    "move_to_float64": _ways(seed=[1]),
    "change_from_outside": _ways(which=[0], factor=[3.0], seed=[1]),
    "forget_a_pair": _ways(seed=[1], which=[0]),
    "forget_everything": _ways(seed=[1]),
    "exchange_a_parameter": _ways(seed=[1], which=[0], with_state=[False, True]),
    "freeze_and_unfreeze_a_pair": _ways(seed=[1], which=[0], late=[False, True]),
    "train_other_factors_of_a_pair": _ways(seed=[1], which=[0], trained=[(True, False), (False, True)]),
    "put_values_elsewhere": _ways(seed=[1], which=[0], what=["data", "grad"], turned=[False, True]),
    "put_states_elsewhere": _ways(seed=[1], how=["exchanged", "moved"]),
}


@pytest.mark.parametrize("event", EVENTS)
def test_each_event_between_two_steps(event, any_engine):
    """No plan that is kept from the first step is stale in the event's own or in the last."""
    for how in EVENTS[event]:
        training = Training()
        training.begin(dtype=torch.float32, zero_b=False, options={})
        training.good_step(seed=2, rank=None, scale=0.1)
        training.good_step(seed=3, rank=None, scale=0.1)
        getattr(training, event)(**how)
        training.good_step(seed=4, rank=None, scale=0.1)
        training.all_is_well()


def test_every_event_happens():
    events = {name for name, f in vars(Training).items() if hasattr(f, RULE_MARKER)}
    assert events - {"good_step", "step_at_lr_zero"} == set(EVENTS)
