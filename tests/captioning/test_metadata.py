"""Captions and tags merged into metadata, buckets and latents; what training then reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune import (
    clean_captions_and_tags,
    merge_captions_to_metadata,
    merge_dd_tags_to_metadata,
    prepare_buckets_latents,
    tag_images_by_wd14_tagger,
)
from library.data.image_header import read_header
from tests.fixtures.file_tools import refused, run_words
from tests.fixtures.runs import make_images, train_here
from tests.fixtures.tiny_captioners import write_wd_onnx
from tests.fixtures.tiny_sd import MadeCheckpoint, make_tiny_sd

pytestmark = pytest.mark.usefixtures("own_root_logger")

SMALL = ("--max_resolution", "64,64", "--min_bucket_reso", 32, "--max_bucket_reso", 128, "--bucket_reso_steps", 32)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Seven images with tags, in three buckets; one has a caption too."""
    folder = make_images(tmp_path / "images")
    (folder / "0.caption").write_text("a cat\n")
    return folder


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    return make_tiny_sd(tmp_path_factory.mktemp("sd") / "tiny.safetensors")


# ---- merging ----


def test_merge(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "meta.json"
    run_words(merge_captions_to_metadata, images, target, "--debug")
    out = capsys.readouterr()
    assert json.loads(target.read_text()) == {"0": {"caption": "a cat"}}
    assert "0.png: a cat" in out.out and "no 1.caption, 2.caption, 3.caption and 3 more" in out.err
    run_words(merge_dd_tags_to_metadata, images, target)  # begins with what is there
    merged = json.loads(target.read_text())
    assert merged["0"] == {"caption": "a cat", "tags": "a cat, photo of the dog, tag0, dog, cat"} and len(merged) == 7
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"x": {"tags": "kept"}, "0": {"tags": "old", "more": 1}}))
    run_words(merge_dd_tags_to_metadata, images, target, "--in_json", other, "--caption_extension", "caption")
    assert json.loads(target.read_text()) == {"x": {"tags": "kept"}, "0": {"tags": "a cat", "more": 1}}
    before = target.read_bytes()
    run_words(merge_dd_tags_to_metadata, images, target, "--dry_run")
    assert target.read_bytes() == before


def test_merge_with_paths(images: Path, tmp_path: Path) -> None:
    make_images(images / "inner", ((64, 64),))
    target = tmp_path / "meta.json"
    run_words(merge_dd_tags_to_metadata, images, target, "--full_path", "--recursive")
    names = json.loads(target.read_text())
    assert len(names) == 8 and str(images / "inner" / "0.png") in names
    run_words(merge_captions_to_metadata, images, target, "--full_path", "--caption_extention", ".txt")
    assert json.loads(target.read_text())[str(images / "1.png")]["caption"].startswith("a cat")


