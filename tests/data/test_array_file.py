"""npz files are read as numpy reads them, and every damage is found."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from library.data.array_file import open_arrays

ARRAYS = {
    "latents_4x6": np.random.default_rng(0).normal(size=(4, 4, 6)).astype(np.float32),
    "turned": np.asfortranarray(np.arange(12, dtype=np.int64).reshape(3, 4)),
    "half": np.ones((2, 2), dtype=np.float16),
    "big_endian": np.arange(3, dtype=">i4"),
    "stamp": np.array('{"image": "größe"}'),
    "number": np.array(5),
    "empty": np.zeros((0, 4), dtype=np.float32),
}


def read(path: Path) -> dict[str, np.ndarray]:
    with open_arrays(path) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes(tmp_path: Path, save: object) -> None:
    path = tmp_path / "a.npz"
    save(path, **ARRAYS)  # type: ignore[operator]
    found = read(path)
    assert list(found) == list(ARRAYS)
    for name, values in ARRAYS.items():
        assert found[name].dtype == values.dtype and found[name].shape == values.shape
        assert np.array_equal(found[name], values)
    assert found["latents_4x6"].flags.writeable  # torch warns of memory that is not
    found["latents_4x6"][:] = 0  # and it belongs to nobody else
    assert np.array_equal(read(path)["latents_4x6"], ARRAYS["latents_4x6"])


def test_what_other_programs_write(tmp_path: Path) -> None:
    """A member that is no array, a header of version 2, names and extra fields of other lengths."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "latents")
        content = io.BytesIO()
        np.lib.format.write_array(content, ARRAYS["latents_4x6"], version=(2, 0))
        info = zipfile.ZipInfo("latents.npy")
        info.extra = b"\x01\x99\x04\x00abcd"
        archive.writestr(info, content.getvalue())
    found = read(path)
    assert list(found) == ["latents"]
    assert np.array_equal(found["latents"], ARRAYS["latents_4x6"])


def test_python_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", latents=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"a.npz: damaged \(.*[oO]bject"):
        read(tmp_path / "a.npz")


def test_a_missing_file_is_no_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "a.npz")


def test_no_damage_changes_an_array_unseen(tmp_path: Path) -> None:
    """Each byte turned over in its turn, and the file cut at each length: an error, or what was written."""
    path = tmp_path / "a.npz"
    arrays = {"latents": ARRAYS["half"], "stamp": np.array("x")}
    np.savez(path, **arrays)
    whole = path.read_bytes()
    damaged = [whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :] for place in range(len(whole))]
    errors = 0
    for content in [*damaged, *(whole[:length] for length in range(len(whole)))]:
        path.write_bytes(content)
        try:
            found = read(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: damaged (")
            errors += 1
        else:
            assert all(np.array_equal(found[name], arrays[name]) for name in found if name in arrays)
    assert errors > 1.5 * len(whole)
