"""Figures of Super-Natural Instructions, from generated answers."""

import math
import statistics
import string
from typing import Any

from .tasks import Row

#: Categories of Super-Natural Instructions' test split that Tk-Instruct judges by exact match; the others by ROUGE-L.
EXACT_MATCH = {
    "Textual Entailment",
    "Cause Effect Classification",
    "Coreference Resolution",
    "Dialogue Act Recognition",
    "Answerability Classification",
    "Word Analogy",
}
#: The metric that stands for a task.
MAIN_METRIC = {"choices": "acc_norm", "generation": "exact_match,strict-match", "instructions": "score"}


def instruction_scores(rows: list[Row], predictions: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of Super-Natural Instructions as Tk-Instruct's ``compute_metrics.py`` has them, but from 0 to 1.

    ROUGE-L (F, stemmed) and exact match (of lower-case text without punctuation), each the best over the references;
    the mean over instances, for all, for each category and for each task. ``score`` is exact match for the categories
    of :data:`EXACT_MATCH` and others whose name says Classification, and ROUGE-L for the rest. An answer is unparsed
    where it is empty, or where exact match decides and it is none of the task's outputs.

    Args:
        rows: the instances, as :func:`~lora_rite.finetune.tasks.read_rows` gives them.
        predictions: an answer for each.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    labels = {row["Task"]: {_normal(output) for output in row["Outputs"]} for row in rows}
    samples = []
    for row, prediction in zip(rows, predictions, strict=True):
        category, references = row["Categories"][0], row["Instance"]["output"]
        exact = category in EXACT_MATCH or "Classification" in category
        metric = "exact_match" if exact else "rougeL"
        sample = {
            "task": row["Task"],
            "category": category,
            "id": row["Instance"].get("id"),
            "references": references,
            "prediction": prediction,
            "rougeL": scorer.score_multi(references, prediction)["rougeL"].fmeasure,
            "exact_match": float(_normal(prediction) in map(_normal, references)),
            "metric": metric,
            "unparsed": not prediction or (exact and _normal(prediction) not in labels[row["Task"]]),
        }
        samples.append({**sample, "score": sample[metric]})
    names = ("score", "rougeL", "exact_match")
    whole = _means(samples)
    figures = {
        "metric": MAIN_METRIC["instructions"],
        "metrics": {name: whole[name] for name in names},
        "stderr": {
            name: statistics.stdev(sample[name] for sample in samples) / math.sqrt(len(samples))
            for name in names
            if len(samples) > 1
        },
        "n": whole["n"],
        "unparsed": {"score": whole["unparsed"]},
    }
    for group, key in (("by_metric", "metric"), ("categories", "category"), ("tasks", "task")):
        values = sorted({sample[key] for sample in samples})
        figures[group] = {value: _means([sample for sample in samples if sample[key] == value]) for value in values}
    return figures, samples


def _means(samples: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = {sample["metric"] for sample in samples}
    return {
        **{name: statistics.fmean(sample[name] for sample in samples) for name in ("score", "rougeL", "exact_match")},
        "metric": metrics.pop() if len(metrics) == 1 else "both",
        "n": len(samples),
        "unparsed": sum(sample["unparsed"] for sample in samples),
    }


def _normal(text: str) -> str:
    """Lower case, without punctuation, single spaces: what exact match compares."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())
