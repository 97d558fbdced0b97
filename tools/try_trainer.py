"""Trains ten steps in somebody else's trainer, by the lines of docs/trainers.md, and says what came of it.

    python tools/try_trainer.py llamafactory
    python tools/try_trainer.py axolotl --python python3.12 --folder /tmp/trainers

Makes an environment of its own (gigabytes; from the package index, no hub) in FOLDER/NAME/venv, a random Llama of two
layers and 64 questions beside it, and writes the files and runs the command of the trainer's section: a Python block
becomes the file that its first line names, the YAML block goes below the configuration here, and "…" of the command
stands for the words here. Runs on the CPU. Each of the 14 pairs must have been stepped in each of ten steps, by the
optimizer's state in the checkpoint; then the run goes on from a checkpoint, and its adapter is compared with the
uninterrupted one's. Prints a row of the page's table. Exit code 1 where any of it fails.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "trainers.md"
STEPS, LAYERS = 10, 2
PAIRS = LAYERS * 7


class Trainer(NamedTuple):
    """What a run needs beside the lines of the page. In texts, {out} is the run's folder.

    Attributes:
        section: heading in the page.
        packages: requirements for pip; the first one is the trainer's.
        words: what stands for "…" in the command.
        resume: further words that go on from the middle of the run in ``whole``.
        config: what stands above the page's YAML in ``config.yaml``.
        empty: modules that the trainer imports for data that is not trained on here, and that do not load on a CPU.
    """

    section: str
    packages: tuple[str, ...]
    words: str
    resume: str
    config: str = ""
    empty: tuple[str, ...] = ()


TRAINERS = {
    "llamafactory": Trainer(
        section="LLaMA-Factory",
        packages=("llamafactory", "torch==2.13.0", "torchvision==0.28.0"),
        words="output_dir={out}",
        resume="resume_from_checkpoint=whole/checkpoint-5",
        config="""\
model_name_or_path: model
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
dataset_dir: .
dataset: questions
template: alpaca
max_steps: 10
save_steps: 5
logging_steps: 1
per_device_train_batch_size: 4
lr_scheduler_type: cosine
report_to: none
""",
        empty=("torchaudio",),
    ),
    "ms-swift": Trainer(
        section="ms-swift",
        packages=("ms-swift", "torch==2.13.0", "torchvision==0.28.0"),
        words="--model model --model_type llama --template default --tuner_type lora --target_modules all-linear "
        "--dataset questions.json --max_steps 10 --save_steps 5 --logging_steps 1 --per_device_train_batch_size 4 "
        "--gradient_accumulation_steps 1 --split_dataset_ratio 0 --torch_dtype float32 --add_version false "
        "--report_to none --output_dir {out}",
        resume="--resume_from_checkpoint whole/checkpoint-5",
    ),
    "axolotl": Trainer(
        section="axolotl",
        packages=("axolotl", "torch==2.13.0", "torchvision==0.28.0"),
        words="--launcher python --output-dir {out}",
        resume="--resume-from-checkpoint whole/checkpoint-5",
        config="""\
base_model: model
datasets:
  - {path: questions.json, ds_type: json, type: alpaca}
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
sequence_len: 128
max_steps: 10
save_steps: 5
logging_steps: 1
micro_batch_size: 4
gradient_accumulation_steps: 1
lr_scheduler: cosine
attn_implementation: sdpa
bf16: false
lora_mlp_kernel: false
lora_qkv_kernel: false
lora_o_kernel: false
lora_embedding_kernel: false
""",
    ),
    "unsloth": Trainer(
        section="Unsloth",
        packages=("unsloth", "torch==2.13.0", "torchvision==0.28.0"),
        words="model questions.json {out}",
        resume="whole/checkpoint-5",
    ),
    "torchtune": Trainer(
        section="torchtune",
        packages=("torchtune", "torch==2.13.0", "torchao==0.10.0", "transformers"),
        words="output_dir={out}",
        resume="resume_from_checkpoint=True checkpointer.recipe_checkpoint=../whole/recipe_state/recipe_state.pt "
        "checkpointer.adapter_checkpoint=../whole/epoch_1/adapter_model.pt",
        config="""\
