"""Files of FLUX.1 and Chroma: layouts, what they are found to be, loading, writing, and what is said of others."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.common import clip, t5
from library.architectures.common.ae import ae_source, ae_tensors, load_ae
from library.architectures.common.loading import ModelSource, load_frozen
from library.architectures.common.sources import vae_source
from library.architectures.common.tensor_files import TensorFile
from library.architectures.flux import checkpoint as flux
from library.architectures.flux.chroma import Chroma
from library.architectures.flux.model import Flux
from library.architectures.flux.sizes import ApproximatorSizes
from library.errors import UserError
from library.memory.stored_layers import StoredLinear, store_weights
from tests.fixtures.layouts import table as published
from tests.fixtures.tiny_flux import (
    FluxFileSizes,
    ae_shapes,
    chroma_shapes,
    clip_l_shapes,
    flux_shapes,
    full_sizes,
    make_tiny_flux,
    t5_shapes,
)
from tests.fixtures.tiny_flux_files import write_diffusers_folder
from tests.fixtures.tiny_sd import make_tiny_sd

KINDS = ("dev", "schnell", "chroma")


def table_file(name: str, **more: tuple[int, ...]) -> TensorFile:
    """A file of the published names and shapes, without data."""
    shapes = {**published(name), **more}
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return TensorFile(Path(f"{name}.safetensors"), shapes, tensors)


# ---- layouts ----


@pytest.mark.parametrize(("name", "kind"), [("flux1_dev", "dev"), ("flux1_schnell", "schnell"), ("chroma1", "chroma")])
def test_published_transformers_have_the_models_names(name: str, kind: str) -> None:
    found = flux.transformer_in(table_file(name))
    assert found.kind == kind and found.sizes.rope_axes == (16, 56, 56) and found.sizes.heads == 24
    model = flux.load_transformer(found, dtype=torch.bfloat16, device="meta")
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == published(name)
    prefixed = {f"any.prefix.{key}": shape for key, shape in published(name).items()}
    assert flux.transformer_in(TensorFile(Path("prefixed"), prefixed)).kind == kind
    assert type(model) is (Chroma if kind == "chroma" else Flux)
    if kind == "chroma":
        assert found.sizes.modulation_rows == 344 and found.sizes.approximator == ApproximatorSizes(64, 5120, 5)
    classes = {type(module).__name__ for module in model.modules()}
    assert {"DoubleStreamBlock", "SingleStreamBlock", "SelfAttention"} <= classes


def test_published_autoencoder_and_text_encoders_fill_their_models_and_come_back() -> None:
    source = vae_source(table_file("flux_ae"))
    assert (source.config["latent_channels"], source.config["use_quant_conv"]) == (16, False)
    ae = load_ae(source, dtype=torch.float32, device="meta")
    assert {name: tuple(t.shape) for name, t in ae_tensors(ae).items()} == published("flux_ae")
    file = table_file("clip_l", **{"text_model.embeddings.position_ids": (1, 77)})
    config = clip.infer_clip_config(file.shapes, prefix="text_model.", activation="quick_gelu")
    assert (config["num_hidden_layers"], config["num_attention_heads"]) == (12, 12)
    source = ModelSource("CLIP-L", file, clip.clip_layout(prefix="text_model."), config)
    encoder = load_frozen(source, partial(clip.build_clip, config), dtype=torch.float32, device="meta")
    written = source.layout.write(dict(encoder.named_parameters()))
    assert {name: tuple(t.shape) for name, t in written} == published("clip_l")
    for names in ({}, {t5.EMBEDDINGS: (32128, 4096)}):
        file = table_file("t5xxl_encoder", **names)
        config = t5.infer_t5_config(file.shapes)
        assert (config["num_layers"], config["num_heads"], config["d_kv"], config["d_ff"]) == (24, 64, 64, 10240)
        source = ModelSource("T5 encoder", file, t5.t5_layout(file.shapes), config)
        model = t5.load_t5(source, dtype=torch.bfloat16, device="meta")
        assert {k: tuple(v.shape) for k, v in t5.t5_tensors(model, file.shapes).items()} == dict(file.shapes)


def test_fixtures_follow_the_published_layouts() -> None:
    sizes = full_sizes()
    assert flux_shapes(sizes, guidance=True) == published("flux1_dev")
    assert flux_shapes(sizes, guidance=False) == published("flux1_schnell")
    assert chroma_shapes(sizes) == published("chroma1")
    assert ae_shapes(sizes) == published("flux_ae")
    assert clip_l_shapes(sizes) == published("clip_l")
    assert t5_shapes(sizes) == published("t5xxl_encoder")


# ---- loading and writing ----


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_load_then_save_is_bit_identical(tmp_path: Path, kind: str, dtype: torch.dtype, prefix: str) -> None:
    made = make_tiny_flux(tmp_path, model=kind, dtype=dtype, prefix=prefix)
    original = load_file(made.path)
    original[f"{prefix}img_in.bias"] = original[f"{prefix}img_in.bias"].float()  # files may mix dtypes
    save_file(original, made.path)
    found = flux.inspect_transformer(str(made.path))
    assert (found.kind, found.sizes.hidden, found.sizes.heads) == (kind, 32, 2)
    model = flux.load_transformer(found, dtype=torch.float32, device="cpu")
    assert not model.training and all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    flux.save_transformer(tmp_path / "again.safetensors", model, like=made.path, metadata={"a": "b"})
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == original.keys()
    for name, tensor in original.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)), name
    flux.save_transformer(tmp_path / "plain.safetensors", model, dtype=torch.bfloat16)
    plain = load_file(tmp_path / "plain.safetensors")
    assert set(plain) == {name.removeprefix(prefix) for name in original}
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}


def test_weights_of_an_fp8_file_stay_its_numbers(tmp_path: Path) -> None:
    made = make_tiny_flux(tmp_path, dtype=torch.float8_e4m3fn)
    model = flux.load_transformer(flux.inspect_transformer(str(made.path)), dtype=torch.bfloat16, device="cpu")
    store_weights(model, "fp8", torch.device("cpu"))
    linear = model.double_blocks[1].img_mlp[0]
    assert isinstance(linear, StoredLinear) and (linear.scale == 1).all()
    stored = load_file(made.path)["double_blocks.1.img_mlp.0.weight"]
    assert torch.equal(linear.numbers.view(torch.uint8), stored.view(torch.uint8))
    generator = torch.Generator().manual_seed(1)
    latents, context, pooled = (torch.randn(s, generator=generator) for s in ((1, 16, 4, 4), (1, 3, 32), (1, 32)))
    inputs = (latents.bfloat16(), torch.ones(1), context.bfloat16(), pooled.bfloat16(), torch.ones(1))
    plain = flux.load_transformer(flux.inspect_transformer(str(made.path)), dtype=torch.bfloat16, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), plain(*inputs), rtol=1e-5, atol=1e-5)


SCALES = {"one": lambda out: (), "rows": lambda out: (out, 1), "blocks": lambda out: (out, 2, 1)}


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", SCALES)
def test_fp8_files_with_scales(tmp_path: Path, suffix: str, shape: str) -> None:
    """ComfyUI's files hold weights as numbers times scales, and storing them in fp8 gives the same numbers."""
    made = make_tiny_flux(tmp_path)
    tensors = load_file(made.path)
    name = "double_blocks.1.img_mlp.0.weight"
    numbers = (tensors[name] * 50).to(torch.float8_e4m3fn)
    own = SCALES[shape](len(numbers))
    scale = 0.02 + 0.013 * torch.rand(own, generator=torch.Generator().manual_seed(3))
    tensors |= {name: numbers, name.replace("weight", suffix): scale, "scaled_fp8": torch.zeros(0, dtype=numbers.dtype)}
    tensors[name.replace("weight", "scale_input")] = torch.ones(())
    save_file(tensors, made.path)
    model = flux.load_transformer(flux.inspect_transformer(str(made.path)), dtype=torch.bfloat16, device="cpu")
    linear = model.double_blocks[1].img_mlp[0]
    whole = scale.repeat_interleave(numbers.shape[1] // 2, 1).flatten(1) if shape == "blocks" else scale
    assert torch.equal(linear.weight, (numbers.float() * whole).to(torch.bfloat16))
    store_weights(model, "fp8", torch.device("cpu"), blocks=[model.double_blocks, model.single_blocks])
    if shape != "blocks":
        assert torch.equal(linear.numbers.view(torch.uint8), numbers.view(torch.uint8))
        assert torch.equal(linear.scale, scale.expand(len(numbers), 1))


def test_other_formats_with_scales_are_refused(tmp_path: Path) -> None:
    made = make_tiny_flux(tmp_path)
    tensors = load_file(made.path)
    name = "double_blocks.1.img_mlp.0.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    mark = torch.frombuffer(bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    for changes, message in (
        ({name.replace("weight", "weight_scale"): torch.ones(3)}, r"has shape \[3\], which does not fit"),
        ({name.replace("weight", "comfy_quant"): mark}, "says that weights are in nvfp4"),
    ):
        save_file({**tensors, **changes}, made.path)
        with pytest.raises(UserError, match=message):
            flux.inspect_transformer(str(made.path))


