"""What layers tell of their pairs: several in one parameter (experts, groups of a convolution, block-diagonal factors),
and what they multiply B·A by."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

#: Names of layers (as PEFT gives them) that are likely to hold the experts of a layer in one parameter.
EXPERTS = re.compile(r"(^|\.)(base_layer|\w*experts?|\w*moe\.(in|out)put_linear)$")


def stacked_layers(model: nn.Module) -> dict[str, tuple[int, str]]:
    """By name of A, where it and its B hold several pairs: ``blocks`` and ``columns`` of :class:`Pair`."""
    stacked = {}
    for name, module in model.named_modules():
        sides = [getattr(module, side, None) for side in ("lora_A", "lora_B")]
        if not all(isinstance(side, nn.ModuleDict) for side in sides):
            continue
        experts = getattr(module, "num_experts", 1) if type(module).__name__ == "ParamWrapper" else 1
        groups = getattr(getattr(module, "base_layer", None), "groups", 1)
        a_factors, b_factors = (dict(side.items()) for side in sides)  # type: ignore[union-attr]
        for adapter, a in a_factors.items():
            b: Any = b_factors.get(adapter)
            a_name = f"{name}.lora_A.{adapter}.weight".removeprefix(".")
            if experts > 1:
                stacked[a_name] = experts, "interleaved"
            elif groups > 1:
                stacked[a_name] = groups, ""
            elif type(b).__name__ == "BlockDiagonalLinear":
                stacked[a_name] = b.nblocks, ""
            elif type(a).__name__ == "BlockDiagonalLinear":
                stacked[a_name] = a.nblocks, "side by side"
    return {a_name: layout for a_name, layout in stacked.items() if layout[0] > 1}


def base_weights(named: Sequence[tuple[str, Tensor]]) -> dict[str, list[Tensor]]:
    """By layer of PEFT, the parameters of the module that it wraps, also through further layers."""
    weights: dict[str, list[Tensor]] = {}
    for name, p in named:
        segments = name.split(".")
        for i in range(len(segments) - 1):
            if segments[i] == "base_layer" and set(segments[i:-1]) == {"base_layer"}:
                weights.setdefault(".".join(segments[:i]), []).append(p)
    return weights


def layout_by_shapes(a: Tensor, b: Tensor, weights: Iterable[Tensor]) -> tuple[int, str] | None:
    """``blocks`` and ``columns`` of a :class:`Pair` of PEFT, as the shapes of the weights tell that it is for: of a
    linear map or convolution (m, n, …), or of experts (experts, m, n) or (experts, n, m). None where they do not."""
    if min(a.ndim, b.ndim) < 2 or not a.numel() or not b.numel():
        return None
    (rows, n), (m, r), found = a.shape[:2], b.shape[:2], set()
    above = rows // r if rows % r == 0 else 0  # so many factors one above the other
    for w in weights:
        if a.ndim == 2 and w.ndim == 3 and sorted(w.shape[1:]) == sorted((m, n)):
            found.update([(len(w), "interleaved")] * (rows == r and rows % len(w) == 0))
        elif a.ndim == 2 and w.ndim == 2 and sorted(w.shape) == sorted((m, n)):
            found.update([(above, "")] * (above > 0 and m % above == 0))
        elif a.ndim == 2 and w.ndim == 2 and w.shape[0] == m and w.shape[1] % n == 0:
            beside = w.shape[1] // n
            found.update([(beside, "side by side")] * (rows == r and beside > 0 and rows % beside == 0))
        elif a.ndim > 2 and w.ndim == a.ndim and w.shape[0] == m and w.shape[2:] == a.shape[2:]:
            found.update([(above, "")] * (above > 0 and m % above == 0 and n in (w.shape[1], w.shape[1] * above)))
    return found.pop() if len(found) == 1 else None


def layer_scalings(model: nn.Module) -> dict[str, float]:
    """By name of A, what a layer of PEFT multiplies its B·A by."""
    found = {}
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        for side, suffix in (("lora_A", ".weight"), ("lora_embedding_A", "")):
            factors = getattr(module, side, None)
            if not isinstance(factors, nn.ModuleDict | nn.ParameterDict) or not isinstance(scaling, dict):
                continue
            for adapter in factors:
                value = scaling.get(adapter)
                if isinstance(value, int | float) and 0 < value < math.inf:
                    found[f"{name}.{side}.{adapter}{suffix}".removeprefix(".")] = float(value)
    return found
