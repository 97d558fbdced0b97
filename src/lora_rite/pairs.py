"""A path of before: pairs are in :mod:`lora_rite.plan.pairs`."""

from .plan.pairs import LeftOut, Pair, Pairing, Shape, find_pairs, param_groups

__all__ = ["LeftOut", "Pair", "Pairing", "Shape", "find_pairs", "param_groups"]