def test_autoencoder_file_comes_back_bit_for_bit(tmp_path: Path) -> None:
    made = make_tiny_flux(tmp_path)
    vae = load_ae(ae_source(str(made.ae)), dtype=torch.float32, device="cpu")
    again, original = ae_tensors(vae), load_file(made.ae)
    assert again.keys() == original.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in original.items())


# ---- what is said of others ----


@pytest.mark.parametrize("kind", KINDS)
def test_model_type_that_contradicts_the_file(tmp_path: Path, kind: str) -> None:
    found = flux.inspect_transformer(str(make_tiny_flux(tmp_path, model=kind).path))
    right, wrong = ("chroma", "flux") if kind == "chroma" else ("flux", "chroma")
    flux.check_model_type(right, found)
    title = {"dev": "FLUX.1 dev", "schnell": "FLUX.1 schnell", "chroma": "Chroma"}[kind]
    with pytest.raises(
        UserError, match=rf"is {title}, which contradicts --model_type {wrong}; use --model_type {right}"
    ):
        flux.check_model_type(wrong, found)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cond_stage_model.transformer.x", "model.diffusion_model.input_blocks.0.0.weight"], "train_network.py"),
        (["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"], "LoRA file.*--network_weights"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "a VAE.*--ae"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5 text encoder.*--t5xxl"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "a bare CLIP text encoder"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3.*sd3_train_network.py"),
        (["double_stream_modulation_img.lin.weight", "double_blocks.0.x", "single_blocks.0.x"], "a FLUX.2 model"),
        (["something.else"], r"not a FLUX.1 or Chroma transformer \(its first tensor is something.else\)"),
    ],
)
def test_other_files_are_named(tmp_path: Path, names: list[str], message: str) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=f"other.safetensors.*{message}"):
        flux.inspect_transformer(str(tmp_path / "other.safetensors"))


