"""Evaluation: by lm_eval and rouge-score, on local files, of causal and encoder–decoder models, with adapters."""

import json
import math
import sys
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse")
pytest.importorskip("lm_eval")
pytest.importorskip("rouge_score")
peft = pytest.importorskip("peft")

import torch  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from task_files import choice_rows, gsm8k_rows, make_mt5, make_task_files, write_jsonl  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from lora_rite.cli import main  # noqa: E402
from lora_rite.finetune import evaluate as module  # noqa: E402
from lora_rite.finetune import evaluator, judges, plans  # noqa: E402
from lora_rite.finetune.evaluate import evaluate, table  # noqa: E402
from lora_rite.finetune.load import attach_adapter, load_model  # noqa: E402
from lora_rite.finetune.scores import instruction_scores  # noqa: E402
from lora_rite.finetune.tasks import require_rows  # noqa: E402
from lora_rite.finetune.train import train  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
SHARED = Path(__file__).parents[2] / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the data folder ../shared/data is not there")
CHOICES = ["hellaswag", "arc_challenge", "arc_easy", "openbookqa"]
QUICK = {"batch_size": 4, "max_new_tokens": 6, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_task_files(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def mt5(tmp_path_factory):
    return make_mt5(tmp_path_factory.mktemp("mt5"))


@pytest.fixture
def answers(monkeypatch):
    """Answers that the model gives instead of its own."""
    given = []
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, disable_tqdm=False: list(given))
    return given


def figures(result, name):
    return result["results"][name]["results"]


# -------------------------------------------------------------------------------------------------- lm_eval's tasks


def log_likelihood(network, tokenizer, prompt, text):
    """Of the text after the prompt, from the logits, in float64."""
    start, whole = (tokenizer(t, return_tensors="pt")["input_ids"][0] for t in (prompt, prompt + text))
    with torch.inference_mode():
        logits = network(whole[None]).logits[0].double().log_softmax(-1)
    return sum(logits[i - 1, whole[i]].item() for i in range(len(start), len(whole)))


def test_choices_are_judged_by_their_log_likelihood(folder, tmp_path):
    """acc and acc_norm of ARC from the logits by hand; acc_norm divides by the characters of the choice. What was asked
    and what there was to choose from stands beside the answers."""
    result = figures(evaluate("arc_challenge", data_dir=folder, out=tmp_path, **QUICK), "arc_challenge")
    network, tokenizer = load_model("tiny")
    right = {"acc": 0, "acc_norm": 0}
    rows = require_rows("arc_challenge", "test", folder).rows
    samples = [json.loads(line) for line in (tmp_path / "arc_challenge.samples.jsonl").read_text().splitlines()]
    for row, sample in zip(rows, samples, strict=True):
        texts = row["choices"]["text"]
        prompt = f"Question: {row['question']}\nAnswer:"
        assert (sample["prompt"], sample["choices"]) == (prompt, [f" {text}" for text in texts])
        assert len(sample["filtered_resps"]) == len(texts)
        scores = [log_likelihood(network, tokenizer, prompt, f" {text}") for text in texts]
        norms = [score / len(text) for score, text in zip(scores, texts, strict=True)]
        gold = "ABCD".index(row["answerKey"])
        right["acc"] += scores.index(max(scores)) == gold
        right["acc_norm"] += norms.index(max(norms)) == gold
    assert result["metrics"] == {name: n / len(rows) for name, n in right.items()}
    assert result["n"] == 6
    assert result["metric"] == "acc_norm"
    assert result["unparsed"] == {"acc": 0, "acc_norm": 0}
    assert result["stderr"]["acc"] == pytest.approx(
        math.sqrt(result["metrics"]["acc"] * (1 - result["metrics"]["acc"]) / 5)
    )


def test_progress_is_bars_on_a_terminal_and_few_lines_elsewhere(folder, capsys, monkeypatch):
    """And nothing at all without ``progress``, of lm_eval's bars either."""
    quick = {**QUICK, "data_dir": folder, "limit": 1}
    evaluate(["arc_easy", "openbookqa"], **quick)
    assert capsys.readouterr().err == ""
    evaluate(["arc_easy", "openbookqa"], **{**quick, "progress": True})
    assert capsys.readouterr().err.splitlines() == ["arc_easy (1 of 2)", "openbookqa (2 of 2)"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    evaluate("arc_easy", **{**quick, "progress": True})
    assert "loglikelihood requests: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("shots", [0, 2])
def test_local_files_give_what_lm_eval_gives_on_its_own_path(shots, folder, tmp_path):
    """Its YAML with data_files, which is evaluated as any other task of lm_eval is, and our rows: the same figures."""
    import lm_eval.tasks

    for name in ("gsm8k", "hellaswag"):
        source = Path(lm_eval.tasks.__file__).parent / name / f"{name}.yaml"
        files = {file.stem: str(file) for file in (folder / name).iterdir()}
        text = {"include": str(source), "task": f"own_{name}", "dataset_path": "json", "dataset_name": None}
        text["dataset_kwargs"] = {"data_files": files, "cache_dir": str(tmp_path / "cache")}
        yaml = tmp_path / f"own_{name}.yaml"
        yaml.write_text(json.dumps(text))
        result = evaluate([name, str(yaml)], data_dir=folder, num_fewshot=shots, **QUICK)
        ours, theirs = figures(result, name), figures(result, str(yaml))
        assert ours["num_fewshot"] == theirs["num_fewshot"] == shots
        for key in ("metrics", "stderr", "n", "unparsed"):
            assert ours[key] == theirs[key]
        assert "loss" in ours
        assert "loss" not in theirs


def test_few_shot_examples_are_as_many_as_asked_for_and_come_from_train(folder, monkeypatch):
    prompts = []
    monkeypatch.setattr(
        HFLM,
        "generate_until",
        lambda self, requests, disable_tqdm=False: [prompts.append(r.args[0]) or "#### 1" for r in requests],
    )
    training = {row["question"] for row in gsm8k_rows(12, seed=0)}
    for shots, expected in ((None, 5), (0, 0), (3, 3)):
        prompts.clear()
        result = evaluate("gsm8k", data_dir=folder, num_fewshot=shots, **QUICK)
        assert figures(result, "gsm8k")["num_fewshot"] == expected
        for prompt in prompts:
            *shown, asked = [part.split("\nAnswer:")[0] for part in prompt.split("Question: ")[1:]]
            assert len(shown) == expected
            assert set(shown) <= training
            assert asked not in training


def test_unparsed_answers_are_counted(folder, answers, tmp_path):
    """gsm8k: 41, 43, 45, 47, 49. One right in both, one wrong, one without the mark, one in words, one empty."""
    answers += [" 20 + 21 = 41\n#### 41", " #### 7", " The answer is 45.", " Ann has many.", ""]
    result = evaluate("gsm8k", data_dir=folder, out=tmp_path / "out", **QUICK)
    found = figures(result, "gsm8k")
    assert found["metrics"] == {"exact_match,strict-match": 1 / 5, "exact_match,flexible-extract": 2 / 5}
    assert found["unparsed"] == {"exact_match,strict-match": 3, "exact_match,flexible-extract": 2}
    lines = (tmp_path / "out" / "gsm8k.samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [s["resps"][0][0] for s in samples if s["filter"] == "strict-match"] == answers
    assert all(s["prompt"].endswith("\nAnswer:") and "choices" not in s for s in samples)
    printed = table(result)
    assert "20.00 ± 20.00" in printed
    assert "exact_match,strict-match" in printed


def test_choices_without_a_finite_likelihood_are_unparsed(folder, tmp_path):
    network, tokenizer = load_model("tiny")
    network.model.norm.weight.data.fill_(math.nan)
    network.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    result = figures(evaluate("openbookqa", data_dir=folder, model=str(tmp_path / "broken"), **QUICK), "openbookqa")
    assert result["unparsed"] == {"acc": 6, "acc_norm": 6}
    assert math.isnan(result["loss"]["nat_per_token"])


def test_questions_that_are_cut_are_counted(folder, tmp_path):
    """The embedded model has room for 512 tokens: 480 for an answer leave 32 for 5 examples."""
    result = figures(evaluate("gsm8k", data_dir=folder, **{**QUICK, "max_new_tokens": 480}, limit=2), "gsm8k")
    assert result["cut"] == 2
    assert figures(evaluate("gsm8k", data_dir=folder, **QUICK, limit=2), "gsm8k")["cut"] == 0
    with pytest.raises(ValueError, match="answers of 512 tokens leave no room for a prompt"):
        evaluate("gsm8k", data_dir=folder, **{**QUICK, "max_new_tokens": 512})


@shared
def test_the_real_data_is_evaluated(tmp_path):
    names = ["gsm8k", "arc_challenge", "arc_easy", "openbookqa"]
    result = evaluate(names, data_dir=SHARED, limit=3, num_fewshot=1, **QUICK)
    for name in names:
        found = figures(result, name)
        assert found["n"] == found["loss"]["examples"] == 3
        assert 2 < found["loss"]["nat_per_token"] < 10
        assert all(0 <= value <= 1 for value in found["metrics"].values())


# ------------------------------------------------------------------------------------------------ models, adapters


def test_an_adapter_is_evaluated_as_the_merged_model(folder, tmp_path):
    """The same answers and, to rounding, the same losses; and other ones than without it."""
    network, tokenizer = load_model("tiny")
    network = attach_adapter(network, rank=4)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    network.save_pretrained(str(tmp_path / "adapter"))
    network.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    names = ["openbookqa", "gsm8k", "natural_instructions"]
    options = {"data_dir": folder, "limit": 4, "num_fewshot": 1, **QUICK}
    plain = evaluate(names, **options)
    adapted = evaluate(names, adapter=tmp_path / "adapter", out=tmp_path / "a", **options)
    merged = evaluate(names, model=str(tmp_path / "merged"), out=tmp_path / "m", **options)
    for name in names:
        a, m, p = (figures(result, name) for result in (adapted, merged, plain))
        assert a["loss"]["nat_per_token"] == pytest.approx(m["loss"]["nat_per_token"], rel=1e-4)
        assert abs(a["loss"]["nat_per_token"] - p["loss"]["nat_per_token"]) > 0.01
        assert a["metrics"] == m["metrics"]
    read = lambda out: [json.loads(line) for line in (tmp_path / out / "gsm8k.samples.jsonl").read_text().splitlines()]
    assert [s["resps"] for s in read("a")] == [s["resps"] for s in read("m")]


def test_encoder_decoder_models_are_evaluated(mt5, folder, tmp_path):
    """All kinds of tasks on an mT5 with an adapter that train has made."""
    options = {"steps": 60, "lr": 0.05, "rank": 8, "warmup": 0.0, "max_length": 96, "progress": False}
    run = train(out=tmp_path / "run", task="openbookqa", data_dir=folder, model=str(mt5), **options)
    names = ["openbookqa", "gsm8k", "natural_instructions:task012"]
    results = [
        evaluate(names, data_dir=folder, model=str(mt5), adapter=adapter, num_fewshot=0, **QUICK)
        for adapter in (None, tmp_path / "run" / "adapter")
    ]
    before, after = (figures(result, "openbookqa") for result in results)
    assert after["loss"]["nat_per_token"] < before["loss"]["nat_per_token"] - 0.5
    assert run["held_out"]["after"] < run["held_out"]["before"] - 0.5
    for name in names:
        assert figures(results[1], name)["n"] == {"openbookqa": 6, "gsm8k": 5}.get(name, 5)
    with pytest.raises(ValueError, match="not from texts"):
        evaluate(str(write_jsonl(tmp_path / "text.jsonl", [{"text": "water"}])), model=str(mt5), **QUICK)


def test_the_loss_of_a_file_is_the_one_that_train_measures(folder, tmp_path):
    """Held-out loss after training, and evaluate on the same file with the adapter: equal; tasks likewise."""
    texts = [{"text": f"def f_{i}(x):\n    return x + {i}\n"} for i in range(8)]
    pairs = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(8)]
    for name, rows in (("texts", texts), ("pairs", pairs)):
        file = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        options = {"steps": 2, "lr": 0.01, "rank": 2, "batch_size": 4, "max_length": 48, "progress": False}
        with pytest.warns(UserWarning, match="8 held-out examples are in the training data too"):
            run = train(out=tmp_path / name, data=file, validation=file, **options)
        adapter = tmp_path / name / "adapter"
        result = evaluate(str(file), adapter=adapter, batch_size=4, max_length=48, progress=False)
        loss = figures(result, str(file))["loss"]
        assert loss["nat_per_token"] == pytest.approx(run["held_out"]["after"], rel=1e-6)
        assert loss["tokens"] == run["held_out"]["tokens"]
        assert loss["perplexity"] == pytest.approx(math.exp(loss["nat_per_token"]))


@pytest.mark.parametrize("weights", [{"load_in_4bit": True}, {"load_in_8bit": True}, {"dtype": "bfloat16"}], ids=str)
def test_a_model_is_evaluated_in_the_weights_that_it_was_trained_in(weights, tmp_path):
    """To the loss that train measures, and with as many parameters as there are, not as many bytes."""
    if "dtype" not in weights:
        pytest.importorskip("bitsandbytes")
    file = write_jsonl(
        tmp_path / "pairs.jsonl", [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(8)]
    )
    options = {"batch_size": 4, "max_length": 48, "progress": False, **weights}
    with pytest.warns(UserWarning, match="in the training data too"):
        run = train(out=tmp_path / "run", data=file, validation=file, steps=1, rank=2, **options)
    record = evaluate(str(file), adapter=tmp_path / "run" / "adapter", **options)["results"][str(file)]
    assert record["results"]["loss"]["nat_per_token"] == pytest.approx(run["held_out"]["after"], rel=1e-6)
    assert record["model"]["parameters"] == run["run"]["parameters"]
    plain = evaluate(str(file), adapter=tmp_path / "run" / "adapter", batch_size=4, max_length=48, progress=False)
    assert figures(plain, str(file))["loss"]["nat_per_token"] != record["results"]["loss"]["nat_per_token"]


def test_an_evaluation_is_known_by_its_weights(tmp_path):
    """--bf16 is --dtype bfloat16, also in what was written before there was --dtype; another one is another."""
    file = write_jsonl(tmp_path / "mine.jsonl", [{"text": "x = 1"}])
    options = {"out": tmp_path / "out", **QUICK}
    first = evaluate(str(file), bf16=True, **options)
    path = tmp_path / "out" / "mine.json"
    record = json.loads(path.read_text())
    assert (record["settings"].pop("dtype"), record["settings"].pop("bits")) == ("bfloat16", None)
    path.write_text(json.dumps({**record, "settings": {**record["settings"], "bf16": True}}))
    again = evaluate(str(file), dtype="bfloat16", **options)
    assert again["results"][str(file)]["results"] == first["results"][str(file)]["results"]
    with pytest.raises(ValueError, match="dtype: 'bfloat16' → 'float32'"):
        evaluate(str(file), **options)


def test_the_loss_does_not_depend_on_the_batch_or_on_the_side_of_padding(tmp_path):
    """The last of four windows is shorter: each token counts the same, and none is predicted from padding."""
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": "x = 1\n" * n} for n in (1, 4, 9)])
    network, tokenizer = load_model("tiny")
    network.save_pretrained(tmp_path / "left")
    tokenizer.save_pretrained(tmp_path / "left")
    config = tmp_path / "left" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "padding_side": "left"}))
    assert AutoTokenizer.from_pretrained(tmp_path / "left").padding_side == "left"
    options = {"max_length": 20, "progress": False}
    one = figures(evaluate(str(file), batch_size=1, **options), str(file))["loss"]
    for model in ("tiny", str(tmp_path / "left")):
        other = figures(evaluate(str(file), batch_size=4, model=model, **options), str(file))["loss"]
        assert other["nat_per_token"] == pytest.approx(one["nat_per_token"], rel=1e-5)


