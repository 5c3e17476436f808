"""The metadata of a trained file against the published table of keys, value types and conditions."""

from __future__ import annotations

import ast
import json
import re
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from safetensors.torch import load_file

from library.files.hashes import sshs_hashes
from tests.fixtures.families import Tiny
from tests.fixtures.runs import ROOT, make_images, metadata_of, write_dataset

pytestmark = pytest.mark.usefixtures("own_root_logger")

TABLE = json.loads((ROOT / "tests" / "compat" / "data" / "metadata_keys.json").read_text())


def _is_literal(*kinds: type) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        value = ast.literal_eval(text)
        return type(value) in kinds

    return check


def _is_json(*kinds: type) -> Callable[[str], bool]:
    return lambda text: isinstance(json.loads(text), kinds)


def _matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


NONE = type(None)
#: published value type -> whether a text is one
TYPES: dict[str, Callable[[str], bool]] = {
    "int": _is_literal(int),
    "int|None": _is_literal(int, NONE),
    "int|float": _is_literal(int, float),
    "float": _is_literal(float),
    "float|None": _is_literal(float, NONE),
    "float|list[float]|None": _is_literal(float, list, NONE),
    "float unix time": lambda text: abs(float(text) - time.time()) < 3600,
    "bool": _is_literal(bool),
    "str": lambda text: text != "" and text != "None",
    "str|None": lambda text: text != "",
    "tuple[float,float]|None": _is_literal(tuple, NONE),
    "tuple[int,int]|None": _is_literal(tuple, NONE),
    "json list": _is_json(list),
    "json object": _is_json(dict),
    "json object|null": _is_json(dict, NONE),
    "hex8": _matches("[0-9a-f]{8}"),
    "hex64": _matches("[0-9a-f]{64}"),
    "str WxH": _matches(r"\d+x\d+"),
    "str a,b": _matches(r"\d+,\d+"),
    "data URL": _matches(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+"),
    "ISO-8601 seconds, local time, no zone": lambda text: (
        datetime.fromisoformat(text).tzinfo is None and len(text) == 19
    ),
}

ALWAYS = {"always", "each save", "not for flux/chroma"}


def expected_keys(tiny: Tiny, *conditions: str) -> set[str]:
    table = TABLE["keys"][tiny.family.metadata_table]
    keys = {key for key, _, when in table if when in ALWAYS or when in conditions}
    return keys - tiny.family.metadata_absent


def assert_types(tiny: Tiny, entries: dict[str, str]) -> None:
    types = {key: kind for key, kind, _ in TABLE["keys"][tiny.family.metadata_table]}
    wrong = {key: text for key, text in entries.items() if not TYPES[types[key]](text)}
    assert not wrong


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    """The file of a run with a dataset file and no more options than needed."""
    folder = tmp_path_factory.mktemp("plain")
    dataset = write_dataset(folder / "data.toml", make_images(folder / "images"))
    tiny.train(dataset, folder / "out")
    return folder / "out" / "tiny.safetensors"


@pytest.mark.every_family
def test_keys_and_types_of_a_plain_run(tiny: Tiny, plain: Path) -> None:
    entries = metadata_of(plain)
    local_model = ["when local path exists", "with --dataset_config"]
    if "vae" in tiny.model.flags:
        local_model += ["when --vae given", "when --vae local"]
    assert set(entries) == expected_keys(tiny, *local_model) | {"ss_sd_model_name"}
    assert_types(tiny, entries)
    assert not set(TABLE["never"]) & set(entries)
    assert entries.items() >= tiny.family.metadata.items()


@pytest.mark.every_family
def test_the_model_hashes_are_those_of_the_file(plain: Path) -> None:
    entries = metadata_of(plain)
    recorded = {name: text for name, text in entries.items() if name.startswith("ss_")}
    strict, legacy = sshs_hashes(load_file(plain), recorded)
    assert (entries["sshs_model_hash"], entries["sshs_legacy_hash"]) == (strict, legacy)


@pytest.mark.every_family
def test_keys_and_types_with_everything_given(tmp_path: Path, tiny: Tiny) -> None:
    """The old folder form, a VAE, network arguments and every option of the model specification."""
    make_images(tmp_path / "train" / "2_cat dog")
    thumbnail = tmp_path / "train" / "2_cat dog" / "0.png"
    for ending in (".png", ".txt"):  # the first has a face of 20x16 pixels in its middle
        thumbnail.with_suffix(ending).rename(thumbnail.with_name(f"face_32_32_20_16{ending}"))
    thumbnail = thumbnail.with_name("1.png")
    given = ["description", "author", "license", "tags", "usage_hint", "merged_from", "trigger_phrase", "preprocessor"]
    tiny.train(
        None,
        tmp_path / "out",
        dataset_config=None,
        train_data_dir=tmp_path / "train",
        resolution=64,
        caption_extension=".txt",
        vae=tiny.model.flags[tiny.family.vae[0]],
        network_args=tiny.family.network_args,
        face_crop_aug_range="2.0,4",
        color_aug=True,
        clip_skip=2,
        min_timestep=10,
        max_timestep=900,
        metadata_thumbnail=thumbnail,
        metadata_is_negative_embedding="false",
        **{f"metadata_{name}": f"the {name}" for name in given},
    )
    entries = metadata_of(tmp_path / "out" / "tiny.safetensors")
    conditions = {when for _, _, when in TABLE["keys"]["sd"]} - {"with --dataset_config"}
    assert set(entries) == expected_keys(tiny, *conditions)
    assert (entries["ss_face_crop_aug_range"], entries["ss_color_aug"]) == ("(2.0, 4.0)", "True")
    assert_types(tiny, entries)


@pytest.mark.every_family
def test_no_metadata_keeps_what_loaders_need(tmp_path: Path, tiny: Tiny) -> None:
    dataset = write_dataset(tmp_path / "data.toml", make_images(tmp_path / "images"))
    tiny.train(
        dataset,
        tmp_path / "out",
        no_metadata=True,
        network_args=tiny.family.network_args,
    )
    kept = {key for key in metadata_of(tmp_path / "out" / "tiny.safetensors") if key.startswith("ss_")}
    expected = {key for key in TABLE["no_metadata_keeps"] if key.startswith("ss_")}
    assert kept == expected - tiny.family.metadata_absent
