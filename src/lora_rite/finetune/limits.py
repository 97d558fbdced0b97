"""What a language model and its tokenizer can take, found by trying them before a run writes anything.

The trials are a few short sequences in evaluation mode, without gradients. The model's mode, dtype, buffers and the
generators of random numbers are what they were before; in several processes, each has to call, and all decide alike.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import LoRARiteValueError, warn
from ..inputs import blame, one_line
from .windows import Row, Windows

#: Tokens of the sequences that are tried: the longer one tells tables of positions from T5's buckets of distances.
SHORT, LONG = 16, 32
#: A model in another dtype than float32 is tried in float32 up to so many parameters (a copy of 1 GiB).
COPIED = 2**28
#: Of the size of the logits, what later tokens may move: a mixture of experts rounds differently where its later tokens
#: go to other experts, all other causal models differ by nothing. A random BERT of width 16 moves by 4e-4.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
LOW_PRECISION_TOLERANCE = 3e-2
#: LLM.int8 looks at all tokens of a batch for the columns that it does not quantise: the embedded model moves by 0.05.
INT8_TOLERANCE = 0.2
_LOOKUPS = (
    torch.ops.aten.embedding.default,
    torch.ops.aten.gather.default,
    torch.ops.aten.index_select.default,
    torch.ops.aten.index.Tensor,
)
Forward = Callable[..., Any]


class Limits(NamedTuple):
    """What a model takes at most.

    Attributes:
        positions: tokens of a window (encoder–decoder: of a prompt); None where the code has no limit, as with rotary
            and relative positions.
        answer_positions: the same of a completion, for an encoder–decoder model; else ``positions``.
        declared: the number of positions in the config, up to which it was made; None where it says none.
        tokens: one more than the largest id of a token.
        labels: one more than the largest id of a label.
    """

    positions: int | None
    answer_positions: int | None
    declared: int | None
    tokens: int
    labels: int


def find_limits(network: Any, tokenizer: Any, model: str, *, packing: bool = False) -> Limits:
    """Checks that a model can be trained and evaluated as a language model, and finds what it takes at most.

    A model that is not an encoder–decoder has to be causal: later tokens do not move earlier logits, and its loss is
    that of the next token. Models above :data:`COPIED` parameters are tried in their own dtype, others in float32.

    Args:
        network: a causal or encoder–decoder model of transformers, on the CPU (an accelerator does not survive an index
            out of range).
        tokenizer: its tokenizer.
        model: what the user calls the model, for the errors.
        packing: check also that it keeps the examples of a packed window apart.

    Raises:
        LoRARiteValueError: it cannot, by ``--model`` or ``--packing``.
    """
    encoder_decoder = network.config.is_encoder_decoder
    embeddings = _embeddings(network)
    first, second = _ordinary(tokenizer, min(map(len, embeddings)))
    with _untouched(network) as forward, blame(f"--model {model}"):
        run = _runner(network, forward)
        with _blame_config(network.config):
            predicted = run(first[:2], first[:2]).logits.shape[-1]
        tables = {weight.data_ptr() for weight in embeddings}
        same = lambda n: first[:1] * n
        if encoder_decoder:
            positions = _positions(lambda n: run(same(n), same(2)), tables)
            answers = _positions(lambda n: run(same(2), same(n)), tables)
        else:
            positions = answers = _positions(lambda n: run(same(n), same(n)), tables)
            _check_causal(network, run, first[: _room(positions)], second[: _room(positions)])
    if packing:
        with _untouched(network) as forward, blame("--packing"):
            _check_packing(network, forward, first[: _room(positions)], second[: _room(positions)])
    config = network.config if encoder_decoder else network.config.get_text_config()
    declared = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    labels = min(predicted, len(embeddings[-1])) if encoder_decoder else predicted  # the decoder's inputs too
    return Limits(positions, answers, declared, len(embeddings[0]), labels)


def check_windows(found: Sequence[Windows], network: Any, tokenizer: Any, model: str, *, packing: bool = False) -> None:
    """Checks that a model can take the windows of :func:`~lora_rite.finetune.windows.make_windows`.

    Raises:
        LoRARiteValueError: as :func:`find_limits` and :func:`check_rows` do.
    """
    limits = find_limits(network, tokenizer, model, packing=packing)
    check_rows([row for part in found for row in part.rows], limits, network, tokenizer)


def check_rows(rows: list[Row], limits: Limits, network: Any, tokenizer: Any) -> None:
    """Checks that the model has the tokens of the rows and positions for all of them. Warns of windows that are longer
    than the config says, where the model runs on them all the same (models above :data:`COPIED` are not tried).

    Raises:
        LoRARiteValueError: by ``--model`` or ``--max_length``.
    """
    largest = max(tokenizer.pad_token_id, *(max(row["input_ids"]) for row in rows))
    if largest >= limits.tokens:
        raise LoRARiteValueError(
            f"the tokenizer of --model gives token {largest}, and the model knows {limits.tokens} tokens"
        )
    if (label := max(max(row["labels"]) for row in rows)) >= limits.labels:
        raise LoRARiteValueError(
            f"the tokenizer of --model gives token {label}, and the model predicts {limits.labels} tokens"
        )
    keys = ("input_ids", "labels") if network.config.is_encoder_decoder else ("input_ids",)
    for key, limit in zip(keys, (limits.positions, limits.answer_positions), strict=False):
        row = max(rows, key=lambda row: len(row[key]))
        longest = len(row[key])
        if limit is not None and longest > limit:
            raise LoRARiteValueError(
                f"--max_length: a window has {longest} tokens, and --model has {limit} positions; give --max_length "
                f"{limit} or less"
            )
        if limit is None and limits.declared is not None and longest > limits.declared:
            _try_beyond(network, row, limits.declared)
            warn(
                f"--max_length: a window has {longest} tokens, and --model was made for {limits.declared} "
                "(max_position_embeddings): beyond, it may be much worse"
            )


def _try_beyond(network: Any, row: Row, declared: int) -> None:
    """Runs a small model on a window that is longer than its config says."""
    if sum(p.numel() for p in network.parameters()) > COPIED:
        return
    try:
        with _untouched(network) as forward:
            _runner(network, forward)(row["input_ids"], row["labels"])
    except (IndexError, RuntimeError, ValueError) as error:
        raise LoRARiteValueError(
            f"--max_length: --model cannot be run on a window of {len(row['input_ids'])} tokens ({one_line(error)}); "
            f"give --max_length {declared} or less"
        ) from error


# --------------------------------------------------------------------------------------------------------- the trials


@contextmanager
def _untouched(network: Any) -> Iterator[Forward]:
    """A call of the network, in evaluation mode and float32 (but see :data:`COPIED`), that leaves no trace in it."""
    parameters = dict(network.named_parameters())
    copied = sum(p.numel() for p in parameters.values()) <= COPIED and all(map(_plain, parameters.values()))
    tensors = {name: buffer.clone() for name, buffer in network.named_buffers()}
    if copied:
        tensors = {name: _float(tensor) for name, tensor in {**parameters, **tensors}.items()}
    modes = {module: module.training for module in network.modules()}
    device = network.device
    devices = [] if device.type == "cpu" else [device]

    def forward(**inputs: Any) -> Any:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"), torch.no_grad():
            torch.default_generator.manual_seed(0)  # for the generators of accelerators nobody asks
            return torch.func.functional_call(network, tensors, kwargs=inputs)

    network.eval()
    try:
        yield forward
    finally:
        for module, training in modes.items():
            module.training = training


def _plain(tensor: Tensor) -> bool:
    """Neither quantised nor a shard, of which copies in another dtype are none of our business."""
    return tensor.is_floating_point() and type(tensor.data) is Tensor


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor


@contextmanager
def _blame_config(config: Any) -> Iterator[None]:
    """Says which id an encoder–decoder model has not, where its first run fails for the want of one."""
    try:
        yield
    except Exception as error:
        for key in ("decoder_start_token_id", "pad_token_id"):
            if config.is_encoder_decoder and getattr(config, key, None) is None:
                raise LoRARiteValueError(
                    f"its config has no {key}, which an encoder-decoder model needs: set it in its config.json"
                ) from error
        raise


def _runner(network: Any, forward: Forward) -> Callable[[list[int], list[int]], Any]:
    """The model's output, with its loss, on tokens and labels."""

    def run(ids: list[int], labels: list[int]) -> Any:
        batch = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
        return forward(**{key: torch.tensor([value], device=network.device) for key, value in batch.items()})

    return run