def test_loss_only_is_the_same_loss_and_nothing_else(folder):
    whole = evaluate("openbookqa", data_dir=folder, **QUICK)
    part = evaluate("openbookqa", data_dir=folder, loss_only=True, **QUICK)
    assert figures(part, "openbookqa") == {"loss": figures(whole, "openbookqa")["loss"]}
    with pytest.raises(ValueError, match="--loss_only: piqa is neither a file nor one of"):
        evaluate("piqa", loss_only=True, **QUICK)


# -------------------------------------------------------------------------------------- Super-Natural Instructions


def instance(task, category, references, outputs=("Yes.", "No.")):
    return {
        "Task": task,
        "Categories": [category],
        "Outputs": [*outputs, *references],
        "Instance": {"id": task, "output": references},
    }


def test_instruction_scores_by_hand():
    rows = [
        instance("t1", "Textual Entailment", ["Yes."]),
        instance("t1", "Textual Entailment", ["Yes."]),
        instance("t1", "Textual Entailment", ["No."]),
        instance("t2", "Title Generation", ["something else", "The running dogs"]),
        instance("t2", "Title Generation", ["one two three four"]),
        instance("t3", "Data to Text", ["a"]),
        instance("t4", "Emotion Classification", ["joy"], ["joy", "fear"]),
    ]
    answers = ["yes", "No", "Maybe so", "the run dog", "one two", "", "JOY!"]
    found, samples = instruction_scores(rows, answers)
    exact = [1, 0, 0, 0, 0, 0, 1]
    # stemmed, the best over references: 3 of 3; 2 of 4 recalled with precision 1; of "Yes." "yes" is all
    rouge = [1, 0, 0, 1, 2 / 3, 0, 1]
    score = [1, 0, 0, 1, 2 / 3, 0, 1]
    assert [s["exact_match"] for s in samples] == exact
    assert [s["rougeL"] for s in samples] == pytest.approx(rouge)
    assert [s["score"] for s in samples] == pytest.approx(score)
    assert found["metrics"] == pytest.approx(
        {"score": sum(score) / 7, "rougeL": sum(rouge) / 7, "exact_match": sum(exact) / 7}
    )
    assert found["unparsed"] == {"score": 2}  # "Maybe so", and nothing
    entailment = found["categories"]["Textual Entailment"]
    assert entailment["score"] == pytest.approx(1 / 3)
    assert (entailment["metric"], entailment["n"], entailment["unparsed"]) == ("exact_match", 3, 1)
    assert found["categories"]["Title Generation"]["score"] == pytest.approx(5 / 6)
    assert found["by_metric"]["exact_match"]["score"] == pytest.approx(0.5)
    assert found["by_metric"]["rougeL"]["n"] == 3
    assert set(found["tasks"]) == {"t1", "t2", "t3", "t4"}


