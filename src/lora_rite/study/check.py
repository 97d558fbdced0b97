"""``lora-rite compare --check``: what a study needs, from shapes alone. Nothing is trained, no weights are loaded."""

import statistics
from collections import Counter
from typing import Any, NamedTuple

from ..errors import LoRARiteValueError
from ..finetune.checks import weights_of
from ..finetune.load import attach_shapes
from ..finetune.memory import activations, count_text, optimizer_state, size_text
from ..finetune.models import configuration, network_of_shapes
from ..finetune.tasks import find_task
from ..inputs import one_line
from ..plan.pairs import Shape
from ..run.console import number
from .data import read_data
from .recipe import HEADERS, SPLITS
from .search import Study


class Needs(NamedTuple):
    """Bytes that training one adapter takes, by what they are for, with its model and its number of pairs."""

    model: str
    pairs: int
    parameters: int
    weights: int
    adapter: int
    state: dict[str, int]
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + max(self.state.values()) + self.activations


#: Bytes of a weight by its bits: of NF4, 64 have a constant of 8 bits, and 256 of these one of 32; LLM.int8 has one for
#: each row.
QUANTISED = {4: 1 / 2 + 1 / 64 + 4 / (64 * 256), 8: 1.0}
#: The options that memory depends on.
SIZES = (
    "model", "trust_remote_code", "target_modules", "bf16", "dtype", "load_in_4bit", "load_in_8bit", "batch_size",
    "max_length", "gradient_checkpointing",
)  # fmt: skip


def needs(study: Study, rank: int) -> Needs:
    """What one run at a rank needs, of the task that needs most."""
    tasks = [study.train_options(task) for task in study.recipe.tasks]
    sizes = [{key: options[key] for key in SIZES if key in options} for options in tasks]
    different = [options for n, options in enumerate(sizes) if options not in sizes[:n]]
    return max((_needs(study, rank, options) for options in different), key=lambda need: need.total)


def _needs(study: Study, rank: int, options: dict[str, Any]) -> Needs:
    """What a run with these options needs. The model and its adapter are built on torch's meta device.

    For state and activations see :mod:`lora_rite.finetune.memory`.
    """
    import torch

    from .. import find_pairs

    model, trusted = options.get("model", "tiny"), options.get("trust_remote_code", False)
    config = configuration(model, "train.model", trusted)
    # a recipe's function knows what it puts on top of the model
    network = network_of_shapes(config, base=study.recipe.function is not None, trust_remote_code=trusted)
    parameters = sum(p.numel() for p in network.parameters())
    dtype, bits = weights_of(options)
    stored = getattr(config, "dtype", None) or torch.float32
    bytes_each = (stored if dtype == "auto" else getattr(torch, dtype)).itemsize
    weights = weight_bytes(network, bits, bytes_each)
    network = attach_shapes(network, rank=rank, target_modules=options.get("target_modules", "all-linear"))
    pairing = find_pairs(network)
    if pairing.left_out:
        names = ", ".join(f"{left.name} ({left.reason})" for left in pairing.left_out[:3])
        raise LoRARiteValueError(
            f"train.target_modules: {len(pairing.left_out)} trainable parameters are in no pair: {names}"
        )
    shapes = Counter(pair.shape for pair in pairing.pairs)
    factors = sum(shape.elements * count for shape, count in shapes.items())
    tokens = options.get("batch_size", 8) * options.get("max_length", 256)
    return Needs(
        model=model,
        pairs=pairing.count,
        parameters=parameters,
        weights=weights,
        adapter=factors * (4 + 4),
        state={name: _state(study, name, shapes) for name in study.recipe.optimizers},
        activations=activations(config, shapes, tokens, bytes_each, options.get("gradient_checkpointing", False)),
    )


def weight_bytes(network: Any, bits: int | None, bytes_each: int) -> int:
    """Bytes of a model's weights, where ``bits`` quantises its linear maps (all but the head, as transformers does) and
    each other number takes ``bytes_each``."""
    from torch import nn

    parameters = sum(p.numel() for p in network.parameters())
    if bits is None:
        return parameters * bytes_each
    head = network.get_output_embeddings()
    quantised = sum(m.weight.numel() for m in network.modules() if type(m) is nn.Linear and m is not head)
    return (parameters - quantised) * bytes_each + round(quantised * QUANTISED[bits])


def _state(study: Study, name: str, shapes: Counter[Shape]) -> int:
    """Bytes of an optimizer's state after a step, for pairs of these shapes in float32."""
    contender = study.recipe.optimizers[name]
    try:
        return optimizer_state(shapes, contender.optimizer, contender.lr[0], contender.optimizer_args)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LoRARiteValueError(f"optimizers.{name}: {one_line(error)}") from error


def check(study: Study, data_dir: Any = None) -> str:
    """What the study needs, as text: pairs and memory at each rank, runs, steps, and the data.

    Raises:
        LoRARiteValueError: what is wrong, by its key in the recipe.
    """
    recipe = study.recipe
    optimizers, tasks = number(len(recipe.optimizers), "optimizer"), number(len(recipe.tasks), "task")
    ranks = f"rank{'s' * (len(recipe.ranks) > 1)} {', '.join(map(str, recipe.ranks))}"
    lines = [f"{recipe.title}: {optimizers}, {tasks}, {ranks}"]
    for rank in recipe.ranks:
        need = needs(study, rank)
        lines.append(
            f"rank {rank}: {number(need.pairs, 'pair')} in {need.model} ({count_text(need.parameters)} parameters); "
            f"about {size_text(need.total)} on a device: weights {size_text(need.weights)}, factors and gradients "
            f"{size_text(need.adapter)}, activations roughly {size_text(need.activations)}, optimizer state at most "
            f"{size_text(max(need.state.values()))}"
        )
        lines += [f"  state of {name}: {size_text(size)}" for name, size in need.state.items()]
    runs, steps = study.planned({}), study.planned_steps()
    grids = [len(c.lr) for c in recipe.optimizers.values()]
    lines.append(
        f"{number(runs, 'run')} of {study.steps_text()}, {number(steps, 'step')} in all: "
        f"{number(len(study.lines), 'optimizer')} in cases, {statistics.fmean(grids):.1f} learning rates each on the "
        f"average, {number(len(recipe.seeds), 'seed')} at the best"
    )
    for name, task in recipe.tasks.items():
        if task.task not in (None, HEADERS):
            hub = find_task(task.task).dataset
            if data_dir is None:
                where = f"from the hub, {'/'.join(filter(None, hub))}" if hub else "needs --data_dir"
                lines.append(f"{name}: {task.task} {where}; not loaded (--data_dir checks local files)")
                continue
        found = read_data(task, data_dir)
        lines.append(
            f"{name}: " + ", ".join(f"{number(len(found[part]), 'example')} to {_FOR[part]}" for part in SPLITS)
        )
    return "\n".join(lines)


_FOR = {"train": "train on", "validation": "choose lr", "test": "test"}
