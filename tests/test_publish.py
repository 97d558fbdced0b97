"""What a run leaves for others: card, tokenizer, the commands that come next, and the hub (a stub: no network)."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("jsonargparse")

import huggingface_hub  # noqa: E402
import transformers  # noqa: E402
from huggingface_hub import ModelCard  # noqa: E402

from lora_rite.cli import main  # noqa: E402
from lora_rite.finetune import publish  # noqa: E402
from lora_rite.finetune import trainer as train_module  # noqa: E402
from lora_rite.finetune.models import TINY  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "always::UserWarning")
SMALL = ["--steps", 2, "--batch_size", 2, "--max_length", 32, "--rank", 2, "--lr", 0.01, "--no_progress"]
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def run(*words):
    return main([str(word) for word in words])


def write_data(folder):
    path = folder / "my data.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"int add_{i}(int a) {{ return a + {i}; }}"}) + "\n" for i in range(20))
    )
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, which no test changes."""
    folder = tmp_path_factory.mktemp("trained")
    assert run("train", "--data", write_data(folder), "--out", folder / "run", *SMALL) == 0
    return folder / "run"


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of it."""
    import shutil

    return Path(shutil.copytree(trained, tmp_path / "run"))


class Hub:
    """The hub: who is asking, repositories with their files, and what was asked in order."""

    def __init__(self, role="write", fails=None):
        self.role, self.fails = role, fails
        self.calls, self.private, self.files = [], {}, {}

    def __call__(self):
        return self

    def whoami(self):
        self.calls.append("whoami")
        if self.role is None:
            raise OSError("Token is required")
        return {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": self.role}}}

    def create_repo(self, repo, private, exist_ok):
        assert exist_ok
        self.calls.append("create_repo")
        repo = repo if "/" in repo else f"me/{repo}"
        self.private.setdefault(repo, private)
        self.files.setdefault(repo, {})
        return SimpleNamespace(repo_id=repo)

    def file_exists(self, repo, name):
        return name in self.files[repo]

    def create_commit(self, repo, operations, commit_message):
        self.calls.append("create_commit")
        if self.fails is not None:
            raise self.fails
        for operation in operations:
            with operation.as_file() as file:
                self.files[repo][operation.path_in_repo] = file.read()
        return SimpleNamespace(repo_url=f"https://hub/{repo}")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()

    def download(repo, name):
        (tmp_path / "downloaded").write_bytes(hub.files[repo][name])
        return str(tmp_path / "downloaded")

    hub.hf_hub_download = download
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return hub


# ---------------------------------------------------------------------------------------------------- the run's folder


def test_the_card_says_what_result_json_says(trained):
    """Base, data, settings, losses and versions, as the hub's own class reads them; no blanks to fill in."""
    result = json.loads((trained / "result.json").read_text())
    card = ModelCard((trained / "adapter" / "README.md").read_text())
    assert card.data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora-rite"],
    }
    for text in (
        "| base model | tiny |",
        "| training data | my data.jsonl, 18 examples |",
        "| learning rate | 0.01, cosine",
        "| steps | 2, each of 2 windows of at most 32 tokens |",
        "rank 2, alpha 2",
        f"{result['held_out']['before']:.4f} before, {result['held_out']['after']:.4f} after",
        f"torch {result['versions']['torch']}",
        "| optimizer | lora-rite, ",
    ):
        assert text in card.text
    assert "More Information Needed" not in card.text
    assert str(trained.parent) not in card.content
    assert str(TINY.parent) not in card.content


@pytest.mark.parametrize(
    ("model", "base"), [("google/gemma-2b", "google/gemma-2b"), ("tiny", None), ("/home/me/secret/gemma", None)]
)
def test_the_card_names_a_base_that_the_hub_knows_or_none(model, base, trained):
    """The hub refuses a card whose base model is a folder; and whose folder it is, is nobody's business."""
    result = json.loads((trained / "result.json").read_text())
    result["settings"]["model"] = model
    card = ModelCard(publish.adapter_card(result, {"task_type": "CAUSAL_LM"}))
    assert card.data.get("base_model") == base
    assert "secret" not in card.content
    assert f"| base model | {Path(model).name if base is None else model} |" in card.text


def test_equal_runs_have_equal_folders(trained, tmp_path):
    """Byte for byte, the card and the tokenizer too: no date is in them."""
    assert run("train", "--data", trained.parent / "my data.jsonl", "--out", tmp_path / "again", *SMALL) == 0
    found = {path.name: path.read_bytes() for path in (tmp_path / "again" / "adapter").iterdir()}
    assert found.keys() == FILES
    assert found == {path.name: path.read_bytes() for path in (trained / "adapter").iterdir()}