def test_instructions_are_answered_and_judged(folder, answers, tmp_path):
    """The standard split: the first 100 of a task with 104 instances, all 5 of the other; the order is the rows'."""
    answers += ["no", "yes"] * 50 + ["The run dog 0", "A title", "", "nothing", "the running dogs 4"]
    result = evaluate("natural_instructions", data_dir=folder, out=tmp_path / "out", **QUICK)
    found = figures(result, "natural_instructions")
    assert found["n"] == 105
    assert found["categories"]["Textual Entailment"]["exact_match"] == 1
    assert found["categories"]["Title Generation"]["score"] == pytest.approx(3 / 5)
    assert found["metrics"]["score"] == pytest.approx(103 / 105)
    assert found["unparsed"] == {"score": 1}
    assert "rougeL, Title Generation" in table(result)
    record = json.loads((tmp_path / "out" / "natural_instructions.json").read_text())
    assert record["results"]["tasks"]["task012_test_title"]["n"] == 5


def test_a_causal_answer_ends_before_a_blank_line_and_long_prompts_are_counted(folder, monkeypatch):
    seen = []

    def generate(self, requests, disable_tqdm=False):
        seen.extend(request.args for request in requests)
        return ["a"] * len(requests)

    monkeypatch.setattr(HFLM, "generate_until", generate)
    name = "natural_instructions:task012"
    found = figures(evaluate(name, data_dir=folder, **QUICK), name)
    assert found["cut"] == 0
    assert seen[0][1] == {"do_sample": False, "max_gen_toks": 6, "until": ["\n\n"]}
    assert "Positive Example 2" in seen[0][0]
    seen.clear()
    found = figures(evaluate(name, data_dir=folder, max_length=72, **QUICK), name)
    assert found["cut"] == found["loss"]["cut"] == 1
    assert "Positive Example 1" in seen[0][0]
    assert "Positive Example 2" not in seen[0][0]
    assert seen[0][0].startswith("Definition")
    assert not seen[3][0].startswith("Definition")
    assert seen[3][0].endswith("and more.\nOutput:")


