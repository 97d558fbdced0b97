"""States of other runs: whether they belong to the parameters, and in which order."""

from collections import Counter
from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

from torch import Tensor

from ..errors import LoRARiteValueError
from ..plan.names import plain_names
from ..plan.sharding import local
from ..plan.state import FROZEN_KEYS, MATRICES, STATE_KEYS, State, moment_dtype, work_dtype
from .adamw import ADAMW_STATE_KEYS
from .checks import names_of
from .groups import OF_THIS_RUN


def match_state(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """``state_dict`` in the order of ``groups``, with their :data:`OF_THIS_RUN`; LoRARiteValueError where it does not
    belong to their parameters."""
    saved = state_dict["param_groups"]
    if any("kind" not in group for group in saved):
        raise LoRARiteValueError(
            'not a LoRA-RITE state: its groups have no "kind". A run of another optimizer cannot go on with LoRARite; '
            "load the weights alone"
        )
    names = names_of(groups)
    if all(group.get("param_names") for group in [*saved, *groups]):
        saved = _by_name(saved, names)
    for group, saved_group, group_names in zip(groups, saved, names, strict=False):
        for p, saved_id, name in zip(group["params"], saved_group["params"], group_names, strict=False):
            state = state_dict["state"].get(saved_id)
            if not state:
                continue
            kinds = STATE_KEYS if group["kind"] == "lora" else ADAMW_STATE_KEYS
            if missing := [key for key in kinds if key not in state]:
                raise LoRARiteValueError(f"the state of {name} is incomplete: it has no {', '.join(missing)}")
            moment = state[kinds[1]]
            if moment.shape != p.shape:
                raise LoRARiteValueError(
                    f"the state of {name} is for shape {tuple(moment.shape)}, the parameter has {tuple(p.shape)}"
                )
            if fault := _fault(state):
                raise LoRARiteValueError(f"the state of {name} is damaged: {fault}. Nothing was loaded")
        if group["kind"] == "lora":
            states = [state_dict["state"].get(i) or {} for i in saved_group["params"]]
            trained = [p.requires_grad for p in group["params"]]
            pairs = zip(states[::2], states[1::2], trained[::2], trained[1::2], group_names[::2], strict=False)
            for *own, trains_a, trains_b, name in pairs:
                missing = bool(own[0]) != bool(own[1])
                frozen = missing and all(key in (own[0] or own[1]) for key in FROZEN_KEYS)
                if missing and not frozen:
                    raise LoRARiteValueError(f"the state of {name} or of its partner is missing")
                if any(own) and (trains_a or trains_b) and (bool(own[0]), bool(own[1])) != (trains_a, trains_b):
                    raise LoRARiteValueError(
                        f"{name} or its partner is frozen in the model and not in the state, or the reverse: freeze "
                        "the same factors. Nothing was loaded"
                    )
    both = zip(saved, groups, strict=False)
    kept = [{**group, **{key: own.get(key) for key in OF_THIS_RUN}} for group, own in both]
    return {**state_dict, "param_groups": [*kept, *saved[len(groups) :]]}


def put_states(states: dict[Tensor, State], groups: list[dict[str, Any]], matched: dict[str, Any]) -> None:
    """Puts the states of a dict that :func:`match_state` gave into ``states``, copied: in the dtype of the arithmetic,
    and first moments in that of their group, where torch has cast them to the parameters'."""
    for group, saved in zip(groups, matched["param_groups"], strict=True):
        lora = group["kind"] == "lora"
        for i, (p, saved_id) in enumerate(zip(group["params"], saved["params"], strict=True)):
            factors = p, *([group["params"][i ^ 1]] if lora else [])
            for key, value in matched["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    device = "cpu" if key == "step" and not (lora or group["capturable"]) else p.device  # torch's
                    dtype = moment_dtype(group, *factors) if key == "first_moment" else work_dtype(*factors)
                    kept = key == "step" or not value.is_floating_point()
                    states[p][key] = value.detach().to(device, value.dtype if kept else dtype, copy=True)


def _by_name(saved: list[dict[str, Any]], names: list[list[str]]) -> list[dict[str, Any]]:
    """The saved groups in the order of the optimizer's, whose names these are, whatever wrappers put into them."""
    given, saved_given = [list(chain.from_iterable(side)) for side in (names, (g["param_names"] for g in saved))]
    same = set(given) == set(saved_given)
    ours, theirs = (given, saved_given) if same else (plain_names(given), plain_names(saved_given))
    plain, saved_plain = _cut(ours, map(len, names)), _cut(theirs, (len(group["param_names"]) for group in saved))
    if twice := [name for side in (ours, theirs) for name, n in Counter(side).items() if n > 1]:  # (of two models)
        if plain != saved_plain:
            raise LoRARiteValueError(f"two parameters are named {twice[0]}, so the state has to be in their order")
        return [{**group, "param_names": list(own)} for group, own in zip(saved, names, strict=True)]
    ids = dict(zip(theirs, chain.from_iterable(group["params"] for group in saved), strict=True))
    home = {name: k for k, group in enumerate(saved_plain) for name in group}
    differences = [f"{name} is not in the state" for name in ours if name not in ids]
    differences += [f"{name} is not in the optimizer" for name in ids if name not in set(ours)]
    differences = differences or [
        f"{name} is in group {home[name]} of the state and in group {k} of the optimizer, which differ"
        for k, group in enumerate(plain)
        for name in group
        if sorted(saved_plain[home[name]]) != sorted(group)
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise LoRARiteValueError("the state is of other parameters: " + "; ".join(differences[:3]) + more)
    return [
        {**saved[home[group[0]]], "params": [ids[name] for name in group], "param_names": list(own)}
        for group, own in zip(plain, names, strict=True)
    ]


def _cut(names: list[str], lengths: Iterable[int]) -> list[list[str]]:
    """Names by group."""
    rest = iter(names)
    return [list(islice(rest, length)) for length in lengths]


def _fault(state: State) -> str | None:
    """What is wrong with the values of a saved state."""
    step = local(state["step"])
    if not bool(((step >= 0) & (step == step.round())).all()):
        return "step is not a count"
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not local(value).isfinite().all():
            return f"{key} has NaN or Inf"
    if "matrices" in state:
        moment = state["matrices"][..., MATRICES.index("second_moment"), :, :]
        if (moment - moment.mT).abs().max() > 1e-3 * moment.abs().max():
            return "its second moment is not symmetric"
    return None