def _embeddings(network: Any) -> list[Tensor]:
    """The tables of the tokens: the encoder's and the decoder's may be two."""
    modules = [network, network.get_decoder()] if network.config.is_encoder_decoder else [network]
    return [module.get_input_embeddings().weight for module in modules if module is not None]


def _ordinary(tokenizer: Any, known: int) -> tuple[list[int], list[int]]:
    """Twice :data:`LONG` tokens, always the same: the special ones may stand for a picture, or for padding."""
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    ids = [n for n in range(min(known, len(tokenizer))) if n not in special] or [0]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [ids[order[n % len(ids)]] for n in range(2 * LONG)]
    return chosen[:LONG], chosen[LONG:]


def _room(positions: int | None) -> int:
    """Tokens of a short sequence."""
    return SHORT if positions is None else min(SHORT, positions)


# ------------------------------------------------------------------------------------------------- tables of positions


class _Seen(Exception):
    """Ends a run where a table is looked up at the watched index; whether the table has it."""


class _Lookups(TorchDispatchMode):
    """Records, by operation and table (its size, and its other dimensions), the largest index that is looked up;
    ``skipped`` tables aside. Ends the run where the ``watched`` index is looked up in a table of that kind."""

    def __init__(self, skipped: set[int], watched: tuple[Any, int] | None = None):
        super().__init__()
        self.largest: dict[tuple[Any, int], int] = {}
        self.skipped, self.watched = skipped, watched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOOKUPS and args[0].data_ptr() not in self.skipped:
            table, *where = args
            if func is torch.ops.aten.index.Tensor:
                indices = list(enumerate(where[0]))
            else:
                indices = [(0, where[0]) if func is torch.ops.aten.embedding.default else (where[0], where[1])]
            for dim, index in indices:
                if index is None or not index.numel() or index.dtype not in (torch.int64, torch.int32):
                    continue
                kind, size = (func, dim, *table.shape[:dim], *table.shape[dim + 1 :]), table.shape[dim]
                largest = int(index.max())
                self.largest[kind, size] = max(self.largest.get((kind, size), 0), largest)
                if self.watched == (kind, largest):
                    raise _Seen(largest < size)
        return func(*args, **(kwargs or {}))


