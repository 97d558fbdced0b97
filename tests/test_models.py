"""Models that are not language models alone: one that sees, a UNet and diffusion transformers, all tiny and random."""

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lora_rite import create_lora_rite  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
STEPS = 12


def learn(model, loss, lr=2e-2):
    """Steps on one batch: each preconditions every pair that there is, every factor moves, and the loss falls."""
    optimizer = create_lora_rite(model, lr=lr)
    pairs = optimizer.report()["pairs"]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert pairs == len(before) / 2 > 0
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        optimizer.step()
        assert optimizer.report()["pairs_preconditioned"] == pairs
    assert loss() < 0.9 * losses[0]
    assert not [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
    return list(before)


@pytest.mark.parametrize("modules", ["all-linear", r".*(vision_tower|language_model).*\.(q_proj|v_proj|fc1)"])
def test_a_model_that_sees(modules):
    """Gemma 3: pairs in the vision tower get their gradients through the image's tokens."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    size["initializer_range"] = 0.3  # at 0.02, so narrow a model says nearly nothing
    config = transformers.Gemma3Config(
        text_config={"vocab_size": 40, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 16, **size},
        vision_config={"image_size": 8, "patch_size": 2, "vision_use_head": False, **size},
        mm_tokens_per_image=4,
        image_token_index=39,
        boi_token_index=37,
        eoi_token_index=38,
    )
    base = transformers.Gemma3ForConditionalGeneration(config)
    # It starts at zero, through which no gradient reaches the vision tower.
    torch.nn.init.normal_(base.model.multi_modal_projector.mm_input_projection_weight)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=2, target_modules=modules))
    text = torch.randint(0, 36, (2, 6))
    image = torch.tensor([[37, 39, 39, 39, 39, 38]]).repeat(2, 1)
    tokens = torch.cat([image, text], 1)
    batch = {
        "input_ids": tokens,
        "pixel_values": torch.randn(2, 3, 8, 8),
        "token_type_ids": (tokens == 39).long(),
        "labels": torch.where(tokens < 37, tokens, -100),
    }
    trained = learn(model, lambda: model(**batch).loss, lr=5e-2)
    assert {tower for tower in ("vision_tower", "language_model") if any(tower in name for name in trained)} == {
        "vision_tower", "language_model",
    }  # fmt: skip


def diffusion_lora(modules):
    return peft.LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=modules)


def test_a_unet():
    """As diffusers trains Stable Diffusion's: attention, and convolutions too, by ``add_adapter``."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
    )
    unet.requires_grad_(False)
    unet.add_adapter(diffusion_lora(["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv2"]))
    sample, noise, text = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    noised = lambda: unet(sample, torch.tensor([10, 500]), encoder_hidden_states=text).sample
    learn(unet, lambda: (noised() - noise).square().mean())


def test_a_diffusion_transformer():
    """As diffusers trains Flux's, by ``add_adapter``."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
    )
    transformer.requires_grad_(False)
    transformer.add_adapter(diffusion_lora(["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "net.0.proj"]))
    latents, target, text = torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.randn(2, 5, 12)
    places = {"img_ids": torch.randn(6, 3), "txt_ids": torch.zeros(5, 3)}
    velocity = lambda: (
        transformer(
            latents,
            encoder_hidden_states=text,
            pooled_projections=torch.ones(2, 10),
            timestep=torch.tensor([0.1, 0.7]),
            **places,
        ).sample
    )
    learn(transformer, lambda: (velocity() - target).square().mean())
