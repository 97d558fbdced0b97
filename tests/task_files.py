"""Small local files of the tasks in their data sets' own layouts, and a small encoder–decoder model; all made up."""

import json

LETTERS = ["A", "B", "C", "D"]
WORDS = ["water", "ice", "steam", "stone", "sand", "glass", "iron", "wood", "wool", "cotton", "silk", "paper"]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def choice_rows(stem, n, *, seed):
    """Rows of ARC (``stem`` "question") or OpenBookQA ("question_stem")."""
    rows = []
    for i in range(seed, seed + n):
        texts = [WORDS[(i + k) % len(WORDS)] for k in range(4)]
        choices = {"text": texts, "label": LETTERS}
        rows.append({"id": str(i), stem: f"Which one is number {i}?", "choices": choices, "answerKey": LETTERS[i % 4]})
    return rows


def hellaswag_rows(n, *, seed):
    return [
        {
            "ind": i,
            "activity_label": "Making tea",
            "ctx_a": f"[header] How to boil {WORDS[i % len(WORDS)]} [title] Take a pot. [step] Fill  it {i} times.",
            "ctx_b": "the cook",
            "endings": [f"waits for {word} [substeps] and  sits." for word in WORDS[i % 8 : i % 8 + 4]],
            "label": str(i % 4),
        }
        for i in range(seed, seed + n)
    ]


def gsm8k_rows(n, *, seed):
    return [
        {
            "question": f"Ann has {i} pens and buys {i + 1}. How many?",
            "answer": f"{i} + {i + 1} = {2 * i + 1}\n#### {2 * i + 1}",
        }
        for i in range(seed, seed + n)
    ]


def instruction_task(name, category, outputs, n):
    """A file of Super-Natural Instructions with n instances; ``outputs(i)`` has the references of the i-th. The input
    of the fourth is long."""
    text = lambda i: f"input {i}" + " and more" * (30 if i == 3 else 0)
    return {
        "Contributors": ["nobody"],
        "Categories": [category],
        "Definition": [f"Do what {name} says"],
        "Positive Examples": [
            {"input": "first in", "output": "first out.", "explanation": "because"},
            {"input": "second in?", "output": "second out", "explanation": "so"},
            {"input": "third in", "output": "third out", "explanation": "thus"},
        ],
        "Negative Examples": [],
        "Instances": [{"id": f"{name}-{i}", "input": text(i), "output": outputs(i)} for i in range(n)],
    }


INSTRUCTION_TASKS = {
    "task001_train_generation": ("Story Composition", lambda i: [f"story {i}"], 130),
    "task002_train_small": ("Sentiment Analysis Classification", lambda i: ["good" if i % 2 else "bad"], 30),
    "task011_test_entailment": ("Textual Entailment", lambda i: ["Yes." if i % 2 else "No."], 104),
    "task012_test_title": ("Title Generation", lambda i: [f"The running dogs {i}", "A title"], 5),
}


def make_task_files(folder):
    """DATA_DIR with all tasks; a clone of natural-instructions among them."""
    for task, stem in (("arc_challenge", "question"), ("arc_easy", "question"), ("openbookqa", "question_stem")):
        for n, (split, count) in enumerate((("train", 12), ("validation", 4), ("test", 6))):
            write_jsonl(folder / task / f"{split}.jsonl", choice_rows(stem, count, seed=20 * n))
    write_jsonl(folder / "hellaswag" / "train.jsonl", hellaswag_rows(12, seed=0))
    write_jsonl(folder / "hellaswag" / "validation.jsonl", hellaswag_rows(6, seed=20))
    write_jsonl(folder / "gsm8k" / "train.jsonl", gsm8k_rows(12, seed=0))
    write_jsonl(folder / "gsm8k" / "test.jsonl", gsm8k_rows(5, seed=20))
    clone = folder / "natural-instructions"
    (clone / "tasks").mkdir(parents=True)
    (clone / "splits" / "default").mkdir(parents=True)
    for name, (category, outputs, n) in INSTRUCTION_TASKS.items():
        content = instruction_task(name, category, outputs, n)
        (clone / "tasks" / f"{name}.json").write_text(json.dumps(content, indent=4), encoding="utf-8")
    for split in ("train", "test"):
        names = [name for name in INSTRUCTION_TASKS if split in name]
        (clone / "splits" / "default" / f"{split}_tasks.txt").write_text("\n".join(names) + "\n")
    return folder


def make_mt5(folder):
    """A random mT5 with a word tokenizer, as a local folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import MT5Config, MT5ForConditionalGeneration, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    from tokenizers.decoders import Metaspace

    tokenizer.decoder = Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>", "<unk>"], initial_alphabet=list(map(chr, range(32, 127)))
    )
    tokenizer.train_from_iterator([*WORDS, "Question: Which one is number Answer: Input Output Definition"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = MT5Config(
        vocab_size=len(fast), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    MT5ForConditionalGeneration(config).save_pretrained(folder)
    return folder
