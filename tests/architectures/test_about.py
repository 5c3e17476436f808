"""Messages about a file of another family name scripts that exist and fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from library.architectures.registry import FOLDERS, about
from library.inference.messages import for_images

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_remedy_names_all_scripts_that_train_the_family(folder: str) -> None:
    own = f"from library.architectures.{folder}."
    scripts = {path.name for path in ROOT.glob("*train*.py") if own in path.read_text("utf-8")}
    scripts |= {path.name for path in ROOT.glob("fine_tune.py") if own in path.read_text("utf-8")}
    assert set(re.findall(r"\w+\.py", about(folder).training)) == scripts
    recognised = [sign.found for sign in about(folder).signs] + [found for _, found in about(folder).pipelines]
    assert {one.remedy for one in recognised if one.family} == {about(folder).training}


@pytest.mark.parametrize("folder", FOLDERS)
def test_programs_that_generate_images_name_each_other(folder: str) -> None:
    text = for_images(f"--pretrained_model_name_or_path a.safetensors is a model; {about(folder).training}", "--ckpt")
    assert text == f"--ckpt a.safetensors is a model; {about(folder).images}"
    assert (ROOT / about(folder).images.split()[1]).is_file()
