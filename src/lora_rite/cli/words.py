"""The words of the command line, before they are parsed: dashes in options, and lists as words."""

import itertools
import json
import re
from typing import Any, get_args, get_origin


def with_underscores(word: str) -> str:
    """``--data-dir`` as ``--data_dir``; what follows a ``=`` stays as it is."""
    return re.sub(r"^--[\w-]+", lambda option: "--" + option[0][2:].replace("-", "_"), word)


def item_type(annotation: Any) -> Any:
    """What the lists hold that an option takes; None where it takes none."""
    if get_origin(annotation) is list:
        return get_args(annotation)[0]
    return next((found for part in get_args(annotation) if (found := item_type(part)) is not None), None)


def join_lists(words: list[str], lists: dict[str, Any]) -> list[str]:
    """``--ranks 4 16`` as ``--ranks '["4", "16"]'``, which the option's type reads. One word alone stays as it is where
    the type takes a word too.

    Args:
        words: of the command line.
        lists: the options that take lists, with their types.
    """
    words = [part for word in words for part in (word.split("=", 1) if word.partition("=")[0] in lists else [word])]
    joined = []
    while words:
        joined.append(words.pop(0))
        if (kind := lists.get(joined[-1])) is None:
            continue
        number = "[-+.0-9]" if item_type(kind) in (int, float) else ""  # then a word, as of a recipe, ends the list
        pattern = rf"(?!-[-a-z])({number}|null$|\[)"
        values = list(itertools.takewhile(re.compile(pattern).match, words))
        takes_word = get_origin(kind) is not list and str in get_args(kind)
        alone = len(values) == 1 and (takes_word or values[0] == "null")
        if values and not alone and not values[0].startswith("["):
            joined.append(json.dumps(values))
            del words[: len(values)]
    return joined
