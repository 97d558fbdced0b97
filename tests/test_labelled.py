"""The loss from the logits at the positions that carry loss alone."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("transformers")
pytest.importorskip("peft")

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lora_rite.finetune import prepare as prepare_module
from lora_rite.finetune.labelled import predict_labelled
from lora_rite.finetune.windows import IGNORED

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:fan_in_fan_out:UserWarning", "ignore:The following:RuntimeWarning"
)

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
#: Models whose logits are the head's alone, capped or scaled.
MODELS = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"final_logit_softcapping": 2.0, "tie_word_embeddings": True},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
}


def build(kind, **settings):
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **settings})).double()
    network = prepare_module.attach_adapter(network, rank=4).double().train()
    for name, p in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return network


def batch(shares=(2, 6, 11)):
    """Three rows of 12 tokens, of which the last 2, 6 and 11 carry loss; the second one ends in padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (len(shares), 12), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row, share in zip(labels, shares, strict=True):
        row[: 12 - share] = IGNORED
    ids[1, 9:], labels[1, 9:], mask[1, 9:] = 0, IGNORED, 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def loss_and_gradients(network, inputs, **more):
    network.zero_grad()
    out = network(**inputs, **more)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("items", [None, 40])
def test_loss_and_gradients_stay_the_same(kind, items):
    """To the rounding of the loss, which transformers takes in float32 also of float64 logits; with the mean over the
    batch or the Trainer's (over accumulated batches), and from no more rows of logits than carry loss."""
    network, inputs = build(kind, **MODELS[kind]), batch()
    more = {} if items is None else {"num_items_in_batch": items}
    before, expected = loss_and_gradients(network, inputs, **more)
    assert predict_labelled(network)
    assert network.training
    after, found = loss_and_gradients(network, inputs, **more)
    assert after.logits.shape[:2] == (1, 2 + 3 + 11)
    torch.testing.assert_close(after.loss, before.loss, rtol=5e-7, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    if items is None:  # and it is what it should be
        following = inputs["labels"][:, 1:].flatten()
        plain = cross_entropy(before.logits[:, :-1].flatten(0, 1), following, ignore_index=IGNORED).detach()
        assert float(after.loss.detach()) == pytest.approx(float(plain), rel=1e-6)


def test_text_and_passes_without_labels_stay_bitwise_as_they_were():
    network, inputs = build("llama"), batch((12, 12, 12))
    before, expected = loss_and_gradients(network, inputs)
    assert predict_labelled(network)
    after, found = loss_and_gradients(network, inputs)
    assert torch.equal(after.logits, before.logits)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    inputs = batch()
    del inputs["labels"]
    assert network(**inputs).logits.shape == (3, 12, 50)
    for _ in range(2):  # nothing is left over from a pass with labels
        assert network(**batch()).logits.shape[0] == 1
        assert torch.equal(network.generate(inputs["input_ids"], max_new_tokens=1)[:, :12], inputs["input_ids"])


def test_several_threads_pick_each_their_own():
    """As DataParallel runs replicas that share the hooks."""
    from concurrent.futures import ThreadPoolExecutor

    network = build("llama").eval()
    assert predict_labelled(network)
    batches = [batch((n, 3, 2)) for n in range(1, 9)]
    alone = [network(**inputs).loss.item() for inputs in batches]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda inputs: network(**inputs).loss.item(), batches * 4)) == pytest.approx(alone * 4)


class OwnLoss(torch.nn.Module):
    """A head and a loss that shifts labels itself, as models with code of their own have it."""

    def __init__(self, network, strict):
        super().__init__()
        self.network, self.strict, self.config = network, strict, network.config
        self.dtype, self.device = network.dtype, network.device

    def get_output_embeddings(self):
        return self.network.get_output_embeddings()

    def get_input_embeddings(self):
        return self.network.get_input_embeddings()

    def forward(self, input_ids, labels=None, attention_mask=None, **kwargs):
        if self.strict and kwargs:
            raise TypeError(f"unexpected {sorted(kwargs)}")
        out = self.network(input_ids=input_ids, attention_mask=attention_mask)
        if labels is not None:
            shifted = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            out.loss = cross_entropy(*shifted, ignore_index=IGNORED)
        return out


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_with_a_loss_of_its_own_stays_as_it_is(strict):
    network = OwnLoss(build("llama").get_base_model(), strict)
    before = network(**batch()).loss
    assert not predict_labelled(network)
    assert torch.equal(network(**batch()).loss, before)
    assert math.isfinite(before.item())


def test_an_encoder_decoder_model_stays_as_it_is():
    config = AutoConfig.for_model(
        "t5", d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=50, decoder_start_token_id=0
    )
    network = AutoModelForSeq2SeqLM.from_config(config)
    assert not predict_labelled(network)
    assert network(**batch()).logits.shape == (3, 12, 50)
