"""Conversations as tokens, by a model's chat template, with loss on what the assistant says."""

import json
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError
from ..inputs import blame
from .data import Chat
from .records import read_text

#: The label of a token that carries no loss.
IGNORED = -100
#: What a chat template has around the assistant's turns if it says by itself where they are.
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: A template is at most so many bytes.
MAX_TEMPLATE_BYTES = 2**20

#: The file in which transformers keeps a tokenizer's chat template, in the folder of an adapter too.
CHAT_TEMPLATE = "chat_template.jinja"


def set_chat_template(tokenizer: Any, path: Path) -> None:
    """Gives the tokenizer the chat template of a file of Jinja, after a trial.

    Raises:
        LoRARiteValueError: no such file, or it cannot be used, by ``--chat_template``.
    """
    with blame(f"--chat_template {path}"):
        tokenizer.chat_template = read_text(path, MAX_TEMPLATE_BYTES)
        trial = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        tokenizer.apply_chat_template(trial, tokenize=False)


class ChatEncoder:
    """Token ids and labels of conversations.

    The template alone decides on special tokens: none are added, so that there is no second begin token. Where the
    assistant's turns are, the marks ``{% generation %}`` of the template say, or of TRL's version of it; where there
    are none, a turn is what the conversation up to it has more than the prompt that asks for it.

    Args:
        tokenizer: one of transformers with a chat template.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.template = tokenizer.get_chat_template()
        if not _MARKS.search(self.template):
            self.template = _training_template(tokenizer) or self.template
        self.marked = _MARKS.search(self.template) is not None

    def __call__(self, chat: Chat) -> tuple[list[int], list[int]]:
        """Ids of the tokens, and labels, which are -100 where a token carries no loss.

        Raises:
            LoRARiteValueError: the template does not take the conversation, or does not tell where the turns are.
        """
        messages, tools = json.loads(chat.messages), json.loads(chat.tools) if chat.tools else None
        begin = str(messages[0]["content"])[:40]
        with blame(f"the chat template does not take the conversation that begins {begin!r}"):
            encode = self._by_marks if self.marked else self._by_turns
            ids, learnt = encode(messages, chat.start, tools)
        return ids, [token if learn else IGNORED for token, learn in zip(ids, learnt, strict=True)]

    def _render(self, messages: list[dict[str, Any]], tools: Any, **how: Any) -> Any:
        return self.tokenizer.apply_chat_template(messages, tools=tools, chat_template=self.template, **how)

    def _by_marks(self, messages: list[dict[str, Any]], start: int, tools: Any) -> tuple[list[int], list[int]]:
        how = {"tokenize": True, "return_dict": True, "tokenizer_kwargs": {"verbose": False}}
        found = self._render(messages, tools, return_assistant_tokens_mask=True, **how)
        ids, learnt = list(found["input_ids"]), list(found["assistant_masks"])
        if start:
            prompt = self._render(messages[:start], tools, add_generation_prompt=True, **how)["input_ids"]
            before = common_length(prompt, ids)
            learnt[:before] = [0] * before
        return ids, learnt

    def _by_turns(self, messages: list[dict[str, Any]], start: int, tools: Any) -> tuple[list[int], list[bool]]:
        whole = self._render(messages, tools, tokenize=False)
        learnt = bytearray(len(whole))
        for n, message in enumerate(messages):
            if n < start or message["role"] != "assistant":
                continue
            before = self._render(messages[:n], tools, tokenize=False, add_generation_prompt=True) if n else ""
            after = self._render(messages[: n + 1], tools, tokenize=False)
            if not whole.startswith(after):
                raise LoRARiteValueError(
                    "it writes a turn otherwise once another follows, so that the turns cannot be told apart; give a "
                    "--chat_template that does not, or that marks them by {% generation %} and {% endgeneration %}"
                )
            first = common_length(before, after)
            learnt[first : len(after)] = b"\1" * (len(after) - first)
        if not self.tokenizer.is_fast:
            raise LoRARiteValueError("its tokenizer does not tell which characters a token has (it is not a fast one)")
        found = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(found["input_ids"]), [any(learnt[a:b]) for a, b in found["offset_mapping"]]


def common_length(a: Any, b: Any) -> int:
    """The length of the longest common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _training_template(tokenizer: Any) -> str | None:
    """TRL's version of a known template, for training; None where it has none."""
    from jinja2 import TemplateError
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer)
    except (ValueError, TypeError, LookupError, AttributeError, TemplateError):
        return None  # it knows no such template, or cannot try this one: the turns are found without marks
