"""Token windows with their labels, made of examples."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

from ..errors import LoRARiteValueError
from ..inputs import blame
from .chats import IGNORED, ChatEncoder
from .data import Chat, Example, Sample

Row = dict[str, list[int]]


class Windows(NamedTuple):
    """Rows of token ids for a batch; how many of the examples were too long for one and are cut; and how many are left
    out, since no token that carries loss is in the window (most of them were cut, too)."""

    rows: list[Row]
    cut: int
    dropped: int = 0


def windows(
    examples: Sequence[Sample], tokenizer: Any, length: int, *, encoder_decoder: bool = False, packing: bool = False
) -> Windows:
    """Token windows of at most ``length`` tokens with their labels.

    Texts are put one after the other, between the tokenizer's begin and end tokens (unless they have them already), and
    cut into windows. Where the tokenizer begins texts by itself, a window that begins amid a text has the begin token
    too, and the token after it carries no loss: without it Gemma 3 270M loses 4.6 nat a token instead of 2.5. A prompt
    and its completion are a window of their own, cut at the end; the prompt's labels are ignored. They are tokenised
    together, and a token that spans both counts as the completion's. A conversation is a window too, as the chat
    template writes it, and has labels where the assistant speaks.

    Args:
        examples: texts, prompts with completions, or conversations.
        tokenizer: a tokenizer of transformers.
        length: tokens in a window; for an encoder–decoder model, of a prompt and of a completion, each.
        encoder_decoder: the prompt goes to the encoder, the completion to the decoder; a text has no place there.
        packing: put several prompts with their completions into one window, as many as fit in their order. Each starts
            at position 0, and sees itself alone if the model takes ``position_ids`` for that. Windows are padded to
            ``length``.

    Raises:
        LoRARiteValueError: no token carries loss within ``length`` tokens; a conversation that cannot be encoded.
    """
    encoder = _Encoder(tokenizer, length, encoder_decoder)
    stream: list[int] = []
    rows: list[Row] = []
    cut = dropped = 0
    for example in examples:
        if isinstance(example, Example) and not example.prompt:
            stream += encoder.text(example.completion)
            continue
        ids, labels = encoder.pair(example)
        cut += max(len(ids), len(labels)) > length
        row = {"input_ids": ids[:length], "labels": labels[:length]}
        if label_count([row], encoder_decoder):
            rows.append(row)
        else:
            dropped += 1
    rows += [row for row in _cut(stream, length, encoder.head) if label_count([row], encoder_decoder)]
    if not rows:
        raise LoRARiteValueError(f"no token carries loss within {length} tokens: {encoder.why_none(examples)}")
    if packing:
        return Windows(_pack(rows, tokenizer.pad_token_id, length), cut, dropped)
    return Windows([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows], cut, dropped)


def make_windows(
    parts: Sequence[Sequence[Sample]],
    tokenizer: Any,
    model: str,
    length: int,
    *,
    encoder_decoder: bool = False,
    packing: bool = False,
) -> list[Windows]:
    """The :func:`windows` of each part, the first of which is to train on, and alone is packed, if any is.

    Args:
        model: what the user calls the model, for the errors.

    Raises:
        LoRARiteValueError: as :func:`windows` does, by the part; ``--packing`` for an encoder–decoder model; or the
            tokenizer cannot pad.
    """
    if packing and encoder_decoder:
        raise LoRARiteValueError("--packing is for causal models; an encoder-decoder model takes a prompt at a time")
    check_padding(tokenizer, model)
    found: list[Windows] = []
    for part in parts:
        with blame("the held-out data" if found else "the training data"):
            options = {"encoder_decoder": encoder_decoder, "packing": packing and not found}
            found.append(windows(part, tokenizer, length, **options))
    return found


def check_padding(tokenizer: Any, model: str) -> None:
    """Raises LoRARiteValueError, by ``--model``, where a tokenizer has no token to pad with."""
    if tokenizer.pad_token_id is None:
        raise LoRARiteValueError(
            f"--model {model}: its tokenizer has no token to pad with (no pad_token, eos_token, bos_token or "
            "unk_token): set pad_token in its tokenizer_config.json"
        )


class _Encoder:
    """Examples as token ids with labels, by one tokenizer for windows of one length."""

    def __init__(self, tokenizer: Any, length: int, encoder_decoder: bool):
        self.tokenizer, self.length, self.encoder_decoder = tokenizer, length, encoder_decoder
        self.begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        self.end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    @cached_property
    def head(self) -> list[int]:
        """What a window begins with that begins amid a text: the begin token where the tokenizer itself adds it."""
        return self.begin if self.tokenizer("")["input_ids"][:1] == self.begin else []

    @cached_property
    def chats(self) -> ChatEncoder | None:
        return None if getattr(self.tokenizer, "chat_template", None) is None else ChatEncoder(self.tokenizer)

    def why_none(self, examples: Sequence[Sample]) -> str:
        """Why of these examples no window has a token that carries loss."""
        pairs = [self.pair(example) for example in examples if isinstance(example, Chat) or example.prompt]
        first = 0 if self.encoder_decoder else 1
        begins = [next((n for n, x in enumerate(labels[first:], first) if x != IGNORED), 0) for _, labels in pairs]
        if least := min(filter(None, begins), default=0):
            return f"prompts are too long (the shortest has {least}), raise --max_length"
        return (
            f"the model's tokenizer makes no tokens of what is to be learnt ({_learnt(examples[0])!r} in the first "
            "example), or a single one, which nothing predicts"
        )

    def text(self, text: str) -> list[int]:
        if self.encoder_decoder:
            raise LoRARiteValueError("an encoder-decoder model learns from prompts and completions, not from texts")
        return self._ended(self._begun(text))

    def pair(self, example: Sample) -> tuple[list[int], list[int]]:
        """Ids and labels of the longest form that fits into a window, or else of the shortest."""
        if isinstance(example, Chat):
            if self.chats is not None and not self.encoder_decoder:
                return self.chats(example)
            if (plain := example.plain()) is None:
                raise LoRARiteValueError(
                    "an encoder-decoder model learns from prompts and completions, not from conversations"
                    if self.encoder_decoder
                    else "the model's tokenizer has no chat template for conversations; give --chat_template FILE "
                    "(docs/data.md has one to copy, for a base model)"
                )
            example = plain
        ids, labels = self._tokens(example.prompt, example.completion)
        for prompt in example.shorter:
            if len(ids) <= self.length:
                break
            ids, labels = self._tokens(prompt, example.completion)
        return ids, labels

    def _tokens(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        if self.encoder_decoder:
            return self._ended(self._begun(prompt)), self._ended(self._begun(completion))
        ids = self._ended(self._begun(prompt + completion))
        prefix = zip(self._begun(prompt), ids, strict=False)
        ignored = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], prefix))
        return ids, [IGNORED] * ignored + ids[ignored:]

    def _begun(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids if ids[:1] == self.begin else self.begin + ids

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids[-1:] == self.end else ids + self.end


def _learnt(example: Sample) -> str:
    """The beginning of what is to be learnt of an example."""
    text = example.messages if isinstance(example, Chat) else example.completion
    return text if len(text) <= 40 else f"{text[:40]}…"


def label_count(rows: Sequence[Row], encoder_decoder: bool) -> int:
    """Tokens that carry loss. In a causal model nothing predicts a window's first one."""
    labels = (row["labels"] if encoder_decoder else row["labels"][1:] for row in rows)
    return sum(len(found) - found.count(IGNORED) for found in labels)


def _cut(stream: list[int], length: int, head: list[int]) -> Iterator[Row]:
    """Texts one after the other as windows, the last of which may be shorter."""
    at = 0
    while at < len(stream):
        added = [] if stream[at : at + 1] == head else head
        ids = added + stream[at : at + length - len(added)]
        at += length - len(added)
        ignored = 2 * len(added)  # nothing that the window shows leads to the token after it
        yield {"input_ids": ids, "labels": [IGNORED] * min(ignored, len(ids)) + ids[ignored:]}


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
