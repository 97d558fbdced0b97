"""For mkdocs: what pages link to outside docs/ is published with them, under repository/, as it is (Markdown and Python
as text)."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(\.\./([^)#]+)")


def _published(path: str) -> str:
    return f"repository/{path}{'.txt' if path.endswith(('.md', '.py')) else ''}"


def on_files(files: Files, config: Any) -> Files:
    """Adds the files that are linked to; the build ends with an error where one does not exist."""
    linked = {path for page in files.documentation_pages() for path in LINK.findall(page.content_string)}
    for path in sorted(linked):
        files.append(File.generated(config, _published(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return LINK.sub(lambda match: f"]({_published(match[1])}", markdown)