model:
  _component_: torchtune.models.llama3.lora_llama3
  lora_attn_modules: [q_proj, k_proj, v_proj, output_proj]
  apply_lora_to_mlp: true
  vocab_size: 4096
  num_layers: 2
  num_heads: 4
  num_kv_heads: 2
  embed_dim: 64
  intermediate_dim: 128
  max_seq_len: 128
  lora_rank: 8
  lora_alpha: 16
tokenizer:
  _component_: torchtune.models.qwen2.Qwen2Tokenizer
  path: model/vocab.json
  merges_file: model/merges.txt
  special_tokens: {<|endoftext|>: 0, <|im_start|>: 1, <|im_end|>: 2}
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: model
  checkpoint_files: [model.safetensors]
  recipe_checkpoint: null
  adapter_checkpoint: null
  output_dir: ${output_dir}
  model_type: LLAMA3
resume_from_checkpoint: false
save_adapter_weights_only: true
dataset:
  _component_: torchtune.datasets.alpaca_dataset
  source: json
  data_files: questions.json
seed: 0
shuffle: true
batch_size: 4
epochs: 3
max_steps_per_epoch: 5
gradient_accumulation_steps: 1
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 0
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
compile: false
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}/logs
device: cpu
dtype: fp32
""",
    ),
}


def lines(section: str) -> tuple[dict[str, str], str, str]:
    """Of the page: Python files by name, YAML, and the command."""
    _, text = re.split(rf"^## {section}$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = re.split(r"^## ", text, flags=re.MULTILINE)[0]
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    files = {re.match(r"# (\w+\.py)", code)[1]: code for language, code in blocks if language == "python"}
    (command,) = (code.strip() for language, code in blocks if language == "bash")
    return files, "".join(code for language, code in blocks if language == "yaml"), command


def make_environment(trainer: Trainer, python: str, venv: Path) -> Path:
    """The environment's Python, after everything is installed."""
    inside = venv / "bin" / "python"
    if not inside.exists():
        subprocess.run([python, "-m", "venv", str(venv)], check=True)
    pip = [str(inside), "-m", "pip", "install", "-q", "--no-cache-dir"]
    subprocess.run([*pip, *trainer.packages], check=True)
    subprocess.run([*pip, "--no-deps", str(ROOT)], check=True)
    for name in ("torchvision", "torchaudio"):  # an index has them for CUDA alone; text is trained without them
        if subprocess.run([str(inside), "-c", f"import {name}"], capture_output=True, check=False).returncode:
            subprocess.run([*pip[:3], "uninstall", "-q", "-y", name], check=True)
    return inside


def write_inputs(trainer: Trainer) -> None:
    """Model, data and the page's files, in the present folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import lora_rite

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    tokens = {"vocab_size": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **tokens, num_key_value_heads=2)).save_pretrained("model")
    AutoTokenizer.from_pretrained(Path(lora_rite.__file__).parent / "finetune" / "tiny").save_pretrained("model")
    rows = [{"instruction": f"Add {n} to 17.", "input": "", "output": f"It is {n + 17}."} for n in range(64)]
    Path("questions.json").write_text(json.dumps(rows))
    Path("dataset_info.json").write_text(json.dumps({"questions": {"file_name": "questions.json"}}))
    files, yaml, _ = lines(trainer.section)
    for name, code in files.items():
        Path(name).write_text(code, encoding="utf-8")
    for name in trainer.empty:
        Path(f"{name}.py").touch()
    Path("config.yaml").write_text(trainer.config + yaml, encoding="utf-8")
    from tokenizers import models  # torchtune reads the tokenizer in two files

    vocabulary = json.loads(Path("model/tokenizer.json").read_text(encoding="utf-8"))["model"]
    models.BPE(vocabulary["vocab"], [tuple(pair) for pair in vocabulary["merges"]]).save("model")


def last(out: str, pattern: str) -> Path:
    """The newest file of this name in a run's folder."""
    return max(Path(out).rglob(pattern), key=lambda path: path.stat().st_mtime)