def test_the_tokenizer_beside_the_adapter_is_the_models(trained, tmp_path, capsys):
    """With its chat template, and padding where the model pads, not where training does."""
    from test_after import TEMPLATE, make_llama

    base = make_llama(tmp_path / "base", template=TEMPLATE)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left", "pad_token": None}))
    data = trained.parent / "my data.jsonl"
    assert run("train", "--data", data, "--model", base, "--out", tmp_path / "run", *SMALL) == 0
    model, found = (transformers.AutoTokenizer.from_pretrained(path) for path in (base, tmp_path / "run" / "adapter"))
    assert found.chat_template == model.chat_template == TEMPLATE
    assert (found.padding_side, found.pad_token) == (model.padding_side, model.pad_token) == ("left", None)
    assert found.get_vocab() == model.get_vocab()
    assert found("int a;").input_ids == model("int a;").input_ids


def test_the_end_of_a_run_prints_the_commands_that_come_next(trained, tmp_path, capsys):
    """With its paths; generate and merge are run as they stand there."""
    out, data = tmp_path / "my run", trained.parent / "my data.jsonl"
    assert run("train", "--data", data, "--validation", data, "--out", out, *SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in lines[lines.index("next:") + 1 :]]
    assert [command[:2] for command in commands] == [
        ["lora-rite", verb] for verb in ("generate", "eval", "merge", "report")
    ]
    assert commands[1][2:] == ["--tasks", str(data), "--model", "tiny", "--adapter", str(out / "adapter")]
    assert commands[3][2:] == [str(out)]
    assert main([*commands[0][1:], "--max_new_tokens", "1"]) == 0
    assert main(commands[2][1:]) == 0
    assert (out / "merged" / "model.safetensors").is_file()
    assert main([*commands[1][1:], "--loss_only"]) == 0


@pytest.mark.parametrize(
    ("given", "generates", "evaluates"),
    [
        ({"dtype": "float32"}, [], []),
        ({"dtype": "bfloat16", "bf16": True}, [], ["--dtype", "bfloat16"]),
        ({"dtype": "auto"}, [], ["--dtype", "auto"]),
        ({"dtype": "auto", "load_in_4bit": True}, ["--load_in_4bit"], ["--load_in_4bit"]),
        (
            {"dtype": "float16", "load_in_8bit": True, "trust_remote_code": True},
            ["--load_in_8bit", "--trust_remote_code"],
            ["--dtype", "float16", "--load_in_8bit", "--trust_remote_code"],
        ),
        ({"bf16": True}, [], ["--dtype", "bfloat16"]),  # of a run of before
    ],
)
def test_the_commands_that_come_next_have_the_weights_of_the_run(given, generates, evaluates):
    same = {
        "out": "run",
        "task": "gsm8k",
        "validation": None,
        "model": "tiny",
        "bf16": False,
        "trust_remote_code": False,
    }
    lines = publish.next_commands({"settings": {**same, **given}}).splitlines()
    assert shlex.split(lines[1])[5:] == generates
    assert shlex.split(lines[2])[8:] == evaluates


# -------------------------------------------------------------------------------------------------------------- the hub


def test_train_pushes_after_success(trained, tmp_path, hub, capsys, monkeypatch):
    """It asks before training whether it may, and uploads after it; a new repository is private."""
    train = train_module._arguments

    def begun(*arguments, **more):
        assert hub.calls == ["whoami"]
        return train(*arguments, **more)

    monkeypatch.setattr(train_module, "_arguments", begun)
    out, data = tmp_path / "run", trained.parent / "my data.jsonl"
    assert run("train", "--data", data, "--out", out, *SMALL, "--push_to_hub", "adapter") == 0
    assert "https://hub/me/adapter" in capsys.readouterr().out
    assert hub.private == {"me/adapter": True}
    assert hub.files["me/adapter"].keys() == FILES
    for name, content in hub.files["me/adapter"].items():
        assert content == (out / "adapter" / name).read_bytes() or name == "adapter_config.json"
    assert "push_to_hub" not in json.loads((out / "result.json").read_text())["settings"]
    hub.files["me/adapter"].clear()
    monkeypatch.setattr(train_module, "_arguments", lambda *_, **__: pytest.fail("trained again"))
    assert run("train", "--data", data, "--out", out, *SMALL, "--push_to_hub", "adapter", "--resume") == 0
    assert hub.files["me/adapter"].keys() == FILES


@pytest.mark.parametrize(
    ("repo", "role", "says"),
    [
        ("me/adapter", None, "--push_to_hub me/adapter: Token is required"),
        ("me/adapter", "read", "the token in use may only read"),
        ("them/adapter", "write", "you are me, and can write to me, us alone"),
        ("me/ad apter", "write", "--push_to_hub me/ad apter: "),
        ("a/b/c", "write", "--push_to_hub a/b/c: "),
    ],
)
def test_what_cannot_be_pushed_is_said_before_training(repo, role, says, trained, tmp_path, hub, capsys):
    hub.role = role
    data = trained.parent / "my data.jsonl"
    assert run("train", "--data", data, "--out", tmp_path / "run", *SMALL, "--push_to_hub", repo) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "run").exists()
    assert hub.calls in (["whoami"], [])


