"""Whole runs of Stable Diffusion XL: only what is its own; the tests of ``tiny`` cover what all families share."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.fixtures.runs import (
    ROOT,
    logged,
    lora_arguments,
    make_images,
    metadata_of,
    train_here,
    write_dataset,
)
from tests.fixtures.tiny_sd import MadeCheckpoint
from tests.fixtures.tiny_sdxl import make_tiny_sdxl

SCRIPT = "sdxl_train_network"
pytestmark = pytest.mark.usefixtures("own_root_logger")


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, e.g. {different[:3]}"


def test_rates_and_long_captions_of_both_encoders(
    tmp_path: Path, tiny_sdxl: MadeCheckpoint, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "data.toml", images, dataset="batch_size = 2")
    more = {
        "text_encoder_lr": [1e-3, 2e-3],
        "max_token_length": 150,
        "weighted_captions": True,
        "disable_mmap_load_safetensors": True,
        "gradient_checkpointing": True,
        "sdpa": True,
    }
    train_here(*lora_arguments(tiny_sdxl, dataset, tmp_path / "out", **more), script=SCRIPT)
    path = tmp_path / "out" / "tiny.safetensors"
    moved = {name.split("_")[1] for name, tensor in load_file(path).items() if "lora_up" in name and tensor.any()}
    assert moved == {"te1", "te2", "unet"}
    assert metadata_of(path)["ss_text_encoder_lr"] == "[0.001, 0.002]"
    assert logged(tmp_path / "out", "lr/textencoder 1")[-1] == pytest.approx(1e-3)
    assert logged(tmp_path / "out", "lr/textencoder 2")[-1] == pytest.approx(2e-3)

    more = {
        "text_encoder_lr1": 0,
        "learning_rate": 3e-3,
        "network_args": [f"block_dims={','.join(['2'] * 23)}"],
        "clip_skip": 2,
    }
    train_here(*lora_arguments(tiny_sdxl, dataset, tmp_path / "second", **more), script=SCRIPT)
    assert "--clip_skip has no effect as SDXL always uses the last but one layer" in capsys.readouterr().err
    trained = load_file(tmp_path / "second" / "tiny.safetensors")
    assert any("lora_unet_input_blocks_4_1" in name for name in trained)
    moved = {name.split("_")[1] for name, tensor in trained.items() if "lora_up" in name and tensor.any()}
    assert moved == {"te2", "unet"}
    assert metadata_of(tmp_path / "second" / "tiny.safetensors")["ss_text_encoder_lr"] == "[0.0, 0.003]"
    assert logged(tmp_path / "second", "lr/textencoder 2")[-1] == pytest.approx(3e-3)


@pytest.fixture
def model_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record the U-Net's sizes for each use of an image in the next runs: (H, W), (top, left), (H, W)."""
    from library.architectures.sdxl import StableDiffusionXL

    numbers: list[tuple[int, ...]] = []
    predict = StableDiffusionXL.predict

    def spy(self, denoiser, noisy, timesteps, conditioning, control=None):
        height, width = (8 * side for side in noisy.shape[-2:])
        assert conditioning["sizes"][:, 4:].tolist() == [[height, width]] * len(noisy)
        numbers.extend(tuple(row) for row in conditioning["sizes"].tolist())
        return predict(self, denoiser, noisy, timesteps, conditioning, control)

    monkeypatch.setattr(StableDiffusionXL, "predict", spy)
    return numbers