def test_incomplete_and_quantised_transformers(tmp_path: Path) -> None:
    made = make_tiny_flux(tmp_path)
    tensors = load_file(made.path)
    cases = {
        "tensor txt_in.weight is missing": {"txt_in.weight": None},
        "1 of the transformer's tensors are missing, the first is double_blocks.1.txt_mlp.2.bias": {
            "double_blocks.1.txt_mlp.2.bias": None
        },
        r"tensor single_blocks.0.linear1.bias has shape \[3\] where \[224\] is expected": {
            "single_blocks.0.linear1.bias": torch.zeros(3)
        },
        "qkv.scale_weight is a scale, and .*qkv.weight has no fp8 numbers": {
            "double_blocks.0.img_attn.qkv.scale_weight": torch.ones(1)
        },
        "quantised with scales of their own": {"double_blocks.0.img_attn.qkv.absmax": torch.ones(1)},
        r"FLUX.1 Fill.*takes 384 channels for a token and gives 64": {"img_in.weight": torch.zeros(32, 384)},
        "heads of width 24 do not fit": {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(24)},
    }
    for message, changes in cases.items():
        changed = {name: t for name, t in {**tensors, **changes}.items() if t is not None}
        save_file(changed, made.path)
        with pytest.raises(UserError, match=f"{made.path.name}.*{message}"):
            flux.load_transformer(flux.inspect_transformer(str(made.path)), dtype=torch.float32, device="meta")