def test_a_folder_that_cannot_be_pushed_is_named(tmp_path, hub, capsys):
    (tmp_path / "empty").mkdir()
    for name, says in (("nowhere", "there is no such folder"), ("empty", "")):
        assert run("push", tmp_path / name, "me/adapter") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"lora-rite push: error: {tmp_path / name}: {says}")
    assert not hub.calls


def test_a_run_that_fails_is_not_pushed(trained, tmp_path, hub):
    words = ["--optimizer", "adamw", "--push_to_hub", "me/adapter", *SMALL]
    data = trained.parent / "my data.jsonl"
    assert run("train", "--data", data, "--out", tmp_path / "run", *words, "--lr", 1e30, "--steps", 5) == 3
    assert hub.calls == ["whoami"]


def test_an_upload_that_fails_says_how_to_try_again(trained, tmp_path, hub, capsys):
    """Exit code 1; the adapter is on the disk, and the command that is printed uploads it."""
    hub.fails = OSError("the hub is down\nsee its status")
    out, data = tmp_path / "run", trained.parent / "my data.jsonl"
    assert run("train", "--data", data, "--out", out, *SMALL, "--push_to_hub", "us/adapter") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "cannot upload to us/adapter: the hub is down see its status" in line
    command = shlex.split(line[line.index("lora-rite push") :])
    hub.fails = None
    assert main(command[1:]) == 0
    assert hub.files["us/adapter"].keys() == FILES


def test_push_leaves_what_is_no_part_of_an_adapter(finished, hub, capsys):
    """No pickle, no code, no state of an optimizer, nothing hidden; no weights is an error."""
    for name in ("optimizer.pt", "adapter_model.bin", "evil.py", ".env.json", "notes.md"):
        (finished / "adapter" / name).write_text("x")
    assert run("push", finished, "me/adapter", "--public") == 0
    assert hub.private == {"me/adapter": False}
    assert hub.files["me/adapter"].keys() == {*FILES, "notes.md"}
    assert "which the hub does not know; there it is tiny: --model names it" in capsys.readouterr().err
    assert str(TINY.parent).encode() not in b"".join(hub.files["me/adapter"].values()), "a folder of this machine"
    config = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    there = json.loads(hub.files["me/adapter"]["adapter_config.json"])
    assert there == {**config, "base_model_name_or_path": "tiny"}
    (finished / "adapter" / "adapter_model.safetensors").unlink()
    assert run("push", finished, "me/other") == 2
    assert "is a pickle" in capsys.readouterr().err
    assert run("push", finished.parent, "me/other") == 2
    assert "me/other" not in hub.files


def test_push_names_the_base_on_the_hub(finished, hub, capsys):
    """--model: in the adapter's config and in its card, in the repository alone."""
    before = {path.name: path.read_bytes() for path in (finished / "adapter").iterdir()}
    assert run("push", finished / "adapter", "me/adapter", "--model", "google/gemma-2b") == 0
    files = hub.files["me/adapter"]
    config = json.loads(files["adapter_config.json"])
    assert config == {**json.loads(before["adapter_config.json"]), "base_model_name_or_path": "google/gemma-2b"}
    assert ModelCard(files["README.md"].decode()).data.base_model == "google/gemma-2b"
    assert before == {path.name: path.read_bytes() for path in (finished / "adapter").iterdir()}
    assert capsys.readouterr().err == ""
    assert run("push", finished, "me/adapter") == 0  # our card, unedited, is written over by ours
    assert hub.files["me/adapter"]["README.md"] == before["README.md"]


def test_a_card_that_somebody_has_written_is_not_written_over(finished, hub, capsys):
    """In the repository: it stays. In the folder: it is uploaded as it is, also with --model."""
    hub.create_repo("me/adapter", True, True)
    ours = (finished / "adapter" / "README.md").read_text()
    hub.files["me/adapter"]["README.md"] = ours.replace("LoRA adapter", "poem").encode()
    assert run("push", finished, "me/adapter", "--model", "google/gemma-2b") == 0
    assert "somebody has written: it is left as it is" in capsys.readouterr().err
    assert b"poem" in hub.files["me/adapter"]["README.md"]
    assert hub.files["me/adapter"].keys() == FILES
    (finished / "adapter" / "README.md").write_text("mine\n")
    assert run("push", finished, "me/new", "--model", "google/gemma-2b") == 0
    assert hub.files["me/new"]["README.md"] == b"mine\n"


def test_a_missing_card_is_that_of_the_run(finished, hub):
    ours = (finished / "adapter" / "README.md").read_bytes()
    (finished / "adapter" / "README.md").unlink()
    assert run("push", finished, "me/adapter") == 0
    assert hub.files["me/adapter"]["README.md"] == ours


def test_a_merged_model_is_pushed_with_its_card(finished, hub):
    """The whole model; its card says what it was made of."""
    assert run("merge", finished, "--out", finished / "merged") == 0
    assert run("push", finished / "merged", "me/merged", "--model", "google/gemma-2b") == 0
    files = hub.files["me/merged"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= files.keys()
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "google/gemma-2b"
    assert "| adapter | run |" in card.text
