"""One step of flux_train_network.py against a plain loop over diffusers' transformer and transformers' encoders.

The loop shares the noise, the timesteps and the order of the images with the script, nothing else: tokens, encoded
captions, latents' noising, loss and gradients are its own. With SGD the script's first step leaves the negative
gradient times the rate in the up halves of the LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from library.diffusion import noise as noises
from library.training import batch_losses
from library.training.batch_losses import BatchLosses
from tests.architectures.flux.oracle import diffusers_model
from tests.fixtures.runs import logged, lora_arguments, train_here, write_dataset
from tests.fixtures.tiny_flux import CLIP_TOKENIZER, T5_TOKENIZER, FluxFileSizes, MadeFlux, make_tiny_flux

pytestmark = pytest.mark.usefixtures("own_root_logger")

SIZES = FluxFileSizes()
CAPTIONS = ("a red cat", "a photo of the blue dog, the red cat")
T5_LENGTH, IP_GAMMA = 24, 0.1
#: published module -> diffusers' modules whose rows it holds
MODULES = {
    "double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "double_blocks_1_txt_attn_qkv": [f"transformer_blocks.1.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks_1_img_attn_proj": ["transformer_blocks.1.attn.to_out.0"],
    "double_blocks_0_txt_mlp_2": ["transformer_blocks.0.ff_context.net.2"],
    "single_blocks_0_linear1": [
        *(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.0.proj_mlp",
    ],
    "single_blocks_1_linear2": ["single_transformer_blocks.1.proj_out"],
}
MODULATIONS = {
    "double_blocks_0_img_mod_lin": ["transformer_blocks.0.norm1.linear"],
    "single_blocks_1_modulation_lin": ["single_transformer_blocks.1.norm.linear"],
}


@dataclass
class Drawn:
    """The numbers that the script drew at random, in the batch's order."""

    paths: list[str] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    noise: list[Tensor] = field(default_factory=list)  # and after it that of --ip_noise_gamma
    timesteps: list[Tensor] = field(default_factory=list)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    found = Drawn()
    losses, noisy, noise = BatchLosses.at, batch_losses.make_noisy, noises.draw_noise

    def at(self: BatchLosses, batch: Any, *args: Any, **more: Any) -> Tensor:
        found.paths += batch.paths
        return losses(self, batch, *args, **more)

    def make_noisy(latents: Tensor, *args: Any, **more: Any) -> Any:
        found.latents.append(latents.clone())
        made = noisy(latents, *args, **more)
        found.timesteps.append(made.timesteps.clone())
        return made

    def draw_noise(*args: Any) -> Tensor:
        found.noise.append(noise(*args))
        return found.noise[-1]

    monkeypatch.setattr(BatchLosses, "at", at)
    monkeypatch.setattr(batch_losses, "make_noisy", make_noisy)
    monkeypatch.setattr(noises, "draw_noise", draw_noise)
    return found


def images(folder: Path) -> Path:
    """Two images of one size; the left half of the second one is transparent."""
    folder.mkdir()
    for index, caption in enumerate(CAPTIONS):
        pixels = np.random.default_rng(index).integers(0, 256, (64, 64, 4), dtype=np.uint8)
        pixels[..., 3] = 255
        pixels[:, : 32 * index, 3] = 0
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption, encoding="utf-8")
    return folder


# ---- the plain loop ----


