"""Published single-file layouts <-> models, in both directions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.common import clip, kl_vae, ldm_unet
from library.architectures.common.sources import ldm_unet_source, vae_source
from library.architectures.common.tensor_files import TensorFile
from library.architectures.sd import SD
from library.architectures.sd.weights import ldm_text_source, save_checkpoint
from tests.fixtures.layouts import table as published
from tests.fixtures.tiny_sd import Sizes, full_sizes, ldm_shapes, make_tiny_sd

POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
BUILDERS = {"unet": ldm_unet.build_unet, "text": clip.build_clip, "vae": kl_vae.build_vae}


def meta_sources(shapes: dict[str, tuple[int, ...]], *, v2: bool):
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    file = TensorFile(Path("published.safetensors"), shapes, tensors)
    return file, {"unet": ldm_unet_source(file), "text": ldm_text_source(file, v2=v2), "vae": vae_source(file)}


@pytest.mark.parametrize(("name", "v2"), [("sd15", False), ("sd21", True)])
def test_published_checkpoint_fills_the_models_and_comes_back(name: str, v2: bool) -> None:
    shapes = published(f"{name}_checkpoint")
    file, sources = meta_sources(shapes, v2=v2)
    returned: dict[str, tuple[int, ...]] = {}
    for part, source in sources.items():
        with torch.device("meta"):
            model = BUILDERS[part](source.config)
        expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        state = dict(source.layout.read(file.read(source.file_names())))
        assert {k: tuple(v.shape) for k, v in state.items()} == expected
        returned |= {k: tuple(v.shape) for k, v in source.layout.write(state)}
    aside = {k: v for k, v in shapes.items() if k not in returned}
    assert returned == {k: v for k, v in shapes.items() if k not in aside}
    if v2:  # the unused block and two parameters of OpenCLIP are not the model's
        text = "cond_stage_model.model."
        assert {k for k in aside if ".resblocks.23." not in k} == {text + "text_projection", text + "logit_scale"}
        assert len(aside) == 14
    else:
        assert aside == {}


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_unet_module_names_are_the_published_diffusers_names(name: str) -> None:
    file, sources = meta_sources(published(f"{name}_checkpoint"), v2=name == "sd21")
    with torch.device("meta"):
        unet = ldm_unet.build_unet(sources["unet"].config)
    assert {k: tuple(v.shape) for k, v in unet.state_dict().items()} == published(f"{name}_unet_diffusers")


def test_inferred_configuration_of_the_published_sizes() -> None:
    _, v1 = meta_sources(published("sd15_checkpoint"), v2=False)
    _, v2 = meta_sources(published("sd21_checkpoint"), v2=True)
    assert v1["unet"].config["attention_head_dim"] == 8
    assert v2["unet"].config["attention_head_dim"] == (5, 10, 20, 20)
    assert (v1["text"].config["num_hidden_layers"], v1["text"].config["num_attention_heads"]) == (12, 12)
    assert (v2["text"].config["num_hidden_layers"], v2["text"].config["num_attention_heads"]) == (23, 16)
    assert (v1["text"].config["hidden_act"], v2["text"].config["hidden_act"]) == ("quick_gelu", "gelu")


@pytest.mark.parametrize("v2", [False, True])
def test_fixture_follows_the_published_layout(v2: bool) -> None:
    assert ldm_shapes(full_sizes(v2=v2)) == published("sd21_checkpoint" if v2 else "sd15_checkpoint")


def load_models(path: Path, cache: Path, *, v2: bool, dtype: torch.dtype = torch.float32):
    checkpoint = SD.inspect(str(path), v2=v2, v_parameterization=False, vae=None, tokenizer_cache_dir=str(cache))
    return checkpoint, {
        "unet": SD.load_denoiser(checkpoint, dtype=dtype, device="cpu"),
        "text_encoder": SD.load_text_encoders(checkpoint, dtype=dtype, device="cpu")[0],
        "vae": SD.load_vae(checkpoint, dtype=dtype, device="cpu"),
    }


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize(("dtype", "suffix"), [(torch.float16, ".safetensors"), (torch.float32, ".ckpt")])
def test_load_then_save_is_bit_identical(tmp_path: Path, v2: bool, dtype: torch.dtype, suffix: str) -> None:
    made = make_tiny_sd(tmp_path / f"model{suffix}", v2=v2, dtype=dtype, position_ids=not v2)
    checkpoint, models = load_models(made.path, made.tokenizer_cache_dir, v2=v2, dtype=dtype)
    again = tmp_path / "again.safetensors"
    save_checkpoint(again, **models, source=checkpoint.unet.file, metadata={"a": "b"})
    original = dict(TensorFile.open(made.path).read(list(TensorFile.open(made.path).shapes)))
    original.pop(POSITION_IDS, None)
    assert_same(load_file(again), original)


@pytest.mark.parametrize("v2", [False, True])
def test_diffusers_folder_through_a_single_file_keeps_every_bit(tmp_path: Path, v2: bool) -> None:
    made = make_tiny_sd(tmp_path / "folder", v2=v2, layout="diffusers")
    _, models = load_models(made.path, made.tokenizer_cache_dir, v2=v2)
    single = tmp_path / "single.safetensors"
    save_checkpoint(single, **models)
    assert load_file(single).keys() == ldm_shapes(Sizes(v2=v2)).keys()
    _, again = load_models(single, made.tokenizer_cache_dir, v2=v2)
    for part in models:
        assert_same(dict(models[part].state_dict()), dict(again[part].state_dict()))


def test_saving_a_ckpt_reads_back(tmp_path: Path) -> None:
    made = make_tiny_sd(tmp_path / "model.safetensors")
    _, models = load_models(made.path, made.tokenizer_cache_dir, v2=False)
    save_checkpoint(tmp_path / "out.ckpt", **models, dtype=torch.float16)
    saved = torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == ldm_shapes(Sizes()).keys()
    assert {t.dtype for t in saved.values()} == {torch.float16}


def test_text_encoder_without_text_model_prefix(tmp_path: Path) -> None:
    made = make_tiny_sd(tmp_path / "model.safetensors")
    tensors = {k.replace("transformer.text_model.", "transformer."): t for k, t in load_file(made.path).items()}
    save_file(tensors, tmp_path / "short.safetensors")
    _, models = load_models(made.path, made.tokenizer_cache_dir, v2=False)
    _, short = load_models(tmp_path / "short.safetensors", made.tokenizer_cache_dir, v2=False)
    assert_same(dict(models["text_encoder"].state_dict()), dict(short["text_encoder"].state_dict()))


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"pickled": True}, {"pickled": True, "variant": "fp16"}])
def test_diffusers_variants_hold_the_same_weights(tmp_path: Path, options: dict) -> None:
    plain = make_tiny_sd(tmp_path / "plain", layout="diffusers")
    other = make_tiny_sd(tmp_path / "other", layout="diffusers", **options)
    _, first = load_models(plain.path, plain.tokenizer_cache_dir, v2=False)
    _, second = load_models(other.path, plain.tokenizer_cache_dir, v2=False)
    for part in first:
        assert_same(dict(first[part].state_dict()), dict(second[part].state_dict()))


def test_loading_in_the_files_dtype_copies_nothing(tmp_path: Path) -> None:
    made = make_tiny_sd(tmp_path / "model.safetensors", dtype=torch.float16)
    checkpoint, models = load_models(made.path, made.tokenizer_cache_dir, v2=False, dtype=torch.float16)
    for model in models.values():
        assert not model.training
        assert all(not p.requires_grad and p.dtype == torch.float16 for p in model.parameters())
        assert all(not t.is_meta for t in [*model.parameters(), *model.buffers()])
    position_ids = models["text_encoder"].embeddings.position_ids
    assert torch.equal(position_ids, torch.arange(77).unsqueeze(0))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's record of memory")
def test_loading_takes_no_copy_of_the_file(tmp_path: Path) -> None:
    def own_memory() -> int:  # MiB that are not pages of files
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) // 1024

    small = make_tiny_sd(tmp_path / "small.safetensors", dtype=torch.float16)
    load_models(small.path, small.tokenizer_cache_dir, v2=False, dtype=torch.float16)  # imports are not counted
    made = make_tiny_sd(tmp_path / "m.safetensors", dtype=torch.float16, sizes=Sizes(unet_channels=(320, 640)))
    size = made.path.stat().st_size // 1024**2
    before = own_memory()
    _, models = load_models(made.path, made.tokenizer_cache_dir, v2=False, dtype=torch.float16)
    assert size > 60 and len(models) == 3
    assert own_memory() - before < size // 4
