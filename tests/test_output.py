"""Output on terminals, pipes and disks of any kind: no result is lost to a character, and a closed pipe is no error."""

import io
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("peft")
pytest.importorskip("jsonargparse")

from lora_rite.cli import main
from lora_rite.cli.program import READER_GONE
from lora_rite.run.output import tolerant_output

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
ENCODINGS = ["ascii", "cp1252", "cp437", "utf-8"]
SMALL = ["--steps", 2, "--batch_size", 2, "--max_length", 32, "--rank", 2, "--no_progress"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"line {i}, {i * i} is a number."}) for i in range(40)))
    return path


@pytest.fixture
def run(monkeypatch):
    """Runs a verb on stdout and stderr of an encoding, and returns its exit code and what they have got."""

    def run(encoding, *words, errors="strict"):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # of --help
            code = stop.code
        monkeypatch.undo()
        assert [stream.errors for stream in streams] == [errors] * 2  # as they were
        for stream in streams:
            stream.flush()
        return code, *(stream.buffer.getvalue().decode(encoding) for stream in streams)

    return run


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_train_and_eval_say_their_figures(encoding, data, tmp_path, run):
    code, out, _ = run(encoding, "train", "--data", data, "--out", tmp_path / "run", *SMALL)
    assert code == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())["held_out"]
    arrow = "→" if encoding == "utf-8" else "->"
    assert f"{result['before']:.4f} {arrow} {result['after']:.4f}" in out
    adapter = tmp_path / "run" / "adapter"
    code, out, _ = run(encoding, "eval", "--tasks", data, "--adapter", adapter, "--no_progress", "--limit", 2)
    assert code == 0
    lines = out.splitlines()
    assert len({len(line) for line in lines}) == 1  # the table is still one
    assert any("loss" in line for line in lines)


def study(data, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        f"title: Größe → 1\ntasks: {{sums: {{data: {json.dumps(str(data))}}}}}\ntrain: {{steps: 2}}\n"
        "optimizers: {AdamW: {optimizer: adamw, lr: [0.01]}}\n"
    )
    return path


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("verb", ["audit", "compare", "bench", "pairs", "theory", "help"])
def test_other_verbs_end_as_they_do_elsewhere(verb, encoding, data, tmp_path, run):
    words = {
        "audit": ["audit", "--optimizer", "torch.optim:SGD", "--steps", 1, "--conditions", 10, "--dtypes", "float64"],
        "compare": ["compare", study(data, tmp_path), "--dry_run", "--check"],
        "bench": ["bench", "step", "--models", "tiny", "--layers", 1, "--ranks", 2, "--rounds", 1],
        "pairs": ["pairs"],
        "theory": ["theory", "width", "--settings", '{"widths": [8, 16], "steps": 2}'],
        "help": ["audit", "--help"],
    }[verb]
    expected, whole, _ = run("utf-8", *words)
    code, out, _ = run(encoding, *words)
    assert code == expected
    assert out.count("\n") == whole.count("\n")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_odd_names_are_spelled_out_in_errors(encoding, tmp_path, run):
    """Letters that no small encoding has, and a byte that is no UTF-8, which Python has as a lone surrogate."""
    words = ["train", "--data", tmp_path / "\u03a9\u6f22.jsonl", "--out", tmp_path / "run", "--no_progress"]
    code, _, errors = run(encoding, *words)
    assert code == 2
    assert errors.count("\n") == 1
    assert ("\u03a9\u6f22" if encoding == "utf-8" else "\\u6f22") in errors
    for words in (["train", "--caf\udce9", 1], ["train", "--data", "caf\udce9", "--out", "x"]):
        code, _, errors = run(encoding, *words)
        assert code == 2
        assert errors.count("\n") == 1
        assert "\\udce9" in errors


