"""What two parameters must be to be the factors of one product."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import LoRARiteValueError
from .factors import is_a, partner_of
from .names import plain_names
from .sharding import is_sharded, local

#: Where a B that holds several pairs has them: one below the other, or in its columns.
COLUMNS = ("", "interleaved", "side by side")


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
                "DeepSpeed ZeRO flatten and split them: use FSDP2, and with ZeRO make the optimizer before DeepSpeed "
                "takes the model, or within deepspeed.zero.GatheredParameters)"
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
    if partner_of(plain[0]) == plain[1] and not is_a(plain[0]):
        raise LoRARiteValueError(f"{a_name} comes before {b_name}: a group of kind lora is A, B, A, B, …")
    if is_cut_through(b, blocks, columns):
        raise LoRARiteValueError(
            f"{b_name} holds {blocks} factors one above the other (a grouped convolution, a block-diagonal B) and is "
            "sharded, which cuts through them: keep its layer out of fully_shard (ignored_params)"
        )
    if getattr(a, "device_mesh", None) != getattr(b, "device_mesh", None):
        raise LoRARiteValueError(f"{a_name} and {b_name} are not sharded over the same mesh: shard the pair together")
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
