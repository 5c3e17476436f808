"""Every published flag of the scripts of ``finetune/``: command lines that together have them all, on tiny models."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.file_tools import published_options
from tests.fixtures.runs import make_images, run_script
from tests.fixtures.tiny_captioners import write_mapping_onnx, write_tiny_blip, write_tiny_git, write_wd_onnx
from tests.fixtures.tiny_sd import make_tiny_sd

IMAGES = ((64, 64), (96, 40), (40, 96))
#: script -> command lines; {images} and the like are paths, and every published flag is in one of them
LINES: dict[str, list[str]] = {
    "make_captions": [
        "{images} --caption_weights {blip} --beam_search --num_beams 2 --max_length 12 --min_length 6 --batch_size 2 "
        "--max_data_loader_n_workers 0 --caption_extention .blip --debug --recursive",
        "{images} --caption_weights {blip} --top_p 0.5 --seed 7 --max_length 9 --caption_extension .caption",
    ],
    "make_captions_by_git": [
        "{images} --model_id {git} --caption_extension .git --batch_size 2 --max_data_loader_n_workers 1 "
        "--max_length 12 --remove_words --debug --recursive",
    ],
    "tag_images_by_wd14_tagger": [
        "{images} --repo_id {wd} --model_dir {models} --onnx --force_download --batch_size 2 --recursive --debug "
        "--max_data_loader_n_workers 2 --caption_extention .tags --thresh 0.2 --general_threshold 0.1 "
        "--character_threshold 0.1 --remove_underscore --undesired_tags 1girl --append_tags --frequency_tags "
        "--use_rating_tags --character_tags_first --always_first_tags sky --caption_separator ; "
        "--tag_replacement red_background,red --character_tag_expand",
        "{images} --repo_id {mapping} --onnx --caption_extension .txt --meta_threshold 0.1 --model_threshold 1 "
        "--copyright_threshold 0.1 --artist_threshold 0.1 --use_rating_tags_as_last_tag --use_quality_tags_as_last_tag",
        "{images} --repo_id {mapping} --onnx --output_path {out}/tags.json --use_quality_tags",
    ],
    "merge_dd_tags_to_metadata": [
        "{images} {out}/tags_alone.json --caption_extension .tags --full_path --recursive",
        "{images} {out}/tagged.json --in_json {out}/tags_alone.json --caption_extension .txt --full_path --recursive "
        "--debug",
    ],
    "merge_captions_to_metadata": [
        "{images} {out}/merged.json --in_json {out}/tagged.json --caption_extention .caption --full_path --recursive",
        "{images} {out}/merged.json --caption_extension .caption --full_path --debug",
    ],
    "clean_captions_and_tags": ["{out}/merged.json {out}/clean.json --debug"],
    "prepare_buckets_latents": [
        "{images} {out}/clean.json {out}/prepared.json {sd} --v2 --batch_size 2 --max_data_loader_n_workers 2 "
        "--max_resolution 64,64 --min_bucket_reso 32 --max_bucket_reso 128 --bucket_reso_steps 32 --mixed_precision bf16 "
        "--full_path --flip_aug --alpha_mask true --recursive --bucket_no_upscale",
        "{images} {out}/clean.json {out}/prepared.json {sd} --max_resolution 64,64 --min_bucket_reso 32 "
        "--max_bucket_reso 128 --bucket_reso_steps 32 --full_path --flip_aug --skip_existing --recursive",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    images = make_images(folder / "images", IMAGES)
    make_images(images / "inner", IMAGES[:1])
    makers: dict[str, Callable[[Path], Path]] = {
        "blip": write_tiny_blip, "git": write_tiny_git, "wd": write_wd_onnx,
        "mapping": lambda place: write_mapping_onnx(place, [float(number) for number in range(-3, 8)]),
    }  # fmt: skip
    made = {name: make(folder / name) for name, make in makers.items()}
    (folder / "out").mkdir()
    sd = make_tiny_sd(folder / "sd" / "tiny.safetensors").path
    return {"images": images, "out": folder / "out", "models": folder / "models", "sd": sd, **made}


@pytest.mark.parametrize("script", LINES)
def test_the_lines_have_every_published_flag(script: str) -> None:
    parser = importlib.import_module(f"finetune.{script}").setup_parser()
    used = {word for line in LINES[script] for word in line.split() if word.startswith("--")}
    flags = [action.option_strings for action in parser._actions if action.option_strings]
    for option in published_options(f"finetune/{script}.py"):
        if option.get("flags"):
            assert used & set(option["flags"]), option
            assert any(set(option["flags"]) <= set(names) for names in flags), option


def test_they_work_one_after_the_other(places: dict[str, Path]) -> None:
    """Through the real scripts, from captions to latents that training finds."""
    said: dict[str, str] = {}
    for script, lines in LINES.items():
        for line in lines:
            words = [word.format(**places) for word in line.split()]
            done = run_script(f"finetune/{script}.py", *words)
            assert done.code == 0, f"{script}: {done.text}"
            said[script] = said.get(script, "") + done.text
    images, out = places["images"], places["out"]
    for ending in (".blip", ".git", ".tags"):
        assert len(list(images.rglob(f"*{ending}"))) == 4, ending
    assert len(list(images.glob("*.caption"))) == 3
    assert "Tag frequencies:" in said["tag_images_by_wd14_tagger"]
    tags = (images / "0.tags").read_text(encoding="utf-8")
    assert ";" in tags and "1girl" not in tags
    assert len(json.loads((out / "tags.json").read_text(encoding="utf-8"))) == 3
    prepared = json.loads((out / "prepared.json").read_text(encoding="utf-8"))
    assert len(prepared) == 4 and all("train_resolution" in entry for entry in prepared.values())
    assert all(entry["tags"] for name, entry in prepared.items() if "inner" not in name)
    assert len(list(images.rglob("*_sd.npz"))) == 4
    assert "0 latents encoded, 4 were there" in said["prepare_buckets_latents"]