def _positions(run: Callable[[int], Any], skipped: set[int]) -> int | None:
    """How many positions the model's tables have; None where no table ends.

    A table of positions is looked up with an index that grows with the tokens, one by one. Whether it ends is seen in a
    run with one token more than it has: some grow, and tables of distances are looked up at their last row.

    Args:
        run: runs the model on so many tokens, all the same.
        skipped: addresses of the tables of tokens.
    """

    def lookups(n: int, watched: tuple[Any, int] | None = None) -> dict[tuple[Any, int], int]:
        with _Lookups(skipped, watched) as mode:
            run(n)
        return mode.largest

    longer = LONG
    while True:
        try:
            high = lookups(longer)
            break
        except (IndexError, RuntimeError):
            if longer <= 2:
                raise
            longer //= 2
    shorter = longer * 3 // 4
    low = lookups(shorter)
    ends = [  # some models leave the first rows of the table out
        (size - (top + 1 - longer), kind, size)
        for (kind, size), top in high.items()
        if top - low.get((kind, size), top) == longer - shorter
    ]
    for positions, kind, size in sorted(ends, key=lambda end: end[0]):
        try:
            lookups(positions + 1, (kind, size))
        except (IndexError, RuntimeError):
            return positions
        except _Seen as seen:
            if not seen.args[0]:
                return positions
    return None


# --------------------------------------------------------------------------------------------------- causal and packed


def _check_causal(
    network: Any, run: Callable[[list[int], list[int]], Any], first: list[int], second: list[int]
) -> None:
    """Changes the tokens from a place on, and looks at the logits before it; and at what the loss compares."""
    n = len(first)
    if n < 2 or first == second:
        return  # nothing to see in one token
    config = network.config
    kind = f"{type(network).__name__} ({config.model_type})"
    output = run(first, first)
    logits = output.logits[0].float()
    moved = []
    for begin in sorted({max(1, n // 4), n // 2, n * 3 // 4}):
        changed = first[:begin] + second[begin:]
        other = run(changed, changed).logits[0].float()
        moved.append(float((other - logits)[:begin].abs().max() / logits[:begin].abs().max()))
    share = statistics.median(moved)  # where tokens compete for an expert, few of them see it
    tolerance = TOLERANCE.get(output.logits.dtype, LOW_PRECISION_TOLERANCE)
    if share > (INT8_TOLERANCE if getattr(network, "is_loaded_in_8bit", False) else tolerance):
        decoder = ", or set is_decoder in its config.json if it is a decoder" if "is_decoder" in vars(config) else ""
        raise LoRARiteValueError(
            f"{kind} is not causal: what comes after a token moves its logits, by {share:.1g} of their size, so that "
            f"it sees what it has to predict; give a causal or an encoder-decoder model{decoder}"
        )
    entropy = torch.nn.functional.cross_entropy
    labels = torch.tensor(first, device=logits.device)
    following, own = (float(entropy(*pair)) for pair in ((logits[:-1], labels[1:]), (logits, labels)))
    near = lambda value: abs(float(output.loss) - value) <= 1e-3 * abs(value)
    if near(own) and not near(following):
        raise LoRARiteValueError(
            f"{kind} has the loss of the token that it is given, not of the next one, so that it learns nothing of "
            "text; give another causal model"
        )


def _check_packing(network: Any, forward: Forward, first: list[int], second: list[int]) -> None:
    """Checks that the model keeps the examples of a window apart: the second one alone has the same logits."""

    def logits(tokens: list[int], positions: Sequence[int] | None = None) -> Tensor:
        more = {} if positions is None else {"position_ids": torch.tensor([list(positions)], device=network.device)}
        ids = torch.tensor([tokens], device=network.device)
        return forward(input_ids=ids, use_cache=False, **more).logits[0, -end:]  # with a cache, nothing is packed

    half = max(1, len(first) // 2)
    first, second = first[:half], second[:half]
    end = len(second)
    packed = logits(first + second, [*range(len(first)), *range(end)])
    alone, after_first = logits(second), logits(first + second)
    if (packed - alone).abs().max() > 0.1 * (after_first - alone).abs().max():
        raise LoRARiteValueError("this model does not keep the examples of a window apart")
