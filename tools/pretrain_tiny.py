"""Reproduce the embedded model: corpus, tokenizer, training, package files, manifest; then evaluate it.

    nice -n 19 python tools/pretrain_tiny.py            # 20 minutes on 2 idle cores, more on busy ones
    nice -n 19 python tools/pretrain_tiny.py --resume   # go on after an interruption

On a machine that does other work at the same time, OMP_WAIT_POLICY=PASSIVE in the environment keeps the two threads
from slowing each other down; it changes no result.

The corpus is the standard library of the Python that runs this script (sources and documentation topics),
so that nothing is downloaded. The shipped files came from the default arguments and the CPython version
that is named in `src/lora_rite/finetune/tiny/data.json`.
"""

import argparse
import ast
import hashlib
import json
import math
import pathlib
import platform
import subprocess
import sys
import sysconfig
import time

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GemmaConfig, GemmaForCausalLM, PreTrainedTokenizerFast

REPO = pathlib.Path(__file__).resolve().parents[1]
TINY = REPO / "src" / "lora_rite" / "finetune" / "tiny"
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>"]
PAD, BOS, EOS = range(3)
VOCAB = 4096
HELD_OUT_PERCENT = {"library": 4, "tests": 4, "topics": 15}
# A newline takes the indentation that follows it, so that a line's indentation is one token.
SPLIT = r"\s*\n[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
RULE = (
    "All .py files under the standard library's directory except site-packages and _sysconfigdata*.py, and each "
    "topic of pydoc_data/topics.py as one text. Left out: text that is not UTF-8, shorter than 64 bytes, has a line "
    "of more than 500 bytes, or of whose characters other than white space more than 25% are digits; exact duplicates. "
    "Held out: int(sha256(path), 16) % 100 < 4 (15 for topics), except that a text of whose lines of 20 or more "
    "characters more than half also occur in the training split is left out of both splits."
)


def source_texts():
    """Yield (path relative to the standard library, kind, bytes) of every candidate text, in sorted order."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if "site-packages" in path.parts or path.name.startswith("_sysconfigdata"):
            continue
        if path.as_posix() == "pydoc_data/topics.py":
            topics = ast.literal_eval(ast.parse(file.read_bytes()).body[-1].value)
            for name in sorted(topics):
                yield f"{path.as_posix()}#{name}", "topics", topics[name].encode()
        else:
            is_test = path.name.startswith("test_") or {"test", "tests", "idle_test"} & set(path.parts[:-1])
            yield path.as_posix(), "tests" if is_test else "library", file.read_bytes()


def usable(data):
    """Whether a text passes the stated rule (see RULE)."""
    try:
        dense = "".join(data.decode("utf-8").split())
    except UnicodeDecodeError:
        return False
    digits = sum(c.isdigit() for c in dense)
    return len(data) >= 64 and max(map(len, data.split(b"\n"))) <= 500 and digits <= 0.25 * len(dense)


def long_lines(text):
    """The set of a text's stripped lines of 20 or more characters."""
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= 20}


def build_corpus():
    """Return a list of {path, kind, split, sha256, bytes, text}, one for each text that RULE keeps."""
    corpus, seen = [], set()
    for path, kind, data in source_texts():
        digest = hashlib.sha256(data).hexdigest()
        if digest in seen or not usable(data):
            continue
        seen.add(digest)
        held_out = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT[kind]
        split = "held_out" if held_out else "train"
        row = {"path": path, "kind": kind, "split": split, "sha256": digest, "bytes": len(data)}
        corpus.append(row | {"text": data.decode("utf-8")})
    known = set().union(*(long_lines(row["text"]) for row in corpus if row["split"] == "train"))

    def copied(row):
        lines = long_lines(row["text"])
        return row["split"] == "held_out" and len(lines & known) > 0.5 * len(lines)

    return [row for row in corpus if not copied(row)]


def manifest(corpus, tokenizer):
    """What data.json says of the data: source, licence, rule, and every text with its hash, size and split."""
    rows = [{k: v for k, v in row.items() if k != "text"} for row in corpus]
    for row, ids in zip(rows, encode(corpus, tokenizer), strict=True):
        row["tokens"] = len(ids) - 2
    return {
        "source": f"CPython {platform.python_version()} standard library",
        "licence": "PSF-2.0",
        "rule": RULE,
        "texts": rows,
    }