@pytest.mark.parametrize(("encoding", "errors"), [("ascii", "surrogateescape"), ("cp1252", "backslashreplace")])
def test_streams_of_the_c_locale_and_stderr_are_tolerant_too(encoding, errors, run):
    """Python's stdout in the C locale raises at what is no surrogate; its stderr spells out what has a plain form."""
    code, out, _ = run(encoding, "audit", "--help", errors=errors)
    assert code == 0
    assert "K-" in out  # (cp1252 has the ¹ of K⁻¹)


def test_what_the_user_said_about_errors_stays(run):
    assert "K??" in run("ascii", "audit", "--help", errors="replace")[1]


def test_every_character_of_unicode_can_be_written():
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with tolerant_output():
            print("".join(map(chr, range(sys.maxunicode + 1))), end="")
        stream.flush()
        written = stream.buffer.getvalue().decode("ascii")
    assert "\\U0010ffff" in written
    assert written.count("\\udc80") == 1


def test_letters_of_names_are_not_changed_into_others():
    """An e for an é would be another file's name."""
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with tolerant_output():
            print("é ½ ± → ┏━┓ σ² K⁻¹", end="")
        stream.flush()
        assert stream.buffer.getvalue() == rb"\xe9 \xbd +- -> +-+ sigma2 K-1"


def test_streams_that_are_none_or_no_files_are_left_alone(monkeypatch, data):
    """As of pythonw, and of notebooks."""
    for stream in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        code = main(["train", "--data", str(data), "--out", "x", "--steps", "0"])
        monkeypatch.undo()
        assert code == 2


#: A verb that prints so many bytes, or fails otherwise; the command line around it is the real one.
STUB = """
import sys
from lora_rite.cli import main
from lora_rite.cli.registry import VERBS, Verb

def pairs(model="tiny"):
    {body}

VERBS["pairs"] = Verb(pairs)
sys.exit(main(sys.argv[1:]))
"""


def on_closed_pipe(body, *words, stderr=subprocess.PIPE):
    """Exit code and stderr of that, where whoever reads stdout has gone before it prints."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", STUB.format(body=body), *words],
            stdout=write, stderr=stderr and (write if stderr == subprocess.STDOUT else stderr), timeout=120,
        )  # fmt: skip
    finally:
        os.close(write)
    return done.returncode, (done.stderr or b"").decode()


@pytest.mark.skipif(os.name == "nt", reason="pipes as POSIX has them")
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("print('x')", ["pairs"]),
        ("print('x' * 10**6)", ["pairs"]),
        ("[print('x' * 100) for _ in range(10**4)]", ["pairs"]),
        ("print('x'); print('y', file=sys.stderr)", ["pairs", "--debug"]),
        ("pass", ["pairs", "--help"]),
    ],
)
def test_a_closed_pipe_ends_quietly(body, words):
    """(argparse says nothing of a help text that nobody reads.)"""
    code, errors = on_closed_pipe(body, *words)
    assert code == (0 if "--help" in words else READER_GONE)
    assert errors.strip() in ("", "y")


@pytest.mark.skipif(os.name == "nt", reason="pipes as POSIX has them")
def test_a_closed_pipe_of_both_ends_quietly():
    assert on_closed_pipe("raise OSError('gone')", "pairs", stderr=subprocess.STDOUT)[0] == READER_GONE


@pytest.mark.skipif(os.name == "nt", reason="pipes as POSIX has them")
def test_a_broken_pipe_of_something_else_is_an_error():
    read, write = os.pipe()
    os.close(write)
    body = "raise BrokenPipeError(32, 'of a worker')"
    done = subprocess.run([sys.executable, "-c", STUB.format(body=body), "pairs"], capture_output=True, timeout=120)
    os.close(read)
    assert done.returncode == 1
    assert b"of a worker" in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
@pytest.mark.parametrize("body", ["print('x')", "print('x' * 10**6)"])
def test_a_full_disk_under_stdout_is_one_line(body):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", STUB.format(body=body), "pairs"], stdout=full, stderr=subprocess.PIPE, timeout=120
        )
    assert done.returncode == 4
    assert done.stderr.count(b"\n") == 1
    assert b"No space left" in done.stderr
