"""The optimizers that ``lora-rite train`` and ``compare`` know by name, and any other by its import path."""

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from ..errors import LoRARiteValueError
from ..inputs import blame, resolve, resolve_values
from ..optim.modes import evaluating, two_modes
from ..options import meant_option
from .load import find_device
from .wording import did_you_mean


class Preset(NamedTuple):
    """What a name stands for: an import path and the options that differ from its own defaults."""

    path: str
    options: Mapping[str, Any] = MappingProxyType({})
    weight_decay: str = "weight_decay"


_ADAMW = {"optimizer_cls": "torch.optim:AdamW"}
#: LoRA+ has the ratio of the LoRA-RITE paper's baseline; Muon's rate is in AdamW's units; SOAP leaves sides above 1,024
#: alone, whose square matrices would outgrow the model, as our Shampoo does (``pytorch_optimizer``'s keeps them all).
PRESETS = {
    "lora-rite": Preset("lora_rite:create_lora_rite"),
    "lora-rite-published": Preset("lora_rite.finetune.optimizers:published"),
    "adamw": Preset("torch.optim:AdamW"),
    "lora-plus": Preset(
        "peft.optimizers:create_loraplus_optimizer", {**_ADAMW, "loraplus_lr_ratio": 4.0}, "loraplus_weight_decay"
    ),
    "riemannian": Preset("peft.optimizers:create_riemannian_optimizer", _ADAMW),
    "muon": Preset("torch.optim:Muon", {"adjust_lr_fn": "match_rms_adamw"}),
    "lamb": Preset("pytorch_optimizer:Lamb"),
    "soap": Preset("pytorch_optimizer:SOAP", {"max_precondition_dim": 1024}),
    "shampoo": Preset("lora_rite.rivals:Shampoo.for_model"),
    "polora": Preset("lora_rite.rivals:PoLoRA.for_model"),
    "lora-muon": Preset("lora_rite.rivals:LoRAMuon.for_model"),
}


def find_optimizer(name: str) -> tuple[Callable[..., Any], Preset]:
    """The class or factory behind a name of :data:`PRESETS` or a ``package.module:attribute``, and its options.

    Raises:
        LoRARiteValueError: no such name, module or attribute.
        ImportError: the package of a name is missing, with the extra that has it.
    """
    if name not in PRESETS and ":" not in name:
        hint = did_you_mean(name, PRESETS) or f"; there are {', '.join(PRESETS)}, and package.module:attribute"
        raise LoRARiteValueError(f"no optimizer {name}{hint}")
    preset = PRESETS.get(name, Preset(name))
    try:
        return resolve(preset.path), preset
    except LoRARiteValueError as error:
        if name in PRESETS and isinstance(missing := error.__cause__, ModuleNotFoundError):
            raise ImportError(f'{name} needs {missing.name}: pip install "lora-rite[study]"') from error
        raise


def create_optimizer(
    model: Any, name: str, lr: float, weight_decay: float = 0.0, options: dict[str, Any] | None = None
) -> Any:
    """An optimizer for the trainable parameters of a model.

    Args:
        model: the model, after its adapter is attached.
        name: as :func:`find_optimizer` takes it. A class gets the trainable parameters, LoRARite the groups of
            ``param_groups(model)``; anything else is a factory and gets the model. All get ``lr`` and the options by
            keyword.
        lr: the learning rate.
        weight_decay: passed on where the signature takes it; else it must be 0.
        options: further keyword arguments, over those of the preset; a string ``package.module:attribute`` among them
            stands for what it names.
    """
    import torch

    from .. import LoRARite, param_groups

    target: Any
    target, preset = find_optimizer(name)
    arguments = resolve_values({**preset.options, **(options or {}), "lr": lr})
    taken = inspect.signature(target).parameters.values()
    if any(p.name == preset.weight_decay or p.kind is p.VAR_KEYWORD for p in taken):
        arguments.setdefault(preset.weight_decay, weight_decay)
    elif weight_decay:
        raise LoRARiteValueError(f"it takes no weight_decay, and --weight_decay is {weight_decay}")
    is_class = isinstance(target, type) and issubclass(target, torch.optim.Optimizer)
    if is_class and issubclass(target, LoRARite):
        return target(param_groups(model), **arguments)
    target = cast("Any", target)
    made = target([p for p in model.parameters() if p.requires_grad] if is_class else model, **arguments)
    if not isinstance(made, torch.optim.Optimizer):
        raise LoRARiteValueError(f"it gives a {type(made).__name__}, which is no torch.optim.Optimizer")
    return made


