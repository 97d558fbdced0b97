"""Finds the pairs (A, B) of a model, says what it leaves out and why, and builds the optimizer's groups.

The layout of a group *is* the pairing: ``{"params": [A0, B0, A1, B1, …], "kind": "lora"}`` is read by position at each
step, so that it survives every exchange of parameters (FSDP2, ``deepcopy``, ``load_state_dict``). All other trainable
parameters belong to a group of ``"kind": "adamw"``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import LoRARiteTypeError, LoRARiteValueError, warn
from .checks import check_pair
from .factors import BETWEEN_NAMES, is_a, is_parametrized, layer_of, partner_of, why_not
from .names import plain_names
from .rates import expressions_of
from .stacked import EXPERTS, base_weights, layer_scalings, layout_by_shapes, stacked_layers


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
    stacked = stacked_layers(model) if isinstance(model, nn.Module) else {}
    scalings = layer_scalings(model) if isinstance(model, nn.Module) else {}
    given = dict(zip(plain_names([name for name, _ in named]), (name for name, _ in named), strict=True))
    named = list(zip(given, (p for _, p in named), strict=True))
    everything = dict(named)
    weights = base_weights(named)
    trainable = {name: p for name, p in named if p.requires_grad}
    pairing, excluded = Pairing(), {}
    for name in everything:
        if is_parametrized(name):
            excluded[layer_of(name)] = f"ΔW is not a plain product B·A: a factor is computed from {given[name]}"
    for name in trainable:
        if any(segment in BETWEEN_NAMES for segment in name.split(".")):
            excluded[layer_of(name)] = f"ΔW is not a plain product B·A: {given[name]} stands between"
    partners: dict[str, str] = {}
    for name, p in trainable.items():
        partner = partner_of(name)
        if partner is None:
            pairing.left_out.append(LeftOut(given[name], p, why_not(name)))
        elif reason := excluded.get(layer_of(name)):
            pairing.left_out.append(LeftOut(given[name], p, reason))
        elif partner not in everything:
            raise LoRARiteValueError(
                f"unpaired factor {given[name]}: no {partner}. Pass both factors, also where one is frozen "
                "(model.named_parameters()), or freeze this one"
            )
        elif is_a(name):
            partners[name] = partner
        else:
            partners[partner] = name
    for a_name, b_name in partners.items():
        a, b, layer = everything[a_name], everything[b_name], layer_of(a_name)
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
    frozen = [name for name, p in named if not p.requires_grad and partner_of(name) and name not in paired]
    pairing.frozen += [given[name] for name in frozen]
    return pairing


def param_groups(
    model: nn.Module | Iterable[tuple[str, Tensor]],
    *,
    lr_by_name: Mapping[str, float | Tensor] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Groups for ``LoRARite``: of kind "lora", one with named pairs and the ``options`` (lr, betas, …), and one more
    for each further scaling (PEFT's ``alpha_pattern``, ``rank_pattern``) and number of pairs that parameters hold
    together (experts, groups of a convolution); of kind "adamw", one where other parameters are trainable (the
    optimizer gives it its ``adamw_…`` settings).

    ``scaling`` of a group is what the layers of a model multiply B·A by, so that lr is that of W. ``scaling=None``
    makes it that of B·A, which it is too where ``named_parameters()`` are given, which do not tell.

    ``lr_by_name``, ``{"embed_tokens": 1e-4, …}``, gives some their own lr, in further groups: a regular expression is
    searched in the plain name (without wrappers' segments) of a trainable parameter and of each module that holds it.
    The factors of a pair always have one lr, the one lr of LoRA-RITE; that of other parameters is AdamW's.

    To give pairs other settings of their own, call it with the ``named_parameters()`` of one part of the model at a
    time.

    Raises:
        LoRARiteValueError: as :func:`find_pairs`; an expression of ``lr_by_name`` that matches no trainable parameter,
            or two that match the same pair or parameter.
        LoRARiteTypeError: ``lr_by_name`` is no mapping.
    """
    named = list(model.named_parameters()) if isinstance(model, nn.Module) else _check_named(model)
    pairing = find_pairs(model if isinstance(model, nn.Module) else named)
    number, lrs = _numbers_of_lrs(pairing, [name for name, _ in named], lr_by_name or {})
    groups: list[dict[str, Any]] = []
    kind = lambda p: (number[p.a_name], p.blocks, p.columns, None if "scaling" in options else p.scaling)
    # Trainers log the first group's lr, which therefore is the general one wherever a pair has that.
    for own, blocks, columns, scaling in sorted({kind(p) for p in pairing.pairs}, key=lambda k: (k[0], str(k[1:]))):
        alike = [p for p in pairing.pairs if kind(p) == (own, blocks, columns, scaling)]
        factors = [named for p in alike for named in ((p.a_name, p.a), (p.b_name, p.b))]
        several = {"blocks": blocks, "columns": columns} if blocks > 1 else {}
        known = {"scaling": scaling} if scaling is not None else {}
        groups.append({"params": factors, "kind": "lora", **several, **known, **options, **lrs[own]})
    for own in sorted({number[o.name] for o in pairing.left_out}):
        others = [(o.name, o.parameter) for o in pairing.left_out if number[o.name] == own]
        groups.append({"params": others, "kind": "adamw", **lrs[own]})
    return groups


def _numbers_of_lrs(
    pairing: Pairing, names: list[str], lr_by_name: Mapping[str, float | Tensor]
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """By the name of A or of another parameter, the number of its lr; and by number, the key of a group that it is:
    none for 0, then those of ``lr_by_name``."""
    plain = dict(zip(names, plain_names(names), strict=True))
    together = [(pair.a_name, pair.b_name) for pair in pairing.pairs] + [(o.name,) for o in pairing.left_out]
    found = expressions_of(lr_by_name, [tuple(plain[name] for name in own) for own in together])
    numbers = {None: 0, **{expression: i for i, expression in enumerate(lr_by_name, 1)}}
    by_name = {own[0]: numbers[expression] for own, expression in zip(together, found, strict=True)}
    return by_name, [{}, *({"lr": lr} for lr in lr_by_name.values())]


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
