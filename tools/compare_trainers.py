"""What TRL's SFTTrainer does with the rows of ``lora-rite train``, beside transformers' Trainer as that uses it.

``python tools/compare_trainers.py trainer sft --shares 0.2 1`` prints, for each trainer and each share of tokens that
carry loss, a line of JSON: sha256 of the batches in their order, losses, processor time of a step and peak memory. The
model is a random Llama with a vocabulary that outweighs it, as those of small Gemmas do. Each runs in a process of its
own. With --device cuda, times are of the clock and memory is the GPU's.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

VOCABULARY, BATCH, STEPS = 65536, 4, 6


def rows(share):
    """40 rows of 200 to 239 random tokens, of which the last ``share`` carries loss."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for length in range(200, 240):
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        ignored = round(length * (1 - share))
        yield {"input_ids": ids, "labels": [-100] * ignored + ids[ignored:], "attention_mask": [1] * length}


def make(name, share, folder, device):
    """The trainer, as ``lora-rite train`` would set it up."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
    from trl import SFTConfig, SFTTrainer

    from lora_rite.finetune.labelled import predict_labelled
    from lora_rite.finetune.load import load_model

    set_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=VOCABULARY, tie_word_embeddings=True)
    adapter = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    network = get_peft_model(LlamaForCausalLM(config), adapter)
    options = {
        "output_dir": folder, "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 1e-3,
        "seed": 0, "logging_steps": 1, "disable_tqdm": True, "report_to": "none", "save_strategy": "no",
        "use_cpu": device == "cpu",
    }  # fmt: skip
    _, tokenizer = load_model("tiny")
    given = {"data_collator": DataCollatorForSeq2Seq(tokenizer), "train_dataset": Dataset.from_list(list(rows(share)))}
    if name == "trainer":
        assert predict_labelled(network)
        return Trainer(network, TrainingArguments(**options), **given)
    options |= {"gradient_checkpointing": False, "bf16": False, "max_length": None, "remove_unused_columns": False}
    arguments = SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(network, arguments, processing_class=tokenizer, **given)


def measure(name, share, device):
    import torch

    clock = time.process_time if device == "cpu" else time.perf_counter
    digest, times = hashlib.sha256(), []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(name, share, folder, device)
        step = trainer.training_step

        def training_step(model, inputs, *args, **kwargs):
            for key in ("input_ids", "labels"):
                digest.update(inputs[key].cpu().numpy().tobytes())
            begin = clock()
            loss = step(model, inputs, *args, **kwargs)
            if device != "cpu":
                torch.cuda.synchronize()
            times.append(clock() - begin)
            return loss

        trainer.training_step = training_step
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        before = peak()
        trainer.train()
    memory = peak() - before if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    losses = [round(entry["loss"], 5) for entry in trainer.state.log_history if "loss" in entry]
    found = {"batches": digest.hexdigest(), "losses": losses, "seconds": sorted(times)[len(times) // 2], "MiB": memory}
    print(json.dumps({"trainer": name, "share": share, "device": device, **found}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainers", nargs="+", choices=["trainer", "sft"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.2, 1.0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # SFTTrainer sends some
    if len(options.trainers) == len(options.shares) == 1:
        measure(options.trainers[0], options.shares[0], options.device)
        return
    for share in options.shares:
        for name in options.trainers:
            words = [name, "--shares", str(share), "--device", options.device]
            subprocess.run([sys.executable, "-W", "ignore", __file__, *words], check=True)


if __name__ == "__main__":
    main()
