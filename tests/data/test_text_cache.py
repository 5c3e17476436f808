"""Caches of encoded captions: what they are made from is known, and nothing outdated or damaged is trained on."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from library.errors import UserError
from tests.data.damage import cut, empty, flip_a_bit, foreign_stamp, not_a_zip, rewrite
from tests.data.samples import SIZES
from tests.data.text_samples import Encoders, Make, fill, options_for, outputs_of, same, uses

pytestmark = pytest.mark.usefixtures("peers_without_accelerate")


# ---- what is encoded, and where it lies ----


def test_layout(make_data: Make, folder: Path) -> None:
    assert fill(make_data()) == len(SIZES)
    assert not list(folder.glob(".*"))
    assert {p.name for p in folder.glob("*.npz")} == {f"{Path(name).stem}_x_te.npz" for name in SIZES}
    with zipfile.ZipFile(folder / "a_x_te.npz") as file:
        assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
    with np.load(folder / "a_x_te.npz", allow_pickle=False) as file:
        found = {name: (file[name].shape, str(file[name].dtype)) for name in file.files if name != "stamp"}
    assert found == {
        "context": ((6, 6), "float32"),
        "pooled": ((6,), "float32"),
        "mask": ((6,), "int64"),
        "has_text": ((), "bool"),
    }


def test_the_final_caption_is_encoded(make_data: Make, folder: Path) -> None:
    """Prefix, suffix and separators are in it: an earlier program encoded what stands in the file."""
    (folder / "a.txt").write_text("red;;;blue, ||| cat", encoding="utf-8")
    subset = (
        "caption_prefix = 'photo of'\ncaption_suffix = 'outside'\nsecondary_separator = ';;;'\n"
        "keep_tokens_separator = '|||'"
    )
    for to_disk in (True, False):
        data = make_data(subset=subset)
        fill(data, **options_for(to_disk))
        (found,) = [(caption, row) for name, caption, row in uses(data) if name == "a.png"]
        assert found[0] == "photo of red,blue, cat outside"
        assert same(found[1], outputs_of(found[0]))


@pytest.mark.parametrize("to_disk", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_every_use_gets_its_caption(make_data: Make, to_disk: bool, workers: int) -> None:
    data = make_data(subset="num_repeats = 2")
    fill(data, **options_for(to_disk))
    found = uses(data, workers=workers)
    assert len(found) == 2 * len(SIZES)
    assert all(same(row, outputs_of(caption)) and caption.endswith(name[0]) for name, caption, row in found)


@pytest.mark.parametrize(("given", "calls"), [(None, [7]), (2, [2, 2, 2, 1]), (1, [1] * 7)])
def test_batches(make_data: Make, given: int | None, calls: list[int]) -> None:
    for to_disk in (True, False):
        encoders = Encoders()
        fill(make_data(), encoders, text_encoder_batch_size=given, **options_for(to_disk))
        assert encoders.encoded == calls


@pytest.mark.parametrize("to_disk", [True, False])
def test_equal_captions_are_encoded_once(make_data: Make, folder: Path, to_disk: bool) -> None:
    for name in ("a", "c", "g"):
        (folder / f"{name}.txt").write_text("cat", encoding="utf-8")
    data = make_data()
    assert fill(data, **options_for(to_disk), text_encoder_batch_size=2) == len(SIZES) - 2
    assert all(same(row, outputs_of(caption)) for _, caption, row in uses(data))


@pytest.mark.parametrize(("dtype", "stored"), [(torch.bfloat16, "float32"), (torch.float16, "float16")])
def test_precision(make_data: Make, folder: Path, dtype: torch.dtype, stored: str) -> None:
    """numpy has no bfloat16, so it is stored as float32, as published; training gets what it uses."""
    for to_disk in (True, False):
        data = make_data()
        fill(data, dtype=dtype, **options_for(to_disk))
        for _, caption, row in uses(data):
            assert row["context"].dtype == dtype and row["mask"].dtype == torch.int64
            assert torch.equal(row["context"], outputs_of(caption)["context"].to(dtype))
    with np.load(folder / "a_x_te.npz") as file:
        assert file["context"].dtype == stored and file["mask"].dtype == "int64"


def test_one_file_serves_several_subsets(make_data: Make, folder: Path) -> None:
    """The captions of one image differ in two datasets: both are in its file."""
    more = f"[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = '{folder}'\ncaption_prefix = 'small'"
    data = make_data(more=more)
    assert fill(data) == 2 * len(SIZES)
    found = uses(data)
    assert {caption.startswith("small") for _, caption, _ in found} == {True, False}
    assert all(same(row, outputs_of(caption)) for _, caption, row in found)
    assert fill(make_data(more=more)) == 0
    assert fill(make_data()) == 0  # a file may hold more than a run needs


def test_outputs_that_are_not_finite_end_the_run(make_data: Make, folder: Path) -> None:
    with pytest.raises(UserError, match="caption 'cat, dog, .*not finite"):
        fill(make_data(), Encoders(overflow=True))
    assert not list(folder.glob("*_te.npz"))


# ---- what they were made from ----


def test_a_full_cache_loads_no_encoder(make_data: Make) -> None:
    fill(make_data())
    encoders = Encoders()
    assert fill(make_data(), encoders) == 0
    assert encoders.loaded == encoders.read == 0


def test_encoders_are_let_go(make_data: Make) -> None:
    import gc
    import weakref

    class Module:
        pass

    module = Module()
    reference = weakref.ref(module)
    encoders = Encoders()
    held = [module]
    encoders.load_text_encoders = lambda checkpoint, dtype, device: [held.pop()]
    del module
    fill(make_data(), encoders)
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize(
    ("change", "encoded"),
    [
        ({}, 0),
        ({"clip_skip": 2}, 7),
        ({"max_token_length": 150}, 7),
        ({"weighted_captions": True}, 7),
        ({"dtype": torch.bfloat16}, 7),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_settings(make_data: Make, caplog: pytest.LogCaptureFixture, change: dict[str, Any], encoded: int) -> None:
    fill(make_data())
    data = make_data()
    with caplog.at_level(logging.WARNING):
        assert fill(data, **change) == encoded
    # one line, however many files
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == bool(encoded)
    assert fill(make_data(), **change) == 0
    if encoded and "dtype" not in change and "clip_skip" not in change:
        settings = {"max_token_length": change.get("max_token_length"), "weighted": "weighted_captions" in change}
        assert all(same(row, outputs_of(caption, **settings)) for _, caption, row in uses(data))


@pytest.mark.parametrize(
    ("encoders", "encoded", "read"),
    [
        (Encoders(), 0, 0),
        (Encoders(files="copied"), 0, 1),  # the same weights elsewhere: read once, for all files
        (Encoders(files="edited", weights="other weights"), 7, 1),
    ],
    ids=["same", "copied", "edited"],
)
def test_another_encoder(make_data: Make, encoders: Encoders, encoded: int, read: int) -> None:
    fill(make_data())
    encoders = Encoders(encoders.files, encoders.weights)
    assert fill(make_data(), encoders) == encoded
    assert encoders.read == read


@pytest.mark.parametrize(
    ("subset", "encoded"),
    [
        ("caption_prefix = 'a'", 7),
        ("caption_suffix = 'a'", 7),
        ("secondary_separator = ', '", 7),  # "cat, dog" -> "cat,dog"
        ("caption_separator = ';'", 0),  # what changes no caption changes nothing
        ("keep_tokens = 2", 0),
        ("caption_dropout_rate = 0.5", 1),  # the empty one
    ],
)
def test_rules_of_captions(make_data: Make, subset: str, encoded: int) -> None:
    fill(make_data())
    assert fill(make_data(subset=subset)) == encoded
    assert fill(make_data(subset=subset)) == 0


def test_an_edited_caption(make_data: Make, folder: Path) -> None:
    fill(make_data())
    (folder / "a.txt").write_text("another caption", encoding="utf-8")
    data = make_data()
    assert fill(data) == 1
    (row,) = [row for _, caption, row in uses(data) if caption == "another caption"]
    assert same(row, outputs_of("another caption"))


def lacks_an_array(path: Path) -> None:
    rewrite(path, pooled=None)


def lacks_an_axis(path: Path) -> None:
    rewrite(path, context=np.zeros(6, np.float32))


def not_finite(path: Path) -> None:
    rewrite(path, context=np.full((6, 6), np.nan, np.float32))


def no_stamp(path: Path) -> None:
    rewrite(path, stamp=None)


@pytest.mark.parametrize(
    "damage",
    [cut, flip_a_bit, not_a_zip, empty, lacks_an_array, lacks_an_axis, not_finite, foreign_stamp, no_stamp],
)
def test_damaged_and_unknown_files_are_made_again(
    make_data: Make, folder: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    fill(make_data())
    path = folder / "a_x_te.npz"
    good = path.read_bytes()
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert fill(make_data()) == 1
    assert path.name in caplog.text
    with np.load(path) as new:
        assert np.isfinite(new["context"]).all()
    assert len(path.read_bytes()) == len(good)
    assert fill(make_data()) == 0


def test_files_from_before_captions_were_cleaned(
    make_data: Make, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are made again where cleaning changes a caption, and serve where it does not."""
    (folder / "b.txt").write_text("it’s b", encoding="utf-8")
    fill(make_data())
    for name in ("a", "b"):
        path = folder / f"{name}_x_te.npz"
        with np.load(path) as file:
            stamp = json.loads(str(file["stamp"]))
        assert stamp.pop("cleaned") is True
        rewrite(path, stamp=np.array(json.dumps(stamp)))
    with caplog.at_level(logging.WARNING):
        assert fill(make_data()) == 1
    assert "before captions were cleaned as CLIP does" in caplog.text and "b_x_te.npz" in caplog.text
    assert fill(make_data()) == 0


