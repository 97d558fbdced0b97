"""What a training run begins with, by its options: the model, the windows of its text, the adapter."""

import math
import random
from types import SimpleNamespace
from typing import Any

from ..inputs import blame
from ..run import processes
from .chats import set_chat_template
from .checks import DEFAULT_LR, NEW_ADAPTER, OURS, check_steps, refuse_clipping, weights_of
from .header import busy
from .labelled import predict_labelled
from .load import attach_adapter, check_attaching, check_sharded, load_model, place_quantised, set_attention
from .optimizers import check_optimizer
from .preview import describe_windows
from .reading import Examples, say
from .windows import Windows, make_windows


def load(options: SimpleNamespace, examples: Examples) -> tuple[Any, Any, Windows, Windows, int]:
    """The model, its tokenizer, the windows to train on and to measure the held-out loss on, and how many there were of
    the latter before ``eval_limit``."""
    from .limits import check_windows

    made: list[Windows] = []

    def check(tokenizer: Any, config: Any) -> None:
        made.extend(_make_windows(options, examples, tokenizer, config.is_encoder_decoder))
        names = {key: getattr(options, key) for key in ("adapter", "target_modules", "modules_to_save")}
        check_attaching(config, options.trust_remote_code, **names)

    dtype, options.bits = weights_of(vars(options))
    network, tokenizer = load_model(
        options.model,
        dtype=dtype,
        bits=options.bits,
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
        progress=options.progress,
        check=check,
    )
    train, held_out = made
    with busy("trying the model on a few tokens", options.progress):
        check_windows(made, network, tokenizer, options.model, packing=options.packing)
    set_attention(network, options.attn_implementation)
    there = len(held_out.rows)
    if 0 < options.eval_limit < there:  # the same for all seeds and optimizers
        chosen = sorted(random.Random(0).sample(range(there), options.eval_limit))
        held_out = held_out._replace(rows=[held_out.rows[i] for i in chosen])
    if options.group_by_length:
        held_out.rows.sort(key=lambda row: len(row["input_ids"]))
    return network, tokenizer, train, held_out, there


def _make_windows(options: SimpleNamespace, examples: Examples, tokenizer: Any, encoder_decoder: bool) -> list[Windows]:
    """The windows to train on and those held out, before the weights are loaded; from them follow the steps, where
    epochs are given."""
    if options.chat_template is not None:
        set_chat_template(tokenizer, options.chat_template)
    how = {"encoder_decoder": encoder_decoder, "packing": options.packing}
    with busy("making tokens of the data", options.progress):
        made = make_windows(examples.parts, tokenizer, options.model, options.max_length, **how)
    for name, part, found in zip(("training", "held out"), examples.parts, made, strict=True):
        say(options, describe_windows(name, part, found, options.max_length, encoder_decoder))
    if options.epochs is not None:
        batches = math.ceil(len(made[0].rows) / (options.batch_size * processes.count()))
        options.steps = math.ceil(options.epochs * math.ceil(batches / options.accumulation))
        check_steps(options, options.steps)
    return made


def attach(options: SimpleNamespace, network: Any) -> Any:
    """The network with the adapter of the options, and the optimizer checked on it."""
    from transformers import set_seed

    from .. import LoRARite

    set_seed(options.seed)
    new = {key: getattr(options, key) for key in NEW_ADAPTER}
    network = attach_adapter(network, adapter=options.adapter, **new)
    place_quantised(network)
    config = network.peft_config[network.active_adapter]
    check_sharded(network)
    if options.optimizer in OURS and (config.modules_to_save or getattr(config, "use_dora", False)):
        options.optimizer_args = {"adamw_lr": DEFAULT_LR["adamw"], **(options.optimizer_args or {})}
    made = check_optimizer(network, options.optimizer, options.lr, options.weight_decay, options.optimizer_args)
    if isinstance(made, LoRARite):
        refuse_clipping(options.max_grad_norm)
    predict_labelled(network)
    if options.gradient_checkpointing:
        with blame("--gradient_checkpointing"):  # not by the Trainer's argument, which has another name from version 6
            enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            # Reentrant checkpoints alone need embeddings with gradients, at which torch.compile would break off.
            network.disable_input_require_grads()
    return network
