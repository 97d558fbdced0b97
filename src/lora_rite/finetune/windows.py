"""Token windows with their labels, made of examples."""

from itertools import takewhile
from typing import Any, NamedTuple

from ..errors import LoRARiteValueError
from .data import Example

IGNORED = -100  # the label of a token that carries no loss
Row = dict[str, list[int]]


class Windows(NamedTuple):
    """Rows of token ids for a batch, and how many of the examples were too long for one and are cut (or left out, where
    no token that carries loss was left)."""

    rows: list[Row]
    cut: int


def windows(
    examples: list[Example], tokenizer: Any, length: int, *, encoder_decoder: bool = False, packing: bool = False
) -> Windows:
    """Token windows of at most ``length`` tokens with their labels.

    Texts are put one after the other, between the tokenizer's begin and end tokens, and cut into windows. A prompt and
    its completion are a window of their own, cut at the end; the prompt's labels are ignored. They are tokenised
    together, and a token that spans both counts as the completion's.

    Args:
        examples: texts, or prompts with completions.
        tokenizer: a tokenizer of transformers.
        length: tokens in a window; for an encoder–decoder model, of a prompt and of a completion, each.
        encoder_decoder: the prompt goes to the encoder, the completion to the decoder; a text has no place there.
        packing: put several prompts with their completions into one window, as many as fit in their order. Each starts
            at position 0, and sees itself alone if the model takes ``position_ids`` for that. Windows are padded to
            ``length``.

    Raises:
        LoRARiteValueError: no token carries loss within ``length`` tokens.
    """
    encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def pair(prompt: str, completion: str) -> tuple[list[int], list[int]]:
        if encoder_decoder:
            return begin + encode(prompt) + end, begin + encode(completion) + end
        ids = begin + encode(prompt + completion) + end
        prefix = zip(begin + encode(prompt), ids, strict=False)
        ignored = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], prefix))
        return ids, [IGNORED] * ignored + ids[ignored:]

    stream: list[int] = []
    rows: list[Row] = []
    cut = 0
    for prompt, completion, shorter, _ in examples:
        if not prompt and encoder_decoder:
            raise LoRARiteValueError("an encoder-decoder model learns from prompts and completions, not from texts")
        if not prompt:
            stream += begin + encode(completion) + end
            continue
        prompts = [prompt, *shorter]
        pairs = (pair(text, completion) for text in prompts)
        ids, labels = next((p for p in pairs if len(p[0]) <= length), None) or pair(prompts[-1], completion)
        cut += max(len(ids), len(labels)) > length
        rows.append({"input_ids": ids[:length], "labels": labels[:length]})
    chunks = [stream[i : i + length] for i in range(0, len(stream), length)]
    rows += [{"input_ids": chunk, "labels": list(chunk)} for chunk in chunks]
    rows = [row for row in rows if label_count([row], encoder_decoder)]
    if not rows:
        raise LoRARiteValueError(
            f"no token carries loss within {length} tokens: prompts are too long, see --max_length"
        )
    if packing:
        return Windows(_pack(rows, tokenizer.pad_token_id, length), cut)
    return Windows([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows], cut)


def label_count(rows: list[Row], encoder_decoder: bool) -> int:
    """Tokens that carry loss. In a causal model nothing predicts a window's first one."""
    return sum(label != IGNORED for row in rows for label in row["labels"][0 if encoder_decoder else 1 :])


def _pack(rows: list[Row], pad: int, length: int) -> list[Row]:
    """Rows one after the other, as many in a window as fit, with positions that start anew at each."""
    packed: list[Row] = []
    for row in rows:
        ids, labels = row["input_ids"], [IGNORED, *row["labels"][1:]]  # nothing predicts a row's first token
        if not packed or len(packed[-1]["input_ids"]) + len(ids) > length:
            packed.append({"input_ids": [], "labels": [], "position_ids": []})
        for key, values in (("input_ids", ids), ("labels", labels), ("position_ids", range(len(ids)))):
            packed[-1][key] += values
    for row in packed:
        missing = length - len(row["input_ids"])
        row["input_ids"] += [pad] * missing
        row["labels"] += [IGNORED] * missing
        row["position_ids"] += range(missing)
    return packed
