"""What a model is going to see, on the terminal, before anything is trained."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .chats import IGNORED, set_chat_template
from .data import Sample, counted
from .load import load_tokenizer
from .windows import Row, Windows, label_count, windows

#: Around the text that carries loss.
MARKS = "«", "»"


def show_examples(
    count: int, samples: Sequence[Sample], model: str, length: int, chat_template: Path | None, trust_remote_code: bool
) -> None:
    """Prints the first ``count`` windows of the examples, with :data:`MARKS` around what carries loss. The model's
    weights are not loaded. Arguments as ``lora-rite train`` has them, by its names.

    Raises:
        LoRARiteValueError: the tokenizer cannot be loaded, or as :func:`~lora_rite.finetune.windows.windows`.
    """
    from rich.console import Console
    from rich.text import Text

    tokenizer, config = load_tokenizer(model, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        set_chat_template(tokenizer, chat_template)
    encoder_decoder = config.is_encoder_decoder
    found = windows(samples, tokenizer, length, encoder_decoder=encoder_decoder)
    console = Console(soft_wrap=True, highlight=False)
    for n, row in enumerate(found.rows[:count], 1):
        loss = label_count([row], encoder_decoder)
        heading = f"window {n} of {len(found.rows):,}: {len(row['input_ids']):,} tokens, {loss:,} with loss"
        console.print(Text(heading, style="dim"))
        console.print(_marked(row, tokenizer, encoder_decoder))


def _marked(row: Row, tokenizer: Any, encoder_decoder: bool) -> Any:
    from rich.text import Text

    text = Text()
    ids, learnt = row["input_ids"], [label != IGNORED for label in row["labels"]]
    if encoder_decoder:
        text.append(_decode(tokenizer, ids) + "\n")
        ids, learnt = row["labels"], [True] * len(row["labels"])
    else:
        learnt[0] = False  # nothing predicts it
    place = 0
    for carries_loss, run in itertools.groupby(learnt):
        end = place + len(list(run))
        part = _decode(tokenizer, ids[:end])[len(_decode(tokenizer, ids[:place])) :]  # alone, it would lose its blank
        text.append(MARKS[0] + part + MARKS[1] if carries_loss else part, style="bold green" if carries_loss else "")
        place = end
    return text


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def describe_windows(name: str, examples: Sequence[Sample], found: Windows, length: int, encoder_decoder: bool) -> str:
    """One line that says what became of a part of the data: windows and tokens, and what is cut and left out."""
    tokens = sum(len(row["input_ids"]) + len(row["labels"]) * encoder_decoder for row in found.rows)
    line = (
        f"{name}: {counted(len(examples), 'example')}, {counted(len(found.rows), 'window')}, {tokens:,} tokens, "
        f"{label_count(found.rows, encoder_decoder):,} with loss"
    )
    if found.cut:
        line += f"; cut, since longer than --max_length {length}: {found.cut:,}"
    if found.dropped:
        line += f"; left out, since no token with loss is in the window: {found.dropped:,}"
    return line
