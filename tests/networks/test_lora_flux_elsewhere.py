"""LoRA of FLUX.1 and Chroma elsewhere: diffusers' pipelines compute the same; LyCORIS trains our transformers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from library.architectures.flux.model import Flux
from library.architectures.flux.sizes import FluxSizes
from networks.lora_flux import create_network
from networks.third_party import text_argument
from tests.architectures.flux.oracle import diffusers_model
from tests.fixtures.adapted import randomize
from tests.fixtures.adapted_flux import (
    SIZES,
    TEXT,
    H,
    W,
    flux_inputs,
    flux_models,
    flux_outputs,
    flux_tensors,
    predict,
)
from tests.fixtures.installed import require_peft
from tests.fixtures.tiny_flux import FluxFileSizes
from tests.networks.conftest import make_tiny_text_encoder


def pipeline_of(tensors, sizes, clip=None):
    """diffusers' pipeline with a transformer of these weights; what a LoRA does not touch is left out."""
    from diffusers import ChromaPipeline, FluxPipeline

    transformer = diffusers_model(tensors, sizes).eval()
    kind = type(transformer).__name__
    parts = {"scheduler": None, "vae": None, "tokenizer": None, "text_encoder": clip, "transformer": transformer}
    if kind.startswith("Flux"):
        return FluxPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
    return ChromaPipeline(**parts)


def predicted_by(pipeline, chroma):
    """Return the prediction of the pipeline's transformer for ``flux_inputs``."""
    given = flux_inputs()
    rows, columns = torch.meshgrid(torch.arange(H // 2), torch.arange(W // 2), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    tokens = given["latents"].reshape(2, 16, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, -1, 64)
    settings = {"timestep": given["timesteps"], "img_ids": ids, "txt_ids": torch.zeros(TEXT, 3)}
    if not chroma:
        settings |= {"pooled_projections": given["pooled"], "guidance": given["guidance"]}
    with torch.no_grad():
        out = pipeline.transformer(tokens, given["context"], return_dict=False, **settings)[0]
    return out.reshape(2, H // 2, W // 2, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 16, H, W)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dev", "chroma"])
@pytest.mark.parametrize("split", ["False", "True"], ids=["joined", "split"])
def test_diffusers_pipelines_compute_the_same(tmp_path, kind, split):
    """Without ``linear1``, whose projections diffusers' reader takes to have the published widths.

    What it leaves out: the part of T5, and that of the input layers.
    """
    models = flux_models(kind)
    encoders, denoiser = models
    plain = flux_outputs(*models)
    args = {"split_qkv": split, "network_reg_dims": "linear1=0", "train_t5xxl": "True", "in_dims": "2,0,0,0,2"}
    network = randomize(create_network(1.0, 4, 2.0, None, *models, **args), 0.1)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    network.apply_to(*models)
    for name in ("img_in", "txt_in"):
        network.get_submodule(f"lora_unet_{name}").enabled = False
    ours = flux_outputs(*models)
    assert all((ours[name] - plain[name]).abs().max() > 1e-3 for name in ours)

    clip = make_tiny_text_encoder(32, 48) if kind == "dev" else None
    pipeline = pipeline_of(flux_tensors(kind), SIZES, clip)
    close(predicted_by(pipeline, kind == "chroma"), plain["prediction"])
    require_peft(text_encoders=clip is not None)
    pipeline.load_lora_weights(str(tmp_path / "a.safetensors"))
    close(predicted_by(pipeline, kind == "chroma"), ours["prediction"])
    if clip is not None:
        with torch.no_grad():
            theirs = clip(torch.tensor([[0, 5, 9, 1], [0, 7, 3, 1]])).last_hidden_state
        close(theirs, ours["text 1"])


@pytest.mark.slow
@pytest.mark.parametrize("split", ["False", "True"], ids=["joined", "split"])
def test_diffusers_pipelines_compute_the_same_in_published_widths(tmp_path, split):
    """``linear1``, too, in a transformer of one block."""
    sizes = FluxFileSizes(hidden=3072, head=16, double_blocks=0, single_blocks=1)
    tensors = flux_tensors("dev", sizes)
    with torch.device("meta"):
        ours = Flux(FluxSizes(3072, 16, 12288, 0, 1, context=sizes.t5_width, pooled=sizes.base.text_width))
    ours.load_state_dict(tensors, assign=True)
    ours.requires_grad_(False)
    plain = predict(ours)
    network = randomize(create_network(1.0, 4, 2.0, None, None, ours, split_qkv=split), 0.05)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    network.apply_to(None, ours)
    with torch.no_grad():
        adapted = predict(ours)
    assert (adapted - plain).abs().max() > 1e-3
    pipeline = pipeline_of(tensors, sizes)
    close(predicted_by(pipeline, chroma=False), plain)
    require_peft()
    pipeline.load_lora_weights(str(tmp_path / "a.safetensors"))
    assert pipeline.transformer.single_transformer_blocks[0].attn.to_q.lora_A["default_0"].out_features == 4
    close(predicted_by(pipeline, chroma=False), adapted)


def test_lycoris_trains_flux(tmp_path):
    pytest.importorskip("lycoris.kohya")
    from lycoris.kohya import create_network as create
    from lycoris.kohya import create_network_from_weights

    for kind in ("dev", "chroma"):
        encoders, denoiser = flux_models(kind)
        text = text_argument(encoders)
        plain = flux_outputs(encoders, denoiser)
        network = create(1.0, 4, 2.0, None, text, denoiser, algo="lokr", factor="4", preset="attn-mlp")
        network.apply_to(text, denoiser, False, True)
        assert len(network.unet_loras) > 0
        network.train()
        groups = network.prepare_optimizer_params(1e-2, 1e-2, 1e-2)
        groups = groups[0] if isinstance(groups, tuple) else groups
        optimizer = torch.optim.AdamW(groups)
        denoiser.gradient_checkpointing = True
        predict(denoiser).square().mean().backward()
        optimizer.step()
        network.eval()
        trained = flux_outputs(encoders, denoiser)
        assert (trained["prediction"] - plain["prediction"]).abs().max() > 1e-4
        network.save_weights(str(tmp_path / "a.safetensors"), None, {})
        names = load_file(tmp_path / "a.safetensors")
        assert any("double_blocks_0_img_attn_qkv" in name for name in names)

        encoders, denoiser = flux_models(kind)
        text = text_argument(encoders)
        again, weights = create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, text, denoiser)
        again.apply_to(text, denoiser, False, True)
        again.load_state_dict(weights, strict=False)
        again.eval()
        torch.testing.assert_close(flux_outputs(encoders, denoiser)["prediction"], trained["prediction"])
