"""Text encoders and U-Net compute what diffusers' and transformers' own code computes on the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from library.architectures.conditioning import Conditioning, SampleFacts
from library.architectures.sdxl import SDXL
from tests.fixtures.tiny_sdxl import SdxlSizes, make_tiny_sdxl, sdxl_configs

CAPTIONS = ["a photo of the cat", "dog"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory):
    """(path, tokenizers, text encoders, U-Net) of a single file."""
    made = make_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model.safetensors")
    return (made.path, *load(made.path, made.tokenizer_cache_dir))


def load(path: Path, cache: Path):
    checkpoint = SDXL.inspect(str(path), v_parameterization=False, vae=None, tokenizer_cache_dir=str(cache))
    return (
        SDXL.load_tokenizers(checkpoint),
        SDXL.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu"),
        SDXL.load_denoiser(checkpoint, dtype=torch.float32, device="cpu"),
    )


def encode(tokenizers, encoders, captions=CAPTIONS, length=None, weighted=False) -> Conditioning:
    tokens = SDXL.tokenize(tokenizers, captions, max_token_length=length, weighted=weighted)
    with torch.no_grad():
        return SDXL.encode_text(encoders, tokens, clip_skip=None)


def openclip_oracle(path: Path, ids: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """OpenCLIP's text transformer with torch's own attention: last but one states, and what it pools and projects."""
    root = "conditioner.embedders.1.model."
    w = {k.removeprefix(root): t for k, t in load_file(path).items() if k.startswith(root)}
    width, states = w["positional_embedding"].shape[1], []
    x = w["token_embedding.weight"][ids] + w["positional_embedding"]  # (B, 77, D)
    causal = torch.full((77, 77), float("-inf")).triu(1)
    for layer in range(SdxlSizes().layers_2):
        b = {k.removeprefix(f"transformer.resblocks.{layer}."): t for k, t in w.items()}
        attention = nn.MultiheadAttention(width, 1, batch_first=True)
        attention.load_state_dict({k.removeprefix("attn."): t for k, t in b.items() if k.startswith("attn.")})
        y = F.layer_norm(x, (width,), b["ln_1.weight"], b["ln_1.bias"])
        x = x + attention(y, y, y, attn_mask=causal, need_weights=False)[0]
        y = F.layer_norm(x, (width,), b["ln_2.weight"], b["ln_2.bias"])
        y = F.gelu(F.linear(y, b["mlp.c_fc.weight"], b["mlp.c_fc.bias"]))
        x = x + F.linear(y, b["mlp.c_proj.weight"], b["mlp.c_proj.bias"])
        states.append(x)
    x = F.layer_norm(x, (width,), w["ln_final.weight"], w["ln_final.bias"])
    # open_clip: x[arange, text.argmax(-1)] @ text_projection
    return states[-2], x[torch.arange(len(x)), (ids == end).int().argmax(-1)] @ w["text_projection"]


def test_second_encoder_computes_what_openclip_computes(loaded) -> None:
    path, tokenizers, encoders, _ = loaded
    tokens = SDXL.tokenize(tokenizers, CAPTIONS, max_token_length=None, weighted=False)
    assert tokens["input_ids1"][0, 0, -1] == tokenizers[0].eos_token_id and tokens["input_ids2"][0, 0, -1] == 0
    conditioning = encode(tokenizers, encoders)
    states, pooled = openclip_oracle(path, tokens["input_ids2"][:, 0], tokenizers[1].eos_token_id)
    torch.testing.assert_close(conditioning["hidden_state2"], states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(conditioning["pool2"], pooled, rtol=1e-5, atol=1e-5)


def test_diffusers_pipeline_encodes_the_same(tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    made = make_tiny_sdxl(tmp_path / "folder", layout="diffusers")
    tokenizers, encoders, _ = load(made.path, made.tokenizer_cache_dir)
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(made.path))
    # the tiny tokenizer's end token is not the largest id of the vocabulary
    pipeline.text_encoder_2.config.eos_token_id = tokenizers[1].eos_token_id
    pipeline.text_encoder_2.text_model.config.eos_token_id = tokenizers[1].eos_token_id
    pipeline.text_encoder_2.text_model.eos_token_id = tokenizers[1].eos_token_id
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    ours = encode(tokenizers, encoders)
    together = torch.cat([ours["hidden_state1"], ours["hidden_state2"]], dim=-1)
    torch.testing.assert_close(together, context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["pool2"], pooled, rtol=1e-5, atol=1e-5)


def test_long_captions_are_encoded_in_windows_and_pooled_from_the_first(loaded) -> None:
    _, tokenizers, encoders, _ = loaded
    long = encode(tokenizers, encoders, ["cat " * 100, "dog"], length=225)
    assert long["hidden_state1"].shape == (2, 227, 32) and long["hidden_state2"].shape == (2, 227, 64)
    short = encode(tokenizers, encoders, ["cat " * 75, "dog"])
    torch.testing.assert_close(long["pool2"], short["pool2"])
    torch.testing.assert_close(long["hidden_state2"][:, :76], short["hidden_state2"][:, :76])


def test_weights_scale_both_states_and_leave_the_pooled_output(loaded) -> None:
    _, tokenizers, encoders, _ = loaded
    plain, weighted = (encode(tokenizers, encoders, [text], weighted=True) for text in ("a cat dog", "a (cat:1.5) dog"))
    for name in ("hidden_state1", "hidden_state2"):
        ratio = weighted[name][0] / plain[name][0]
        torch.testing.assert_close(ratio[2] / ratio[1], torch.full_like(ratio[2], 1.5))
        torch.testing.assert_close(weighted[name].mean(), plain[name].mean())
    assert torch.equal(plain["pool2"], weighted["pool2"])


def sized(conditioning: Conditioning) -> Conditioning:
    count = len(conditioning["pool2"])
    sizes = ([[640, 480]], [[0, 96]], [[512, 384]])
    original, top_left, target = (torch.tensor(size).expand(count, 2) for size in sizes)
    return SDXL.condition(conditioning, SampleFacts(original, top_left, target), None)


def test_unet_computes_what_diffusers_conversion_computes(loaded) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    path, tokenizers, encoders, unet = loaded
    theirs = UNet2DConditionModel.from_config(sdxl_configs(SdxlSizes())["unet"]).eval()
    theirs.load_state_dict(convert_ldm_unet_checkpoint(load_file(path), dict(theirs.config)))
    conditioning = sized(encode(tokenizers, encoders))
    assert conditioning["sizes"].tolist() == [[640, 480, 0, 96, 512, 384]] * 2
    noisy = torch.randn(2, 4, 16, 8, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([3, 999])
    context = torch.cat([conditioning["hidden_state1"], conditioning["hidden_state2"]], dim=-1)
    added = {"text_embeds": conditioning["pool2"], "time_ids": conditioning["sizes"]}
    with torch.no_grad():
        ours = SDXL.predict(unet, noisy, timesteps, conditioning)
        expected = theirs(noisy, timesteps, context, added_cond_kwargs=added).sample
        moved = Conditioning({**conditioning.tensors, "sizes": conditioning["sizes"].flip(1)})
        other = SDXL.predict(unet, noisy, timesteps, moved)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert (other - ours).abs().max() > 1e-3  # sizes count


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    made = make_tiny_sdxl(tmp_path / "model.safetensors")
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    gradients = []
    for checkpointing in (False, True):
        tokenizers, encoders, unet = load(made.path, made.tokenizer_cache_dir)
        if checkpointing:
            SDXL.enable_gradient_checkpointing(unet, encoders)
            unet.train()
        scales = [nn.Parameter(torch.ones(())) for _ in range(3)]  # stand for adapters: the base weights stay frozen
        layers = (
            encoders[0].encoder.layers[0].self_attn.q_proj,
            encoders[1].text_model.encoder.layers[0].mlp.fc1,
            unet.mid_block.attentions[0].proj_in,
        )
        for linear, scale in zip(layers, scales, strict=True):
            frozen = linear.forward
            linear.forward = lambda x, frozen=frozen, scale=scale: frozen(x) * scale
        tokens = SDXL.tokenize(tokenizers, CAPTIONS[:1], max_token_length=None, weighted=False)
        conditioning = sized(SDXL.encode_text(encoders, tokens, clip_skip=None))
        SDXL.predict(unet, noisy, torch.tensor([500]), conditioning).square().sum().backward()
        gradients.append(torch.stack([scale.grad for scale in scales]))
    assert (gradients[0] != 0).all()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
