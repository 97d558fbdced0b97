"""The tasks: where their rows are, the text that is learnt from them, and training on it."""

import json
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse")
pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

import torch  # noqa: E402
from task_files import INSTRUCTION_TASKS, choice_rows, gsm8k_rows, make_mt5, make_task_files, write_jsonl  # noqa: E402

from lora_rite.cli import main  # noqa: E402
from lora_rite.finetune import prepare as prepare_module  # noqa: E402
from lora_rite.finetune import tasks as module  # noqa: E402
from lora_rite.finetune import train as train_module  # noqa: E402
from lora_rite.finetune.data import Example  # noqa: E402
from lora_rite.finetune.header import summary  # noqa: E402
from lora_rite.finetune.limits import find_limits  # noqa: E402
from lora_rite.finetune.tasks import TASKS, examples, find_task, read_rows, read_task, require_rows  # noqa: E402
from lora_rite.finetune.windows import IGNORED, windows  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
SHARED = Path(__file__).parents[2] / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the data folder ../shared/data is not there")
LM_EVAL = [name for name, task in TASKS.items() if task.evaluation != "instructions"]
OPTIONS = {"steps": 3, "batch_size": 4, "max_length": 96, "rank": 4, "lr": 0.01, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_task_files(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def mt5(tmp_path_factory):
    return make_mt5(tmp_path_factory.mktemp("mt5"))


@pytest.fixture(scope="module")
def tiny():
    return prepare_module.load_model("tiny")


# ------------------------------------------------------------------------------------------------ texts and rows


def test_the_help_of_train_and_eval_has_every_name():
    from lora_rite.finetune.evaluate import evaluate

    for command in (train_module.train, evaluate):
        assert [name for name in TASKS if name not in command.__doc__] == []


@pytest.mark.parametrize("name", LM_EVAL)
def test_the_text_that_is_learnt_is_the_one_that_lm_eval_asks_for(name, folder):
    """Prompt and right answer as lm_eval 0-shot makes them, and its data set: training and evaluation agree."""
    pytest.importorskip("lm_eval")
    from lora_rite.finetune.judges import task_judge

    rows = require_rows(name, "test", folder)
    judge, _ = task_judge(name, TASKS[name], rows, folder, 0)
    docs = list(judge.eval_docs)
    assert len(docs) == len(rows.rows) == (5 if name == "gsm8k" else 6)
    for doc, example in zip(docs, examples(name, rows), strict=True):
        target = judge.doc_to_target(doc)
        others = []
        if TASKS[name].evaluation == "choices":
            others = list(judge.doc_to_choice(doc))
            target = others.pop(int(target))
        target, *others = (judge.config.target_delimiter + text for text in (target, *others))
        assert example == Example(judge.fewshot_context(doc, 0), target, others=tuple(others))
    assert TASKS[name].dataset == (judge.config.dataset_path, judge.config.dataset_name)


def test_gsm8k_by_hand(folder):
    (first, *_), source = read_task("gsm8k", "test", folder)
    assert first == Example("Question: Ann has 20 pens and buys 21. How many?\nAnswer:", " 20 + 21 = 41\n#### 41")
    assert source == str(folder / "gsm8k" / "test.jsonl")


def test_instructions_by_hand(folder):
    """Tk-Instruct's encoding with the definition and two positive examples; shorter ones where that is too long."""
    (first, *rest), _ = read_task("natural_instructions", "test", folder)
    assert len(rest) == 100 + 5 - 1
    shown = [
        " Positive Example 1 -\nInput: first in.\n Output: first out.\n\n",
        " Positive Example 2 -\nInput: second in?\n Output: second out.\n\n",
    ]
    start, end = "Definition: Do what task011_test_entailment says.\n\n", "Now complete the following example -\n"
    end += "Input: input 0.\nOutput:"
    assert first.prompt == start + "".join(shown) + end
    assert first.shorter == (start + shown[0] + end, start + end)
    assert first.completion == " No."


def test_instruction_splits(folder):
    """100 drawn of each training task, the first 100 of each test task; of a single task those, and the others."""
    by_task = lambda rows: {
        name: [r["Instance"]["id"] for r in rows if r["Task"] == name] for name in INSTRUCTION_TASKS
    }
    train = by_task(require_rows("natural_instructions", "train", folder).rows)
    assert [len(ids) for ids in train.values()] == [100, 30, 0, 0]
    assert len(set(train["task001_train_generation"])) == 100
    assert train == by_task(require_rows("natural_instructions", "train", folder).rows)
    test = by_task(require_rows("natural_instructions", "test", folder).rows)
    assert test["task011_test_entailment"] == [f"task011_test_entailment-{i}" for i in range(100)]
    single = "natural_instructions:task001"
    assert len(require_rows(single, "train", folder).rows) == 30
    assert len(require_rows(single, "test", folder / "natural-instructions").rows) == 100
    assert len(require_rows("natural_instructions:task011_test_entailment", "test", folder, limit=3).rows) == 3
    assert len(require_rows("natural_instructions", "test", folder, limit=3).rows) == 6
    assert read_rows(single, "validation", folder) is None
    with pytest.raises(ValueError, match="its 100 test instances alone"):
        read_rows("natural_instructions:task002", "train", folder)


def test_layouts_of_local_files_give_the_same_rows(tmp_path):
    rows = choice_rows("question", 4, seed=0)
    write_jsonl(tmp_path / "lines" / "arc_easy" / "test.jsonl", rows)
    (tmp_path / "array" / "arc_easy").mkdir(parents=True)
    (tmp_path / "array" / "arc_easy" / "test.json").write_text(json.dumps(rows, indent=1))
    hub = tmp_path / "hub" / "ARC-Easy"
    hub.mkdir(parents=True)
    for i in range(2):
        datasets.Dataset.from_list(rows[2 * i : 2 * i + 2]).to_parquet(hub / f"test-0000{i}-of-00002.parquet")
    for config in ("main", "socratic"):  # as the hub stores gsm8k: one of its configurations is ours
        (tmp_path / "hub" / "gsm8k" / config).mkdir(parents=True)
        table = datasets.Dataset.from_list(gsm8k_rows(3, seed=len(config)))
        table.to_parquet(tmp_path / "hub" / "gsm8k" / config / "test-00000-of-00001.parquet")
    assert read_task("gsm8k", "test", tmp_path / "hub")[0][0].completion == " 4 + 5 = 9\n#### 9"
    assert len(require_rows("gsm8k", "test", tmp_path / "hub").rows) == 3
    records = [
        {
            "instruction": f"Please choose the correct answer to the question: {row['question']}\n\n"
            + " ".join(f"Answer{i}: {text}" for i, text in enumerate(row["choices"]["text"], 1))
            + "\n\nAnswer format: answer1/answer2/answer3/answer4",
            "input": "",
            "output": f"the correct answer is answer{'ABCD'.index(row['answerKey']) + 1}",
            "answer": f"answer{'ABCD'.index(row['answerKey']) + 1}",
        }
        for row in rows
    ]
    (tmp_path / "adapters" / "commonsense").mkdir(parents=True)
    (tmp_path / "adapters" / "commonsense" / "ARC-Easy.test.json").write_text(json.dumps(records))
    expected, _ = read_task("arc_easy", "test", tmp_path / "lines")
    assert len(expected) == 4
    for layout in ("array", "hub", "adapters"):
        assert read_task("arc_easy", "test", tmp_path / layout)[0] == expected
    del records[2]["answer"]
    (tmp_path / "adapters" / "commonsense" / "ARC-Easy.test.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"ARC-Easy.test.json:3: not a multiple-choice record"):
        read_rows("arc_easy", "test", tmp_path / "adapters")


def test_without_a_folder_the_hub_data_set_is_loaded(monkeypatch):
    calls = []

    def load(path, config, split):
        calls.append((path, config, split))
        return datasets.Dataset.from_list(gsm8k_rows(3, seed=0))

    monkeypatch.setattr(datasets, "load_dataset", load)
    found, source = read_task("gsm8k", "test", limit=2)
    assert [example.completion for example in found] == [" 0 + 1 = 1\n#### 1", " 1 + 2 = 3\n#### 3"]
    assert calls == [("openai/gsm8k", "main", "test")]
    assert source == "openai/gsm8k main test"

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"cannot load openai/gsm8k from the hub: Couldn't reach .* and more \(local"):
        read_rows("gsm8k", "test")


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("gsm9k", "train", "no task gsm9k; there are hellaswag, arc_challenge"),
        ("gsm8k:first", "train", "no task gsm8k:first"),
        ("natural_instructions:", "test", "no task natural_instructions:;"),
        ("hellaswag", "validation", "task hellaswag has no validation split"),
        ("natural_instructions:task9", "test", r"no files task9\*.json in .*tasks"),
    ],
)
def test_what_is_missing_is_named(name, split, message, folder):
    with pytest.raises(ValueError, match=message):
        require_rows(name, split, folder)