def train_tokenizer(texts):
    """Train a byte-level BPE tokenizer on strings; it puts <|bos|> first unless add_special_tokens=False."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    names = dict(zip(["pad_token", "bos_token", "eos_token"], SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, clean_up_tokenization_spaces=False, **names
    )


def encode(corpus, tokenizer):
    """Token ids of every text as <|bos|> text <|eos|>: a list of lists of int."""
    encodings = tokenizer.backend_tokenizer.encode_batch([row["text"] for row in corpus], add_special_tokens=False)
    return [[BOS, *encoding.ids, EOS] for encoding in encodings]


def batch(stream, step, length, tokens_per_step, seed):
    """Inputs and labels of one step, int64 (tokens_per_step // length, length) each.

    Every row is <|bos|> and then consecutive tokens of the stream; an epoch visits every row once, in random
    order and from a random offset. The batch depends on the arguments alone, so that training can be resumed.
    """
    rows = tokens_per_step // length
    per_epoch = (len(stream) // length - 1) // rows
    epoch, index = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed + epoch)
    offset = torch.randint(length, (), generator=generator)
    order = torch.randperm(len(stream) // length - 1, generator=generator)
    starts = offset + length * order[index * rows : (index + 1) * rows]
    labels = stream[starts[:, None] + torch.arange(length)]
    return torch.cat([torch.full((rows, 1), BOS), labels[:, :-1]], 1), labels


def model_config():
    """The architecture: Gemma, 3.0 million parameters."""
    return GemmaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        max_position_embeddings=512,
        hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def export(model, tokenizer, data, folder):
    """Write the bf16 weights, the configuration, the tokenizer and the manifest."""
    copy = GemmaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows too
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "data.json").write_text(json.dumps(data, indent=1) + "\n")


def main():
    """Build the corpus, train the tokenizer and the model, write the package files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--muon-lr", type=float, default=0.015)
    parser.add_argument("--adam-lr", type=float, default=0.006)
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--decay", type=float, default=0.6, help="last part of the steps, where the rate falls to 0")
    parser.add_argument("--long", type=float, default=0.2, help="last part of the steps, with rows of 512, not 256")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=pathlib.Path, default=REPO / "runs" / "tiny", help="checkpoint and log")
    parser.add_argument("--out", type=pathlib.Path, default=TINY)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)

    corpus = build_corpus()
    train = [row for row in corpus if row["split"] == "train"]
    held_out = [row for row in corpus if row["split"] == "held_out"]
    tokenizer = train_tokenizer(row["text"] for row in train)
    generator = torch.Generator().manual_seed(args.seed)
    encoded = encode(train, tokenizer)
    order = torch.randperm(len(encoded), generator=generator).tolist()
    stream = torch.tensor([i for n in order for i in encoded[n]])
    probe = torch.tensor([i for ids in encode(held_out, tokenizer) for i in ids])
    data = manifest(corpus, tokenizer)

    model = GemmaForCausalLM(model_config())
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is q for q in hidden)]
    muon = torch.optim.Muon(hidden, lr=args.muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    optimizers = [muon, adamw]

    def schedule(step):
        return min((step + 1) / args.warmup, (args.steps - step) / (args.decay * args.steps), 1.0)

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    options = {k: v for k, v in vars(args).items() if k not in ("work", "out", "resume")}
    training = options | {"step": 0, "tokens": 0, "seconds": 0, "resumed_at": [], "torch": str(torch.__version__)}
    if args.resume:
        state = torch.load(args.work / "checkpoint.pt")
        training = state["training"]
        if training["step"] < args.steps:
            training["resumed_at"].append(training["step"])
        model.load_state_dict(state["model"])
        for part, saved in zip(optimizers + schedulers, state["optimizers"], strict=True):
            part.load_state_dict(saved)

    def loss_of(inputs, labels):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    compiled = torch.compile(loss_of, dynamic=False)
    log = (args.work / "log.txt").open("a" if args.resume else "w", buffering=1)

    def say(text):
        print(text, flush=True)
        print(text, file=log)

    say(f"{len(train)} texts, {len(stream)} tokens, {sum(r['bytes'] for r in train)} bytes in train")
    say(f"{len(held_out)} texts, {len(probe)} tokens, {sum(r['bytes'] for r in held_out)} bytes held out")
    say(f"{sum(p.numel() for p in model.parameters())} parameters")
    begun, saved, mean = time.time() - training["seconds"], time.time(), math.log(VOCAB)
    for step in range(training["step"], args.steps):
        length = 512 if step >= args.steps * (1 - args.long) else 256
        loss = compiled(*batch(stream, step, length, args.tokens_per_step, args.seed))
        loss.backward()
        for part in optimizers:
            part.step()
            part.zero_grad()
        for part in schedulers:
            part.step()
        mean += 0.05 * (loss.item() - mean)
        last = step + 1 == args.steps
        if (step + 1) % 20 == 0:
            say(f"step {step + 1} loss {mean:.4f} seconds {time.time() - begun:.0f}")
        if last or time.time() - saved > 180:
            saved = time.time()
            training |= {"step": step + 1, "tokens": (step + 1) * args.tokens_per_step, "seconds": int(saved - begun)}
            state = {"training": training, "model": model.state_dict()}
            state["optimizers"] = [part.state_dict() for part in optimizers + schedulers]
            torch.save(state, args.work / "checkpoint.part")
            (args.work / "checkpoint.part").replace(args.work / "checkpoint.pt")
            with torch.no_grad():
                sample = [loss_of(*batch(probe, i, length, 4096, 0)).item() for i in range(8)]
            say(f"step {step + 1} held-out sample {sum(sample) / 8:.4f} nat per token")
            export(model, tokenizer, {"training": training, **data}, args.out)
    export(model, tokenizer, {"training": training, **data}, args.out)
    figures = [] if args.out == TINY else ["--json", args.out / "tiny_model.json"]
    subprocess.run([sys.executable, REPO / "tools" / "eval_tiny.py", "--folder", args.out, *figures], check=True)


if __name__ == "__main__":
    main()
