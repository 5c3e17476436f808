"""Training of the latent upscaler: it learns, resumes exactly, and refuses what cannot work; all by its command."""

from __future__ import annotations

import contextlib
import io
import math
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.architectures.common.checkpoint import vae_at
from library.architectures.common.kl_vae import build_vae
from library.architectures.common.loading import load_frozen
from library.inference.latent_upscaler import LatentUpscaler, load_latent_upscaler
from library.inference.upscaling import enlarged
from library.training.upscaler.crops import Crops, CropSettings, split
from tests.fixtures.runs import PATIENCE, ROOT, Finished, metadata_of, run_script, start_script
from tests.fixtures.tiny_flux import make_tiny_flux
from tools import latent_upscaler as tool

pytestmark = pytest.mark.usefixtures("own_root_logger")

MODEL = ROOT / "examples" / "quickstart" / "model"
SCRIPT = "tools/latent_upscaler.py"


def checked(number: int, size: int = 64) -> Image.Image:
    """Colored squares with a fine check over them, of which an image of half the size keeps the colors alone."""
    colors = np.random.default_rng(number).integers(60, 190, (size // 16, size // 16, 3))
    y, x = np.mgrid[:size, :size]
    pixels = np.kron(colors, np.ones((16, 16, 1))) + np.where((x + y) % 2 == 0, 60, -60)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawings")
    for number in range(40):
        checked(number).save(folder / f"{number:02}.png")
    return folder


def words(images: Path, target: Path, **more: object) -> list[object]:
    flags = {
        "vae_path": MODEL, "train_data_dir": images, "output_file": target, "resolution": 64, "batch_size": 2,
        "width": 4, "max_train_steps": 6, "validation_crops": 2, **more,
    }  # fmt: skip
    found: list[object] = ["train"]
    for name, value in flags.items():
        if value is not None:
            found += [f"--{name}"] if value is True else [f"--{name}", value]
    return found


def run_here(*given: object) -> Finished:
    """The tool in this process, which saves the start of another."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            code = tool.main(tool.setup_parser().parse_args([str(word) for word in given]))
        except SystemExit as end:
            code = int(end.code or 0)
    return Finished(code, "", said.getvalue())


def train(images: Path, target: Path, **more: object) -> Finished:
    return run_here(*words(images, target, **more))


def same(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_what_lanczos_loses(images: Path, tmp_path: Path) -> None:
    """On images that it never saw, used as the highres fix uses it, the error is clearly below that of Lanczos."""
    target = tmp_path / "upscaler.safetensors"
    more = {"width": 8, "batch_size": 4, "vae_batch_size": 4, "max_train_steps": 60, "learning_rate": 1e-2}
    done = run_script(SCRIPT, *words(images, target, **more, lr_scheduler="cosine", validate_every_n_steps=30))
    assert done.code == 0, done.text
    assert "step 0, validation" in done.text and "(100%)" in done.text  # a new network changes nothing
    assert "step 30, validation" in done.text and "step 60, validation" in done.text
    network = load_latent_upscaler(target)
    source = vae_at(str(MODEL))
    vae = load_frozen(source, lambda: build_vae(source.config), dtype=torch.float32, device="cpu")
    large = [checked(number) for number in range(1000, 1008)]
    small = [image.resize((32, 32), Image.Resampling.BOX) for image in large]
    size, factor = (64, 64), float(vae.config.scaling_factor)
    with torch.no_grad():
        wanted, plain = (
            vae.encode(torch.stack([enlarged(one, size) for one in part])).latent_dist.mode() * factor
            for part in (large, small)
        )
    refined = network.upscale(vae, small, None, torch.float32, *size, 4, 4)
    errors = [float((one - wanted).square().mean().sqrt()) for one in (refined, plain)]
    assert errors[0] < 0.8 * errors[1], errors
    said = metadata_of(target)
    assert float(said["latent_upscaler.error"]) < 0.8 * float(said["latent_upscaler.error_of_lanczos"])
    assert said["latent_upscaler.step"] == "60"
    # running statistics are those of training, and validation leaves them alone
    assert int(load_file(target)["bn1.num_batches_tracked"]) == 60


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_ctrl_c_saves_and_resuming_is_exact(images: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    more = {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "flip_aug": True, "max_train_steps": 12}
    assert train(images, whole, **more).code == 0
    process = start_script(SCRIPT, *words(images, parts, **more, save_every_n_steps=1))
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "step 2 saved" in line:
            break
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=PATIENCE)
    text = "".join(seen) + rest
    assert process.returncode == 130 and "Traceback" not in text, text
    first = int(metadata_of(parts)["latent_upscaler.step"])
    assert 2 <= first < 12 and not same(whole, parts)
    other = train(images, parts, **{**more, "learning_rate": 1e-3}, resume=True)
    assert other.code == 2 and "--learning_rate was 0.0002 and is 0.001" in other.err
    done = train(images, parts, **more, resume=True)
    assert done.code == 0, done.text
    assert f"steps: {first} done, 12 in all" in done.text
    assert same(whole, parts)
    over = train(images, parts, **more, resume=True)
    assert over.code == 2 and "the state is of step 12 already" in over.err
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".safetensors", ".state")]


def test_it_goes_on_from_a_published_file(images: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = LatentUpscaler(4, 2)
    save_file(start.state_dict(), tmp_path / "start.safetensors")
    more = {"weights": tmp_path / "start.safetensors", "width": None, "mixed_precision": "bf16", "validation_split": 0}
    done = train(images, tmp_path / "tuned.safetensors", **more, loss_type="l2", max_train_steps=1)
    assert done.code == 0, done.text
    assert "validation:" not in done.text
    tuned = load_file(tmp_path / "tuned.safetensors")
    changes = {name: float((tuned[name] - tensor.detach()).abs().max()) for name, tensor in start.named_parameters()}
    assert 0 < changes["conv1.weight"] < 1e-3 and all(math.isfinite(value) for value in changes.values())


def test_a_run_that_diverges_keeps_what_was_saved(images: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    assert train(images, target, max_train_steps=1, max_grad_norm=0).code == 0
    before = target.read_bytes()
    done = train(images, target, max_grad_norm=0, learning_rate=1e30, overwrite=True)
    assert done.code == 2 and "not finite" in done.err and "Traceback" not in done.text, done.text
    assert target.read_bytes() == before


def test_each_image_comes_once_before_one_comes_again(images: Path) -> None:
    paths = sorted(images.iterdir())[:5]
    crops = Crops(paths, CropSettings(side=64, small=32, flips=True, seed=3), "test")
    for epoch in range(2):
        assert {crops._image(5 * epoch + place) for place in range(5)} == set(paths)
    alone, together = crops.read([7]), crops.read([6, 7])
    assert torch.equal(alone.large[0], together.large[1])  # by its number alone
    assert alone.large.shape == alone.enlarged.shape == (1, 3, 64, 64)
    assert 0 < float((alone.large - alone.enlarged).abs().mean()) < 0.5
    learned, kept = split(paths, 0.1, seed=1)
    assert len(kept) == 1 and sorted([*learned, *kept]) == paths


def test_mistakes(images: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    (tmp_path / "small").mkdir()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "small" / "a.png")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    flux = make_tiny_flux(tmp_path / "flux")
    save_file(LatentUpscaler(4, 2).state_dict(), tmp_path / "kept.safetensors")
    kept = (tmp_path / "kept.safetensors").read_bytes()
    (tmp_path / "torn.state").write_bytes(b"PK")
    for more, said in (
        ({"vae_path": None}, "train: --vae_path is required"),
        ({"vae_path": "gone"}, "--vae_path gone"),
        ({"vae_path": flux.ae}, "its latents have 16 channels; a latent upscaler is for those of 4"),
        ({"train_data_dir": "gone"}, "--train_data_dir gone: no such folder"),
        ({"train_data_dir": tmp_path / "small"}, "none of its 1 images has 64 pixels on both sides"),
        ({"train_data_dir": tmp_path / "bad"}, "a.png: not an image"),
        ({"output_file": tmp_path / "a.pt"}, "must end with .safetensors"),
        ({"output_file": tmp_path / "kept.safetensors"}, "exists already; continue it with --resume, or replace it"),
        (
            {"output_file": tmp_path / "kept.safetensors", "weights": tmp_path / "kept.safetensors", "width": None},
            "is one of the files that are read",
        ),
        ({"resume": True}, "a.state does not exist; leave --resume out to begin"),
        ({"output_file": tmp_path / "torn.safetensors", "resume": True}, "torn.state cannot be read"),
        ({"resolution": 60}, "--resolution 60: must be a multiple of 8"),
        ({"scale": 1.001}, "--scale 1.001: makes crops of 64 pixels 64 pixels wide"),
        ({"scale": 1}, "--scale 1.0: must be greater than 1"),
        ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
        ({"weights": tmp_path / "kept.safetensors"}, "--width has no effect with --weights"),
        ({"optimizer_type": "Adamm"}, "Adamm"),
        ({"lr_scheduler": "cosin"}, "cosin"),
        ({"validation_split": 0.99}, "keeps all of 40 images from training"),
        ({"debug": True}, "unrecognized arguments: --debug"),
    ):
        done = train(images, target, **more)
        assert done.code == 2 and said in done.err and "Traceback" not in done.text, (more, done.text)
    before = run_here("--debug", *words(images, target))
    assert before.code == 2 and "--debug is for enlarging images" in before.err
    assert not target.exists() and (tmp_path / "kept.safetensors").read_bytes() == kept
