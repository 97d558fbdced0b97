"""Multiple choice with a sentence encoder, and recipes whose runs a function trains."""

import json
import math
import random

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import transformers

from lora_rite import LoRARiteValueError
from lora_rite.cli import main
from lora_rite.finetune.choices import Chooser, train_choices

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = [a + b for a in "bdfgkl" for b in "aeiou"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random BERT of two layers that knows some syllables."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=len(vocabulary), hidden_dropout_prob=0.0, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def write_questions(path, count, seed):
    """Each syllable has one that belongs to it, which is the right answer; two to four answers."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            asked = draw.randrange(len(WORDS))
            right = WORDS[(asked + 7) % len(WORDS)]
            others = draw.sample([word for word in WORDS if word != right], draw.randint(1, 3))
            file.write(json.dumps({"prompt": WORDS[asked], "completion": f" {right}", "others": others}) + "\n")
    return path


def train(encoder, folder, **options):
    data = write_questions(folder / "train.jsonl", 200, 0)
    validation = write_questions(folder / "validation.jsonl", 50, 1)
    given = {"optimizer": "lora-rite", "lr": 1e-2, "rank": 4, "steps": 100, **options}
    return train_choices(folder / "out", data, validation, str(encoder), **given)


def test_it_learns_to_choose(encoder, tmp_path):
    result = train(encoder, tmp_path, eval_every=50)
    assert result["held_out"]["after"] < 0.5 * result["held_out"]["before"]
    assert result["accuracy"]["after"] > 0.7 > 0.5 > result["accuracy"]["before"]
    assert [entry["step"] for entry in result["held_out_losses"]] == [50, 100]
    assert result["held_out_losses"][-1]["held_out_loss"] == pytest.approx(result["held_out"]["after"])
    assert result["optimizer"]["name"] == "LoRARite"
    assert result["optimizer"]["report"]["pairs"] == 13  # the pooler's too, which has no part in the loss


def test_runs_of_a_seed_are_paired(encoder, tmp_path):
    """The first loss, before any step, is the same for every optimizer."""
    starts = set()
    for optimizer in ("lora-rite", "adamw"):
        (tmp_path / optimizer).mkdir()
        result = train(encoder, tmp_path / optimizer, optimizer=optimizer, steps=2)
        starts.add((result["held_out"]["before"], result["losses"][0]["loss"]))
    assert len(starts) == 1


def test_scores_do_not_depend_on_the_batch(encoder):
    """Questions with other numbers of answers and longer texts beside them change nothing; cosines by hand."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    model = transformers.AutoModel.from_pretrained(encoder)
    chooser = Chooser(model, 20.0).eval()
    questions = {"ba be": ["be", "bi bo"], "da": ["da", "de", "di do du"]}
    encode = lambda texts: dict(tokenizer(texts, padding=True, return_tensors="pt"))
    with torch.no_grad():
        given = encode([text for answers in questions.values() for text in answers])
        scores = chooser(encode(list(questions)), given, torch.tensor([2, 3]))["scores"]
        for row, (question, answers) in zip(scores, questions.items(), strict=True):
            mean = lambda text: model(**encode([text])).last_hidden_state[0].mean(0)
            expected = [20 * torch.cosine_similarity(mean(question), mean(text), dim=0) for text in answers]
            torch.testing.assert_close(row[: len(answers)], torch.stack(expected), rtol=1e-4, atol=1e-4)
            assert (row[len(answers) :] == -math.inf).all()


def test_a_question_needs_wrong_answers(encoder, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "ba", "completion": "ba", "others": ["be"]}\n{"prompt": "ba", "completion": "ba"}\n')
    with pytest.raises(LoRARiteValueError, match=r'bad.jsonl:2: a question needs "prompt", "completion" and "others"'):
        train_choices(tmp_path, path, path, str(encoder), "adamw", 1e-3)
    path.write_text('{"prompt": "ba", "completion": "ba", "others": "be"}\n')
    with pytest.raises(LoRARiteValueError, match='"others" must be a list of completions'):
        train_choices(tmp_path, path, path, str(encoder), "adamw", 1e-3)


RECIPE = """
title: Syllables
function: {function}
train: {{model: {model}, steps: 4, batch_size: 4}}
tasks:
  Syllables: {{data: {folder}/train.jsonl, validation: {folder}/validation.jsonl, test: {folder}/test.jsonl}}
ranks: [2]
seeds: [0, 1, 2]
sweep_seeds: [100]
optimizers:
  AdamW: {{optimizer: adamw, lr: [1e-3]}}
  LoRA-RITE: {{optimizer: lora-rite, lr: [1e-3]}}
"""


@pytest.fixture
def recipe(encoder, tmp_path):
    for seed, name in enumerate(("train", "validation", "test")):
        write_questions(tmp_path / f"{name}.jsonl", 20, seed)
    path = tmp_path / "recipe.yaml"

    def write(function="lora_rite.finetune.choices:train_choices", **changes):
        text = RECIPE.format(function=function, model=encoder, folder=tmp_path)
        for old, new in changes.items():
            text = text.replace(old, new)
        path.write_text(text)
        return str(path)

    return write


def test_a_function_trains_the_runs_of_a_study(recipe, tmp_path, capsys):
    pytest.importorskip("jsonargparse")
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    out = tmp_path / "study"
    command = ["compare", recipe(), "--out", str(out), "--no_progress"]
    assert main(command) == 0
    report = (out / "report.md").read_text()
    assert "accuracy" in report
    assert report.count("result.json") >= 6
    path = out / "runs/Syllables/r2/LoRA-RITE/lr0.001-seed0-test/result.json"
    result = json.loads(path.read_text())
    assert result["settings"]["steps"] == 4
    assert result["settings"]["scale"] == 20.0  # also what the recipe leaves as it is
    assert result["accuracy"]["questions"] == 20
    before = path.stat().st_mtime_ns
    assert main(command) == 0
    assert path.stat().st_mtime_ns == before  # a finished run is never run again
    assert main(["compare", recipe(), "--check"]) == 0
    assert "rank 2: 13 pairs" in capsys.readouterr().out


def ends_in_nan(out, data, validation, optimizer, optimizer_args, lr, rank, seed, model, steps, batch_size):
    return {"held_out": {"before": 1.0, "after": math.nan}, "held_out_losses": []}


def test_a_loss_that_is_nan_counts_as_diverged(recipe, tmp_path):
    pytest.importorskip("jsonargparse")
    pytest.importorskip("jinja2")
    out = tmp_path / "study"
    assert main(["compare", recipe(f"{__name__}:ends_in_nan"), "--out", str(out), "--no_progress"]) == 0
    result = json.loads((out / "runs/Syllables/r2/AdamW/lr0.001-seed0-test/result.json").read_text())
    assert result["held_out"]["after"] == math.inf
    assert result["diverged"] == "the held-out loss is nan after training"
    assert all(run["loss"] == math.inf for run in json.loads((out / "study.json").read_text())["runs"])
    assert "diverged" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"function": "json:loads"}, "function json:loads must take data, "),
        ({"function": "json:nothing"}, "cannot import json:nothing: module 'json' has no attribute 'nothing'"),
        ({"function": "foo"}, "'foo' is not an import path like "),
        ({"steps: 4": "no_such: 4"}, "no_such"),
        ({"test: ": "evaluate: [gsm8k], test: "}, "evaluate: there is no adapter where a function trains"),
    ],
)
def test_bad_functions_are_refused(recipe, capsys, changes, message):
    pytest.importorskip("jsonargparse")
    assert main(["compare", recipe(**changes), "--dry-run"]) == 2
    assert message in capsys.readouterr().err
