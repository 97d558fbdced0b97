"""torchtune's own layers, where it is installed (with torchao 0.10.0; no other version of ours changes)."""

import warnings

import pytest
import torch

pytest.importorskip("torchtune")

from torchtune.models.llama3 import lora_llama3
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from lora_rite import LoRARite

MODEL = {
    "vocab_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 16, "intermediate_dim": 32,
    "max_seq_len": 16, "lora_rank": 4, "lora_alpha": 8.0, "apply_lora_to_mlp": True,
}  # fmt: skip


def model(**options):
    torch.manual_seed(0)
    network = lora_llama3(["q_proj", "k_proj", "v_proj", "output_proj"], **MODEL, **options)
    set_trainable_params(network, get_adapter_params(network))
    return network


def test_recipes_hand_over_nameless_parameters():
    """As ``config.instantiate(cfg.optimizer, model.parameters())`` does: each factor moves, beside its own partner."""
    network = model()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = LoRARite(network.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        network(torch.arange(16)[None]).square().mean().backward()
        optimizer.step()
    assert optimizer.report()["pairs_preconditioned"] == 14
    assert all(not torch.equal(p, before[name]) for name, p in trained.items())
    names = {id(p): name for name, p in trained.items()}
    pairs = iter([names[id(p)] for group in optimizer.param_groups for p in group["params"]])
    for a, b in zip(pairs, pairs, strict=True):
        assert a.replace("lora_a", "lora_b") == b


def test_dora_is_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = model(use_dora=True)
    with pytest.raises(ValueError, match=r"pairs A, B|named_parameters|factor is a"):
        LoRARite(network.parameters(), lr=1e-2)