def test_bad_folders_and_rows_are_named(tmp_path, folder):
    with pytest.raises(ValueError, match=r"has no train split: none of gsm8k/train.jsonl, .* in --data_dir"):
        require_rows("gsm8k", "train", tmp_path)
    with pytest.raises(ValueError, match=r"--data_dir .*nowhere is not a folder"):
        require_rows("gsm8k", "train", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"needs --data_dir with a clone of https://github.com/allenai/"):
        require_rows("natural_instructions", "test")
    with pytest.raises(ValueError, match=r"no clone of allenai/natural-instructions"):
        require_rows("natural_instructions", "test", tmp_path)
    write_jsonl(tmp_path / "gsm8k" / "train.jsonl", [*gsm8k_rows(1, seed=0), {"question": "?"}])
    with pytest.raises(ValueError, match=r"train.jsonl: row 2 has not the layout of gsm8k \(KeyError: 'answer'\)"):
        read_task("gsm8k", "train", tmp_path)
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy" / "test.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read .*test.parquet"):
        read_rows("arc_easy", "test", tmp_path)
    clone = tmp_path / "natural-instructions"
    (clone / "tasks").mkdir(parents=True)
    (clone / "tasks" / "task1_x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"task1_x.json: not a task of Super-Natural Instructions"):
        read_rows("natural_instructions:task1", "test", tmp_path)
    with pytest.raises(ValueError, match=r"cannot read .*test_tasks.txt"):
        read_rows("natural_instructions", "test", tmp_path)


@shared
@pytest.mark.parametrize(
    ("name", "train", "test"),
    [("gsm8k", 7473, 1319), ("arc_challenge", 1119, 1172), ("arc_easy", 2251, 2376), ("openbookqa", 4957, 500)],
)
def test_the_real_data(name, train, test):
    """All rows are read, none of the answers is empty, and train and test have different questions."""
    found = {split: read_task(name, split, SHARED)[0] for split in ("train", "test")}
    assert {split: len(rows) for split, rows in found.items()} == {"train": train, "test": test}
    assert all(example.completion.strip() for rows in found.values() for example in rows)
    assert len({example for rows in found.values() for example in rows}) > 0.98 * (train + test)
    assert find_task(name).splits["test"] == "test"


# --------------------------------------------------------------------------------------------------------- windows


def test_prompt_and_answer_are_tokenised_together(tiny):
    """The text is that of the whole; what is not the prompt's own tokens carries loss, a spanning token too."""
    _, tokenizer = tiny
    for example in (Example("def f(x):\n    ret", "urn x"), Example("Question: 1?\nAnswer:", " 2")):
        (row,) = windows([example], tokenizer, 64).rows
        assert tokenizer.decode(row["input_ids"], skip_special_tokens=True) == example.prompt + example.completion
        answer = [label for label in row["labels"] if label != IGNORED]
        assert tokenizer.decode(answer, skip_special_tokens=True).endswith(example.completion)
        assert row["labels"][-len(answer) :] == row["input_ids"][-len(answer) :] == answer


def test_a_shorter_prompt_is_taken_where_the_whole_does_not_fit(tiny):
    _, tokenizer = tiny
    example = Example("a b c d e f g h i j k l", " x", ("a b c d e f", "a"))
    sizes = [len(windows([example], tokenizer, length).rows[0]["input_ids"]) for length in (64, 14, 5)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    assert windows([example, example], tokenizer, 5).cut == 0
    assert windows([example, Example("a", " b" * 20)], tokenizer, 5).cut == 1


def test_encoder_decoder_windows(mt5):
    _, tokenizer = prepare_module.load_model(str(mt5))
    ((row,), cut, _) = windows([Example("water and ice", " steam")], tokenizer, 64, encoder_decoder=True)
    assert tokenizer.decode(row["input_ids"]).replace(" </s>", "</s>") == "water and ice</s>"
    assert row["labels"][-1] == tokenizer.eos_token_id
    assert IGNORED not in row["labels"]
    assert cut == 0
    ((row,), cut, _) = windows([Example("water and ice", " steam" * 9)], tokenizer, 4, encoder_decoder=True)
    assert (len(row["labels"]), cut) == (4, 1)
    with pytest.raises(ValueError, match="not from texts"):
        windows([Example("", "water")], tokenizer, 64, encoder_decoder=True)


def test_packed_examples_have_the_loss_of_single_ones(tiny, folder):
    """Each sees itself alone: the sum of the answers' losses is the same to rounding, in fewer windows."""
    network, tokenizer = tiny
    found, _ = read_task("openbookqa", "train", folder)
    single, packed = (windows(found, tokenizer, 96, packing=packing).rows for packing in (False, True))
    assert len(packed) < len(single) / 2
    assert {len(row[key]) for row in packed for key in row} == {96}
    spread = lambda rows: sorted(label for row in rows for label in row["labels"] if label != IGNORED)
    assert spread(single) == spread(packed)
    network.config.use_cache = False
    losses = []
    for rows in (single, packed):
        total, count = 0.0, 0
        for row in rows:
            batch = {key: torch.tensor([values]) for key, values in row.items()}
            labels = sum(label != IGNORED for label in row["labels"][1:])
            with torch.inference_mode():
                total += float(network(**batch).loss) * labels
            count += labels
        losses.append(total / count)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_model_that_mixes_packed_examples_is_refused(tiny):
    network, tokenizer = tiny
    find_limits(network, tokenizer, "tiny", packing=True)
    forward = network.forward
    network.forward = lambda position_ids=None, **inputs: forward(**inputs)
    try:
        with pytest.raises(ValueError, match="--packing: this model does not keep the examples of a window apart"):
            find_limits(network, tokenizer, "tiny", packing=True)
    finally:
        del network.forward


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", [*TASKS, "natural_instructions:task001"])
def test_every_task_can_be_trained_on(name, folder, tmp_path):
    result = train_module.train(out=tmp_path / "run", task=name, data_dir=folder, **OPTIONS)
    assert result["held_out"]["after"] < result["held_out"]["before"]
    kept = "validation" if "validation" in find_task(name).splits else "0.1 of"
    assert kept in result["data"]["held_out"]
    if kept == "validation":
        assert result["examples"]["train"] == 12
        assert result["examples"]["held_out"] == 4


def test_loss_is_on_the_answer_alone(folder, tmp_path):
    """The held-out tokens are those of the answers and an end token each."""
    result = train_module.train(out=tmp_path / "run", task="openbookqa", data_dir=folder, **OPTIONS)
    _, tokenizer = prepare_module.load_model("tiny")
    answers = [example.completion for example in read_task("openbookqa", "validation", folder)[0]]
    expected = sum(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1 for answer in answers)
    assert result["held_out"]["tokens"] == expected


def test_the_command_line_trains_on_a_task_with_packing(folder, tmp_path, capsys):
    words = ["--task", "arc_challenge", "--data-dir", folder, "--packing", "--no-progress", "--out", tmp_path / "run"]
    words += ["--steps", 2, "--batch-size", 2, "--max-length", 64, "--rank", 2, "--lr", 0.01]
    assert main(["train", *map(str, words)]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["windows"]["train"] < result["examples"]["train"] == 12
    assert result["settings"]["task"] == "arc_challenge"
    words = ["--task", "gsm8k", "--data", folder / "gsm8k" / "train.jsonl", "--out", tmp_path / "other"]
    for wrong in (words, words[4:]):
        assert main(["train", *map(str, wrong)]) == 2
        assert "give either --data or --task" in capsys.readouterr().err
    words = ["--task", "gsm8k", "--data_dir", tmp_path, "--out", tmp_path / "other"]
    assert main(["train", *map(str, words)]) == 2
    assert "task gsm8k has no train split" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_what_is_cut_is_counted(folder, tmp_path):
    result = train_module.train(out=tmp_path / "run", task="gsm8k", data_dir=folder, **{**OPTIONS, "max_length": 40})
    assert result["examples"]["cut"]["train"] > 0
    assert "longer than --max_length and cut" in summary(result)
    result["seconds"] = dict.fromkeys(result["seconds"])
    assert "of training" not in summary(result)


def test_an_encoder_decoder_model_learns(mt5, folder, tmp_path):
    """mT5 from its config: the adapter of a Seq2Seq model, the answers in the decoder, the loss falls."""
    options = {**OPTIONS, "steps": 60, "lr": 0.05, "rank": 8, "warmup": 0.0}
    result = train_module.train(out=tmp_path / "run", task="openbookqa", data_dir=folder, model=str(mt5), **options)
    assert result["losses"][-1]["loss"] < 0.5 * result["losses"][0]["loss"]
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    with pytest.raises(ValueError, match="--packing is for causal models"):
        train_module.train(
            out=tmp_path / "other", task="openbookqa", data_dir=folder, model=str(mt5), packing=True, **OPTIONS
        )


def test_the_table_is_consistent():
    for name, task in TASKS.items():
        assert {"train", "test"} <= set(task.splits)
        assert (task.dataset is None) == (task.evaluation == "instructions")
        assert find_task(name) is task
    assert module.TEST_INSTANCES == 100
