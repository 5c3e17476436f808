"""Checkpoints are recognized; messages name files and flags that do not fit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.common.checkpoint import locate
from library.architectures.sd import SD
from library.architectures.sd.checkpoint import SDCheckpoint
from library.errors import UserError
from tests.fixtures.tiny_sd import MadeCheckpoint, Sizes, make_tiny_sd, random_tensors, vae_shapes


def inspect(made: MadeCheckpoint | Path, *, cache: Path | None = None, **flags) -> SDCheckpoint:
    path, found = (made.path, made.tokenizer_cache_dir) if isinstance(made, MadeCheckpoint) else (made, cache)
    settings = {"v2": False, "v_parameterization": False, "vae": None, "tokenizer_cache_dir": found} | flags
    settings["tokenizer_cache_dir"] = settings["tokenizer_cache_dir"] and str(settings["tokenizer_cache_dir"])
    return SD.inspect(str(path), **settings)


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize(
    ("v2", "v_prediction", "version"),
    [(False, False, "sd_v1"), (False, True, "sd_v1_v"), (True, False, "sd_v2"), (True, True, "sd_v2_v")],
)
def test_versions(tmp_path: Path, layout: str, v2: bool, v_prediction: bool, version: str) -> None:
    name = "model.safetensors" if layout == "ldm" else "folder"
    made = make_tiny_sd(tmp_path / name, v2=v2, layout=layout, v_prediction=v_prediction)
    info = inspect(made, v2=v2, v_parameterization=v_prediction).info
    assert (info.family, info.version, info.v_prediction) == ("sd", version, v_prediction)
    assert SD.metadata(info) == {"ss_v2": str(v2), "ss_base_model_version": version}


@pytest.mark.parametrize(
    ("v2", "v_prediction", "expected"),
    [
        (False, False, ("stable-diffusion-v1", "512x512", "epsilon")),
        (False, True, ("stable-diffusion-v1", "512x512", "v")),
        (True, False, ("stable-diffusion-v2-512", "512x512", "epsilon")),
        (True, True, ("stable-diffusion-v2-768-v", "768x768", "v")),
    ],
)
def test_modelspec(tmp_path: Path, v2: bool, v_prediction: bool, expected: tuple[str, str, str]) -> None:
    made = make_tiny_sd(tmp_path / "model.safetensors", v2=v2)
    spec = SD.modelspec(inspect(made, v2=v2, v_parameterization=v_prediction).info)
    assert (spec["architecture"], spec["default_resolution"], spec["prediction_type"]) == expected
    assert spec["implementation"] == "diffusers"


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_version_flag_that_contradicts_the_file(tmp_path: Path, layout: str) -> None:
    suffix = ".safetensors" if layout == "ldm" else ""
    first = make_tiny_sd(tmp_path / f"one{suffix}", layout=layout)
    second = make_tiny_sd(tmp_path / f"two{suffix}", v2=True, layout=layout)
    message = rf"^one{suffix} is a Stable Diffusion 1\.x checkpoint \(cross-attention width 32\); drop --v2$"
    with pytest.raises(UserError, match=message):
        inspect(first, v2=True)
    with pytest.raises(UserError, match=rf"^two{suffix} is a Stable Diffusion 2\.x checkpoint .*; add --v2$"):
        inspect(second)


def test_prediction_flag_that_contradicts_the_folder(tmp_path: Path) -> None:
    v = make_tiny_sd(tmp_path / "v", layout="diffusers", v_prediction=True)
    epsilon = make_tiny_sd(tmp_path / "epsilon", layout="diffusers")
    with pytest.raises(UserError, match="v is trained for v_prediction .*; add --v_parameterization"):
        inspect(v)
    with pytest.raises(UserError, match="epsilon is trained for epsilon .*; drop --v_parameterization"):
        inspect(epsilon, v_parameterization=True)
    shutil.rmtree(epsilon.path / "scheduler")
    assert inspect(epsilon, v_parameterization=True).info.v_prediction


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["conditioner.embedders.0.transformer.x", "model.diffusion_model.input_blocks.0.0.weight"], "XL.*sdxl_train"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Diffusion 3.*sd3_train_network.py"),
        (["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"], "FLUX.*flux_train_network.py"),
        (["cap_embedder.0.weight"], "Lumina-Image 2.0.*lumina_train_network.py"),
        (["lora_unet_mid_block.lora_down.weight"], "LoRA file.*--network_weights"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "VAE.*--vae"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "no text encoder"),
        (["something.else"], "not a Stable Diffusion checkpoint"),
    ],
)
def test_other_files_are_named(tmp_path: Path, names: list[str], message: str) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=f"other.safetensors.*{message}"):
        inspect(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("pipeline", "script"),
    [("StableDiffusionXLPipeline", "sdxl_train_network.py"), ("FluxPipeline", "flux_train_network.py")],
)
def test_other_folders_are_named(tmp_path: Path, pipeline: str, script: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(UserError, match=f"{pipeline}.*{script}"):
        inspect(tmp_path)


def test_folder_that_holds_a_single_file_instead(tmp_path: Path) -> None:
    make_tiny_sd(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match='unet/config.json is missing; did you mean the file ".*model.safetensors"'):
        inspect(tmp_path)


def test_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    make_tiny_sd(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r'no such file or folder \(did you mean "model.safetensors"\?\)'):
        inspect(tmp_path / "modle.safetensors")


def test_paths_that_are_nearly_right(tmp_path: Path) -> None:
    folder = make_tiny_sd(tmp_path / "folder", layout="diffusers").path
    with pytest.raises(UserError, match=f'it is a part of a model; did you mean "{folder}"'):
        inspect(folder / "unet")
    with pytest.raises(UserError, match=f"give its folder, {folder}$"):
        inspect(folder / "model_index.json")
    for given, remedy in ((f'"{folder}"', "leave out the quotes"), ("https://huggingface.co/a/b.ckpt", "owner/name")):
        with pytest.raises(UserError, match=f"no such file or folder; .*{remedy}"):
            locate(given, flag="--vae", components=())


def test_the_content_counts_not_the_ending(tmp_path: Path) -> None:
    """Files are renamed: a .ckpt that is no pickle, and a .safetensors that is one."""
    made = make_tiny_sd(tmp_path / "model.safetensors")
    state = load_file(made.path)
    renamed = made.path.rename(tmp_path / "model.ckpt")
    torch.save({"state_dict": state}, tmp_path / "pickled.safetensors")
    for path in (renamed, tmp_path / "pickled.safetensors"):
        unet = SD.load_denoiser(inspect(path, cache=made.tokenizer_cache_dir), dtype=torch.float32, device="cpu")
        assert torch.equal(unet.conv_out.bias, state["model.diffusion_model.out.2.bias"])


def test_mistakes_with_a_vae_name_the_option(tmp_path: Path) -> None:
    made = make_tiny_sd(tmp_path / "model.safetensors")
    (tmp_path / "vae.pt").write_bytes(b"")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, words in (("vae.pt", "it is empty"), ("other.safetensors", "holds no VAE"), ("no.pt", "no such file")):
        with pytest.raises(UserError, match=f"^--vae .*{name}: .*{words}"):
            inspect(made, vae=str(tmp_path / name))


def without(made: MadeCheckpoint, prefix: str) -> None:
    save_file({k: t for k, t in load_file(made.path).items() if not k.startswith(prefix)}, made.path)


def test_vae_from_elsewhere(tmp_path: Path) -> None:
    made = make_tiny_sd(tmp_path / "model.safetensors")
    folder = make_tiny_sd(tmp_path / "folder", layout="diffusers", seed=5)
    other = make_tiny_sd(tmp_path / "other.safetensors", seed=9)
    vae = {k.removeprefix("first_stage_model."): t for k, t in load_file(other.path).items() if "first_stage" in k}
    save_file(vae | {"loss.discriminator.weight": torch.zeros(3)}, tmp_path / "vae.safetensors")
    without(made, "first_stage_model.")
    with pytest.raises(UserError, match="has no VAE; give one with --vae"):
        inspect(made)
    identity = SD.vae_identity(inspect(other))
    for path in (other.path, tmp_path / "vae.safetensors"):
        checkpoint = inspect(made, vae=str(path))
        assert SD.vae_identity(checkpoint) == identity
        loaded = SD.load_vae(checkpoint, dtype=torch.float32, device="cpu")
        assert torch.equal(loaded.quant_conv.weight, vae["quant_conv.weight"])
    identities = set()
    for path in (folder.path, folder.path / "vae", folder.path / "vae" / "diffusion_pytorch_model.safetensors"):
        identities.add(SD.vae_identity(inspect(made, vae=str(path))))
    assert len(identities) == 1 and identities != {identity}


def test_vae_identity_follows_the_encoder_only(tmp_path: Path) -> None:
    made = make_tiny_sd(tmp_path / "model.safetensors")
    identity = SD.vae_identity(inspect(made))
    tensors = load_file(made.path)
    tensors["first_stage_model.decoder.conv_in.bias"] += 1
    save_file(tensors, tmp_path / "decoder.safetensors")
    tensors["first_stage_model.encoder.conv_in.bias"] += 1
    save_file(tensors, tmp_path / "encoder.safetensors")
    cache = made.tokenizer_cache_dir
    assert SD.vae_identity(inspect(tmp_path / "decoder.safetensors", cache=cache)) == identity
    assert SD.vae_identity(inspect(tmp_path / "encoder.safetensors", cache=cache)) != identity


def test_text_identity_follows_encoder_and_tokenizer(tmp_path: Path) -> None:
    made = make_tiny_sd(tmp_path / "model.safetensors")
    cache = made.tokenizer_cache_dir
    before = SD.text_identity(inspect(made))
    shutil.copy(made.path, tmp_path / "copy.safetensors")
    copied = SD.text_identity(inspect(tmp_path / "copy.safetensors", cache=cache))
    assert copied.files != before.files and copied.weights == before.weights
    assert SD.text_identity(inspect(made)).files == before.files

    tensors = load_file(made.path)
    tensors["model.diffusion_model.out.2.bias"] += 1
    save_file(tensors, tmp_path / "unet.safetensors")
    unet = SD.text_identity(inspect(tmp_path / "unet.safetensors", cache=cache))
    assert unet.weights == before.weights  # only the U-Net was trained
    tensors["cond_stage_model.transformer.text_model.final_layer_norm.bias"][3] += 1
    save_file(tensors, tmp_path / "text.safetensors")
    assert SD.text_identity(inspect(tmp_path / "text.safetensors", cache=cache)).weights != before.weights

    vocabulary = next(cache.rglob("vocab.json"))
    vocabulary.write_text(vocabulary.read_text() + " ")
    changed = SD.text_identity(inspect(made))
    assert changed.files != before.files and changed.weights != before.weights


def test_vae_with_old_attention_names(tmp_path: Path) -> None:
    made = make_tiny_sd(tmp_path / "folder", layout="diffusers")
    path = made.path / "vae" / "diffusion_pytorch_model.safetensors"
    plain = SD.load_vae(inspect(made), dtype=torch.float32, device="cpu").state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    renamed = {re.sub("|".join(old), lambda m: old[m[0]], k): t for k, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, path)
    again = SD.load_vae(inspect(made), dtype=torch.float32, device="cpu").state_dict()
    assert all(torch.equal(plain[k], again[k]) for k in plain)


def test_vae_of_another_family(tmp_path: Path) -> None:
    made = make_tiny_sd(tmp_path / "model.safetensors")
    tensors = random_tensors(vae_shapes(Sizes()), seed=0, dtype=torch.float32)
    tensors["decoder.conv_in.weight"] = torch.zeros(32, 16, 3, 3)
    save_file(tensors, tmp_path / "ae.safetensors")
    with pytest.raises(UserError, match="ae.safetensors: this VAE has 16 latent channels"):
        inspect(made, vae=str(tmp_path / "ae.safetensors"))


def test_inpainting_model(tmp_path: Path) -> None:
    made = make_tiny_sd(tmp_path / "model.safetensors", sizes=Sizes(in_channels=9))
    with pytest.raises(UserError, match="inpainting.*9 channels"):
        inspect(made)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    made = make_tiny_sd(tmp_path / "model.safetensors")
    without(made, "model.diffusion_model.middle_block.2.in_layers.2.bias")
    with pytest.raises(UserError, match=r"1 of the U-Net's tensors are missing, .* mid_block.resnets.1.conv1.bias"):
        SD.load_denoiser(inspect(made), dtype=torch.float32, device="cpu")


def test_text_encoder_of_another_width(tmp_path: Path) -> None:
    made = make_tiny_sd(tmp_path / "one", layout="diffusers")
    wide = make_tiny_sd(tmp_path / "wide", layout="diffusers", sizes=Sizes(text_width=64))
    shutil.rmtree(made.path / "text_encoder")
    shutil.copytree(wide.path / "text_encoder", made.path / "text_encoder")
    with pytest.raises(UserError, match="U-Net takes text of width 32, the text encoder gives 64"):
        inspect(made)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty Hub cache and no network."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_args, **_kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)


@pytest.mark.usefixtures("offline")
def test_no_tokenizer_offline(tmp_path: Path) -> None:
    made = make_tiny_sd(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tokenizer openai/clip-vit-large-patch14 .*give --tokenizer_cache_dir"):
        inspect(made, tokenizer_cache_dir=None)
    with pytest.raises(UserError, match='neither in --tokenizer_cache_dir ".*empty" nor'):
        inspect(made, tokenizer_cache_dir=tmp_path / "empty")
    direct = made.tokenizer_cache_dir / "openai_clip-vit-large-patch14"
    assert inspect(made, tokenizer_cache_dir=direct).tokenizer_folder == direct


@pytest.mark.usefixtures("offline")
def test_hub_id_offline() -> None:
    with pytest.raises(UserError, match="owner/model: .*not in the Hub cache, and the Hub cannot be reached"):
        inspect(Path("owner/model"))


def test_clip_skip_beyond_the_layers(tmp_path: Path) -> None:
    from argparse import Namespace

    info = inspect(make_tiny_sd(tmp_path / "model.safetensors")).info
    SD.check_options(Namespace(model=Namespace(clip_skip=2)), info)
    with pytest.raises(UserError, match="--clip_skip 3: this model's text encoder has 2 layers"):
        SD.check_options(Namespace(model=Namespace(clip_skip=3)), info)


def test_hub_repository_fetches_only_what_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import huggingface_hub

    made = make_tiny_sd(tmp_path / "snapshot", layout="diffusers")
    used = {str(p.relative_to(made.path)) for p in made.path.rglob("*") if p.is_file()}
    unused = {
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/model.safetensors",
        "v1-5-pruned.ckpt",
    }
    files = [SimpleNamespace(rfilename=name) for name in sorted(used | unused)]
    asked: list[list[str]] = []

    def fetch(_repository: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(made.path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    checkpoint = inspect(Path("owner/model"))
    assert set(asked[0]) == used
    assert checkpoint.path == str(made.path) and checkpoint.info.version == "sd_v1"
    with pytest.raises(UserError, match=r"^model is a Stable Diffusion 1\.x"):
        inspect(Path("owner/model"), v2=True)


def test_tokenizer_from_the_hub_is_kept_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    made = make_tiny_sd(tmp_path / "model.safetensors")
    snapshot = made.tokenizer_cache_dir / "openai_clip-vit-large-patch14"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    kept = tmp_path / "kept"
    folder = inspect(made, tokenizer_cache_dir=kept).tokenizer_folder
    assert folder == kept / "openai_clip-vit-large-patch14"
    assert (folder / "vocab.json").read_bytes() == (snapshot / "vocab.json").read_bytes()