# ----------------------------------------------------------------------------------------------------- the command


def test_finished_tasks_are_not_evaluated_again(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    options = {"data_dir": folder, "out": out, **QUICK}
    first = evaluate("openbookqa", **options)
    record = json.loads((out / "openbookqa.json").read_text())
    assert record == first["results"]["openbookqa"]
    assert record["settings"]["limit"] is None
    assert {"lm_eval", "torch", "git_commit", "machine", "device"} <= set(record["versions"])
    before = (out / "openbookqa.json").read_bytes()
    both = evaluate("openbookqa,arc_easy", **options)
    assert list(both["results"]) == ["openbookqa", "arc_easy"]
    assert (out / "openbookqa.json").read_bytes() == before
    monkeypatch.setattr(evaluator, "load_model", None)  # it is not needed any more
    assert evaluate("arc_easy,openbookqa", **options)["results"] == both["results"]
    with pytest.raises(ValueError, match=r"other settings or data \(.*limit: None → 2\); choose another --out"):
        evaluate("openbookqa", limit=2, **options)
    (out / "gsm8k.json").write_text("{")
    with pytest.raises(ValueError, match=r"gsm8k.json is not an evaluation"):
        evaluate("gsm8k", **options)
    assert (out / "gsm8k.json").read_text() == "{"


def test_a_changed_adapter_is_another_evaluation(folder, tmp_path):
    network = attach_adapter(load_model("tiny")[0], rank=2)
    network.save_pretrained(str(tmp_path / "adapter"))
    options = {"adapter": tmp_path / "adapter", "data_dir": folder, "out": tmp_path / "out", "loss_only": True}
    first = evaluate("openbookqa", **options, **QUICK)
    options["adapter"] = options["adapter"].rename(tmp_path / "moved")
    assert evaluate("openbookqa", **options, **QUICK) == first
    next(p for n, p in network.named_parameters() if "lora_B" in n).data.fill_(0.1)
    network.save_pretrained(str(tmp_path / "moved"))
    with pytest.raises(ValueError, match="adapter_sha256"):
        evaluate("openbookqa", **options, **QUICK)


def test_changed_data_or_another_model_is_another_evaluation(tmp_path):
    """The file, the rows of a task, the few-shot examples and the model are known by what is in them; where they are
    does not matter."""
    file = write_jsonl(tmp_path / "mine.jsonl", [{"text": "x = 1"}, {"text": "y = 2"}])
    folder, out = make_task_files(tmp_path / "data"), tmp_path / "out"
    network, tokenizer = load_model("tiny")
    for part in (network, tokenizer):
        part.save_pretrained(tmp_path / "model")
    names, options = [str(file), "openbookqa"], {"model": str(tmp_path / "model"), "out": out, "loss_only": True}
    first = evaluate(names, data_dir=folder, **options, **QUICK)
    moved = folder.rename(tmp_path / "moved")
    assert evaluate(names, data_dir=moved, **options, **QUICK) == first
    record = next(path for path in out.glob("*.json") if "openbookqa" in path.name)
    before = record.read_text()
    record.write_text(before.replace('"data_sha256"', '"unknown"'))
    with pytest.raises(ValueError, match="does not say which data it is of"):
        evaluate(names, data_dir=moved, **options, **QUICK)
    record.write_text(before)
    changed = pytest.raises(ValueError, match=r"other settings or data \(data_sha256: \w{12}… → \w{12}…\)")
    write_jsonl(moved / "openbookqa" / "test.jsonl", choice_rows("question_stem", 6, seed=41))
    with changed:
        evaluate("openbookqa", data_dir=moved, **options, **QUICK)
    write_jsonl(file, [{"text": "x = 1"}, {"text": "y = 3"}])
    with changed:
        evaluate(str(file), data_dir=moved, **options, **QUICK)
    write_jsonl(file, [{"text": "x = 1"}, {"text": "y = 2"}])
    next(network.parameters()).data.mul_(2)
    network.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="model_digest: "):
        evaluate(str(file), data_dir=moved, **options, **QUICK)