def check_arguments(name: str, options: Mapping[str, Any] | None) -> None:
    """Looks whether an optimizer takes arguments of these names: by its signature and, where that ends in ``**kwargs``,
    by making it for a small adapter. What nothing refuses is wrong where it is near a name that there is.

    Args:
        name, options: as :func:`create_optimizer` takes them.

    Raises:
        LoRARiteValueError: no such optimizer, or the first name that it does not take, with the one that was meant.
    """
    target, preset = find_optimizer(name)
    if "lr" in (options or {}):
        raise LoRARiteValueError("--optimizer_args.lr: give the learning rate by --lr")
    known, is_open = _named_arguments(target)
    values = {}
    for key, value in {**preset.options, **(options or {})}.items():
        with blame(f"--optimizer_args.{key}"):
            values.update(resolve_values({key: value}))
    unknown = [key for key in values if key not in known]
    wrong = set() if is_open else set(unknown)
    if is_open and unknown:
        base = for_any_model({key: value for key, value in values.items() if key in known})
        makes = _tried(name, base)
        for kind in (type(makes), *base.values()):  # lora-plus is told what to make, and hands on what that takes
            if isinstance(kind, type) and not issubclass(kind, Exception):
                known |= _named_arguments(kind)[0]
        refuses = lambda key, value: _refuses(_tried(name, {**base, key: value}), key)
        swallows = not refuses("no_such_argument", None)
        # (beta2, where beta1 is known, may well be one that it reads.)
        mistakable = [key for key in unknown if key not in known and not key[-1:].isdigit()]
        near = {key for key in mistakable if meant_option(key, sorted(known)) in known}
        wrong = {key for key in unknown if refuses(key, values[key])} | (near if swallows else set())
    for key in unknown:
        if key in wrong:
            hint = did_you_mean(meant_option(key, sorted(known)) or key, known)
            hint = hint.replace("mean lr?", "mean --lr?") or f"; it takes {', '.join(sorted(known - {'lr'})) or 'none'}"
            raise LoRARiteValueError(f"--optimizer_args.{key}: --optimizer {name} has no such argument{hint}")


def _named_arguments(target: Callable[..., Any]) -> tuple[set[str], bool]:
    """The names that a class or function takes by keyword, but for its first one; and whether it takes any other."""
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):  # written in C, it does not say
        return set(), True
    named = {p.name for p in parameters[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _tried(name: str, arguments: dict[str, Any]) -> Any:
    """The optimizer with these arguments for a small adapter, or the error with which it cannot be made."""
    with _small_adapter() as adapter:
        try:
            return create_optimizer(adapter, name, 1e-4, 0.0, arguments)
        except Exception as error:
            return error


def _refuses(made: Any, key: str) -> bool:
    """Whether what :func:`_tried` gives is Python's error for a keyword of that name."""
    about = re.search(r"keyword argument|multiple values", str(made))
    return isinstance(made, TypeError) and about is not None and f"'{key}'" in str(made)


@contextmanager
def _small_adapter() -> Iterator[Any]:
    """One pair, on the device of a run. Within, nothing is warned of (the run itself says it); the generators of random
    numbers are as before afterwards."""
    import torch

    from ..invariance.problems import Adapter
    from ..plan.pairs import Shape

    with warnings.catch_warnings(action="ignore"), torch.random.fork_rng():  # which warns where there are several GPUs
        yield Adapter([Shape(48, 32, 4)], torch.float32, find_device(None))


def option(name: str, options: dict[str, Any] | None) -> str:
    """What an error of an optimizer is blamed on."""
    return f"--optimizer {name}" + (f" with --optimizer_args {options}" if options else "")


def for_any_model(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options but for ``lr_by_name``, whose names are those of one model alone."""
    return {key: value for key, value in (options or {}).items() if key != "lr_by_name"}


def check_optimizer(
    model: Any, name: str, lr: float, weight_decay: float = 0.0, options: dict[str, Any] | None = None
) -> Any:
    """Checks that an optimizer can be made, and that a training loop can step it: by two steps on a small adapter, with
    dense gradients, no closure and a schedule of its lr.

    Args:
        model: to make it for, without a step; None makes it for the small adapter alone.
        name, lr, weight_decay, options: as :func:`create_optimizer` takes them.

    Returns:
        The optimizer of the model, which has made no step; None without one.

    Raises:
        LoRARiteValueError: what is wrong, by the option. (What cannot be made for the small adapter is not judged by it
            where it is a factory of somebody's, which may want a real model.)
    """
    import torch

    made = None
    with _small_adapter() as adapter:
        if model is not None:
            with blame(option(name, options)):
                made = create_optimizer(model, name, lr, weight_decay, options)
        try:
            optimizer = create_optimizer(adapter, name, lr, weight_decay, for_any_model(options))
        except Exception as error:
            if model is None and (name in PRESETS or isinstance(find_optimizer(name)[0], type)):
                with blame(option(name, options)):
                    raise error
            return made
        with blame(f"{option(name, options)}: no schedule can set its lr"):
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        with blame(f"{option(name, options)} cannot be stepped with dense gradients and no closure"):
            for _ in range(2):
                if (inner := two_modes(optimizer)) is not None:
                    inner.train()
                for p in adapter.parameters():
                    p.grad = torch.full_like(p, 1e-3).uniform_(-1, 1)
                optimizer.step()
                schedule.step()
            with evaluating(optimizer):
                optimizer.state_dict()
    return made


def published(model: Any, **options: Any) -> Any:
    """LoRARite with the authors' settings."""
    from .. import PUBLISHED, create_lora_rite

    return create_lora_rite(model, **{**PUBLISHED, **options})


class OptimizerFactory:
    """For the Trainer's ``optimizer_cls_and_kwargs``: the model and the keyword arguments of
    :func:`create_optimizer`."""

    def __call__(self, model: Any, **kwargs: Any) -> Any:
        return create_optimizer(model, **kwargs)
