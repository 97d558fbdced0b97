"""Saving, loading and copying. Ids (C1, …) are those of the project's list of tortures."""

import copy
import pickle
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from problems import factors, gradients_of_w, set_gradients
from test_numerics import equal

from lora_rite import LoRARite, layer_report
from lora_rite.optim.optimizer import state_bytes
from lora_rite.plan.plan import make_plan

OPTIONS = {"lr": 1e-2, "apply_escape": True, "adamw_lr": 1e-2}


def start(dtype=torch.float32, shuffled=False, names=True, seed=0, **options):
    named = []
    for i in range(3):
        a, b = (torch.nn.Parameter(x.to(dtype)) for x in factors(4, 9, 7, zero_b=i == 0, seed=i + seed))
        named += [(f"l{i}.lora_A.weight", a), (f"l{i}.lora_B.weight", b)]
    named.append(("bias", torch.nn.Parameter(torch.ones(5, dtype=dtype))))
    order = [2, 5, 6, 4, 1, 0, 3] if shuffled else range(7)
    optimizer = LoRARite([named[i] for i in order], **{**OPTIONS, **options})
    return dict(named), optimizer


def advance(params, optimizer, steps, seed):
    for t, g in enumerate(gradients_of_w(steps, 7, 9, seed=seed)):
        for i in range(3):
            set_gradients(params[f"l{i}.lora_A.weight"], params[f"l{i}.lora_B.weight"], g)
        params["bias"].grad = torch.full_like(params["bias"], 0.1 * (t + 1))
        optimizer.step()


def copied(params, optimizer):
    """Parameters and state by name."""
    names = [n for group in optimizer.param_groups for n in group["param_names"]]
    state = optimizer.state_dict()["state"]
    return copy.deepcopy(({n: p.detach() for n, p in params.items()}, {n: state[i] for i, n in enumerate(names)}))


def load_into(params, optimizer, weights, state_dict, order="weights first"):
    with torch.no_grad():
        steps = [
            lambda: [p.copy_(weights[n]) for n, p in params.items()],
            lambda: optimizer.load_state_dict(state_dict),
        ]
        for step in steps if order == "weights first" else steps[::-1]:
            step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shuffled", [False, True], ids=["same_order", "shuffled"])
