"""The verbs of what comes after training: ``lora-rite merge | generate | chat | push``."""

from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError
from ..finetune.sources import Dtype


def merge(
    adapter: str,
    out: Path | None = None,
    model: str | None = None,
    dtype: Dtype | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Adds an adapter to its base model, and writes the whole as a model: safetensors, config, tokenizer.

    What is written is read back and compared with base and adapter. Quantised bases and GGUF files are dequantised.

    Args:
        adapter: folder of a run or of an adapter, or an adapter's hub id.
        out: folder for the model, which has to be named; new or empty.
        model: the base model, where it is not the one that the adapter records.
        dtype: of the weights that are written; by default the base model's (float32 of a GGUF file).
        trust_remote_code: allow the model's own code to run.
    """
    from ..finetune.merge import merge as run

    if out is None:
        raise LoRARiteValueError("--out is needed, a new folder for the model")
    done = run(adapter, out, model, dtype, trust_remote_code)
    print(
        f"{done['model']} with {done['adapter']} is in {done['out']}, in {done['dtype']}; read back, its logits differ "
        f"by {done['difference']:.1e} of their size from those of base and adapter"
    )


def generate(
    source: str,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    system: str | None = None,
    raw: bool = False,
    model: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    generation_args: dict[str, Any] | None = None,
    seed: int = 0,
    dtype: Dtype | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Has a model, with an adapter or without, go on from a prompt; the text is written as it comes.

    Args:
        source: folder of a run or of an adapter, hub id of an adapter; or a model: hub id, folder, GGUF file, tiny.
        prompt: the prompt; without it and --prompt_file, standard input.
        prompt_file: file of the prompt.
        system: system message, for a model with a chat template.
        raw: give the prompt as it is to a model that has a chat template.
        model: the base model, where it is not the one that the adapter records.
        max_new_tokens: tokens at most; by default 256, or what the model has positions for.
        temperature: 0 takes the most probable token, any other one samples; by default the model's own.
        top_p: sample among the most probable tokens of that probability together.
        top_k: sample among so many tokens.
        generation_args: further options of transformers' generate, as --generation_args.repetition_penalty 1.2.
        seed: of the sampling.
        dtype: of the weights; by default the checkpoint's (float32 of a GGUF file).
        load_in_4bit: quantise the linear maps to NF4 with bitsandbytes, as train does.
        load_in_8bit: quantise them to 8 bits (LLM.int8).
        device: where to run; by default the accelerator if there is one, else cpu.
        trust_remote_code: allow the model's own code to run.
    """
    given = locals()
    from transformers import set_seed

    from ..finetune.checks import weights_of
    from ..finetune.generate import Writer, generation_options, read_prompt, show

    options = generation_options(max_new_tokens, temperature, top_p, top_k, generation_args, seed)
    text = read_prompt(prompt, prompt_file)
    how = {"device": device, "trust_remote_code": trust_remote_code, "system": system, "raw": raw, "prompt": text}
    writer = Writer(source, model, options, dtype=dtype, bits=weights_of(given)[1], **how)
    set_seed(seed)
    writer.answer(writer.asked(text), show)
    show("\n")


def chat(
    source: str,
    system: str | None = None,
    raw: bool = False,
    model: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    generation_args: dict[str, Any] | None = None,
    seed: int = 0,
    dtype: Dtype | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """A conversation with a model, with an adapter or without; ends with the input (Ctrl-D), Ctrl-C, or /exit.

    Ctrl-C while the model writes ends the answer alone, and /new begins another conversation. A model without a chat
    template goes on with the text so far.

    Args:
        source: folder of a run or of an adapter, hub id of an adapter; or a model: hub id, folder, GGUF file, tiny.
        system: system message, for a model with a chat template.
        raw: give the text as it is to a model that has a chat template.
        model: the base model, where it is not the one that the adapter records.
        max_new_tokens: tokens of an answer at most; by default 256, or what the model has positions for.
        temperature: 0 takes the most probable token, any other one samples; by default the model's own.
        top_p: sample among the most probable tokens of that probability together.
        top_k: sample among so many tokens.
        generation_args: further options of transformers' generate, as --generation_args.repetition_penalty 1.2.
        seed: of the sampling.
        dtype: of the weights; by default the checkpoint's (float32 of a GGUF file).
        load_in_4bit: quantise the linear maps to NF4 with bitsandbytes, as train does.
        load_in_8bit: quantise them to 8 bits (LLM.int8).
        device: where to run; by default the accelerator if there is one, else cpu.
        trust_remote_code: allow the model's own code to run.
    """
    given = locals()
    from transformers import set_seed

    from ..finetune.checks import weights_of
    from ..finetune.generate import Writer, generation_options
    from ..finetune.generate import chat as run

    options = generation_options(max_new_tokens, temperature, top_p, top_k, generation_args, seed)
    how = {"device": device, "trust_remote_code": trust_remote_code, "system": system, "raw": raw}
    writer = Writer(source, model, options, dtype=dtype, bits=weights_of(given)[1], **how)
    set_seed(seed)
    run(writer)


def push(folder: Path, repo: str, model: str | None = None, public: bool = False) -> None:
    """Uploads a finished adapter or a merged model to the hub, with its card and tokenizer, in one commit.

    A card that somebody has edited, here or there, is never written over. Needs a token that may write (hf auth login).

    Args:
        folder: folder of a run, of an adapter, or of a model.
        repo: the hub's repository, as me/my-adapter; made where there is none.
        model: hub id of the base model, to name instead of the one that the adapter records.
        public: make a new repository public; one that is there already stays what it is.
    """
    from ..finetune.publish import push as run

    print(run(folder, repo, model=model, public=public))
