"""Finds the pairs (A, B) of a model, says what it leaves out and why, and builds the optimizer's groups.

The layout of a group *is* the pairing: ``{"params": [A0, B0, A1, B1, …], "kind": "lora"}`` is read by position at each
step, so that it survives every exchange of parameters (FSDP2, ``deepcopy``, ``load_state_dict``). All other trainable
parameters belong to a group of ``"kind": "adamw"``.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LoRARiteTypeError, LoRARiteValueError, warn
from .names import plain_names
from .sharding import is_sharded, local

#: Name of A → name of B, as a whole segment of a dotted parameter name.
FACTOR_NAMES = {
    "lora_A": "lora_B",  # PEFT
    "lora_embedding_A": "lora_embedding_B",  # PEFT, embeddings
    "lora_down": "lora_up",  # diffusers, sd-scripts, LyCORIS
    "lora_a": "lora_b",  # torchtune
    "hira_A": "hira_B",  # HiRA: ΔW = W⊙(B·A)
    "hira_embedding_A": "hira_embedding_B",
    "hada_w1_b": "hada_w1_a",  # LoHa: ΔW = (w1_a·w1_b)⊙(w2_a·w2_b), two pairs a layer
    "hada_w2_b": "hada_w2_a",
    "lokr_w1_b": "lokr_w1_a",  # LoKr: ΔW = w1⊗w2, of which each may be a product
    "lokr_w2_b": "lokr_w2_a",
}
#: A parameter of this name beside A and B stands between them: ΔW = B·(it)·A, which has not the invariance of B·A.
BETWEEN_NAMES = ("lora_E", "lora_diag", "lora_mid", "hada_t1", "hada_t2", "lokr_t2")
#: Behind a factor's name: the parameter is what a parametrization makes the factor of (torch.nn.utils.parametrize, and
#: the older weight_norm, spectral_norm and prune).
PARAMETRIZED = ("parametrizations", "weight_g", "weight_v", "weight_orig")
#: Type of device → why LoRARite refuses it.
REFUSED_DEVICES = {"mps": "there is no float64 on Apple's MPS, and no eigenvalue decomposition: train on the CPU"}
#: Where a B that holds several pairs has them: one below the other, or in its columns.
COLUMNS = ("", "interleaved", "side by side")
NO_FACTOR = "not a LoRA factor"
#: Names of layers (as PEFT gives them) that are likely to hold the experts of a layer in one parameter.
EXPERTS = re.compile(r"(^|\.)(base_layer|\w*experts?|\w*moe\.(in|out)put_linear)$")
#: Begin of a segment of a name → why a parameter of that name is no factor of a pair.
REASONS = {
    "lora_magnitude_vector": "DoRA's magnitudes, a vector",
    "lora_monteclora_sampler": "MonteCLoRA's sampler",
    "modules_to_save": "a whole layer (modules_to_save)",
    "trainable_tokens_delta": "whole rows of an embedding (trainable tokens)",
    "lokr_w": "LoKr's Kronecker factor, not decomposed",
    "vera_": "VeRA trains vectors beside frozen matrices",
    "pvera_": "PVeRA trains vectors beside frozen matrices",
    "randlora_": "RandLoRA trains vectors beside frozen matrices",
    "vblora_": "VB-LoRA trains a bank of vectors",
    "delora_": "DeLoRA normalises each column of B and row of A, so that not only B·A counts",
    "gralora_": "GraLoRA has the factors of several blocks in one tensor",
    "poly_lora_": "Poly has the factors of several skills in one tensor",
    "lily_": "Lily shares factors between layers by a router, so that they are no pairs",
    "glora_": "GLoRA scales and shifts weights and biases by several products at once",
}


class Shape(NamedTuple):
    """Of a pair: B·A is (m, n) (of a convolution, n counts the elements of its kernel too), of rank ``rank``. Where two
    parameters hold several such pairs, ``blocks`` and ``columns`` as in :class:`Pair`."""

    n: int
    m: int
    rank: int
    blocks: int = 1
    columns: str = ""

    @property
    def a(self) -> tuple[int, int]:
        """Of the parameter that holds A."""
        return self.blocks * self.rank, self.n

    @property
    def b(self) -> tuple[int, int]:
        """Of the parameter that holds B."""
        return (self.m, self.rank * self.blocks) if self.columns else (self.blocks * self.m, self.rank)

    @property
    def weight(self) -> tuple[int, ...]:
        """Of the weights that the pairs are for."""
        if self.columns == "interleaved":
            return self.blocks, self.m, self.n
        return (self.m, self.blocks * self.n) if self.columns else (self.blocks * self.m, self.n)

    @property
    def elements(self) -> int:
        """Of the factors of all pairs."""
        return self.blocks * self.rank * (self.n + self.m)


@dataclass(frozen=True)
class Pair:
    """One product B·A: A is (r, n) and B is (m, r), or convolutions (r, n, …) and (m, r, 1, …). Or several, ``blocks``:
    A is (blocks·r, n, …), and B (blocks·m, r, …) (groups), or, where ``columns`` says so, (m, r·blocks): "interleaved"
    (experts) or "side by side" (a block-diagonal A). One factor may be frozen. ``scaling`` is what the layer multiplies
    B·A by, of layers as PEFT has them; None where it is not known."""

    a_name: str
    b_name: str
    a: Tensor
    b: Tensor
    blocks: int = 1
    columns: str = ""
    scaling: float | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.blocks

    @property
    def shape(self) -> Shape:
        """Of each of its pairs."""
        m = self.b.shape[0] // (1 if self.columns else self.blocks)
        return Shape(self.a.shape[1:].numel(), m, self.rank, self.blocks, self.columns)

    def __str__(self) -> str:
        several = f": {self.blocks} pairs of rank {self.rank}" if self.blocks > 1 else ""
        frozen = [f", {side} frozen" for side, p in (("A", self.a), ("B", self.b)) if not p.requires_grad]
        return f"{self.a_name} {tuple(self.a.shape)} with {self.b_name} {tuple(self.b.shape)}{''.join(frozen)}{several}"


@dataclass(frozen=True)
class LeftOut:
    """A trainable parameter that is not part of a pair; LoRARite updates it by AdamW."""

    name: str
    parameter: Tensor
    reason: str


@dataclass
class Pairing:
    """What :func:`find_pairs` found: ``pairs``, of which at least one factor is trainable; ``left_out`` (trainable,
    with the reason); and the names of ``frozen`` factors, whose partners are frozen too or absent."""

    pairs: list[Pair] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """The number of pairs: two parameters may hold several."""
        return sum(pair.blocks for pair in self.pairs)

    def __str__(self) -> str:
        lines = [f"{self.count} pairs"]
        lines += [f"  {pair}" for pair in self.pairs]
        lines += [f"{len(self.left_out)} other trainable parameters (AdamW)"] if self.left_out else []
        lines += [f"  {o.name} {tuple(o.parameter.shape)}: {o.reason}" for o in self.left_out]
        lines += [f"{len(self.frozen)} frozen factors, not trained"] if self.frozen else []
        lines += [f"  {name}" for name in self.frozen]
        return "\n".join(lines)


def find_pairs(model: nn.Module | Iterable[tuple[str, Tensor]]) -> Pairing:
    """The pairs of a model (or of its ``named_parameters()``), by name: ``lora_A``/``lora_B``,
    ``lora_embedding_A``/``lora_embedding_B``, ``lora_down``/``lora_up``, ``lora_a``/``lora_b``, and those of HiRA, LoHa
    and LoKr.

    Layers whose parameters hold several pairs (stacked experts, grouped convolutions, block-diagonal factors) are
    recognised in a model, and among ``named_parameters()`` by the shapes of the frozen weights that PEFT has beside
    their factors. Where these are missing (trainable parameters alone) or tell nothing (quantised ones), factors whose
    names speak of experts are one pair, with a warning: pass the model.

    One factor of a pair may be frozen (``requires_grad=False``), as in LoRA-FA and MiCA; it must be given too.

    What wrappers put into names (torch.compile, activation checkpointing, DDP, …) does not matter.

    Raises:
        LoRARiteValueError: a trainable factor without its partner, two factors that cannot be multiplied, or two
            parameters of one name.
    """
    named = list(model.named_parameters()) if isinstance(model, nn.Module) else _check_named(model)
    stacked = _stacked_layers(model) if isinstance(model, nn.Module) else {}
    scalings = _scalings(model) if isinstance(model, nn.Module) else {}
    given = dict(zip(plain_names([name for name, _ in named]), (name for name, _ in named), strict=True))
    named = list(zip(given, (p for _, p in named), strict=True))
    everything = dict(named)
    weights = _base_weights(named)
    trainable = {name: p for name, p in named if p.requires_grad}
    pairing, excluded = Pairing(), {}
    for name in everything:
        if _is_parametrized(name):
            excluded[_layer(name)] = f"ΔW is not a plain product B·A: a factor is computed from {given[name]}"
    for name in trainable:
        if any(segment in BETWEEN_NAMES for segment in name.split(".")):
            excluded[_layer(name)] = f"ΔW is not a plain product B·A: {given[name]} stands between"
    partners: dict[str, str] = {}
    for name, p in trainable.items():
        partner = _partner(name)
        if partner is None:
            pairing.left_out.append(LeftOut(given[name], p, _why_not(name)))
        elif reason := excluded.get(_layer(name)):
            pairing.left_out.append(LeftOut(given[name], p, reason))
        elif partner not in everything:
            raise LoRARiteValueError(
                f"unpaired factor {given[name]}: no {partner}. Pass both factors, also where one is frozen "
                "(model.named_parameters()), or freeze this one"
            )
        elif _is_a(name):
            partners[name] = partner
        else:
            partners[partner] = name
    for a_name, b_name in partners.items():
        a, b, layer = everything[a_name], everything[b_name], _layer(a_name)
        layout = stacked.get(given[a_name])
        if layout is None and "lora_A" in a_name:
            layout = layout_by_shapes(a, b, weights.get(layer, []))
            if layout is None and EXPERTS.search(layer) and not isinstance(model, nn.Module):
                warn(
                    f"{given[a_name]} {tuple(a.shape)} may hold a pair for each expert, and is taken for one pair of "
                    f"rank {a.shape[0]}: the layer's weights are not among the parameters. Pass the model "
                    "(create_lora_rite(model), param_groups(model)), or all of model.named_parameters()"
                )
        pair = Pair(given[a_name], given[b_name], a, b, *(layout or (1, "")), scalings.get(given[a_name]))
        check_pair(a, b, pair.a_name, pair.b_name, pair.blocks, pair.columns)
        pairing.pairs.append(pair)
    paired = {name for names in partners.items() for name in names}
    frozen = [name for name, p in named if not p.requires_grad and _partner(name) and name not in paired]
    pairing.frozen += [given[name] for name in frozen]
    return pairing


def param_groups(model: nn.Module | Iterable[tuple[str, Tensor]], **options: Any) -> list[dict[str, Any]]:
    """Groups for ``LoRARite``: of kind "lora", one with named pairs and the ``options`` (lr, betas, …), and one more
    for each further scaling (PEFT's ``alpha_pattern``, ``rank_pattern``) and number of pairs that parameters hold
    together (experts, groups of a convolution); of kind "adamw", one where other parameters are trainable (the
    optimizer gives it its ``adamw_…`` settings).

    ``scaling`` of a group is what the layers of a model multiply B·A by, so that lr is that of W. ``scaling=None``
    makes it that of B·A, which it is too where ``named_parameters()`` are given, which do not tell.

    To give pairs different settings, call it with the ``named_parameters()`` of one part of the model at a time.
    """
    pairing = find_pairs(model)
    groups: list[dict[str, Any]] = []
    kind = lambda p: (p.blocks, p.columns, None if "scaling" in options else p.scaling)
    for blocks, columns, scaling in sorted({kind(p) for p in pairing.pairs}, key=str):
        alike = [p for p in pairing.pairs if kind(p) == (blocks, columns, scaling)]
        named = [named for p in alike for named in ((p.a_name, p.a), (p.b_name, p.b))]
        several = {"blocks": blocks, "columns": columns} if blocks > 1 else {}
        known = {"scaling": scaling} if scaling is not None else {}
        groups.append({"params": named, "kind": "lora", **several, **known, **options})
    if pairing.left_out:
        groups.append({"params": [(o.name, o.parameter) for o in pairing.left_out], "kind": "adamw"})
    return groups


def check_pair(a: Tensor, b: Tensor, a_name: str, b_name: str, blocks: int = 1, columns: str = "") -> None:
    """Raises LoRARiteValueError where A (r, n, …) and B (m, r, …) cannot be the factors of one product; or, where they
    hold several pairs, ``blocks``, A (blocks·r, n, …) and B (blocks·m, r, …) or, with ``columns``, (m, r·blocks)."""
    if columns not in COLUMNS:
        raise LoRARiteValueError(f"columns must be one of {COLUMNS}, got {columns!r}")
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1 or a.shape[:1].numel() % blocks:
        raise LoRARiteValueError(
            f"blocks={blocks!r} must be a whole number that divides the first dimension of {a_name}"
        )
    for name, p in ((a_name, a), (b_name, b)):
        if p.ndim < 2 or p.numel() == 0:
            raise LoRARiteValueError(
                f"{name} has shape {tuple(p.shape)}; a factor is a non-empty matrix or convolution (FSDP1 and "
                "DeepSpeed ZeRO flatten and split them: use FSDP2, or DeepSpeed's stage 0)"
            )
    rank = a.shape[0] // blocks
    if (
        b.shape[1] != (a.shape[0] if columns else rank)
        or b.shape[2:].numel() != 1
        or (not columns and b.shape[0] % blocks)
    ):
        several = a.shape[0] // b.shape[1]
        hint = ""
        if blocks == 1 and several > 1 and (a.shape[0] % b.shape[1], b.shape[0] % several) == (0, 0):
            hint = (
                f". If these are {several} pairs, one below the other (a grouped convolution, loralib's MergedLinear), "
                f'pass the model to create_lora_rite, or a group {{"params": [A, B], "kind": "lora", '
                f'"blocks": {several}}}'
            )
        raise LoRARiteValueError(
            f"rank mismatch {a.shape[0]} vs {b.shape[1]}: {a_name} has shape {tuple(a.shape)}, {b_name} "
            f"{tuple(b.shape)}, and should have (r, n) and (m, r){f', {blocks} times' * (blocks > 1)}{hint}"
        )
    plain = plain_names([a_name, b_name])
    if _partner(plain[0]) == plain[1] and not _is_a(plain[0]):
        raise LoRARiteValueError(f"{a_name} comes before {b_name}: a group of kind lora is A, B, A, B, …")
    if is_cut_through(b, blocks, columns):
        raise LoRARiteValueError(
            f"{b_name} holds {blocks} factors one above the other (a grouped convolution, a block-diagonal B) and is "
            "sharded, which cuts through them: keep its layer out of fully_shard (ignored_params)"
        )
    if getattr(a, "device_mesh", None) != getattr(b, "device_mesh", None):
        raise LoRARiteValueError(f"{a_name} and {b_name} are not sharded over the same mesh: shard the pair together")
    if reason := REFUSED_DEVICES.get(a.device.type):
        raise LoRARiteValueError(f"{a_name} is on {a.device}: {reason}")
    if a.device != b.device:
        raise LoRARiteValueError(f"{a_name} is on {a.device} and {b_name} on {b.device}: move the pair to one device")


def is_cut_through(b: Tensor, blocks: int = 1, columns: str = "") -> bool:
    """Whether B holds factors one above the other, and is sharded: shares of its rows cut through them."""
    return blocks > 1 and not columns and is_sharded(b)


def check_order(a: Tensor, b: Tensor, a_name: str, b_name: str) -> None:
    """Raises LoRARiteValueError where shapes alone cannot tell that ``a`` is A (r, n) and ``b`` is B (m, r)."""
    forward = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]
    backward = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0]
    rank_in_front = a.ndim == 2 and a.shape[0] < a.shape[1]
    if backward and not (forward and rank_in_front):
        raise LoRARiteValueError(
            f"cannot tell A from B: {a_name} has shape {tuple(a.shape)} and {b_name} {tuple(b.shape)}, without names. "
            "A flat list must be A, B, A, B, … with A (r, n) and B (m, r); pass model.named_parameters()"
        )


def _check_named(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    named = list(named)
    for item in named:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise LoRARiteTypeError(f"expected a model or its named_parameters(), got an item of {type(item).__name__}")
        if not isinstance(item[1], Tensor):
            raise LoRARiteTypeError(f"{item[0]} is a {type(item[1]).__name__}, not a tensor")
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise LoRARiteValueError(
            f"two parameters are named {twice}: pass each model's parameters as a group of its own, or name them apart"
        )
    return named


def _partner(name: str) -> str | None:
    """The name of the other factor, or None where ``name`` is not a factor's."""
    segments = name.split(".")
    if segments[-1] == "bias":
        return None
    for i in reversed(range(len(segments))):
        for a, b in FACTOR_NAMES.items():
            if segments[i] in (a, b):
                segments[i] = b if segments[i] == a else a
                return ".".join(segments)
    return None


def _is_a(name: str) -> bool:
    return next(s in FACTOR_NAMES for s in reversed(name.split(".")) if s in {*FACTOR_NAMES, *FACTOR_NAMES.values()})


def _is_parametrized(name: str) -> bool:
    """Whether a factor is computed from the parameter of this name by more than taking it."""
    segments = name.split(".")
    factor = [i for i, s in enumerate(segments) if s in {*FACTOR_NAMES, *FACTOR_NAMES.values()}]
    return bool(factor) and any(s in PARAMETRIZED for s in segments[factor[-1] + 1 :])


def _layer(name: str) -> str:
    """The name of the layer that holds a factor: everything before its ``lora_…`` segment."""
    known = {*FACTOR_NAMES, *FACTOR_NAMES.values(), *BETWEEN_NAMES}
    segments = name.split(".")
    return ".".join(segments[: max(i for i, s in enumerate(segments) if s in known)])


def _why_not(name: str) -> str:
    """Why a parameter that has no partner is not part of a pair."""
    found = [why for begin, why in REASONS.items() if any(s.startswith(begin) for s in name.split("."))]
    return found[0] if found else NO_FACTOR


def _stacked_layers(model: nn.Module) -> dict[str, tuple[int, str]]:
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


def _scalings(model: nn.Module) -> dict[str, float]:
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


def _base_weights(named: Sequence[tuple[str, Tensor]]) -> dict[str, list[Tensor]]:
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


def overlapping_storage(named: Iterable[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """The names of two parameters that begin at the same place in memory, or None."""
    seen: dict[tuple[torch.device, int], str] = {}
    for name, p in named:
        address = local(p).data_ptr() if p.numel() else 0
        if address:
            other = seen.setdefault((p.device, address), name)
            if other is not name:
                return other, name
    return None
