"""The parser of the command line, made from the signatures of the verbs, on jsonargparse."""

import inspect
import re
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import docstring_parser
from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser, set_parsing_settings

from .. import __version__
from ..errors import LoRARiteValueError
from ..finetune.untrusted import CODE, forbid_imports, names_code, read_config
from ..finetune.wording import did_you_mean
from ..inputs import resolve
from .messages import said
from .registry import Verb
from .words import item_type, join_lists, with_underscores


class CommandLine:
    """Reads the words of a command line.

    Args:
        verbs: by their names, of one word, or of two where they are in a group.
        groups: what these are for.
    """

    def __init__(self, verbs: Mapping[str, Verb], groups: Mapping[str, str]):
        forbid_imports()
        self.lists: dict[str, Any] = {}
        self.places: dict[str, str] = {}  # file:line of what came from a config file
        self.parser = ArgumentParser(
            prog="lora-rite", description="Fine-tuning with LoRA-RITE.", version=__version__, exit_on_error=False
        )
        commands = {"": self.parser.add_subcommands(dest="verb")}
        for name, verb in verbs.items():
            parent, _, own = name.rpartition(" ")
            if parent not in commands:
                what, names = groups[parent], ", ".join(n.split()[1] for n in verbs if n.startswith(f"{parent} "))
                group = ArgumentParser(description=f"{what}.", exit_on_error=False)
                commands[""].add_subcommand(parent, group, help=f"{what}: {names}.")
                commands[parent] = group.add_subcommands(dest="part")
            function = verb.run if verb.signature is None else resolve(verb.signature)
            summary = (function.__doc__ or "").split("\n")[0]
            commands[parent].add_subcommand(own, self._make(function, verb.positional), help=summary)

    def _make(self, function: Callable[..., Any], positional: bool) -> ArgumentParser:
        """The parser of a verb with the options of a function."""
        text = function.__doc__ or ""
        verb = ArgumentParser(description=text.split("\n\n    Args:")[0], exit_on_error=False)
        verb.add_argument("--config", action=_config_file(self.places), help="YAML file with any of these options")
        verb.add_argument("--debug", action="store_true", help="show a traceback where something goes wrong")
        parameters = inspect.signature(function).parameters.values()
        self.lists.update({f"--{p.name}": p.annotation for p in parameters if item_type(p.annotation) is not None})
        switches = [p for p in parameters if isinstance(p.default, bool)]
        skip: set[str | int] = {p.name for p in switches}
        verb.add_function_arguments(function, as_group=False, as_positional=positional, skip=skip)
        texts = {p.arg_name: p.description for p in docstring_parser.parse(text).params}
        for p in switches:  # --resume instead of --resume true
            verb.add_argument(f"--{p.name}", action=ActionYesNo, default=p.default, help=texts[p.name])
        return verb

    def parse(self, words: Sequence[str]) -> tuple[str, dict[str, Any]]:
        """The name of the verb, and its options. Without words, or with those of a group alone, it prints the help and
        exits.

        Raises:
            LoRARiteValueError: what is wrong with the words, or with a config file that they name.
        """
        words = [with_underscores(word) for word in words]
        name, parser = self._named(words)
        if " ".join(words) == name and parser._subcommands_action is not None:  # nothing, or a group alone
            with suppress(SystemExit):
                self._parse([*words, "--help"])
            raise SystemExit(2)
        try:
            arguments = self._parse(join_lists(words, self.lists))
        except ArgumentError as error:
            options = [key.lstrip("-") for key in parser._option_string_actions if key[:2] == "--" and key[-1] != "+"]
            positional = [action.dest for action in parser._actions if not action.option_strings]
            message = said(str(error), words, name, options, positional)
            key = re.match(r"--(\w+)(?=:| must be )", message)
            if key and key[1] in self.places and not any(re.match(f"--{key[1]}(=|$)", word) for word in words):
                message = f"{self.places[key[1]]}: {message.removeprefix('--')}"
            raise LoRARiteValueError(f"{message} (see lora-rite {name}{' ' * bool(name)}--help)") from None
        verb = arguments.verb
        options = self.parser.instantiate(arguments)[verb].as_dict()
        if "part" in options:
            part = options["part"]
            verb, options = f"{verb} {part}", options[part]
        options.pop("config")
        return verb, options

    def _parse(self, words: list[str]) -> Any:
        set_parsing_settings(
            add_print_completion_argument=True
        )  # here alone: a parser that reads a file must not print
        try:
            return self.parser.parse_args(words)
        finally:
            set_parsing_settings(add_print_completion_argument=False)

    def _named(self, words: Sequence[str]) -> tuple[str, ArgumentParser]:
        """The verb or group that words name, and its parser; "" and the whole parser where they name none."""
        name, parser = "", self.parser
        for word in words:
            commands: Any = parser._subcommands_action
            if commands is None or word not in commands.choices:
                break
            name, parser = f"{name} {word}".lstrip(), commands.choices[word]
        return name, parser


def _config_file(places: dict[str, str]) -> type[ActionConfigFile]:
    """The action of ``--config``, which notes in ``places`` where each key stands."""

    class ConfigFile(ActionConfigFile):
        """Checks a config file, which may come from a stranger, before it is read."""

        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
            options = {action.dest: action for action in parser._actions}
            try:
                config = read_config(Path(values))
            except LoRARiteValueError as error:
                raise TypeError(str(error)) from None
            places.update(config.lines)
            for key, value in config.items():
                _check_key(key, value, options, places[key])
            super().__call__(parser, cfg, values, option_string)
            for key in config:  # as jsonargparse has read them: it looks into strings too
                option = key.partition(".")[0]
                if option in CODE and names_code(cfg[option]) and cfg[option] != options[option].default:
                    what = f"--{option} with an import path"
                    raise TypeError(f"{places[key]}: {what} can be given on the command line only")

    return ConfigFile


def _check_key(key: str, value: Any, options: dict[str, Any], place: str) -> None:
    """Raises TypeError where a key of a config file is no option, or one that must not come from a file."""
    if key.partition(".")[0] not in options:
        raise TypeError(f"{place}: no option {key}{did_you_mean(key, options)}")
    on = value not in (False, None)  # --print_config writes them where they are off
    if on and key in ("config", "debug", "trust_remote_code"):
        raise TypeError(f"{place}: --{key} can be given on the command line only")
    if isinstance(options.get(key), ActionYesNo) and not isinstance(value, bool):
        raise TypeError(f"{place}: {key} must be true or false, got {value!r}")
