"""Prints the changelog's section of a version; fails where tag, package, citation and changelog do not agree on it.

python tools/release_notes.py 0.2.0
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def release_notes(version: str, root: Path = ROOT) -> str:
    """The section of CHANGELOG.md.

    Raises:
        SystemExit: with a line that names the file that disagrees.
    """
    read = lambda path: (root / path).read_text(encoding="utf-8")
    found = {
        "src/lora_rite/__init__.py": re.search(r'^__version__ = "(.+)"', read("src/lora_rite/__init__.py"), re.M),
        "CITATION.cff": re.search(r'^version: "?([^"\n]+)"?', read("CITATION.cff"), re.M),
    }
    for path, match in found.items():
        if match is None or match[1] != version:
            sys.exit(f"{path} has version {match[1] if match else 'none'}, the tag {version}")
    section = re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)", read("CHANGELOG.md"), re.M | re.S
    )
    if section is None or not section[1].strip():
        sys.exit(f'CHANGELOG.md has no section "## [{version}] - YYYY-MM-DD"')
    return section[1].strip()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(release_notes(sys.argv[1]))
