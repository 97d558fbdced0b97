"""What the release workflow asks of the repository."""

import importlib.metadata
import json
import os
import runpy
import subprocess
import sys
import zipfile
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The folder of an unpacked wheel of the working tree."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as content:
        content.extractall(folder / "unpacked")
    return folder / "unpacked"


def run(*words, **options):
    """What a command prints; what it says where it fails is in the error."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def with_wheel(wheel, *words, **options):
    return run(sys.executable, *words, env={**os.environ, "PYTHONPATH": str(wheel)}, **options)


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(wheel):
    """The embedded model and the templates of reports too."""
    files = lambda root: {
        p.relative_to(root) for p in root.rglob("*") if p.is_file() and p.parent.name != "__pycache__"
    }
    assert files(wheel / "lora_rite") == files(ROOT / "src" / "lora_rite")


@pytest.mark.slow
def test_paths_of_before_work_in_the_wheel(wheel, tmp_path):
    with_wheel(wheel, ROOT / "tests" / "public_paths.py", wheel, cwd=tmp_path)


@pytest.mark.slow
def test_the_commands_of_the_wheel_run(wheel, tmp_path):
    """By its entry point and as modules; a step of training finds the embedded model, which is in the wheel."""
    import lora_rite

    pytest.importorskip("jsonargparse")
    (distribution,) = importlib.metadata.distributions(path=[str(wheel)])
    (entry,) = distribution.entry_points.select(group="console_scripts", name="lora-rite")
    command = ("-c", f"import sys; from {entry.module} import {entry.attr} as main; sys.exit(main())")
    for words in (command, ("-m", "lora_rite"), ("-m", "lora_rite.cli")):
        assert with_wheel(wheel, *words, "--version", cwd=tmp_path).split()[-1] == lora_rite.__version__
        assert "compare" in with_wheel(wheel, *words, "--help", cwd=tmp_path)
    rows = [{"prompt": f"Say word {i}: ", "completion": "the quick brown fox jumps"} for i in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ("train", "--model", "tiny", "--data", "data.jsonl", "--steps", "1", "--out", "run")
    with_wheel(wheel, *command, *train, cwd=tmp_path)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