def images_of_all_shapes(folder: Path) -> Path:
    """Each of another size; one lies on its side and says so, and one is smaller than its bucket would be."""
    make_images(folder, ((64, 64), (113, 50), (100, 47), (41, 96), (40, 37)))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(9).integers(0, 256, (47, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "turned.jpg", exif=exif)  # seen, it is 47 wide and 120 high
    (folder / "turned.txt").write_text("dog")
    return folder


def crops(size: tuple[int, int], target: tuple[int, int]) -> set[tuple[int, int]]:
    """(top, left) that an image of (H, W) may have in the middle, and mirrored."""
    scale = max(target[0] / size[0], target[1] / size[1])
    over = [round(side * scale) - wanted for side, wanted in zip(size, target, strict=True)]
    top, left = (round(rest / 2) for rest in over)
    return {(top, left), (top, over[1] - left)}


@pytest.mark.parametrize("no_upscale", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_unet_is_told_real_sizes_from_caches_too(
    tmp_path: Path, tiny_sdxl: MadeCheckpoint, model_sizes: list[tuple[int, ...]], no_upscale: bool
) -> None:
    folder = images_of_all_shapes(tmp_path / "images")
    general = f"flip_aug = true\nbucket_no_upscale = {str(no_upscale).lower()}"
    dataset = write_dataset(tmp_path / "data.toml", folder, general=general, subset="num_repeats = 3")
    runs = []
    for name, caches in (("plain", {}), ("memory", {"cache_latents": True}), ("disk", {"cache_latents_to_disk": True})):
        if name == "memory" and no_upscale:
            continue
        more = {"max_train_steps": None, "max_train_epochs": 1, "network_train_unet_only": True, **caches}
        train_here(*lora_arguments(tiny_sdxl, dataset, tmp_path / name, **more), script=SCRIPT)
        runs.append(list(model_sizes))
        model_sizes.clear()
    assert all(run == runs[0] for run in runs[1:])
    seen = {(height, width): set() for height, width, *_ in runs[0]}
    assert seen.keys() == {(64, 64), (50, 113), (47, 100), (96, 41), (37, 40), (120, 47)}
    for height, width, top, left, *target in runs[0]:
        assert (top, left) in crops((height, width), tuple(target))
        seen[height, width].add((top, left))
    assert any(len(found) == 2 for found in seen.values())  # mirrored uses have the place in the mirrored image
    small = {tuple(target) for height, width, _, _, *target in runs[0] if (height, width) == (37, 40)}
    assert small == ({(32, 32)} if no_upscale else {(64, 64)})


def test_the_unet_is_told_real_sizes_of_random_crops(
    tmp_path: Path, tiny_sdxl: MadeCheckpoint, model_sizes: list[tuple[int, ...]]
) -> None:
    folder = images_of_all_shapes(tmp_path / "images")
    general = "flip_aug = true\nrandom_crop = true"
    dataset = write_dataset(tmp_path / "data.toml", folder, general=general, dataset="batch_size = 2")
    more = {"max_train_steps": None, "max_train_epochs": 3, "network_train_unet_only": True}
    train_here(*lora_arguments(tiny_sdxl, dataset, tmp_path / "out", **more), script=SCRIPT)
    assert {(height, width) for height, width, *_ in model_sizes} >= {(120, 47), (50, 113)}
    outside = []
    for height, width, top, left, *target in model_sizes:
        scale = max(target[0] / height, target[1] / width)
        assert 0 <= top <= round(height * scale) - target[0] and 0 <= left <= round(width * scale) - target[1]
        outside.append((top, left) not in crops((height, width), tuple(target)))
    assert any(outside)


def test_caches_change_nothing_and_have_the_published_layout(
    tmp_path: Path, tiny_sdxl: MadeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    images = make_images(tmp_path / "images", ((64, 64), (100, 44), (80, 80), (64, 64), (64, 64)))
    dataset = write_dataset(tmp_path / "data.toml", images)
    more = {"network_train_unet_only": True, "max_train_steps": 3, "cache_latents": True}
    train_here(*lora_arguments(tiny_sdxl, dataset, tmp_path / "plain", **more), script=SCRIPT)
    cached = {**more, "cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
    train_here(*lora_arguments(tiny_sdxl, dataset, tmp_path / "cached", **cached), script=SCRIPT)
    assert_same_weights(tmp_path / "plain" / "tiny.safetensors", tmp_path / "cached" / "tiny.safetensors")
    assert not any("lora_te" in name for name in load_file(tmp_path / "cached" / "tiny.safetensors"))

    with np.load(images / "1_te_outputs.npz") as file:
        shapes = {
            name: (file[name].shape, str(file[name].dtype)) for name in ("hidden_state1", "hidden_state2", "pool2")
        }
    assert shapes == {
        "hidden_state1": ((77, 32), "float32"),
        "hidden_state2": ((77, 64), "float32"),
        "pool2": ((64,), "float32"),
    }
    with np.load(images / "1_0100x0044_sdxl.npz") as file:
        assert file["original_size"].tolist() == [100, 44] and file["latents"].shape[0] == 4

    capsys.readouterr()
    train_here(*lora_arguments(tiny_sdxl, dataset, tmp_path / "third", **cached), script=SCRIPT)
    assert "0 files made, 5 from the cache" in capsys.readouterr().err
    assert_same_weights(tmp_path / "plain" / "tiny.safetensors", tmp_path / "third" / "tiny.safetensors")


def test_v_prediction_with_zero_terminal_snr_from_a_folder(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the last timestep the U-Net sees noise alone, and what it should say, v, is the negative latents."""
    from library.architectures.sdxl import StableDiffusionXL

    made = make_tiny_sdxl(tmp_path / "folder", layout="diffusers", v_prediction=True)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    predict = StableDiffusionXL.predict

    def spy(self, denoiser, noisy, timesteps, conditioning, control=None):
        assert timesteps.tolist() == [999]
        said = predict(self, denoiser, noisy, timesteps, conditioning, control)
        seen.append((noisy.detach().clone(), said.detach().clone()))
        return said

    monkeypatch.setattr(StableDiffusionXL, "predict", spy)
    more = {"v_parameterization": True, "zero_terminal_snr": True, "network_train_unet_only": True, "min_timestep": 999}
    more |= {"max_train_steps": 1, "cache_latents_to_disk": True}
    for number in (0, 1):
        folder = tmp_path / f"image{number}"
        folder.mkdir()
        for ending in (".png", ".txt"):
            shutil.copy(images / f"{number}{ending}", folder / f"x{ending}")
        dataset = write_dataset(tmp_path / "data.toml", folder)
        output = tmp_path / f"out{number}"
        train_here(*lora_arguments(made, dataset, output, **more), script=SCRIPT)
        (cache,) = folder.glob("*_sdxl.npz")
        with np.load(cache) as file:
            latents = torch.from_numpy(file["latents"]) * 0.13025
        loss = (seen[-1][1][0] + latents).square().mean()
        assert logged(output, "loss/current")[0] == pytest.approx(float(loss), rel=1e-4)
    assert metadata_of(output / "tiny.safetensors")["modelspec.prediction_type"] == "v"
    assert torch.equal(seen[0][0], seen[1][0])


@pytest.mark.slow
def test_the_vae_stays_in_float32(
    tmp_path: Path, tiny_sdxl: MadeCheckpoint, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.architectures.sdxl import StableDiffusionXL

    dtypes = []
    encode = StableDiffusionXL.encode_images

    def spy(self, vae, *args, **kwargs):
        dtypes.append(next(vae.parameters()).dtype)
        return encode(self, vae, *args, **kwargs)

    monkeypatch.setattr(StableDiffusionXL, "encode_images", spy)
    dataset = write_dataset(tmp_path / "data.toml", images)
    more = {"mixed_precision": "bf16", "network_train_unet_only": True, "max_train_steps": 1}
    for settings in ({}, {"no_half_vae": True, "cache_latents": True}):
        dtypes.clear()
        train_here(*lora_arguments(tiny_sdxl, dataset, tmp_path / "out", **more, **settings), script=SCRIPT)
        assert set(dtypes) == {torch.float32 if settings else torch.bfloat16}


def test_base_weights_are_merged_together(
    tmp_path: Path, tiny_sdxl: MadeCheckpoint, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two DoRAs, each of which changes the weights as they are in the file; all models have them before training."""
    from library.architectures.sdxl import SDXL, StableDiffusionXL
    from networks.lora import create_network
    from tests.fixtures.adapted import randomize

    cache = str(tiny_sdxl.tokenizer_cache_dir)
    checkpoint = SDXL.inspect(str(tiny_sdxl.path), v_parameterization=False, vae=None, tokenizer_cache_dir=cache)
    encoders = SDXL.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")
    unet = SDXL.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
    names, changes, files = ("proj_in", "to_q", "q_proj"), {}, [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for file, strength, std in zip(files, (0.5, 1.0), (0.05, 0.1), strict=True):
        network = randomize(create_network(1.0, 4, 4.0, None, encoders, unet, dora="True"), std)
        network.save_weights(file, None, {})
        for adapter in network.adapters:
            if adapter.lora_name.endswith(names):
                change = adapter.get_weight(strength)
                changes[adapter.original] = changes.get(adapter.original, adapter.original.weight) + change

    seen: list[torch.nn.Module] = []
    encode, predict = StableDiffusionXL.encode_text, StableDiffusionXL.predict
    monkeypatch.setattr(
        StableDiffusionXL, "encode_text", lambda self, e, *a, **k: seen.extend(e) or encode(self, e, *a, **k)
    )
    monkeypatch.setattr(StableDiffusionXL, "predict", lambda self, d, *a: seen.append(d) or predict(self, d, *a))
    dataset = write_dataset(tmp_path / "data.toml", images)
    more = {"base_weights": files, "base_weights_multiplier": 0.5, "max_train_steps": 1}
    train_here(*lora_arguments(tiny_sdxl, dataset, tmp_path / "out", **more), script=SCRIPT)
    count = 0
    for before, after in zip((*encoders, unet), seen[:3], strict=True):
        for (name, module), (_, trained) in zip(before.named_modules(), after.named_modules(), strict=True):
            if module in changes:
                torch.testing.assert_close(trained.weight, changes[module], rtol=1e-5, atol=1e-5, msg=name)
                count += 1
    assert count == len(changes) > 10


@pytest.mark.slow
def test_a_lora_of_diffusers_trains_on_and_draws(tmp_path: Path, tiny_sdxl: MadeCheckpoint, images: Path) -> None:
    """With the names, ranks and alphas that PEFT writes; what is saved then draws the same image."""
    from networks.files.convert import convert

    dataset = write_dataset(tmp_path / "data.toml", images)
    more = {"max_train_steps": 3, "network_alpha": 1, "network_dim": 4, "learning_rate": 0.05}
    train_here(*lora_arguments(tiny_sdxl, dataset, tmp_path / "out", **more), script=SCRIPT)
    theirs = tmp_path / "pytorch_lora_weights.safetensors"
    convert(tmp_path / "out" / "tiny.safetensors", theirs, "diffusers")
    assert all(".lora_A." in name or ".lora_B." in name for name in load_file(theirs))
    more = {"network_weights": theirs, "dim_from_weights": True, "network_dim": None, "learning_rate": 1e-30}
    train_here(*lora_arguments(tiny_sdxl, dataset, tmp_path / "on", **more), script=SCRIPT)
    on = tmp_path / "on" / "tiny.safetensors"
    assert load_file(on).keys() == load_file(tmp_path / "out" / "tiny.safetensors").keys()
    drawn = {
        name: draw(tmp_path / name, tiny_sdxl, *words)
        for name, words in {
            "plain": [],
            "theirs": ["--network_module", "networks.lora", "--network_weights", theirs],
            "ours": ["--network_module", "networks.lora", "--network_weights", tmp_path / "out" / "tiny.safetensors"],
            "on": ["--network_module", "networks.lora", "--network_weights", on],
        }.items()
    }
    assert np.abs(drawn["ours"] - drawn["plain"]).max() > 5
    assert np.abs(drawn["theirs"] - drawn["ours"]).max() <= 1 and np.abs(drawn["on"] - drawn["ours"]).max() <= 1


def draw(folder: Path, model: MadeCheckpoint, *words: object) -> np.ndarray:
    """An image by ``gen_img.py``."""
    import gen_img

    given = ["--ckpt", model.path, "--tokenizer_cache_dir", model.tokenizer_cache_dir, "--console_log_simple"]
    given += ["--W", 64, "--H", 64, "--steps", 2, "--seed", 3, "--prompt", "a cat", "--outdir", folder, *words]
    gen_img.main(gen_img.setup_parser().parse_args([str(word) for word in given]))
    (path,) = folder.glob("*.png")
    return np.asarray(Image.open(path)).astype(int)


def test_caching_tools_make_what_training_uses(
    tmp_path: Path, tiny_sdxl: MadeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    from library.config.config_file import read_args
    from tools import cache_latents, cache_text_encoder_outputs

    images = make_images(tmp_path / "images", ((64, 64), (100, 44)))
    dataset = write_dataset(tmp_path / "data.toml", images)
    words = ["--sdxl", "--pretrained_model_name_or_path", tiny_sdxl.path, "--dataset_config", dataset]
    words += ["--tokenizer_cache_dir", tiny_sdxl.tokenizer_cache_dir, "--console_log_simple"]
    for module, tool in (
        (cache_latents, cache_latents.CacheLatents),
        (cache_text_encoder_outputs, cache_text_encoder_outputs.CacheTextEncoderOutputs),
    ):
        tool().run(read_args(module.setup_parser(), [str(word) for word in words]))
    assert len(list(images.glob("*_sdxl.npz"))) == len(list(images.glob("*_te_outputs.npz"))) == 2
    capsys.readouterr()
    more = {
        "network_train_unet_only": True,
        "cache_latents_to_disk": True,
        "cache_text_encoder_outputs_to_disk": True,
        "max_train_steps": 1,
    }
    train_here(*lora_arguments(tiny_sdxl, dataset, tmp_path / "out", **more), script=SCRIPT)
    error = capsys.readouterr().err
    assert "latents: 0 encoded, 2 from the cache" in error
    assert "0 files made, 2 from the cache" in error


def test_lycoris_trains_both_encoders(tmp_path: Path, tiny_sdxl: MadeCheckpoint, images: Path) -> None:
    pytest.importorskip("lycoris")
    dataset = write_dataset(tmp_path / "data.toml", images)
    more = {"network_module": "lycoris.kohya", "network_args": ["algo=lokr", "preset=attn-mlp"]}
    train_here(*lora_arguments(tiny_sdxl, dataset, tmp_path / "out", **more), script=SCRIPT)
    names = load_file(tmp_path / "out" / "tiny.safetensors")
    for start in ("lora_te1_text_model_encoder", "lora_te2_text_model_encoder", "lora_unet_input_blocks_4_1"):
        assert any(name.startswith(start) for name in names)


def refused(capsys: pytest.CaptureFixture[str], script: str, *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        train_here(*arguments, script=script)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_the_right_script_is_named(
    tmp_path: Path,
    tiny_sd: MadeCheckpoint,
    tiny_sdxl: MadeCheckpoint,
    images: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset = write_dataset(tmp_path / "data.toml", images)
    error = refused(capsys, SCRIPT, *lora_arguments(tiny_sd, dataset, tmp_path / "out"))
    assert "tiny.safetensors is a Stable Diffusion 1.x or 2.x checkpoint; use train_network.py" in error
    error = refused(capsys, "train_network", *lora_arguments(tiny_sdxl, dataset, tmp_path / "out"))
    assert "tiny_xl.safetensors is a Stable Diffusion XL checkpoint; use sdxl_train_network.py" in error
    error = refused(capsys, SCRIPT, *lora_arguments(tiny_sdxl, dataset, tmp_path / "out", v2=True))
    assert "--v2: that is for Stable Diffusion 2.x" in error
    block_dims = ",".join(["4"] * 25)
    arguments = lora_arguments(tiny_sdxl, dataset, tmp_path / "out", network_args=[f"block_dims={block_dims}"])
    assert "must have 23 comma-separated values, has 25" in refused(capsys, SCRIPT, *arguments)
    general = write_dataset(tmp_path / "steps.toml", images)
    general.write_text(general.read_text().replace("bucket_reso_steps = 32", "bucket_reso_steps = 16"))
    error = refused(capsys, SCRIPT, *lora_arguments(tiny_sdxl, general, tmp_path / "out"))
    assert "bucket_reso_steps 16: must be a multiple of 32" in error
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_gen_img_recognises_the_model(tmp_path: Path, tiny_sdxl: MadeCheckpoint, tiny_sd: MadeCheckpoint) -> None:
    from types import SimpleNamespace

    import gen_img
    from library.architectures.sd import SD
    from library.architectures.sdxl import SDXL
    from library.inference.families import family_of

    def family(path: Path | str, sdxl: bool = False) -> object:
        return family_of(SimpleNamespace(ckpt=str(path), sdxl=sdxl, v2=False, clip_skip=None))

    assert family(tiny_sd.path) is SD and family("owner/name") is SD and family("owner/name", sdxl=True) is SDXL
    folder = make_tiny_sdxl(tmp_path / "folder", layout="diffusers")
    assert family(folder.path) is SDXL
    words = ["--ckpt", tiny_sdxl.path, "--tokenizer_cache_dir", tiny_sdxl.tokenizer_cache_dir, "--console_log_simple"]
    words += ["--W", 64, "--H", 96, "--steps", 2, "--prompt", "a (cat:1.2) --n dog", "--outdir", tmp_path / "images"]
    gen_img.main(gen_img.setup_parser().parse_args([str(word) for word in words]))
    (image,) = (tmp_path / "images").iterdir()
    assert Image.open(image).size == (64, 96)


def commands_of_the_page() -> list[list[str]]:
    """The words of each command on docs/sdxl_train_network.md, from the script's name on."""
    page = (ROOT / "docs" / "sdxl_train_network.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line) for line in lines]
    return [words[next(i for i, word in enumerate(words) if word.endswith(".py")) :] for words in found]


def test_commands_of_the_page(tmp_path: Path, tiny_sdxl: MadeCheckpoint) -> None:
    from library.config.config_file import read_args

    images = make_images(tmp_path / "images", ((64, 64), (100, 44)))
    dataset = write_dataset(tmp_path / "data.toml", images)
    config = tmp_path / "run.toml"
    config.write_text(
        f"pretrained_model_name_or_path = '{tiny_sdxl.path}'\ndataset_config = '{dataset}'\n"
        f"output_dir = '{tmp_path / 'second'}'\nnetwork_module = 'networks.lora'\nmax_train_steps = 1\n"
    )
    values = {
        "sd_xl_base_1.0.safetensors": tiny_sdxl.path,
        "dataset.toml": dataset,
        "output": tmp_path / "first",
        "run.toml": config,
    }
    more = ["--tokenizer_cache_dir", tiny_sdxl.tokenizer_cache_dir, "--max_data_loader_n_workers", 0]
    commands = commands_of_the_page()
    assert len(commands) == 4
    for script, *words in commands:
        given = [str(values.get(word, word)) for word in words] + [str(word) for word in more]
        if "--max_train_epochs" in given:
            given[given.index("--max_train_epochs") + 1] = "1"
        module = script.removesuffix(".py").replace("/", ".")
        if module == SCRIPT:
            train_here(*given, script=SCRIPT)
        else:
            tool = {"cache_latents": "CacheLatents", "cache_text_encoder_outputs": "CacheTextEncoderOutputs"}
            imported = importlib.import_module(module)
            getattr(imported, tool[module.split(".")[1]])().run(read_args(imported.setup_parser(), given))
    assert (tmp_path / "first" / "my_lora.safetensors").is_file() and list((tmp_path / "second").glob("*.safetensors"))
    assert len(list(images.glob("*_sdxl.npz"))) == len(list(images.glob("?_te_outputs.npz"))) == 2