@pytest.mark.parametrize("order", ["weights first", "optimizer first"])
def test_resume_is_bitwise(dtype, shuffled, order, tmp_path, engine):
    """C1, C2, C4: saved at step 7, loaded by weights_only into a fresh optimizer (its parameters in another order), 20
    more steps. Loading the optimizer before the weights does not look like a change from outside. By the kernels, saved
    at step 1, 2 more."""
    first, more, options = engine.choose((7, 20, {}), kernels=(1, 2, {"apply_escape": False}))
    params, optimizer = start(dtype, **options)
    advance(params, optimizer, first, seed=1)
    torch.save({"weights": params, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    advance(params, optimizer, more, seed=2)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other, other_optimizer = start(dtype, shuffled, seed=5, **options)
    load_into(other, other_optimizer, saved["weights"], saved["optimizer"], order)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advance(other, other_optimizer, more, seed=2)
    if not shuffled:
        assert equal(copied(other, other_optimizer), copied(params, optimizer))
    elif dtype in (torch.float32, torch.float64):  # sums are taken in another order
        torch.testing.assert_close(copied(other, other_optimizer), copied(params, optimizer), rtol=1e-4, atol=1e-5)
    else:  # the rounding noise belongs to positions: other noise
        dtypes = {t.dtype for s in other_optimizer.state.values() for t in s.values() if t.is_floating_point()}
        assert dtypes == {torch.float32}


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [(torch.float64, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float64),
     (torch.float64, torch.bfloat16)],
)  # fmt: skip
def test_a_state_goes_on_in_another_dtype(saved, loaded):
    """The moments too, where the state is as exact as the new dtype and the weights are the same."""
    kept = loaded == torch.float32
    params, optimizer = start(saved)
    advance(params, optimizer, 3, seed=1)
    others, other = start(loaded)
    with torch.no_grad():
        for name, p in others.items():
            p.copy_(params[name])
    other.load_state_dict(optimizer.state_dict())
    with nullcontext() if kept else pytest.warns(UserWarning, match="3 pairs were changed from outside"):
        advance(others, other, 3, seed=2)
    advance(params, optimizer, 3, seed=2)
    work = torch.float64 if loaded == torch.float64 else torch.float32
    states = [state for state in other.state.values() if "matrices" in state]
    assert {state[key].dtype for state in states for key in ("first_moment", "matrices", "numbers")} == {work}
    assert all(int(state["step"]) == (6 if kept else 3) for state in states)
    if kept and saved == torch.float64:
        assert all(torch.allclose(p.double(), params[name], rtol=1e-4) for name, p in others.items())


def test_a_model_that_changes_its_dtype_between_steps_is_an_error():
    params, optimizer = start(torch.float32)
    advance(params, optimizer, 1, seed=1)
    for p in params.values():
        p.grad, p.data = None, p.data.double()
    with pytest.raises(ValueError, match=r"l0\.lora_A\.weight changed its dtype to torch.float64"):
        advance(params, optimizer, 1, seed=2)


def test_state_is_tensors_and_groups_are_plain():
    """C2."""
    params, optimizer = start()
    advance(params, optimizer, 2, seed=1)
    state_dict = optimizer.state_dict()
    assert all(isinstance(t, torch.Tensor) for state in state_dict["state"].values() for t in state.values())
    assert all(t.grad_fn is None for state in state_dict["state"].values() for t in state.values())
    plain = (int, float, bool, str, list, tuple, type(None))
    assert all(isinstance(v, plain) for group in state_dict["param_groups"] for v in group.values())


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(duplicate):
    """C3."""
    params, optimizer = start()
    advance(params, optimizer, 3, seed=1)
    both = duplicate((params, optimizer))
    assert equal(copied(*both), copied(params, optimizer))
    assert repr(both[1]) == repr(optimizer)
    before = copied(params, optimizer)
    advance(*both, 2, seed=2)
    assert equal(copied(params, optimizer), before)
    advance(params, optimizer, 2, seed=2)
    assert equal(copied(*both), copied(params, optimizer))
    a, b = (torch.nn.Parameter(x) for x in factors(4, 9, 7))
    both[1].add_param_group(
        {"params": [("x.lora_A.w", a), ("x.lora_B.w", b), ("y", torch.nn.Parameter(torch.ones(2)))]}
    )
    assert both[1].param_groups[-1]["lr"] == 1e-2


def renamed(state_dict, old, new):
    state_dict = copy.deepcopy(state_dict)
    for group in state_dict["param_groups"]:
        group["param_names"] = [n.replace(old, new) for n in group["param_names"]]
    return state_dict


def test_foreign_states_are_refused_and_nothing_is_loaded():
    """C4, C5, C7: other names, other groups, other shapes, another optimizer."""
    params, optimizer = start()
    advance(params, optimizer, 2, seed=1)
    state_dict, before = optimizer.state_dict(), copied(params, optimizer)
    names = list(params)
    regrouped = copy.deepcopy(state_dict)
    lora = regrouped["param_groups"][0]
    half = {**lora, "params": lora["params"][2:], "param_names": lora["param_names"][2:]}
    lora["params"], lora["param_names"] = lora["params"][:2], lora["param_names"][:2]
    regrouped["param_groups"].insert(1, half)
    larger = copy.deepcopy(state_dict)
    larger["state"][0]["first_moment"] = torch.zeros(8, 9)
    partial = copy.deepcopy(state_dict)
    del partial["state"][3]["matrices"]
    widowed = copy.deepcopy(state_dict)
    del widowed["state"][3]
    cases = [
        (partial, "state of l1.lora_B.weight is incomplete: it has no matrices"),
        (widowed, "state of l1.lora_A.weight or of its partner is missing"),
        (renamed(state_dict, "l1", "l7"), r"l1.lora_A.weight is not in the state; .*; l7.*and 1 more"),
        (regrouped, "group"),
        (larger, r"state of l0.lora_A.weight is for shape \(8, 9\), the parameter has \(4, 9\)"),
        (torch.optim.AdamW(params.items()).state_dict(), "not a LoRA-RITE state"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
        assert equal(copied(params, optimizer), before)
    assert names == list(params)


def test_loaded_values_win_whenever_they_are_loaded():
    """C9: before the first step, after three, twice."""
    params, optimizer = start()
    advance(params, optimizer, 4, seed=1)
    saved = copy.deepcopy(({n: p.detach() for n, p in params.items()}, optimizer.state_dict()))
    advance(params, optimizer, 3, seed=2)
    expected = copied(params, optimizer)
    for steps, times in ((0, 1), (3, 1), (3, 2)):
        other, other_optimizer = start(seed=3)
        advance(other, other_optimizer, steps, seed=4)
        for _ in range(times):
            load_into(other, other_optimizer, *saved)
        advance(other, other_optimizer, 3, seed=2)
        assert equal(copied(other, other_optimizer), expected)


def test_unnamed_states_load_by_position_and_empty_states_load():
    """Accelerate loads the state of a fresh optimizer into it."""
    pairs = [[torch.nn.Parameter(x.clone()) for x in factors(4, 9, 7, seed=2)] for _ in range(2)]
    optimizers = [LoRARite(pair, lr=1e-2) for pair in pairs]
    optimizers[0].load_state_dict(optimizers[0].state_dict())
    for i, g in enumerate(gradients_of_w(6, 7, 9)):
        if i == 3:
            with torch.no_grad():
                for p, q in zip(*pairs, strict=True):
                    q.copy_(p)
            optimizers[1].load_state_dict(optimizers[0].state_dict())
        for pair, optimizer in list(zip(pairs, optimizers, strict=True))[: 1 if i < 3 else 2]:
            set_gradients(*pair, g)
            optimizer.step()
    assert equal(*[[p.detach() for p in pair] for pair in pairs])


def test_settings_and_counters_come_back():
    params, optimizer = start()
    advance(params, optimizer, 1, seed=1)
    params["bias"].grad = torch.full((5,), torch.nan)
    with pytest.warns(UserWarning, match="bias"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.123
    _, other = start()
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.123
    assert other.report()["skipped"] == 1


def test_initialising_step_of_distributed_checkpoints_changes_nothing():
    """A step with zero gradients and lr 0 creates the whole state and leaves the parameters bitwise as they are."""
    for dtype in (torch.float32, torch.bfloat16):
        params, optimizer = start(dtype)
        before = {n: p.detach().clone() for n, p in params.items()}
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.0)
        for p in params.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert equal({n: p.detach() for n, p in params.items()}, before)
        assert set(optimizer.state_dict()["state"]) == set(range(7))


def test_distributed_checkpoint_api_round_trip():
    """C10: torch.distributed.checkpoint.state_dict by names, into a model whose optimizer has not stepped yet."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_B = torch.nn.Linear(9, 4, bias=False), torch.nn.Linear(4, 7, bias=False)

    def advance_layer(layer, optimizer, seed):
        for g in gradients_of_w(3, 7, 9, seed=seed):
            set_gradients(layer.lora_A.weight, layer.lora_B.weight, g)
            optimizer.step()

    layer = Layer()
    optimizer = LoRARite(layer.named_parameters(), lr=1e-2)
    advance_layer(layer, optimizer, seed=1)
    saved = copy.deepcopy(get_optimizer_state_dict(layer, optimizer)), copy.deepcopy(layer.state_dict())
    advance_layer(layer, optimizer, seed=2)
    other = Layer()
    other_optimizer = LoRARite(other.named_parameters(), lr=1e-2)
    other.load_state_dict(saved[1])
    set_optimizer_state_dict(other, other_optimizer, saved[0])
    advance_layer(other, other_optimizer, seed=2)
    assert equal(dict(other.state_dict()), dict(layer.state_dict()))


def _storages(optimizer):
    """Bytes of all memory that the states keep."""
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def _addresses(optimizer):
    return [t.data_ptr() for state in optimizer.state.values() for t in state.values()]


@pytest.mark.parametrize("capturable", [False, True])
def test_steps_of_some_pairs_leave_states_where_they_are(capturable):
    """So that a CUDA graph finds them, and no memory is kept but theirs: neither after steps of a part of the pairs,
    nor where pairs get their first gradients late."""
    pairs = [factors(4, 30, 20, seed=i, dtype=torch.float32) for i in range(8)]
    params = [[torch.nn.Parameter(x) for x in pair] for pair in pairs]
    optimizer = LoRARite([p for pair in params for p in pair], lr=1e-2, capturable=capturable)
    generator = torch.Generator().manual_seed(0)

    def step(some):
        for i, pair in enumerate(params):
            for p in pair:
                p.grad = torch.randn(p.shape, generator=generator) if i in some else None
        optimizer.step()

    for some in ([0, 1], [2, 3, 4], [1, 5], [6, 7], range(8)):
        step(some)
        assert _storages(optimizer) == state_bytes(optimizer)
    before = _addresses(optimizer)
    for some in ([0], [3, 5], [7], range(1, 8), range(8), [2]):
        step(some)
    assert _addresses(optimizer) == before
    assert _storages(optimizer) == state_bytes(optimizer)
    assert [int(optimizer.state[a]["step"]) for a, _ in params] == [4, 5, 5, 5, 4, 5, 4, 5]


def _arenas(optimizer):
    """References to the tensors that the states are views of."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if t._base is not None]
    return [weakref.ref(t._base) for t in tensors]


@pytest.mark.parametrize("how", ["clear", "pop", "offload", "load"])
def test_states_that_are_removed_are_freed_at_once(how):
    """Not at the next step: whoever offloads them needs the memory before it."""
    params, optimizer = start()
    advance(params, optimizer, 2, seed=1)
    arenas = _arenas(optimizer)
    assert arenas
    assert all(arena() is not None for arena in arenas)
    saved = copy.deepcopy(optimizer.state_dict())
    if how == "clear":
        optimizer.state.clear()
    elif how == "pop":
        for p in list(optimizer.state):
            del optimizer.state[p]
    elif how == "load":
        optimizer.load_state_dict(saved)
    else:
        for state in optimizer.state.values():
            state.update({key: value.clone() for key, value in state.items()})
    assert all(arena() is None for arena in arenas)


def test_a_saved_state_dict_has_each_value_once(tmp_path):
    """Though its tensors are parts of larger ones; of one parameter's state, that holds of clones."""
    params, optimizer = start()
    advance(params, optimizer, 2, seed=1)
    state, path = optimizer.state_dict()["state"], tmp_path / "state.pt"
    one = {key: value.clone() for key, value in state[0].items()}
    for saved, least in ((state, state_bytes(optimizer)), (one, sum(t.nbytes for t in one.values()))):
        torch.save(saved, path)
        records = torch._C.PyTorchFileReader(str(path))
        stored = sum(len(records.get_record(name)) for name in records.get_all_records() if name.startswith("data/"))
        assert stored == least


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "load_state_dict"])
def test_a_copy_reports_the_last_step_and_a_loaded_state_the_present_lr(how):
    """When a step is reported, the scheduler has moved on to the lr of the next one."""
    params, optimizer = start()
    advance(params, optimizer, 3, seed=1)
    at_last_lr = optimizer.report()["update_norm"]
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    assert optimizer.report()["update_norm"] == at_last_lr
    if how == "load_state_dict":
        optimizer.load_state_dict(optimizer.state_dict())
        twin = copy.deepcopy(optimizer)
        advance(params, optimizer, 1, seed=2)
        assert optimizer.report()["update_norm"] < 0.5 * at_last_lr
        assert twin.report()["update_norm"] < 0.5 * at_last_lr
    else:
        twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        assert twin.report()["update_norm"] == at_last_lr


def test_reports_copy_moments_of_a_few_pairs_at_most(monkeypatch):
    """By the plan of the last step none; without one, those of so many pairs at once; with the same figures."""
    monkeypatch.setattr("lora_rite.optim.optimizer.PAIRS_AT_ONCE", 2)
    made = []

    def watched(*args):
        plan = make_plan(*args)
        made.append(len(plan.pairs))
        return plan

    monkeypatch.setattr("lora_rite.optim.optimizer.make_plan", watched)
    params, optimizer = start()
    advance(params, optimizer, 2, seed=1)
    made.clear()
    expected, layers = optimizer.report(), layer_report(optimizer)
    assert made == []
    twin = copy.deepcopy(optimizer)
    got = twin.report()
    assert made == [2, 1]
    assert got["update_norm"] == pytest.approx(expected["update_norm"], rel=1e-6)
    assert got["dead_pairs"] == expected["dead_pairs"]
    assert layer_report(twin) == layers
    assert made == [2, 1] * 2