def test_wrong_files_behind_the_flags_of_the_parts(tmp_path: Path) -> None:
    made = make_tiny_flux(tmp_path)
    sd = make_tiny_sd(tmp_path / "sd.safetensors").path
    with pytest.raises(UserError, match=r"--ae .*clip_l.safetensors: not an autoencoder \(it is a bare CLIP"):
        ae_source(str(made.clip_l))
    with pytest.raises(UserError, match=r"--ae .*sd.safetensors: this VAE has 4 latent channels"):
        ae_source(str(sd))
    with pytest.raises(UserError, match=r"--t5xxl .*ae.safetensors: not a T5 encoder \(it is a VAE"):
        t5.t5_source(made.ae)
    with pytest.raises(
        UserError, match=r"--clip_l .*t5xxl.safetensors: not a CLIP text encoder \(it is a T5 text encod"
    ):
        flux.clip_l_source(made.t5xxl)
    scaled = {**load_file(made.t5xxl), "encoder.block.0.layer.0.SelfAttention.q.scale_weight": torch.ones(1)}
    save_file(scaled, made.t5xxl)
    with pytest.raises(UserError, match=r"t5xxl.*q.scale_weight is a scale, and .*has no fp8 numbers"):
        t5.t5_source(made.t5xxl)


def test_sizes_of_other_models_are_inferred(tmp_path: Path) -> None:
    sizes = replace(FluxFileSizes(), hidden=48, head=24, double_blocks=1, single_blocks=3, t5_width=16)
    made = make_tiny_flux(tmp_path, model="schnell", sizes=sizes)
    found = flux.inspect_transformer(str(made.path)).sizes
    assert (found.hidden, found.heads, found.double_blocks, found.single_blocks) == (48, 2, 1, 3)
    assert (found.context, found.mlp, found.rope_axes, found.latent_channels) == (16, 192, (4, 10, 10), 16)


def test_a_hub_repository_in_shards_fetches_only_what_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import huggingface_hub

    made = make_tiny_flux(tmp_path / "made")
    folder = write_diffusers_folder(made.path, tmp_path / "snapshot")
    used = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert len(used) == 4
    unused = {
        "flux1-dev.safetensors",
        "text_encoder/model.safetensors",
        "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    }
    files = [SimpleNamespace(rfilename=name) for name in sorted(used | unused)]
    asked: list[list[str]] = []

    def fetch(_repository: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    found = flux.inspect_transformer("owner/flux")
    assert set(asked[0]) == used and found.kind == "dev"
    read, plain = (
        flux.load_transformer(one, dtype=torch.float32, device="cpu").state_dict()
        for one in (found, flux.inspect_transformer(str(made.path)))
    )
    assert read.keys() == plain.keys() and all(torch.equal(read[name], plain[name]) for name in plain)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(UserError, match="is a Stable Diffusion XL model .*; use sdxl_train_network.py"):
        flux.inspect_transformer(str(folder))
