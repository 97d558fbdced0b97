"""The loss from logits at the positions that carry loss alone.

The head over a large vocabulary is the dearest part of a small model; a prompt's logits, and those of padding, would be
thrown away.
"""

import threading
from typing import Any

from .windows import IGNORED

#: The share of positions that carry loss from which on nothing is gained: batches of plain text stay as they are.
MOST = 0.75


def predict_labelled(network: Any) -> bool:
    """Has a causal model compute logits, in each forward pass with labels, only at positions that carry loss.

    Loss and gradients stay the same up to rounding; ``logits`` of such a pass are (1, positions that carry loss,
    vocabulary), and where most positions carry loss they are all there, and nothing changes. The hidden states are
    picked in front of the model's own head, and the labels go to its own loss as ``shift_labels``.

    Args:
        network: a causal language model of transformers, with an adapter or without.

    Returns:
        Whether it does. A model stays as it is where it has no head that it names, or a loss of its own, which is not
        the same from ``shift_labels``; and so does an encoder–decoder model, whose labels are the completion alone.
    """
    import torch
    from torch.nn.functional import pad

    base = network.get_base_model() if hasattr(network, "get_base_model") else network
    head = base.get_output_embeddings()
    if head is None or base.config.is_encoder_decoder:
        return False
    chosen = threading.local()  # DataParallel's replicas are threads that share these hooks

    @torch.compiler.disable  # how many positions there are, a compiled graph cannot ask
    def choose(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        chosen.positions = None
        if (labels := kwargs.get("labels")) is None:
            return None
        following = pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        positions = (following != IGNORED).nonzero().squeeze(1)
        if len(positions) > MOST * len(following):
            return None
        chosen.positions = positions
        picked = following[positions][None]
        # A model that shifts labels itself finds none, and its loss is NaN: seen below.
        return args, {**kwargs, "labels": torch.full_like(picked, IGNORED), "shift_labels": picked}

    def pick(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        positions = getattr(chosen, "positions", None)
        return None if positions is None else (args[0].flatten(0, 1)[positions][None], *args[1:])

    before = _loss(network)
    hooks = [base.register_forward_pre_hook(choose, with_kwargs=True), head.register_forward_pre_hook(pick)]
    try:
        same = abs(_loss(network) - before) <= (1e-4 if base.dtype.itemsize > 2 else 1e-2) * max(1.0, abs(before))
    except (TypeError, ValueError, RuntimeError, IndexError):  # no shift_labels, or more is done with the logits
        same = False
    if not same:
        for hook in hooks:
            hook.remove()
    return same


def _loss(network: Any) -> float:
    """The loss, without dropout, of two rows of eight tokens of which four and two carry loss."""
    import torch

    tokens = torch.arange(8, device=network.device) % network.get_input_embeddings().num_embeddings
    rows = torch.stack([tokens, tokens.flip(0)])
    labels = rows.clone()
    labels[0, :4] = labels[1, :6] = IGNORED
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            return float(network(input_ids=rows, attention_mask=torch.ones_like(rows), labels=labels).loss)
    finally:
        network.train(training)
