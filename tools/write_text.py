"""Writes a text that lies on every machine with torch as a task for lora-rite compare, to predict the next token.

    python tools/write_text.py sympy-tests data/sympy-tests

Into the folder go train.jsonl, validation.jsonl and test.jsonl, a source file a line. Split by file: by the sha256 of
its path 1 in 10 goes to validation and 1 in 10 to test; in that order, as many as CHARACTERS allows. Files of the same
text count once. The same version of the text gives the same files everywhere. (The C++ headers of torch need no script:
a recipe has them as `task: torch-headers`.)
"""

import argparse
import hashlib
import importlib.util
import json
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lora_rite.errors import LoRARiteError, LoRARiteValueError
from lora_rite.run.files import check_empty, prepare_folder

#: Characters of text in each split, at most, and of one file.
CHARACTERS = {"train": 4_000_000, "validation": 64_000, "test": 64_000}
LONGEST = 20_000


class Text(NamedTuple):
    """Where a text is: the folder, the files in it by pattern, and folders whose files do not belong to it."""

    title: str
    licence: str
    root: Callable[[], Path]
    pattern: str
    without: tuple[str, ...] = ()


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise LoRARiteValueError(f"{name}, whose text it is, is not installed")
    return Path(spec.origin).parent


def standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


TEXTS = {
    "python-library": Text(
        "Python's standard library", "PSF licence", standard_library, "*.py", ("site-packages", "test", "tests")
    ),
    "sympy-tests": Text(
        "the tests of SymPy, computer algebra that torch installs", "BSD-3", lambda: package("sympy"), "test_*.py"
    ),
}


def read(root: Path, pattern: str, without: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """The files of a text in the three splits.

    Raises:
        LoRARiteValueError: a split has none.
    """
    files = [f for f in root.rglob(pattern) if not {*f.relative_to(root).parts} & {*without}]
    ordered = sorted((hashlib.sha256(f.relative_to(root).as_posix().encode()).hexdigest(), f) for f in files)
    sizes, seen = dict.fromkeys(CHARACTERS, 0), set()
    found: dict[str, list[str]] = {name: [] for name in CHARACTERS}
    for digest, file in ordered:
        name = {0: "test", 1: "validation"}.get(int(digest, 16) % 10, "train")
        text = file.read_text(encoding="utf-8", errors="replace")
        fits = len(text) <= LONGEST and sizes[name] + len(text) <= CHARACTERS[name]
        if text.strip() and text not in seen and fits:
            seen.add(text)
            sizes[name] += len(text)
            found[name].append(text)
    if empty := [name for name, texts in found.items() if not texts]:
        raise LoRARiteValueError(f"{root} has no {pattern} for {empty[0]}, of {len(files)} files")
    return found


def write(found: dict[str, list[str]], out: Path) -> None:
    """Writes the splits into a new or empty folder."""
    check_empty("OUT", out)
    prepare_folder("OUT", out)
    for name, texts in found.items():
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", choices=TEXTS)
    parser.add_argument("out", type=Path, help="new or empty folder")
    options = parser.parse_args(words)
    text = TEXTS[options.text]
    print(f"{text.title} ({text.licence})")
    try:
        found = read(text.root(), text.pattern, text.without)
        write(found, options.out)
    except (LoRARiteError, OSError) as error:
        print(f"write_text: error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: " + ", ".join(f"{len(v)} files in {name}.jsonl" for name, v in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