def test_mistakes_of_merging(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, tool = tmp_path / "meta.json", merge_dd_tags_to_metadata
    assert "needs --full_path" in refused(capsys, tool, images, target, "--recursive")
    assert "no such file" in refused(capsys, tool, images, target, "--in_json", tmp_path / "none.json")
    assert "no image has a .none file" in refused(capsys, tool, images, target, "--caption_extension", ".none")
    Image.new("RGB", (8, 8)).save(images / "0.jpg")
    assert "have the same name in the metadata" in refused(capsys, tool, images, target)
    (images / "0.jpg").unlink()
    (images / "3.txt").write_bytes(b"\xff\xfe")
    assert "3.txt: is not UTF-8" in refused(capsys, tool, images, target)
    assert not target.exists()


# ---- buckets and latents ----


def test_the_whole_way(images: Path, tmp_path: Path, sd: MadeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    """Tag, merge, clean, prepare, train: training encodes nothing, and is fed the tidy tags."""
    for text in images.glob("*.txt"):
        text.unlink()
    wd = write_wd_onnx(tmp_path / "wd")
    run_words(tag_images_by_wd14_tagger, images, "--repo_id", wd, "--remove_underscore", "--thresh", 0.1)
    merged, clean, prepared = (tmp_path / f"{name}.json" for name in ("merged", "clean", "prepared"))
    run_words(merge_dd_tags_to_metadata, images, merged)
    run_words(merge_captions_to_metadata, images, merged)
    run_words(clean_captions_and_tags, merged, clean)
    words = (images, clean, prepared, sd.path, *SMALL, "--batch_size", 2, "--flip_aug", "--device", "cpu")
    run_words(prepare_buckets_latents, *words, "--dry_run")
    assert not prepared.exists() and not list(images.glob("*.npz"))
    capsys.readouterr()
    run_words(prepare_buckets_latents, *words)
    output = capsys.readouterr().err
    assert "bucket 64x64: 3 images" in output and "mean difference of aspect ratios: " in output
    assert "7 images, 7 latents encoded, 0 were there" in output
    content = json.loads(prepared.read_text())
    assert content["0"]["train_resolution"] == [64, 64] and content["2"]["train_resolution"] == [96, 32]
    assert content["0"]["caption"] == "a cat" and "red background" in content["0"]["tags"]
    assert len(list(images.glob("*_sd.npz"))) == 7
    run_words(prepare_buckets_latents, *words, "--skip_existing")
    assert "0 latents encoded, 7 were there" in capsys.readouterr().err

    train_here(
        *("--train_data_dir", images, "--in_json", prepared, "--resolution", 64, "--enable_bucket"),
        *("--min_bucket_reso", 32, "--max_bucket_reso", 128, "--bucket_reso_steps", 32, "--flip_aug"),
        *("--cache_latents", "--cache_latents_to_disk", "--output_dir", tmp_path / "out", "--max_train_steps", 2),
        *("--network_module", "networks.lora", "--network_dim", 2, "--learning_rate", "1e-4"),
        *("--max_data_loader_n_workers", 0, "--console_log_simple"),
        *(word for name, value in sd.flags.items() for word in (f"--{name}", value)),
    )
    assert "latents: 0 encoded, 7 from the cache" in capsys.readouterr().err
    (trained,) = (tmp_path / "out").glob("*.safetensors")
    tags = json.loads(json.loads(json.dumps(_metadata(trained)))["ss_tag_frequency"])
    assert any("red background" in counts for counts in tags.values())


def _metadata(path: Path) -> dict[str, str]:
    from tests.fixtures.runs import metadata_of

    return metadata_of(path)


def test_vae_alone_masks_and_paths(images: Path, tmp_path: Path, sd: MadeCheckpoint) -> None:
    folder = make_tiny_sd(tmp_path / "folder", layout="diffusers").path
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:32, :, 3] = 255
    (images / "inner").mkdir()
    Image.fromarray(pixels).save(images / "inner" / "clear.png")
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text("{}")
    words = (images, source, target, folder / "vae", *SMALL, "--full_path", "--recursive", "--device", "cpu")
    run_words(prepare_buckets_latents, *words, "--alpha_mask", "--mixed_precision", "bf16", "--v2")
    content = json.loads(target.read_text())
    assert len(content) == 8 and content[str(images / "inner" / "clear.png")]["caption"] == ""
    with np.load(next((images / "inner").glob("*.npz"))) as arrays:
        names = set(arrays.files)
        mask = next(arrays[name] for name in names if name.startswith("alpha_mask"))
    assert mask.shape == (64, 64) and (mask[:32] == 1).all() and (mask[32:] == 0).all()
    run_words(prepare_buckets_latents, *words, "--bucket_no_upscale", "--alpha_mask", "false")
    assert read_header(images / "0.png").size == (64, 64)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bucket_reso_steps", 12], "--bucket_reso_steps 12: must be a multiple of 8"),
        (["--max_resolution", "64x64"], "write it as 512,512"),
        (["--min_bucket_reso", 128], "--min_bucket_reso 128: is larger"),
        (["--max_bucket_reso", 32], "--max_bucket_reso 32: is smaller"),
        (["--batch_size", 0], "--batch_size 0"),
        (["--recursive"], "needs --full_path"),
        (["--flux"], "--flux: its latents are not made here"),
        (["--flux", "--sdxl"], "exclude each other"),
    ],
)
def test_mistakes_of_preparing(
    images: Path, tmp_path: Path, sd: MadeCheckpoint, capsys: pytest.CaptureFixture[str], words: list[object], said: str
) -> None:
    source = tmp_path / "in.json"
    source.write_text("{}")
    error = refused(capsys, prepare_buckets_latents, images, source, tmp_path / "out.json", sd.path, *SMALL, *words)
    assert said in error and not (tmp_path / "out.json").exists() and not list(images.glob("*.npz"))


def test_files_that_are_missing(
    images: Path, tmp_path: Path, sd: MadeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    assert "in_json" in refused(capsys, prepare_buckets_latents, images, source, target, sd.path, *SMALL)
    source.write_text("{}")
    (images / "torn.png").write_bytes(b"\x89PNG")
    error = refused(capsys, prepare_buckets_latents, images, source, target, sd.path, *SMALL)
    assert "torn.png" in error
    words = (images, source, target, sd.path, *SMALL, "--on_bad_image", "skip", "--device", "cpu")
    run_words(prepare_buckets_latents, *words)
    assert len(json.loads(target.read_text())) == 7
    error = refused(capsys, prepare_buckets_latents, images, source, target, tmp_path / "none.safetensors", *SMALL)
    assert "model_name_or_path" in error and "none.safetensors" in error