def clip_of(made: MadeFlux) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    base, state = SIZES.base, load_file(str(made.clip_l))
    config = CLIPTextConfig(
        vocab_size=base.vocabulary, hidden_size=base.text_width, intermediate_size=base.text_inner,
        num_hidden_layers=base.text_layers, num_attention_heads=max(base.text_width // 64, 1), eos_token_id=2,
    )  # fmt: skip
    model = CLIPTextModel(config).eval()
    bare = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    own = model.state_dict()
    model.load_state_dict({name: bare[name.removeprefix("text_model.")] for name in own}, strict=True)
    return model


def t5_of(made: MadeFlux) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=SIZES.t5_vocabulary, d_model=SIZES.t5_width, d_kv=SIZES.t5_head, d_ff=SIZES.t5_inner,
        num_layers=SIZES.t5_layers, num_heads=SIZES.t5_heads, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = T5EncoderModel(config).eval()
    state = load_file(made.t5xxl)
    model.load_state_dict({**state, "encoder.embed_tokens.weight": state["shared.weight"]})
    return model


@dataclass
class Plain:
    """The loss of the plain loop, and the modules that have its gradients."""

    loss: Tensor
    transformer: nn.Module
    clip: nn.Module | None
    t5: nn.Module


def plain_step(kind: str, made: MadeFlux, drawn: Drawn, *, guidance: float, masked: bool, weigh: Any) -> Plain:
    from transformers import AutoTokenizer

    transformer = diffusers_model(load_file(made.path), SIZES)
    t5, clip = t5_of(made), None if made.clip_l is None else clip_of(made)
    captions = [CAPTIONS[int(Path(path).stem)] for path in drawn.paths]
    tokenizer = AutoTokenizer.from_pretrained(made.tokenizer_cache_dir / T5_TOKENIZER)
    given = tokenizer(captions, padding="max_length", max_length=T5_LENGTH, truncation=True, return_tensors="pt")
    assert len(set(given.attention_mask.sum(dim=1).tolist())) == 2, "captions of different length"
    states = t5(given.input_ids, attention_mask=given.attention_mask if masked else None).last_hidden_state

    (latents,), (times,) = drawn.latents, drawn.timesteps
    noise, *perturbation = drawn.noise
    sigma = (times / 1000).view(-1, 1, 1, 1)
    input_noise = noise + sum(IP_GAMMA * more for more in perturbation)  # Ning et al. 2023, alg. 1
    noisy = (1 - sigma) * latents + sigma * input_noise
    batch, channels, h, w = latents.shape
    tokens = (
        noisy.view(batch, channels, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)
    )
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    settings: dict[str, Any] = {"timestep": times / 1000, "img_ids": ids, "txt_ids": torch.zeros(T5_LENGTH, 3)}
    seen = given.attention_mask.bool()
    if kind == "chroma":  # the caption's tokens and one more
        seen = torch.arange(T5_LENGTH) < given.attention_mask.sum(dim=1, keepdim=True) + 1
    whole = torch.cat([seen, torch.ones(batch, tokens.shape[1], dtype=torch.bool)], dim=1)
    if kind == "chroma":
        settings["attention_mask"] = whole
    else:
        words = AutoTokenizer.from_pretrained(made.tokenizer_cache_dir / CLIP_TOKENIZER)
        read = words(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        assert clip is not None
        ends = (read == words.eos_token_id).int().argmax(dim=1)
        settings["pooled_projections"] = clip(read).last_hidden_state[torch.arange(batch), ends]
        settings["guidance"] = torch.full((batch,), guidance) if kind == "dev" else None
        settings["joint_attention_kwargs"] = {"attention_mask": whole[:, None, None]} if masked else None
    output = transformer(tokens, states, return_dict=False, **settings)[0]
    velocity = output.view(batch, h // 2, w // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)
    loss = weigh(velocity, noise - latents, sigma, drawn.paths)
    loss.backward()
    return Plain(loss.detach(), transformer, clip, t5)


def gradient_of(model: nn.Module, names: list[str]) -> Tensor:
    weights = dict(model.named_parameters())
    return torch.cat([weights[f"{name}.weight"].grad for name in names])


def assert_moved_along(weights: Mapping[str, Tensor], name: str, gradient: Tensor, rate: float = 1.0) -> None:
    """up = -rate dL/dup, and dL/dup = alpha / rank * dL/dW down^T."""
    up, down = weights[f"{name}.lora_up.weight"], weights[f"{name}.lora_down.weight"]
    expected = -rate * gradient @ down.T * (float(weights[f"{name}.alpha"]) / len(down))
    assert expected.abs().max() > 1e-7, name
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        up, expected, rtol=1e-4, atol=1e-5 * max(scale, 1e-3), msg=lambda text: f"{name}: {text}"
    )


# ---- losses of the plain loop, (B, C, h, w) each ----


def mean_square(output: Tensor, target: Tensor, sigma: Tensor, paths: list[str]) -> Tensor:
    return (output - target).square().mean()


def cosmap_behind_a_mask(output: Tensor, target: Tensor, sigma: Tensor, paths: list[str]) -> Tensor:
    """The mask counts transparent pixels as nothing, and all pixels in the mean."""
    kept = torch.ones(len(output), 1, *output.shape[2:])
    for row, path in enumerate(paths):
        kept[row, :, :, : 4 * int(Path(path).stem)] = 0
    errors = ((output - target).square() * kept).mean(dim=(1, 2, 3))
    s = sigma.flatten()
    return (errors * 2 / (math.pi * (1 - 2 * s + 2 * s**2))).mean()


def of_images(output: Tensor, target: Tensor, sigma: Tensor, paths: list[str]) -> Tensor:
    """sigma_scaled: the errors of the images that follow."""
    return (sigma * output - sigma * target).square().mean()


def of_additions(output: Tensor, target: Tensor, sigma: Tensor, paths: list[str]) -> Tensor:
    """additive: the output is the way from the noisy image to the image."""
    return (output + sigma * target).square().mean()


RAW = {"model_prediction_type": "raw"}
T5 = ["train_t5xxl=True"]
RUNS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "dev": (
        "dev",
        {**RAW, "guidance_scale": 1.5, "timestep_sampling": "flux_shift", "weighting_scheme": "cosmap",
         "masked_loss": True, "ip_noise_gamma": IP_GAMMA, "unet_lr": 0.5, "text_encoder_lr": [2.0, 0.25],
         "network_args": T5, "apply_t5_attn_mask": True},
        cosmap_behind_a_mask,
    ),
    "dev without masks": ("dev", {**RAW, "guidance_scale": 1.0, "timestep_sampling": "shift"}, mean_square),
    "published defaults": ("dev", {"network_args": T5}, of_images),
    "additive": ("dev", {"model_prediction_type": "additive", "weighting_scheme": "logit_normal"}, of_additions),
    "schnell": ("schnell", {**RAW, "timestep_sampling": "uniform"}, mean_square),
    "chroma": ("chroma", {**RAW, "timestep_sampling": "sigmoid", "network_args": T5}, mean_square),
}  # fmt: skip


@pytest.mark.parametrize(
    "run", [r if r in ("dev", "chroma") else pytest.param(r, marks=pytest.mark.slow) for r in RUNS]
)
def test_a_step_is_that_of_a_plain_loop(run: str, tmp_path: Path, drawn: Drawn) -> None:
    kind, options, weigh = RUNS[run]
    made = make_tiny_flux(tmp_path / "model", model=kind)
    subset = "alpha_mask = true" if options.get("masked_loss") else ""
    data = write_dataset(tmp_path / "d.toml", images(tmp_path / "images"), dataset="batch_size = 2", subset=subset)
    settings = {
        "network_module": "networks.lora_flux", "optimizer_type": "SGD", "learning_rate": 1.0, "max_grad_norm": 0,
        "max_train_steps": 1, "t5xxl_max_token_length": T5_LENGTH, "logging_dir": tmp_path / "out" / "logs", **options,
    }  # fmt: skip
    train_here(*lora_arguments(made, data, tmp_path / "out", **settings), script="flux_train_network")
    weights = load_file(tmp_path / "out" / "tiny.safetensors")

    masked = kind == "chroma" or bool(options.get("apply_t5_attn_mask"))
    guidance = options.get("guidance_scale", 3.5)
    plain = plain_step(kind, made, drawn, guidance=guidance, masked=masked, weigh=weigh)
    assert logged(tmp_path / "out", "loss/current") == pytest.approx([plain.loss.item()], rel=1e-5)
    for name, parts in (MODULES if kind == "chroma" else MODULES | MODULATIONS).items():
        gradient = gradient_of(plain.transformer, parts)
        assert_moved_along(weights, f"lora_unet_{name}", gradient, options.get("unet_lr", 1.0))
    *clip_rate, t5_rate = options.get("text_encoder_lr", [1.0, 1.0])
    if plain.clip is not None:
        (layer,) = [name for name, _ in plain.clip.named_modules() if name.endswith("layers.0.self_attn.q_proj")]
        lora = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
        assert_moved_along(weights, lora, gradient_of(plain.clip, [layer]), *clip_rate)
    assert any("lora_te3" in name for name in weights) == ("network_args" in options)
    if "network_args" in options:
        for part in ("layer.0.SelfAttention.q", "layer.1.DenseReluDense.wo"):
            name = f"encoder.block.0.{part}"
            lora = "lora_te3_" + name.replace(".", "_")
            assert_moved_along(weights, lora, gradient_of(plain.t5, [name]), t5_rate)