def test_few_shot_examples_are_data_too(folder, tmp_path):
    plan = lambda where: plans.read_plan("gsm8k", where, {"limit": None, "loss_only": False, "num_fewshot": 1}, False)
    before = plan(folder)
    assert plan(folder).sha256 == before.sha256
    other = make_task_files(tmp_path / "data")
    write_jsonl(other / "gsm8k" / "train.jsonl", gsm8k_rows(12, seed=5))
    assert plan(other).sha256 != before.sha256


def test_a_model_from_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    import huggingface_hub

    assert plans.model_digest("no/such-model") is None
    assert plans.model_digest("nowhere/at/all") is None
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: f"{tmp_path}/snapshots/abc/config.json")
    assert plans.model_digest("some/model") == "abc"


def test_dry_run_prints_the_plan_and_loads_no_model(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluator, "load_model", None)
    file = write_jsonl(tmp_path / "mine.jsonl", [{"text": "x"}, {"text": "y"}, {"text": "z"}])
    words = ["--tasks", f"gsm8k,natural_instructions,{file}", "--data-dir", folder, "--dry-run", "--num-fewshot", 2]
    assert main(["eval", *map(str, words)]) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in printed.splitlines() if "│" in line]
    assert ["gsm8k", "generation, loss", "5"] in rows
    assert ["natural_instructions", "instructions, loss", "105"] in rows
    assert any(row[1:] == ["loss", "3"] for row in rows)
    assert not (tmp_path / "out").exists()


