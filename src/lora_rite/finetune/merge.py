"""``lora-rite merge``: one model of a base and its adapter, by PEFT's ``merge_and_unload``, read back and compared."""

import shutil
import warnings
from pathlib import Path
from typing import Any

from ..errors import LoRARiteError, LoRARiteValueError, WriteError, warn
from ..inputs import blame, one_line
from ..run.files import check_empty, write_folder, writing
from ..run.processes import check_alone
from .adapted import attach, load_source
from .publish import merged_card, write_card
from .sources import Dtype, Source, find_source

#: How far, relative to their size (L2), the logits of the written model may be from those of base and adapter. In
#: float32 only the order of sums differs; in 16 bits each merged weight is rounded, and the output of each layer.
TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
#: Tokens on which they are compared.
PROBED = 16


def merge(
    adapter: str, out: Path, model: str | None = None, dtype: Dtype | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Adds an adapter to its base model, and writes the whole as a model of its own: safetensors, config, tokenizer.

    What was written is read back, and its logits compared with those of base and adapter, before it is called OUT.
    Quantised bases and GGUF files are dequantised. Runs on the CPU.

    Args:
        adapter: folder of a run or of an adapter, or an adapter's hub id.
        out: folder for the model; must be new or empty.
        model: the base model, where it is not the one that the adapter records.
        dtype: of the weights that are written; by default the base model's own (float32 of a GGUF file).
        trust_remote_code: allow the model's own code to run.

    Returns:
        {"model", "adapter", "out", "dtype", "difference"}: the last is of the logits (L2, relative to their size).

    Raises:
        LoRARiteValueError: an adapter or a base that cannot be used, a layer that PEFT cannot merge, OUT is not empty.
        LoRARiteError: the model that was written has other logits than base and adapter; OUT is as it was.
        WriteError: no space, or no permission.
    """
    import torch

    check_alone("lora-rite merge")
    out = out.resolve()
    check_empty("--out", out)
    found = find_source(adapter, model)
    if found.adapter is None:
        raise LoRARiteValueError(f"{adapter} is no adapter (a folder with adapter_config.json, or a run's)")
    network, tokenizer = load_source(found, None, trust_remote_code=trust_remote_code)
    _dequantise(network, found.model)
    written = network.dtype if dtype is None else getattr(torch, dtype)
    _check_space(out, network, written)
    network = attach(network.to(torch.promote_types(network.dtype, written)), found)
    expected = _logits(network)
    with blame(f"cannot merge {found.adapter}"):
        merged = [_merged(network).to(written)]
    del network
    difference = 0.0

    def write(folder: Path) -> None:
        nonlocal difference
        try:
            merged.pop().save_pretrained(folder)  # no reference is left, so that it is read back into its memory
            tokenizer.save_pretrained(folder)
        except (RuntimeError, TypeError, ValueError) as error:  # others are of the disk, see below
            raise LoRARiteError(f"transformers cannot write the merged model: {one_line(error)}") from error
        difference = _difference(folder, expected, written, trust_remote_code)
        write_card(folder, merged_card(found, str(written).removeprefix("torch."), difference))
        check_empty("--out", out)  # again: merging takes minutes, and what is there by now is somebody's

    with writing(out.with_name(f".{out.name}.tmp"), "the model", lambda: f"{out} is as it was"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_folder(out, write)
    record = {"model": found.model, "adapter": str(found.adapter), "out": str(out)}
    return {**record, "dtype": str(written).removeprefix("torch."), "difference": difference}


def _check_space(out: Path, network: Any, dtype: Any) -> None:
    needed = sum(p.numel() for p in network.parameters()) * dtype.itemsize
    there = next(part for part in (out, *out.parents) if part.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise WriteError(
            f"{there} has {free / 1e6:,.0f} MB free, and the model needs {needed / 1e6:,.0f} MB: free some, or choose "
            "another --out"
        )


def _dequantise(network: Any, model: str) -> None:
    """Has transformers dequantise a quantised base in place: PEFT would round what it merges to few bits again."""
    if getattr(network, "hf_quantizer", None) is None:
        return
    method = getattr(network.config.quantization_config, "quant_method", "quantised")
    with blame(f"--model {model} is quantised ({getattr(method, 'value', method)}) and cannot be dequantised"):
        network.dequantize(dtype=network.dtype)
    # how the quantised tensors were read, transformers would undo in writing, and cannot
    vars(network).pop("_weight_conversions", None)
    warn(f"{model}: the quantised weights are dequantised to {str(network.dtype).removeprefix('torch.')}")


def _merged(network: Any) -> Any:
    """The base model with the adapter in its weights. A weight that an adapted layer shares with another one (the
    embedding and the head) becomes two: the adapter changes one of them."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    shared: dict[int, int] = {}
    for module in network.modules():
        for p in module._parameters.values():
            shared[id(p)] = shared.get(id(p), 0) + 1
    for layer in network.modules():
        weight = getattr(layer.get_base_layer(), "weight", None) if isinstance(layer, BaseTunerLayer) else None
        if weight is not None and shared.get(id(weight), 0) > 1:
            layer.get_base_layer().weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            shared[id(weight)] -= 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*(tie_word_embeddings|no longer tied)")
        return network.merge_and_unload(safe_merge=True)


def _logits(network: Any) -> Any:
    """Logits (1, tokens, vocabulary) in float32, of the same random tokens for each model of a vocabulary."""
    import torch

    tokens = network.get_input_embeddings().weight.shape[0]
    ids = torch.randint(tokens, (1, PROBED), generator=torch.Generator().manual_seed(0)).to(network.device)
    more = {"decoder_input_ids": ids} if network.config.is_encoder_decoder else {}
    with torch.inference_mode():
        return network(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits.float()


def _difference(folder: Path, expected: Any, dtype: Any, trust_remote_code: bool) -> float:
    """How far the logits of the model in the folder are from the expected ones, relative to their size (L2)."""
    network, _ = load_source(Source(str(folder), None), None, trust_remote_code=trust_remote_code)
    found = _logits(network)
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= TOLERANCE[name := str(dtype).removeprefix("torch.")]:
        raise LoRARiteError(
            f"the adapter cannot be merged: in {name}, the logits of the model that was written differ by "
            f"{difference:.1e} of their size from those of base and adapter; use it as an adapter, or try --dtype"
        )
    return difference