def steps(out: str) -> list[int]:
    """How often each factor has been stepped, by the optimizer's state in the last checkpoint."""
    import torch

    file = last(out, "recipe_state.pt" if list(Path(out).rglob("recipe_state.pt")) else "optimizer.pt")
    state = torch.load(file, map_location="cpu", weights_only=True)
    return [int(of_factor["step"]) for of_factor in state.get("optimizer", state)["state"].values()]


def resumes(whole: str, out: str) -> bool:
    """Whether a run lacks checkpoints that the whole one has: those before it went on."""
    folders = [
        {path.parent.relative_to(run) for path in Path(run).rglob("adapter_config.json")} for run in (whole, out)
    ]
    return folders[1] < folders[0]


def difference(outs: list[str]) -> float:
    """The largest one between the adapters of two runs, relative to the largest entry."""
    from safetensors.torch import load_file

    first, second = (load_file(last(out, "adapter_model.safetensors")) for out in outs)
    assert first.keys() == second.keys()
    largest = max(float(x.abs().max()) for x in first.values())
    return max(float((first[name] - second[name]).abs().max()) for name in first) / largest


def run(trainer: Trainer, out: str, further: str = "") -> None:
    """The page's command, in the present folder."""
    _, _, command = lines(trainer.section)
    words = [*command.replace("…", trainer.words.format(out=out)).split(), *further.split()]
    print("$", " ".join(words), flush=True)
    shutil.rmtree(out, ignore_errors=True)  # a trainer would go on with an older run, or refuse
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": ".",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "WANDB_DISABLED": "true",
        "DO_NOT_TRACK": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
    }
    with open(f"{out}.log", "w", encoding="utf-8") as log:
        done = subprocess.run(words, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        sys.exit(Path(f"{out}.log").read_text(encoding="utf-8")[-3000:] + f"\nexit code {done.returncode}")


def try_inside(trainer: Trainer) -> None:
    """Everything after the installation, in the environment's Python and the present folder."""
    write_inputs(trainer)
    run(trainer, "whole")
    counts = steps("whole")
    if counts != [STEPS] * 2 * PAIRS:
        sys.exit(f"not every factor of {PAIRS} pairs has been stepped {STEPS} times: {counts}")
    run(trainer, "resumed", trainer.resume)
    if not resumes("whole", "resumed"):
        sys.exit("the second run did not go on from the checkpoint, it began anew")
    apart = difference(["whole", "resumed"])
    resumed = "bitwise" if apart == 0 else f"apart by {apart:.0e}"
    others = [name for name in ("torch", "transformers", "peft", "trl") if importlib.util.find_spec(name)]
    beside = ", ".join(f"{name} {version(name)}" for name in others)
    result = f"{PAIRS} pairs in {STEPS} steps; resumed {resumed}"
    print(f"| {trainer.section} {version(trainer.packages[0])} | {beside} | {date.today()} | {result} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TRAINERS)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "trainers", help="where it works")
    parser.add_argument("--python", default=sys.executable, help="the Python of the new environment")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    trainer = TRAINERS[options.name]
    if options.inside:
        return try_inside(trainer)
    folder = options.folder.resolve() / options.name
    folder.mkdir(parents=True, exist_ok=True)
    inside = make_environment(trainer, options.python, folder / "venv")
    command = [str(inside), str(Path(__file__).resolve()), options.name, "--inside"]
    sys.exit(subprocess.run(command, cwd=folder, check=False).returncode)


if __name__ == "__main__":
    main()