def test_the_command_line(folder, tmp_path, capsys):
    words = [
        "--tasks",
        "[openbookqa, arc_easy]",
        "--data-dir",
        folder,
        "--limit",
        2,
        "--batch-size",
        2,
        "--no-progress",
    ]
    assert main(["eval", *map(str, words), "--out", str(tmp_path / "out"), "--device", "cpu", "--bf16"]) == 0
    printed = capsys.readouterr().out
    assert "openbookqa" in printed
    assert "acc_norm" in printed
    record = json.loads((tmp_path / "out" / "arc_easy.json").read_text())
    assert record["model"]["dtype"] == "bfloat16"
    assert record["results"]["n"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "natural_instructions:task9"], "no files task9"),
        (["--tasks", "gsm8k,gsm8k"], "--tasks: gsm8k and gsm8k have one results file"),
        (["--tasks", "gsm8k,"], "--tasks: an empty name"),
        (["--tasks", "missing.jsonl"], "cannot read missing.jsonl"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--num_fewshot", "-1"], "--num_fewshot must be at least 0"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--max_new_tokens", "0"], "--max_new_tokens must be at least 1"),
        (["--load_in_4bit", "--load_in_8bit"], "give either --load_in_4bit or --load_in_8bit"),
        (["--bf16", "--dtype", "float32"], "--bf16 is --dtype bfloat16, and --dtype is float32"),
        (["--adapter", "nowhere"], "--adapter nowhere: there is no such folder"),
        (["--model", "no/such-model"], "cannot load --model no/such-model"),
        (["--device", "abacus"], "--device abacus"),
        (["--data_dir", "nowhere"], "--data_dir nowhere is not a folder"),
        (["--out", __file__], "test_evaluate.py is not a folder"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA"),
        ),
    ],
)
def test_errors_are_one_line_that_names_the_option(words, message, folder, capsys):
    options = {"--tasks": "openbookqa", "--data_dir": str(folder)}
    words = [*(w for option in options.items() if option[0] not in words for w in option), "--no_progress", *words]
    assert main(["eval", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("lora-rite eval: error: ")


def test_an_output_that_cannot_be_written_is_an_error_before_the_evaluation(folder, monkeypatch, capsys):
    monkeypatch.setattr(module, "Evaluator", lambda *args: pytest.fail("evaluated"))
    out = Path(__file__) / "out"
    assert main(["eval", "--tasks", "gsm8k", "--data_dir", str(folder), "--loss_only", "--out", str(out)]) == 4
    assert f"--out: cannot write into {out}: " in capsys.readouterr().err


def test_an_unknown_task_is_named(monkeypatch):
    """Of the tasks of lm_eval none are indexed here, which takes ten seconds."""
    manager, root = judges.lm_eval_tasks()
    monkeypatch.setattr(
        judges, "lm_eval_tasks", lambda: (lambda include_defaults: manager(include_defaults=False), root)
    )
    with pytest.raises(ValueError, match="--tasks no_such_task: no such task or file; give hellaswag, arc_challenge"):
        evaluate("no_such_task", **QUICK)


def test_few_shot_examples_need_their_file(tmp_path):
    write_jsonl(tmp_path / "arc_easy" / "test.jsonl", choice_rows("question", 3, seed=0))
    assert figures(evaluate("arc_easy", data_dir=tmp_path, **QUICK), "arc_easy")["n"] == 3
    with pytest.raises(ValueError, match="task arc_easy has no train split"):
        evaluate("arc_easy", data_dir=tmp_path, num_fewshot=1, **QUICK)


def test_missing_packages_are_named(folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in ("openbookqa", "natural_instructions"):
        with pytest.raises(ImportError, match=r'pip install "lora-rite\[eval\]"'):
            evaluate(name, data_dir=folder, **QUICK)
    assert "loss" in figures(evaluate("openbookqa", data_dir=folder, loss_only=True, **QUICK), "openbookqa")