def test_skip_check_takes_what_is_there(make_data: Make, folder: Path) -> None:
    """So an earlier program's files can be used, which do not tell their captions."""
    fill(make_data())
    mine = np.full((6, 6), 0.5, np.float32)
    rewrite(folder / "a_x_te.npz", context=mine, stamp=None)
    (folder / "b.txt").write_text("edited", encoding="utf-8")
    trusting = {"skip_cache_check": True, "clip_skip": 2}
    data = make_data()
    assert fill(data, **trusting) == 0
    found = {name: (caption, row) for name, caption, row in uses(data)}
    assert np.array_equal(found["a.png"][1]["context"].numpy(), mine)
    assert same(found["b.png"][1], outputs_of("cat, dog, b"))

    rewrite(folder / "a_x_te.npz", context=np.zeros((3, 6), np.float32))
    data = make_data()
    assert fill(data, **trusting) == 0
    with pytest.raises(UserError, match="a.png.*different sizes"):
        uses(data)
    not_a_zip(folder / "a_x_te.npz")
    data = make_data()
    assert fill(data, **trusting) == 0
    with pytest.raises(UserError, match="a_x_te.npz: damaged"):
        uses(data)
    (folder / "a_x_te.npz").unlink()
    assert fill(make_data(), **trusting) == 1


def test_a_file_that_vanishes_is_named(make_data: Make, folder: Path) -> None:
    data = make_data()
    fill(data)
    (folder / "a_x_te.npz").unlink()
    with pytest.raises(UserError, match="a_x_te.npz: has no output for the caption 'cat, dog, a'"):
        uses(data)


def test_a_kill_while_writing_leaves_the_old_file(make_data: Make, folder: Path) -> None:
    fill(make_data())
    path = folder / "a_x_te.npz"
    before = path.read_bytes()
    program = f"""
import os, signal, sys
from pathlib import Path
import numpy as np, torch
from library.data.text_cache_format import TextStamp, write_texts
from tests.data.text_samples import Encoders

def killed(file, **arrays):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

np.savez = killed
stamp = TextStamp(("cat",), "f", "w", "float32", None, None, False)
write_texts(Path({str(path)!r}), [{{n: torch.zeros(6) for n in Encoders.text.arrays}}], stamp, Encoders.text)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == before
    assert list(folder.glob(".a_x_te.npz*.tmp"))  # it was in the middle
    (folder / "a.txt").write_text("edited", encoding="utf-8")
    assert fill(make_data()) == 1
