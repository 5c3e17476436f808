"""CLIP-L, T5 and the autoencoder from stand-alone files compute what transformers and diffusers compute."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.common import clip, clip_text, t5, tokenizer_files
from library.architectures.common.ae import SCALE, SHIFT, ae_source, load_ae
from library.architectures.common.kl_vae import decode_latents, encode_images
from library.architectures.common.loading import load_frozen
from library.architectures.common.tokenizer_files import T5, find_tokenizer, locate_tokenizer
from library.architectures.flux import text
from library.architectures.flux.checkpoint import clip_l_source
from library.errors import UserError
from tests.fixtures.tiny_flux import CLIP_TOKENIZER, T5_TOKENIZER, FluxFileSizes, MadeFlux, make_tiny_flux

CAPTIONS = ["a photo of the cat", "dog, red " * 20]
SIZES = FluxFileSizes()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeFlux:
    return make_tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def tokens(made: MadeFlux) -> dict[str, torch.Tensor]:
    tokenizers = clip_text.load_tokenizer(made.tokenizer_cache_dir / CLIP_TOKENIZER), t5_tokenizer(made)
    return text.tokenize(*tokenizers, CAPTIONS, t5_length=24)


def t5_tokenizer(made: MadeFlux):
    folder = locate_tokenizer((t5.TOKENIZER,), model_folder=None, cache_dir=str(made.tokenizer_cache_dir), kind=T5)
    assert folder.name == T5_TOKENIZER
    return t5.load_tokenizer(folder)


def their_t5(path: Path):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=SIZES.t5_vocabulary,
        d_model=SIZES.t5_width,
        d_kv=SIZES.t5_head,
        d_ff=SIZES.t5_inner,
        num_layers=SIZES.t5_layers,
        num_heads=SIZES.t5_heads,
        feed_forward_proj="gated-gelu",
    )
    model = T5EncoderModel(config).eval()
    state = load_file(path)
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


@pytest.mark.parametrize("masked", [False, True])
def test_t5_is_transformers(made: MadeFlux, tokens, masked: bool) -> None:
    ours = t5.load_t5(t5.t5_source(made.t5xxl), dtype=torch.float32, device="cpu")
    ids, mask = tokens["t5_ids"], tokens["t5_mask"] if masked else None
    with torch.no_grad():
        states = t5.encode(ours, ids, mask)
        expected = their_t5(made.t5xxl)(input_ids=ids, attention_mask=mask).last_hidden_state
    assert states.shape == (2, 24, 32)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_t5_files_of_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    made = make_tiny_flux(tmp_path, dtype=dtype)
    model = t5.load_t5(t5.t5_source(made.t5xxl), dtype=torch.float32, device="cpu")
    ids = torch.tensor([[5, 6, 7, 1, 0]])
    with torch.no_grad():
        expected = their_t5(made.t5xxl)(input_ids=ids).last_hidden_state
        torch.testing.assert_close(t5.encode(model, ids), expected, rtol=1e-5, atol=1e-5)
        half = t5.load_t5(t5.t5_source(made.t5xxl), dtype=torch.float16, device="cpu")
        assert (t5.encode(half, ids) - expected).abs().max() < 0.05
    dtypes = {name.rpartition(".DenseReluDense.")[2]: p.dtype for name, p in half.named_parameters()}
    assert dtypes.pop("wo.weight") == torch.float32 and set(dtypes.values()) == {torch.float16}


def test_t5_in_float16_stays_in_range_under_autocast(made: MadeFlux) -> None:
    exact = t5.load_t5(t5.t5_source(made.t5xxl), dtype=torch.float32, device="cpu")
    half = t5.load_t5(t5.t5_source(made.t5xxl), dtype=torch.float16, device="cpu")
    ids = torch.tensor([[5, 6, 7, 1, 0]])
    with torch.no_grad():
        for model in (exact, half):  # sums beyond 65504, as those of T5-XXL
            for name, parameter in model.named_parameters():
                if name.endswith(".DenseReluDense.wo.weight"):
                    parameter.mul_(1e9)
        expected = t5.encode(exact, ids)
        with torch.autocast("cpu", dtype=torch.float16):
            states = t5.encode(half, ids)
    assert states.isfinite().all()
    assert (states - expected).abs().max() < 0.05


def test_t5_table_under_either_name_or_both(made: MadeFlux, tmp_path: Path) -> None:
    state, ids = load_file(made.t5xxl), torch.tensor([[5, 6, 7, 1]])
    table = state.pop(t5.SHARED)
    results = []
    for index, names in enumerate(([t5.SHARED], [t5.EMBEDDINGS], [t5.SHARED, t5.EMBEDDINGS])):
        path = tmp_path / f"{index}.safetensors"
        file = {**state, **{name: table.clone() for name in names}}
        save_file(file, path)
        model = t5.load_t5(t5.t5_source(path), dtype=torch.float32, device="cpu")
        assert t5.t5_tensors(model, file).keys() == file.keys()
        with torch.no_grad():
            results.append(t5.encode(model, ids))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("bare", [False, True])
def test_clip_l_pools_what_transformers_pools(made: MadeFlux, tokens, tmp_path: Path, bare: bool) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    state = {name.removeprefix("text_model."): tensor for name, tensor in load_file(made.clip_l).items()}
    path = made.clip_l
    if bare:  # some files name tensors without the model's own name; some have a projection and positions
        path = tmp_path / "bare.safetensors"
        more = {"text_projection.weight": torch.eye(32), "embeddings.position_ids": torch.arange(77)[None]}
        save_file({**state, **more}, path)
    source = clip_l_source(path)
    ours = load_frozen(source, partial(clip.build_clip, source.config), dtype=torch.float32, device="cpu")
    base = SIZES.base
    settings = {"vocab_size": base.vocabulary, "hidden_size": base.text_width, "intermediate_size": base.text_inner}
    heads = max(base.text_width // 64, 1)
    eos = int(tokens["clip_ids"][0, -1])
    theirs = CLIPTextModel(
        CLIPTextConfig(**settings, num_hidden_layers=base.text_layers, num_attention_heads=heads, eos_token_id=eos)
    ).eval()
    theirs.load_state_dict({name: state[name] for name in theirs.state_dict() if name in state}, strict=False)
    with torch.no_grad():
        pooled = text.pooled_clip(ours, tokens)
        torch.testing.assert_close(pooled, theirs(tokens["clip_ids"]).pooler_output, rtol=1e-5, atol=1e-5)


def test_conditioning_has_what_caches_hold(made: MadeFlux, tokens) -> None:
    encoder = t5.load_t5(t5.t5_source(made.t5xxl), dtype=torch.float32, device="cpu")
    source = clip_l_source(made.clip_l)
    pooler = load_frozen(source, partial(clip.build_clip, source.config), dtype=torch.float32, device="cpu")
    with torch.no_grad():
        both = text.encode_text(pooler, encoder, tokens, apply_t5_mask=False)
        chroma = text.encode_text(None, encoder, tokens, apply_t5_mask=True)
    assert {name: tuple(t.shape) for name, t in both.tensors.items()} == {
        "t5_out": (2, 24, 32),
        "t5_attn_mask": (2, 24),
        "l_pooled": (2, 32),
    }
    assert chroma.tensors.keys() == {"t5_out", "t5_attn_mask"}
    assert not torch.allclose(both["t5_out"][0], chroma["t5_out"][0])  # caption 0 is padded
    torch.testing.assert_close(both["t5_out"][1], chroma["t5_out"][1])  # caption 1 fills the window


def test_t5_tokens_end_are_cut_and_filled_up(made: MadeFlux) -> None:
    from transformers import T5Tokenizer

    tokenizer = t5_tokenizer(made)
    ids, mask = t5.tokenize(tokenizer, CAPTIONS, length=24)
    theirs = T5Tokenizer.from_pretrained(str(made.tokenizer_cache_dir / T5_TOKENIZER))
    found = theirs(CAPTIONS, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    assert torch.equal(ids, found.input_ids) and torch.equal(mask, found.attention_mask)
    assert ids[0, :6].tolist() == [4, 5, 6, 7, 8, 1] and mask.sum(dim=1).tolist() == [6, 24]
    length = t5.caption_length(tokenizer, "a photo of the cat", length=5)
    assert (length.tokens, length.limit, length.cut) == (5, 4, "cat")


def test_t5_tokenizers_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match="spiece.model: reading it needs the package sentencepiece"):
        t5.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="T5's tokenizer cannot be read"):
        t5.load_tokenizer(tmp_path)


def test_t5_tokenizer_is_looked_for_as_clips_is(
    made: MadeFlux, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = made.tokenizer_cache_dir / T5_TOKENIZER
    shutil.copytree(here, tmp_path / "model" / "tokenizer_2")
    settings = {"repositories": (t5.TOKENIZER,), "kind": T5, "subfolder": "tokenizer_2"}
    beside = locate_tokenizer(**settings, model_folder=tmp_path / "model", cache_dir=None)
    assert beside == tmp_path / "model" / "tokenizer_2"
    assert locate_tokenizer(**settings, model_folder=None, cache_dir=str(here)) == here
    assert find_tokenizer(here, T5) == here
    # CLIP's is no T5's, and the other way round
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match="has no tokenizer.json, nor spiece.model"):
        find_tokenizer(made.tokenizer_cache_dir / CLIP_TOKENIZER, T5)
    with pytest.raises(UserError, match="has no tokenizer.json, nor vocab.json and merges.txt"):
        find_tokenizer(here)
    empty = tmp_path / "empty"
    with pytest.raises(UserError, match=r"google/t5-v1_1-xxl is neither in .*empty.* tokenizer.json or spiece.model"):
        locate_tokenizer(**settings, model_folder=None, cache_dir=str(empty))


def test_autoencoder_is_diffusers(made: MadeFlux) -> None:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    ours = load_ae(ae_source(str(made.ae)), dtype=torch.float32, device="cpu")
    levels = len(SIZES.base.vae_channels)
    theirs = AutoencoderKL(
        latent_channels=16,
        block_out_channels=SIZES.base.vae_channels,
        layers_per_block=SIZES.base.vae_layers,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    theirs.load_state_dict(convert_ldm_vae_checkpoint(load_file(made.ae), dict(theirs.config)))
    pixels = torch.rand(2, 3, 32, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    generators = [torch.Generator().manual_seed(seed) for seed in (2, 3)]
    with torch.no_grad():
        latents = encode_images(ours, pixels, generators)
        moments = theirs.encode(pixels).latent_dist
        noise = torch.stack([torch.randn(16, 4, 2, generator=torch.Generator().manual_seed(s)) for s in (2, 3)])
        torch.testing.assert_close(latents, moments.mean + moments.std * noise, rtol=1e-5, atol=1e-5)
        decoded = decode_latents(ours, latents)
        expected = theirs.decode(latents).sample.clamp(-1, 1)
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-5)
    assert (SCALE, SHIFT) == (0.3611, 0.1159)
