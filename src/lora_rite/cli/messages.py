"""What is wrong with the words of a command line, in a line that says what to write instead."""

import re
from collections.abc import Collection, Sequence

from ..finetune.wording import did_you_mean, in_words


def said(message: str, words: Sequence[str], verb: str, options: Collection[str], positional: Collection[str]) -> str:
    """A message of argparse or jsonargparse in our words.

    Args:
        message: of the ArgumentError.
        words: of the command line.
        verb: the one that they name; "" where there is none.
        options: the names that the verb's options have, without dashes; of a group, and of ``lora-rite`` itself, of
            theirs.
        positional: those of them that are written without their names.
    """
    message = " ".join(message.split())
    if choice := re.fullmatch(r"argument (?:verb|part): invalid choice: '(.*)' \(choose from (.*)\)", message):
        if words[0].startswith("-"):  # its value was taken for a verb
            return _no_option(words[0].lstrip("-").partition("=")[0], verb, options)
        known = re.findall(r"'([^']*)'", choice[2])
        return f"no verb {choice[1]}{did_you_mean(choice[1], known)} (there are {', '.join(known)})"
    if "--print_completion: invalid choice: 'shtab-" in message:
        return '--print_completion needs shtab: pip install "lora-rite[finetune]"'
    if unknown := re.fullmatch(r"unrecognized arguments: (.*)", message):
        return _unknown(unknown[1].split(" "), words, verb, options)
    if ambiguous := re.match(r"ambiguous option: --([\w-]+)", message):
        return _no_option(ambiguous[1], verb, options)
    if value := re.fullmatch(r"argument (--\w+).*: expected one argument", message):
        return f"{value[1]} needs a value"
    return in_words(message, lambda key: key.upper() if key in positional else f"--{key}")


def _unknown(unknown: Sequence[str], words: Sequence[str], verb: str, options: Collection[str]) -> str:
    """Of words that are no option and no value of one, what is wrong with the first."""
    dashed = next((word for word in unknown if word.startswith("-")), None)
    if dashed is not None:
        return _no_option(dashed.lstrip("-").partition("=")[0], verb, options)
    before = words[words.index(unknown[0]) - 1] if unknown[0] in words else ""
    if before.startswith("--"):
        return f"{before} takes no value, got {unknown[0]}; --no_{before.lstrip('-')} is its opposite"
    return f"nothing takes the word {unknown[0]}"


def _no_option(name: str, verb: str, options: Collection[str]) -> str:
    return f"no option {'-' * min(2, len(name))}{name}{did_you_mean(name.replace('-', '_'), options, '--')}"
