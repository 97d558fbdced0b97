"""A model with its adapter as shapes alone, on torch's meta device: no weights are loaded."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ..errors import LoRARiteValueError
from ..finetune.load import attach_shapes
from ..finetune.models import configuration, network_of_shapes
from ..inputs import blame
from ..run.console import number


def pairs_of(
    model: str, adapter: Path | None, target_modules: str | list[str], rank: int, trust_remote_code: bool
) -> str:
    """``lora-rite pairs``: the pairs of a model and an adapter, and what else is trained or frozen, a line for each
    kind of layer.

    Raises:
        LoRARiteValueError: what is wrong with the model, the adapter or an option.
    """
    from ..plan.pairs import find_pairs

    if rank < 1:
        raise LoRARiteValueError(f"--rank must be at least 1, got {rank}")
    config = configuration(model, "--model", trust_remote_code)
    with blame(f"--model {model}"):
        network = network_of_shapes(config, trust_remote_code=trust_remote_code)
    network = attach_shapes(network, adapter=adapter, rank=rank, target_modules=target_modules)
    found = find_pairs(network)
    lines = [number(found.count, "pair"), *_by_kind(str(pair).replace(pair.b_name, "B") for pair in found.pairs)]
    if found.left_out:
        lines.append(f"{number(len(found.left_out), 'other trainable parameter')} (AdamW)")
        lines += _by_kind(f"{o.name} {tuple(o.parameter.shape)}: {o.reason}" for o in found.left_out)
    if found.frozen:
        lines += [f"{number(len(found.frozen), 'frozen factor')}, not trained", *_by_kind(found.frozen)]
    return "\n".join(lines)


def _by_kind(lines: Iterable[str]) -> list[str]:
    """The lines, those that differ in the numbers within names (of layers) alone as one, with how many they are."""
    kinds = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", line.replace("base_model.model.", "")) for line in lines)
    return [f"  {count} × {kind}" for kind, count in kinds.items()]
