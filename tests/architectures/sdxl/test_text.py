"""Captions of every length, plain and weighted, against transformers' own encoders with diffusers' conversion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.architectures.sdxl import SDXL
from library.config.image_settings import ImageSettings
from library.inference.prompt_line import SamplePrompt
from library.inference.settings import settings_for
from library.training.previews import texts_of_prompt
from tests.fixtures.tiny_sdxl import SdxlSizes, make_tiny_sdxl, sdxl_configs

#: lengths in tokens: one window, into the second, into the third, past the third
COUNTS = (3, 75, 76, 149, 150, 226)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory):
    made = make_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model.safetensors")
    checkpoint = SDXL.inspect(
        str(made.path), v_parameterization=False, vae=None, tokenizer_cache_dir=str(made.tokenizer_cache_dir)
    )
    encoders = SDXL.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")
    return SDXL.load_tokenizers(checkpoint), encoders, transformers_encoders(made.path, checkpoint)


def transformers_encoders(path: Path, checkpoint):
    """``CLIPTextModel`` and ``CLIPTextModelWithProjection`` with the file's weights as diffusers converts them."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tensors, configs = load_file(path), sdxl_configs(SdxlSizes())
    prefix = "conditioner.embedders.0.transformer."
    names = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    first = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])).eval()
    if "text_model.final_layer_norm.weight" not in first.state_dict():  # transformers 5
        names = {key.removeprefix("text_model."): tensor for key, tensor in names.items()}
    first.load_state_dict(names)
    end = SDXL.load_tokenizers(checkpoint)[1].eos_token_id  # published files' is the largest id, the tiny one's is not
    second = CLIPTextModelWithProjection(CLIPTextConfig(**{**configs["text_encoder_2"], "eos_token_id": end})).eval()
    second.load_state_dict(convert_open_clip_checkpoint(second, tensors, prefix="conditioner.embedders.1.model."))
    return first, second


def windows_of(tokenizer, caption: str, count: int) -> Tensor:
    """(n, 77): start, 75 tokens, end; the rest is padding."""
    ids = tokenizer(caption, add_special_tokens=False, verbose=False).input_ids
    rows = []
    for begin in range(0, 75 * count, 75):
        row = [tokenizer.bos_token_id, *ids[begin : begin + 75], tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (77 - len(row)))
    return torch.tensor(rows)


def joined(states: Tensor) -> Tensor:
    """(n, 77, D) -> (75n + 2, D)."""
    return torch.cat([states[0, :1], *[window[1:76] for window in states], states[-1, 76:]])


@pytest.mark.parametrize("length", [None, 75, 150, 225])
def test_states_and_pooled_output_are_those_of_transformers(loaded, length: int | None) -> None:
    tokenizers, encoders, (first, second) = loaded
    captions = [" ".join(["cat", "dog", "photo", "of"][i % 4] for i in range(count)) for count in COUNTS]
    tokens = SDXL.tokenize(tokenizers, captions, max_token_length=length, weighted=False)
    with torch.no_grad():
        ours = SDXL.encode_text(encoders, tokens, clip_skip=None)
        pools = []
        for row, caption in enumerate(captions):
            for name, tokenizer, encoder in zip(("1", "2"), tokenizers, (first, second), strict=True):
                out = encoder(windows_of(tokenizer, caption, (length or 75) // 75), output_hidden_states=True)
                expected = joined(out.hidden_states[-2])
                torch.testing.assert_close(ours[f"hidden_state{name}"][row], expected, rtol=1e-5, atol=1e-5)
            pools.append(out.text_embeds)
            torch.testing.assert_close(ours["pool2"][row], out.text_embeds[0], rtol=1e-5, atol=1e-5)
        # the other windows' are other values, and so is what the transposed projection would give
        assert all((pool[0] - pool[1]).abs().max() > 1e-2 for pool in pools if len(pool) > 1)
        kept = second.text_projection.weight.clone()
        second.text_projection.weight.copy_(kept.T)
        turned = second(windows_of(tokenizers[1], captions[0], 1)).text_embeds[0]
        second.text_projection.weight.copy_(kept)
        assert (turned - ours["pool2"][0]).abs().max() > 1e-2


@pytest.mark.parametrize("length", [75, 225])
def test_a_weighted_caption_pools_as_the_plain_one(loaded, length: int) -> None:
    tokenizers, encoders, (_, second) = loaded
    words = " ".join(["cat dog photo"] * 30)
    with torch.no_grad():
        tokens = SDXL.tokenize(tokenizers, [f"a (dog:1.4) [cat] {words}"], max_token_length=length, weighted=True)
        ours = SDXL.encode_text(encoders, tokens, clip_skip=None)
        out = second(windows_of(tokenizers[1], f"a dog cat {words}", length // 75), output_hidden_states=True)
    torch.testing.assert_close(ours["pool2"][0], out.text_embeds[0], rtol=1e-5, atol=1e-5)
    plain = joined(out.hidden_states[-2])
    weights = torch.ones(len(plain), 1)
    weights[2], weights[3] = 1.4, 1 / 1.1
    expected = plain * weights
    expected = expected * plain.mean() / expected.mean()
    torch.testing.assert_close(ours["hidden_state2"][0], expected, rtol=1e-5, atol=1e-5)


def test_a_caption_does_not_feel_its_batch(loaded) -> None:
    """Equal to the bit: a cache that was interrupted is filled up in other batches, and a step has its own."""
    tokenizers, encoders, _ = loaded
    tokens = SDXL.tokenize(tokenizers, [f"a cat {i}" for i in range(8)], max_token_length=None, weighted=False)
    with torch.no_grad():
        whole = SDXL.encode_text(encoders, tokens, clip_skip=None)
        for start, stop in ((0, 1), (1, 5), (5, 8)):
            part = SDXL.encode_text(encoders, {k: v[start:stop] for k, v in tokens.items()}, clip_skip=None)
            assert all(torch.equal(part[name], whole[name][start:stop]) for name in whole.tensors)


def test_each_encoder_reads_the_text_that_is_for_it(loaded) -> None:
    tokenizers, *_ = loaded
    settings = ImageSettings("a cat", "dog", 64, 64, 1, 5.0, "euler", 0, own={"prompt2": "the red dog"})
    family = SDXL.for_image(settings)
    prompt, negative = settings.texts(family.worded)
    assert negative == "dog" and SDXL.for_image(replace(settings, own={})).worded("a cat", "prompt") == "a cat"
    both, first, second = (
        SDXL.tokenize(tokenizers, [text], max_token_length=None, weighted=False)
        for text in (prompt, "a cat", "the red dog")
    )
    assert torch.equal(both["input_ids1"], first["input_ids1"]) and torch.equal(both["end"], second["end"])
    assert torch.equal(both["input_ids2"], second["input_ids2"]) and not torch.equal(first["end"], second["end"])


def test_sample_images_read_the_texts_of_their_image() -> None:
    """As ``generate_latents`` words them, or cached texts would not be found."""
    prompt = SamplePrompt("a cat", negative_prompt="dog", scale=5.0, own={"prompt2": "the red dog"})
    settings = settings_for(prompt, SDXL.sample_defaults, sampler="")
    expected = SDXL.for_image(settings).worded("a cat", "prompt")
    assert texts_of_prompt(SDXL, prompt) == (expected, "dog") and expected != "a cat"
