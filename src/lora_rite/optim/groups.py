"""Parameter groups: what ``add_param_group`` makes of what it is given, and what is wrong with that."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import Any

from torch import Tensor

from ..errors import LoRARiteTypeError, LoRARiteValueError
from ..options import check as check_options
from ..options import meant_option
from ..plan.checks import check_order, check_pair, overlapping_storage
from ..plan.layout import LAYOUT_KEYS, layout_options
from ..plan.pairs import param_groups
from ..plan.state import has_float64
from .checks import check_tensors, names_by_position

Group = dict[str, Any]

#: Options that are about the memory and the device of a run: a loaded state does not change them.
OF_THIS_RUN = ("algebra_dtype", "first_moment_dtype")


def new_groups(given: Group, present: list[Group], defaults: Group, adamw: Group) -> list[Group]:
    """The groups that ``given`` stands for, each of kind "lora" or "adamw", beside those that are ``present``.

    Args:
        defaults: the hyperparameters of the optimizer.
        adamw: those of groups of kind "adamw" that name none of their own; an ``lr`` of None is none.

    Raises:
        LoRARiteValueError, LoRARiteTypeError: as :meth:`LoRARite.add_param_group`.
    """
    if not isinstance(given, dict):
        raise LoRARiteTypeError(f"param_group must be a dict, but got {type(given).__name__}")
    foreign = _foreign_keys(given, defaults, adamw)
    labelled, named = _labelled(given, offset=sum(len(group["params"]) for group in present))
    # (a frozen base, of integers where it is quantised, may be among named parameters)
    check_tensors([(n, p) for n, p in labelled if not (named and isinstance(p, Tensor) and not p.requires_grad)])
    options = {key: value for key, value in given.items() if key not in ("params", "param_names")}
    if "kind" in options:
        groups = [{"params": labelled, **options}]
    elif named:
        groups = param_groups(labelled, **options)
    else:
        trainable = [(name, p) for name, p in labelled if p.requires_grad]
        groups = [{"params": trainable, "kind": "lora", **options}] if trainable else []
    groups = [{**foreign, **group} for group in groups]
    for group in groups:
        check_tensors(group["params"])  # frozen factors of pairs too
        _check_kind(group, named, adamw)
        check_hyperparameters({**defaults, **group})
        _check_escape({**defaults, **group}, [p for _, p in group["params"]])
    _check_overlap(present, groups)
    return groups if named else [{**group, "params": [p for _, p in group["params"]]} for group in groups]


def _foreign_keys(given: Group, defaults: Group, adamw: Group) -> Group:
    """What of a group is not for LoRARite; LoRARiteValueError where it looks as if it were meant to be."""
    own = ["params", "param_names", "kind", *LAYOUT_KEYS, *defaults]
    foreign = {key: value for key, value in given.items() if key not in own}
    for key in (key for key in foreign if isinstance(key, str)):
        if key.removeprefix("adamw_") in adamw:
            raise LoRARiteValueError(
                f"{key} is an option of the optimizer; in a parameter group of kind adamw it is called "
                f"{key.removeprefix('adamw_')}"
            )
        if key == "lr_by_name":
            raise LoRARiteValueError("lr_by_name is not for a group: pass it to create_lora_rite or param_groups")
        if (meant := meant_option(key, own)) is not None:
            raise LoRARiteValueError(f"unknown key {key!r} in a parameter group: did you mean {meant!r}?")
    if "params" not in given:
        raise LoRARiteValueError("a parameter group without 'params'")
    return foreign


def _labelled(given: Group, offset: int) -> tuple[list[tuple[str, Any]], bool]:
    """The parameters with their names, or with running numbers from ``offset`` on; and whether they have names."""
    if isinstance(given["params"], set):
        raise LoRARiteValueError("params is a set, whose order changes between runs: pass a list")
    params: list[Any] = [given["params"]] if isinstance(given["params"], Tensor) else list(given["params"])
    if params and isinstance(params[0], tuple):
        return params, True
    if "param_names" in given:
        return list(zip(given["param_names"], params, strict=True)), True
    return [(f"parameter {offset + i}", p) for i, p in enumerate(params)], False


def _check_kind(group: Group, named: bool, adamw: Group) -> None:
    """Raises LoRARiteValueError where the parameters of a group are not what its kind says. A group of kind "adamw"
    gets the settings that it has none of."""
    kind, params = group["kind"], group["params"]
    if kind == "lora":
        if len(params) % 2:
            raise LoRARiteValueError(
                f"unpaired factor {params[-1][0]}: {len(params)} parameters are not pairs A, B, A, B, …; pass "
                "model.named_parameters()"
            )
        for (a_name, a), (b_name, b) in zip(params[::2], params[1::2], strict=True):
            if not named and not set(LAYOUT_KEYS) & set(group):
                check_order(a, b, a_name, b_name)
            check_pair(a, b, a_name, b_name, **layout_options(group))
    elif kind == "adamw":
        for key, value in adamw.items():
            group.setdefault(key, value)
        if group["lr"] is None:
            names = [name for name, _ in params]
            raise LoRARiteValueError(
                f"{len(names)} trainable parameters are not LoRA factors ({', '.join(names[:3])}"
                f"{', …' if len(names) > 3 else ''}): pass adamw_lr=… to train them by AdamW (LoRA-RITE's lr does "
                "not suit them), or freeze them"
            )
    else:
        raise LoRARiteValueError(f'kind is "lora" or "adamw", not {kind!r}')


def _check_overlap(present: list[Group], new: list[Group]) -> None:
    everything = [
        *zip(names_by_position(present), chain.from_iterable(g["params"] for g in present), strict=True),
        *chain.from_iterable(group["params"] for group in new),
    ]
    if shared := overlapping_storage(everything):
        raise LoRARiteValueError(
            f"{shared[0]} and {shared[1]} are the same tensor or share storage (tied, or passed twice): each may "
            "be updated once only. Untie them, or freeze one, with its partner where it is a factor"
        )


def check_hyperparameters(values: dict[str, Any]) -> None:
    """Raises LoRARiteValueError where one is out of its range."""
    check_options(values, _number)


def _number(name: str, value: Any) -> Any:
    """lr may be a tensor."""
    if name != "lr" or not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise LoRARiteValueError("lr must be a number or a tensor of one element")
    return value.item()


def _check_escape(settings: Group, params: list[Tensor]) -> None:
    if settings["apply_escape"] and params and not has_float64(params[0].device):
        raise LoRARiteValueError(f"apply_escape needs eigenvalues, which {params[0].device.type} devices do not have")


def check_settings(groups: list[Group]) -> None:
    """Raises LoRARiteValueError for what schedulers and callers may have made of the groups since they were checked, as
    far as the host knows."""
    for group in groups:
        lr, decay = group["lr"], group["weight_decay"]
        _check_escape(group, group["params"])
        check_options({key: group[key] for key in OF_THIS_RUN if group.get(key) is not None})
        if group["capturable"] != groups[0]["capturable"]:
            raise LoRARiteValueError("capturable is not the same in all parameter groups: set one value")
        if isinstance(lr, Tensor):
            continue
        if not math.isfinite(lr):
            raise LoRARiteValueError(f"lr={lr} is not finite: look at the learning-rate scheduler")
        if lr * decay >= 1:
            raise LoRARiteValueError(f"lr={lr} with weight_decay={decay} wipes out the weights in one step")


def group_at(groups: list[Group], position: int) -> Group:
    """The group of the parameter at a position among those of all groups."""
    ends = accumulate(len(group["params"]) for group in groups)
    return next(group for group, end in zip(groups, ends, strict=True) if position < end)


@contextmanager
def at_lrs(groups: list[Group], lrs: list[float | Tensor]) -> Iterator[None]:
    """Within, the groups have these learning rates: those of the last step, when that is reported and the scheduler has
    moved on. Groups that were added since then keep theirs."""
    present = [group["lr"] for group in groups]
    for group, lr in zip(groups, lrs, strict=False):
        group["lr"] = lr
    try:
        yield
    finally:
        for group, lr in zip(groups, present, strict=True):
            group["lr"] = lr
