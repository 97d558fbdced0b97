"""Score the embedded model and an interpolated trigram model on the held-out texts; write figures and model card.

    python tools/eval_tiny.py

Both models score exactly the same tokens: those of every held-out text and the end token after it. The trigram
model always sees the two tokens before; the causal model reads each text in windows of 512 tokens, with nothing
but <|bos|> before a window.
"""

import argparse
import json
import math
import pathlib
import platform

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from pretrain_tiny import BOS, REPO, TINY, VOCAB, build_corpus, encode, long_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

COMMAND = "python tools/eval_tiny.py"
KINDS = ("library", "tests", "topics")


class Trigram:
    """Interpolated trigram model: p3 = a3 f3 + (1 - a3) p2, p2 = a2 f2 + (1 - a2) p1, p1 = a1 f1 + (1 - a1) / VOCAB.

    f is the relative frequency. Every a depends on the order and on the bucket of the context: floor(log2(count)) and
    floor(log2(count / number of different successors)) of the context's occurrences, and is fitted by EM.
    """

    def __init__(self, texts):
        """texts: token ids of each text, <|bos|> first and <|eos|> last."""
        contexts, words = events(texts)
        self.tables = []
        for order in (1, 2, 3):
            context = contexts % VOCAB ** (order - 1)
            grams, counts = np.unique(context * VOCAB + words, return_counts=True)
            heads, first = np.unique(grams // VOCAB, return_index=True)
            totals, kinds = np.add.reduceat(counts, first), np.diff(first, append=len(grams))
            self.tables.append((grams, counts, heads, totals, kinds))
        self.weights = [np.full((32, 32), 0.5) for _ in self.tables]

    def frequencies(self, texts):
        """For each order: frequency of every scored token, bucket indices and whether the context is known."""
        contexts, words = events(texts)
        for order, (grams, counts, heads, totals, kinds) in enumerate(self.tables):
            context = contexts % VOCAB**order
            gram = context * VOCAB + words
            at = np.searchsorted(grams, gram).clip(max=len(grams) - 1)
            head = np.searchsorted(heads, context).clip(max=len(heads) - 1)
            known = heads[head] == context
            total = totals[head]
            frequency = np.where(known & (grams[at] == gram), counts[at] / total, 0.0)
            bucket = np.log2(total).astype(int), np.log2(total / kinds[head]).astype(int)
            yield frequency, bucket, known

    def fit(self, texts, rounds=30):
        """Fit the interpolation weights on texts that are not among those counted."""
        levels = list(self.frequencies(texts))
        for _ in range(rounds):
            lower = np.full(len(levels[0][0]), 1 / VOCAB)
            parts = []
            for (frequency, bucket, known), weight in zip(levels, self.weights, strict=True):
                a = np.where(known, weight[bucket], 0.0)
                parts.append((a, frequency, lower))
                lower = a * frequency + (1 - a) * lower
            share = np.ones_like(lower)  # probability that the token came from this order or a lower one
            for (_, bucket, known), (a, frequency, below), weight in zip(
                levels[::-1], parts[::-1], self.weights[::-1], strict=True
            ):
                here = share * a * frequency / (a * frequency + (1 - a) * below)
                used, tried = np.zeros_like(weight), np.zeros_like(weight)
                np.add.at(used, bucket, here * known)
                np.add.at(tried, bucket, share * known)
                weight[:] = (used + 0.5) / (tried + 1)
                share = share - here

    def losses(self, texts):
        """Negative log-likelihood in nat of every scored token, one text after the other: float64 (tokens,)."""
        probability = 1 / VOCAB
        for (frequency, bucket, known), weight in zip(self.frequencies(texts), self.weights, strict=True):
            a = np.where(known, weight[bucket], 0.0)
            probability = a * frequency + (1 - a) * probability
        return -np.log(probability)


def events(texts):
    """Contexts (u * VOCAB + v of the two tokens before) and the scored tokens of texts: int64 (tokens,) each."""
    contexts, words = [], []
    for ids in texts:
        padded = np.array([BOS, *ids], dtype=np.int64)
        contexts.append(padded[:-2] * VOCAB + padded[1:-1])
        words.append(padded[2:])
    return np.concatenate(contexts), np.concatenate(words)


@torch.no_grad()
def model_losses(model, texts, length=512):
    """Negative log-likelihood in nat of every scored token, one text after the other: float64 (tokens,).

    A text is read in windows of at most `length` tokens, each after <|bos|> alone.
    """
    losses = []
    for ids in texts:
        for start in range(1, len(ids), length):
            labels = torch.tensor([ids[start : start + length]])
            inputs = torch.cat([torch.tensor([[BOS]]), labels[:, :-1]], 1)
            losses.append(F.cross_entropy(model(input_ids=inputs).logits[0].float(), labels[0], reduction="none"))
    return torch.cat(losses).double().numpy()


def summary(losses, rows, texts):
    """Nat per token and bits per byte, over all rows and by kind of text."""
    sizes = [len(ids) - 1 for ids in texts]
    sums = [part.sum() for part in np.split(losses, np.cumsum(sizes)[:-1])]
    result = {}
    for kind in ("all", *KINDS):
        picked = [n for n, row in enumerate(rows) if kind in ("all", row["kind"])]
        nats = sum(sums[n] for n in picked)
        result[kind] = {
            "nat_per_token": round(float(nats / sum(sizes[n] for n in picked)), 4),
            "bits_per_byte": round(float(nats / math.log(2) / sum(rows[n]["bytes"] for n in picked)), 4),
        }
    return result


def counts(rows, split, kind):
    """Number of texts, bytes and tokens of one kind in one split."""
    picked = [row for row in rows if (row["split"], row["kind"]) == (split, kind)]
    return {"texts": len(picked)} | {key: sum(row[key] for row in picked) for key in ("bytes", "tokens")}


def processor():
    """The processor's name, where the system tells it."""
    info = pathlib.Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def main():
    """Evaluate, print, and write the figures and the model card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, default=TINY)
    parser.add_argument("--json", type=pathlib.Path, default=REPO / "benchmarks" / "results" / "tiny_model.json")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = json.loads((args.folder / "data.json").read_text())
    corpus = build_corpus()
    digests = [[(row["sha256"], row["split"]) for row in rows] for rows in (corpus, data["texts"])]
    if digests[0] != digests[1]:
        raise SystemExit(f"this Python's standard library is not that of the manifest ({data['source']})")
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    train = [row for row in corpus if row["split"] == "train"]
    held_out = [row for row in corpus if row["split"] == "held_out"]
    train_ids, held_out_ids = encode(train, tokenizer), encode(held_out, tokenizer)

    fitting = [int(row["sha256"], 16) % 20 == 0 for row in train]  # 5% of the training texts, for the weights
    trigram = Trigram([ids for ids, part in zip(train_ids, fitting, strict=True) if not part])
    trigram.fit([ids for ids, part in zip(train_ids, fitting, strict=True) if part])
    full = Trigram(train_ids)
    full.weights = trigram.weights
    baseline = summary(full.losses(held_out_ids), held_out, held_out_ids)
    tiny = summary(model_losses(model, held_out_ids), held_out, held_out_ids)
    known = set().union(*(long_lines(row["text"]) for row in train))
    lines = [line for row in held_out for line in long_lines(row["text"])]
    result = {
        "model": tiny,
        "trigram": baseline,
        "gap_nat_per_token": round(baseline["all"]["nat_per_token"] - tiny["all"]["nat_per_token"], 4),
        "model_256_token_windows": summary(model_losses(model, held_out_ids, 256), held_out, held_out_ids),
        "held_out_long_lines_also_in_train": round(sum(line in known for line in lines) / len(lines), 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "directory_bytes": sum(file.stat().st_size for file in args.folder.iterdir() if file.name != "README.md"),
        "counts": {
            split: {kind: counts(data["texts"], split, kind) for kind in KINDS} for split in ("train", "held_out")
        },
        "data": data["source"],
        "training": data["training"],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
        "hardware": f"{processor()}, {torch.get_num_threads()} threads",
        "command": COMMAND,
    }
    for name in ("model", "trigram"):
        for kind, row in result[name].items():
            print(f"{name:8} {kind:8} {row['nat_per_token']:.4f} nat/token {row['bits_per_byte']:.4f} bits/byte")
    print(f"the model is {result['gap_nat_per_token']:.4f} nat per token below the trigram model")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    (args.folder / "README.md").write_text(card(result))


def card(result):
    """The model card, every figure of which comes from the result of this evaluation."""
    model, trigram, training = result["model"], result["trigram"], result["training"]
    total = {
        split: {key: sum(kind[key] for kind in kinds.values()) for key in ("texts", "bytes", "tokens")}
        for split, kinds in result["counts"].items()
    }
    tokens = {"all": total["held_out"]["tokens"]} | {k: v["tokens"] for k, v in result["counts"]["held_out"].items()}
    names = {"all": "all", "library": "library sources", "tests": "test sources", "topics": "documentation topics"}
    rows = "\n".join(
        f"| {name} | {model[kind]['nat_per_token']:.3f} | {model[kind]['bits_per_byte']:.3f} "
        f"| {trigram[kind]['nat_per_token']:.3f} | {trigram[kind]['bits_per_byte']:.3f} | {tokens[kind]:,} |"
        for kind, name in names.items()
    )
    return CARD.format(
        r=result,
        rows=rows,
        train=total["train"],
        held_out=total["held_out"],
        training=training,
        minutes=training["seconds"] / 60,
        epochs=training["tokens"] / total["train"]["tokens"],
        resumed="".join(f", resumed from a checkpoint at step {step:,}" for step in training["resumed_at"])
        + training.get("note", ""),
        short=100 - round(100 * training["long"]),
        long=round(100 * training["long"]),
        decay=round(100 * training["decay"]),
        loss256=result["model_256_token_windows"]["all"]["nat_per_token"],
        size=result["directory_bytes"] / 1e6,
    )


CARD = """---
language: en
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# The embedded model of lora-rite

A causal language model of {r[parameters]:,} parameters that lora-rite trained from scratch on the Python standard
library. It is there for the tests and the demonstration of lora-rite, which need a real language model that loads
without a network. It is of no other use: it does not answer questions and its code does not work.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(folder)  # folder: where this file lies
    tokenizer = AutoTokenizer.from_pretrained(folder)

## Architecture

Gemma (`GemmaForCausalLM`): 5 layers, hidden size 192, GeGLU of size 576, 4 query heads and 2 key/value heads of
dimension 48, tied embeddings, vocabulary 4,096, context 512. The weights are bfloat16; the directory
takes {size:.1f} MB.

The tokenizer is a byte-level BPE of its own, trained on the training split alone. Any text survives a round trip
(`decode(encode(x, add_special_tokens=False)) == x`); a line break and the indentation after it are usually one token.
It puts `<|bos|>` first, as the model expects; `<|pad|>` and `<|eos|>` are different tokens.

## Data

The sources and documentation topics of the {r[data]}, under the PSF License, version 2
(PSF-2.0). `data.json` lists every text with its SHA-256, size, kind and split, and states the rule by which texts were
left out and split by file.

| | texts | bytes | tokens |
|---|---|---|---|
| train | {train[texts]:,} | {train[bytes]:,} | {train[tokens]:,} |
| held out | {held_out[texts]:,} | {held_out[bytes]:,} | {held_out[tokens]:,} |

No text is in both splits, and no held-out text shares more than half of its long lines with the training split.
Of all lines of 20 or more characters in held-out texts, {r[held_out_long_lines_also_in_train]:.1%} also occur somewhere
in the training split (imports, licence headers, common statements).

## Training

`python tools/pretrain_tiny.py`: {training[step]:,} steps of {training[tokens_per_step]:,} tokens, {training[tokens]:,}
tokens in all ({epochs:.2f} times the training split); rows of 256 tokens for the first {short}% of the steps and of 512
for the last {long}%. Muon (rate {training[muon_lr]}, weight decay 0.05) for the matrices of the layers, AdamW (rate
{training[adam_lr]}) for embeddings and norms; {training[warmup]} steps of warm-up, linear decay to zero over the last
{decay}% of the steps; bfloat16 autocast, seed {training[seed]}. It took {minutes:.0f} minutes on {training[threads]}
threads{resumed} ({r[hardware]}; torch {training[torch]}). Learning rates and batch size were
chosen after three runs of 0.9 million tokens, by the loss on a sample of the held-out texts.

## Held-out loss

`{r[command]}` computes these figures and writes `benchmarks/results/tiny_model.json`. Both models
score the same tokens: those of every held-out text and its end token. The trigram model is interpolated, with weights
by count of the context, fitted by EM on 5% of the training texts; it always sees the two tokens before. The model
reads windows of 512 tokens after `<|bos|>` alone.

| held-out texts | model, nat per token | bits per byte | trigram, nat per token | bits per byte | tokens |
|---|---|---|---|---|---|
{rows}

The model is {r[gap_nat_per_token]:.3f} nat per token below the trigram model. In windows of 256 tokens its loss
is {loss256:.3f} nat per token.

## Limits

It has seen nothing but the standard library: it knows Python's surface and little English, and no other language. It
may repeat pieces of its training data, licence headers and names of authors among them. The context ends at 512 tokens.
The documentation topics held out are few (the table says how many tokens), so their figure is rough. Another CPython
version, processor or torch version gives other weights.

## Licence

The weights and the tokenizer are under Apache-2.0. The training data is copyright Python Software Foundation and its
contributors, under PSF-2.0; it is not part of this directory.
"""


if __name__ == "__main__":
    main()
