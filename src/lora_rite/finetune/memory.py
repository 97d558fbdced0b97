"""How many bytes a run takes, from shapes alone, and how many it took."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..run.processes import count, highest, sharded
from .optimizers import create_optimizer, for_any_model

if TYPE_CHECKING:
    from ..plan.pairs import Shape


def optimizer_state(shapes: "Mapping[Shape, int]", name: str, lr: float, options: dict[str, Any] | None = None) -> int:
    """Bytes of an optimizer's state after a step on pairs of these shapes (each so many times) in float32.

    It is measured on torch's meta device, or where the optimizer needs values (LoRARite), on the CPU with one pair of
    each shape.

    Raises:
        TypeError, ValueError, RuntimeError: the optimizer cannot be made for the pairs, or step them.
    """
    import torch

    from ..invariance.problems import Adapter
    from ..optim.optimizer import state_bytes

    def measure(device: str, shape: "Shape") -> int:
        adapter = Adapter([shape], torch.float32, device)
        optimizer = create_optimizer(adapter, name, lr, options=for_any_model(options))
        for p in adapter.parameters():
            p.grad = torch.full_like(p, 1e-3) if p.requires_grad else None
        optimizer.step()
        return state_bytes(optimizer)

    total = 0
    with torch.random.fork_rng(devices=[]):  # a run draws its batches and dropout from what a seed has set before
        for shape, count in shapes.items():
            try:
                each = measure("meta", shape)
            except Exception:  # whatever an optimizer that reads values makes of a tensor without any
                each = measure("cpu", shape)
            total += count * each
    return total


def activations(
    config: Any, shapes: "Mapping[Shape, int]", tokens: int, bytes_each: int, checkpointing: bool = False
) -> int:
    """Roughly the bytes of what a model keeps for the backward pass of a batch.

    In a layer, about 16 tensors as wide as the model and 4 as the feed-forward, of experts those that a token goes to,
    and the logits; with checkpointing, the input of each layer and the rest of one. And the weights of adapted experts
    once more, since PEFT adds B·A to a copy of them.

    Args:
        config: of the model.
        shapes: of the pairs, each so many times.
        tokens: in a batch.
        bytes_each: of a number in the forward pass.
        checkpointing: whether layers are computed again in the backward pass.
    """
    layers = config.num_hidden_layers * (2 if config.is_encoder_decoder else 1)
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None) or config.d_ff
    inner *= getattr(config, "num_experts_per_tok", None) or 1
    experts = sum(math.prod(s.weight) * count for s, count in shapes.items() if s.columns == "interleaved")
    of_a_layer = 16 * config.hidden_size + 4 * inner
    kept = layers * config.hidden_size + of_a_layer if checkpointing else layers * of_a_layer
    return tokens * (kept * bytes_each + config.vocab_size * (bytes_each + 8)) + experts * bytes_each


def estimate(network: Any, options: Any, longest: int, bytes_each: int) -> dict[str, int | None]:
    """What each process of a run takes on its device, in bytes: ``weights``, ``adapter`` (what is trained, and its
    gradients), ``optimizer`` (None where it cannot be told), ``activations`` (roughly; None for a model whose config
    does not tell), and ``estimated``, the sum of what is known.

    Args:
        network: the model with its adapter.
        options: those of ``lora-rite train``.
        longest: tokens of the longest window.
        bytes_each: of a number in the forward pass.
    """
    from .. import find_pairs

    pairing = find_pairs(network)
    shapes = Counter(pair.shape for pair in pairing.pairs)
    parameters = list(network.parameters())
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    parts_of_all = count() if sharded() else 1
    parts: dict[str, int | None] = {
        "weights": sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad) // parts_of_all,
        "adapter": 2 * trained,
    }
    try:
        state = optimizer_state(shapes, options.optimizer, options.lr, options.optimizer_args)
        parts["optimizer"] = state + sum(8 * left.parameter.numel() for left in pairing.left_out)
    except Exception:  # an optimizer of somebody's, which may want a real model
        parts["optimizer"] = None
    config = network.config if network.config.is_encoder_decoder else network.config.get_text_config()
    tokens = options.batch_size * longest
    try:
        parts["activations"] = activations(config, shapes, tokens, bytes_each, options.gradient_checkpointing)
    except (AttributeError, TypeError):
        parts["activations"] = None
    return {**parts, "estimated": sum(size or 0 for size in parts.values())}


def peak() -> int | None:
    """The largest number of bytes so far in any process of the run: of tensors on the GPU, or of the process where it
    has none; None where the system does not tell."""
    return highest(_peak()) or None


def _peak() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
        import sys
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def size_text(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"


def count_text(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"
