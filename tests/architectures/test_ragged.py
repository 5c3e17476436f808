"""Captions of different lengths: cut, padded, packed, and cached without padding."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from library.architectures.conditioning import Conditioning
from library.architectures.formats import TextFormat
from library.architectures.ragged import PackedRows, joined, padded, trimmed
from library.data.text_cache import MemoryTexts, stack_rows
from library.data.text_cache_format import TextSettings, TextStamp, read_row, write_texts
from library.errors import UserError

MASKS = {"states": "mask", "mask": "mask"}


def row(length: int, *, padding: int = 0) -> dict[str, torch.Tensor]:
    states = torch.arange(1.0, 1 + 2 * length).view(length, 2)
    return {
        "states": padded(states, length + padding),
        "mask": padded(torch.ones(length, dtype=torch.int64), length + padding),
        "pooled": torch.full((3,), float(length)),
    }


def test_padding_is_cut_off_and_added_again() -> None:
    for found in (trimmed(row(2, padding=3), MASKS), trimmed(row(2), MASKS)):
        assert all(torch.equal(found[name], value) for name, value in row(2).items())
    empty = trimmed(row(0, padding=2), MASKS)
    assert empty["states"].shape == (0, 2) and empty["pooled"].shape == (3,)
    with_batch = {name: value[None] for name, value in row(2, padding=1).items()}
    assert trimmed(with_batch, MASKS, axis=1)["states"].shape == (1, 2, 2)
    both = joined([row(1)["states"][None], row(3)["states"][None]])
    assert both.shape == (2, 3, 2) and not both[0, 1:].any() and torch.equal(both[1], row(3)["states"])


def test_conditioning_of_different_lengths_is_concatenated() -> None:
    parts = [Conditioning({name: value[None] for name, value in row(n).items()}) for n in (2, 0, 1)]
    found = Conditioning.cat(parts)
    assert found["mask"].tolist() == [[1, 1], [0, 0], [1, 0]] and found["pooled"].shape == (3, 3)


def test_rows_are_packed_into_one_tensor_that_workers_share() -> None:
    packed = PackedRows(3)
    for place, length in ((2, 1), (0, 4), (1, 0)):
        packed.put(place, row(length)["states"])
    packed.pack()
    for other in (packed, pickle.loads(pickle.dumps(packed))):
        assert [len(other.get(place)) for place in range(3)] == [4, 0, 1]
        assert torch.equal(other.get(0), row(4)["states"])


def test_a_memory_cache_holds_no_padding() -> None:
    texts = MemoryTexts(["a", "b"], MASKS)
    texts.put("b", row(1, padding=5))
    texts.put("a", row(3, padding=3))
    texts.complete()
    rows = [texts.get(Path("x.png"), caption, 0) for caption in "ab"]
    assert [len(one["states"]) for one in rows] == [3, 1]
    stacked = stack_rows(rows, [Path("a"), Path("b")], texts.ragged)
    assert stacked["mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    with pytest.raises(UserError, match="different sizes"):
        stack_rows(rows, [Path("a"), Path("b")])


def test_files_hold_published_lengths_and_rows_do_not(tmp_path: Path) -> None:
    format = TextFormat(
        "_x.npz", {"states": ("T", "D"), "mask": ("T",)}, ragged=MASKS, stored_lengths={"states": 8, "mask": 8}
    )

    class Identity:
        files = weights = "x"

    settings = TextSettings(Identity(), torch.float32, None, None, False)  # type: ignore[arg-type]
    write_texts(tmp_path / "x.npz", [row(2)], TextStamp.of(["a"], settings), format)
    import numpy as np

    assert np.load(tmp_path / "x.npz")["states"].shape == (8, 2)
    found = read_row(tmp_path / "x.npz", "a", 0, format, trust=False)
    assert found is not None and torch.equal(found["states"], row(2)["states"])
