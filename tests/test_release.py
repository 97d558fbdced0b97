"""What the release workflow asks of the repository."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from release_notes import release_notes  # noqa: E402


def repository(
    folder, *, package="0.2.0", citation="0.2.0", changelog="## [0.2.0] - 2027-01-02\n\n- New.\n\n## [0.1.0] - …\n"
):
    (folder / "src" / "lora_rite").mkdir(parents=True)
    (folder / "src" / "lora_rite" / "__init__.py").write_text(f'__version__ = "{package}"\n')
    (folder / "CITATION.cff").write_text(f"version: {citation}\n")
    (folder / "CHANGELOG.md").write_text(f"# Changelog\n\n## [Unreleased]\n\n{changelog}", encoding="utf-8")
    return folder


def test_notes_are_the_section_of_the_version(tmp_path):
    assert release_notes("0.2.0", repository(tmp_path)) == "- New."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"package": "0.1.9"}, r"__init__\.py has version 0\.1\.9, the tag 0\.2\.0"),
        ({"citation": "0.1.9"}, r"CITATION\.cff has version 0\.1\.9"),
        ({"changelog": ""}, r"CHANGELOG\.md has no section"),
        ({"changelog": "## [0.2.0] - 2027-01-02\n\n"}, r"CHANGELOG\.md has no section"),
    ],
)
def test_disagreement_is_named(tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        release_notes("0.2.0", repository(tmp_path, **options))


def test_package_and_citation_agree_now():
    import lora_rite

    assert f"\nversion: {lora_rite.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.parametrize("tool", sorted((ROOT / "tools").glob("*.py")), ids=lambda tool: tool.stem)
def test_tools_start(tool):
    """They are run by hand, now and then: what they import must still be there."""
    pytest.importorskip("peft")
    pytest.importorskip("mkdocs")
    runpy.run_path(str(tool), run_name="imported")
