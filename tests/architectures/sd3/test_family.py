"""Checkpoints, captions, layouts and sampling of Stable Diffusion 3."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.conditioning import Conditioning, SampleFacts
from library.architectures.sd3 import SD3
from library.architectures.sd3.names import diffusers_plan
from library.architectures.sd3.options import SD3Options
from library.errors import UserError
from library.randomness import Draw
from tests.fixtures.tiny_sd3 import MODELS, MadeSD3, make_tiny_sd3, transformer_tensors


def opened(made: MadeSD3, **options: object):
    own = {name: str(path) for name, path in made.apart.items()}
    family = SD3.changed(SD3Options, t5xxl_max_token_length=24, **own, **options)
    checkpoint = family.inspect(str(made.path), vae=None, tokenizer_cache_dir=str(made.tokenizer_cache_dir))
    return family.for_model(checkpoint), checkpoint


def encoded(family, checkpoint, captions=("a cat", "a red dog of the cat")) -> Conditioning:
    tokens = family.tokenize(family.load_tokenizers(checkpoint), list(captions), max_token_length=None, weighted=False)
    encoders = family.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        return family.encode_text(encoders, tokens, clip_skip=None)


def test_encoders_apart_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    one = encoded(*opened(make_tiny_sd3(tmp_path / "one")))
    two = encoded(*opened(make_tiny_sd3(tmp_path / "two", apart=True)))
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one[name], two[name]) for name in one.tensors)


def test_a_missing_t5_leaves_zeros(tmp_path: Path) -> None:
    family, checkpoint = opened(make_tiny_sd3(tmp_path, t5=False))
    found = encoded(family, checkpoint)
    assert "t5_out" not in found.tensors and len(family.text_encoder_targets) == 2
    denoiser = family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
    latents, times = torch.randn(2, 16, 8, 8), torch.tensor([10.0, 900.0])
    zeros = {**found.tensors, "t5_out": torch.zeros(2, 77, 96)}
    with torch.no_grad():
        left_out = family.predict(denoiser, latents, times, found)
        given = family.predict(denoiser, latents, times, Conditioning(zeros))
    assert torch.equal(left_out, given)
    extras = family.text.extras({name: tensor[0] for name, tensor in found.tensors.items()})
    assert extras["t5_out"].shape == (77, 96) and not extras["t5_attn_mask"].any()


@pytest.mark.parametrize("option", ["apply_lg_attn_mask", "apply_t5_attn_mask"])
def test_masks_change_what_the_encoders_see(tmp_path: Path, option: str) -> None:
    made = make_tiny_sd3(tmp_path)
    plain, masked = encoded(*opened(made)), encoded(*opened(made, **{option: True}))
    changed = {name for name in plain.tensors if not torch.equal(plain[name], masked[name])}
    assert changed == ({"lg_out"} if option == "apply_lg_attn_mask" else {"t5_out"}) or changed == {
        "lg_out", "lg_pooled",
    }  # fmt: skip


def test_pooled_text_is_transformers_own(tmp_path: Path) -> None:
    family, checkpoint = opened(make_tiny_sd3(tmp_path))
    tokenizers = family.load_tokenizers(checkpoint)
    tokens = family.tokenize(tokenizers, ["a cat"], max_token_length=None, weighted=False)
    first, second, _ = family.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")
    for encoder in (first, second):  # the tiny tokenizer's end token is not the last of the tiny vocabulary
        encoder.text_model.eos_token_id = tokenizers[0].eos_token_id
    with torch.no_grad():
        found = family.encode_text([first, second, None], tokens, clip_skip=None)["lg_pooled"]
        expected = [e(tokens[f"{n}_ids"]).text_embeds for n, e in (("l", first), ("g", second))]
    torch.testing.assert_close(found, torch.cat(expected, dim=-1))


def test_dropout_is_keyed_and_each_encoder_has_its_own(tmp_path: Path) -> None:
    family, checkpoint = opened(
        make_tiny_sd3(tmp_path), clip_l_dropout_rate=0.5, clip_g_dropout_rate=0.5, t5_dropout_rate=0.5
    )
    one = encoded(family, checkpoint, ["a cat"])
    many = Conditioning({name: tensor.expand(64, *tensor.shape[1:]) for name, tensor in one.tensors.items()})
    facts = SampleFacts.of_whole_images(64, 64, 64)
    draw = Draw(tuple(range(64)))
    found = family.condition(many, facts, draw)
    assert family.condition(many, facts, None) is many, "sample images never lose their prompt"
    without_l = (found["lg_out"][:, :, :32] == 0).all(dim=(1, 2))
    without_g = (found["lg_out"][:, :, 32:] == 0).all(dim=(1, 2))
    without_t5 = (found["t5_out"] == 0).all(dim=(1, 2))
    for dropped, mask in (
        (without_l, "clip_l_attn_mask"),
        (without_g, "clip_g_attn_mask"),
        (without_t5, "t5_attn_mask"),
    ):
        assert 16 < int(dropped.sum()) < 48
        assert torch.equal((found[mask] == 0).all(dim=1), dropped)
    assert torch.equal((found["lg_pooled"][:, :32] == 0).all(dim=1), without_l)
    assert not torch.equal(without_l, without_g) and not torch.equal(without_g, without_t5)
    again = family.condition(many, facts, draw)
    assert all(torch.equal(found[name], again[name]) for name in found.tensors)
    half = family.condition(
        Conditioning({name: tensor[:8] for name, tensor in many.tensors.items()}),
        SampleFacts.of_whole_images(64, 64, 8),
        Draw(tuple(range(8))),
    )
    assert torch.equal(half["lg_out"], found["lg_out"][:8]), "a sample's dropout does not depend on its batch"


@pytest.mark.parametrize("model", MODELS)
def test_diffusers_layout_reads_as_the_published_file(tmp_path: Path, model: str) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    published = transformer_tensors(MODELS[model])
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(published))
    assert diffusers_plan({name: tuple(t.shape) for name, t in converted.items()}).keys() == published.keys()
    made = make_tiny_sd3(tmp_path, model=model, apart=True)
    save_file({name: t.contiguous() for name, t in converted.items()}, tmp_path / "diffusers.safetensors")
    vae = {n.removeprefix("first_stage_model."): t for n, t in load_file(made.path).items() if "first_stage" in n}
    save_file(vae, tmp_path / "vae.safetensors")
    own = {name: str(path) for name, path in made.apart.items()}
    family = SD3.changed(SD3Options, **own)
    checkpoint = family.inspect(
        str(tmp_path / "diffusers.safetensors"),
        vae=str(tmp_path / "vae.safetensors"),
        tokenizer_cache_dir=str(made.tokenizer_cache_dir),
    )
    denoiser = family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
    state = denoiser.state_dict()
    assert state.keys() == published.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in published.items())
    assert checkpoint.info.version == model


def test_the_sampler_s_levels_are_those_of_diffusers_pipeline() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(7)
    ours = SD3.objective(v_prediction=False, zero_terminal_snr=False).scheduler("euler", 7, (8, 8), torch.device("cpu"))
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)


def test_clear_errors(tmp_path: Path) -> None:
    made = make_tiny_sd3(tmp_path, apart=True)
    with pytest.raises(UserError, match=r"--clip_l: .* has none; name clip_l.safetensors"):
        SD3.inspect(str(made.path), vae=None, tokenizer_cache_dir=str(made.tokenizer_cache_dir))
    with pytest.raises(UserError, match="not a CLIP text encoder"):
        opened(MadeSD3(made.path, made.tokenizer_cache_dir, {**made.apart, "clip_l": made.apart["t5xxl"]}))
    with pytest.raises(UserError, match="takes pooled text of width 80"):
        opened(MadeSD3(made.path, made.tokenizer_cache_dir, {**made.apart, "clip_g": made.apart["clip_l"]}))
