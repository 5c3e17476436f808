"""The published single-file layout <-> models, in both directions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.architectures.common import clip, kl_vae, ldm_unet
from library.architectures.common.sources import ldm_unet_source, vae_source
from library.architectures.common.tensor_files import TensorFile
from library.architectures.sdxl import SDXL
from library.architectures.sdxl.weights import LOGIT_SCALE, save_checkpoint, text_1_source, text_2_source
from tests.fixtures.layouts import table
from tests.fixtures.tiny_sdxl import SdxlSizes, full_sizes, ldm_shapes, make_tiny_sdxl

POSITION_IDS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"


def test_published_checkpoint_fills_the_models_and_comes_back() -> None:
    shapes = table("sdxl_base_checkpoint")
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    file = TensorFile(Path("published.safetensors"), shapes, tensors)
    sources = {
        ldm_unet.build_unet: ldm_unet_source(file),
        clip.build_clip: text_1_source(file),
        clip.build_clip_with_projection: text_2_source(file),
        kl_vae.build_vae: vae_source(file),
    }
    returned: dict[str, tuple[int, ...]] = {}
    for build, source in sources.items():
        with torch.device("meta"):
            model = build(source.config)
        state = dict(source.layout.read(file.read(source.file_names())))
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in model.state_dict().items()}
        returned |= {k: tuple(v.shape) for k, v in source.layout.write(state)}
    assert returned == {k: v for k, v in shapes.items() if k != LOGIT_SCALE}

    unet, text_2 = sources[ldm_unet.build_unet].config, sources[clip.build_clip_with_projection].config
    assert unet["transformer_layers_per_block"] == (1, 2, 10)
    assert unet["attention_head_dim"] == (5, 10, 20)
    assert (text_2["num_hidden_layers"], text_2["num_attention_heads"], text_2["hidden_act"]) == (32, 20, "gelu")
    assert (text_2["projection_dim"], text_2["eos_token_id"]) == (1280, 49407)


def test_fixture_follows_the_published_layout() -> None:
    assert ldm_shapes(full_sizes()) == table("sdxl_base_checkpoint")


def load_models(path: Path, cache: Path, *, dtype: torch.dtype = torch.float32, **options):
    settings = {"v_parameterization": False, "vae": None, "tokenizer_cache_dir": str(cache), "v2": False}
    checkpoint = SDXL.inspect(str(path), **{**settings, **options})
    return checkpoint, {
        "unet": SDXL.load_denoiser(checkpoint, dtype=dtype, device="cpu"),
        "text_encoders": tuple(SDXL.load_text_encoders(checkpoint, dtype=dtype, device="cpu")),
        "vae": SDXL.load_vae(checkpoint, dtype=dtype, device="cpu"),
    }


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(("dtype", "suffix"), [(torch.float16, ".safetensors"), (torch.float32, ".ckpt")])
def test_load_then_save_is_bit_identical(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    made = make_tiny_sdxl(tmp_path / f"model{suffix}", dtype=dtype, position_ids=True)
    checkpoint, models = load_models(made.path, made.tokenizer_cache_dir, dtype=dtype)
    save_checkpoint(tmp_path / "again.safetensors", **models, source=checkpoint.unet.file, metadata={"a": "b"})
    original = dict(TensorFile.open(made.path).read(list(TensorFile.open(made.path).shapes)))
    original.pop(POSITION_IDS)
    assert_same(load_file(tmp_path / "again.safetensors"), original)


def test_diffusers_folder_through_a_single_file_keeps_every_bit(tmp_path: Path) -> None:
    made = make_tiny_sdxl(tmp_path / "folder", layout="diffusers")
    _, models = load_models(made.path, made.tokenizer_cache_dir)
    single = tmp_path / "single.safetensors"
    save_checkpoint(single, **models)
    assert load_file(single).keys() == ldm_shapes(SdxlSizes()).keys()
    _, again = load_models(single, made.tokenizer_cache_dir)
    for part in ("unet", "vae"):
        assert_same(dict(models[part].state_dict()), dict(again[part].state_dict()))
    for one, other in zip(models["text_encoders"], again["text_encoders"], strict=True):
        assert_same(dict(one.state_dict()), dict(other.state_dict()))


def test_read_without_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mmap

    made = make_tiny_sdxl(tmp_path / "model.safetensors", dtype=torch.float16)
    _, mapped = load_models(made.path, made.tokenizer_cache_dir, dtype=torch.float16)

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("mapped")

    monkeypatch.setattr(mmap, "mmap", refuse)
    _, read = load_models(made.path, made.tokenizer_cache_dir, dtype=torch.float16, disable_mmap=True)
    assert_same(dict(mapped["unet"].state_dict()), dict(read["unet"].state_dict()))
    assert_same(dict(mapped["text_encoders"][1].state_dict()), dict(read["text_encoders"][1].state_dict()))
