"""Filling the latent cache: reading ahead, writing behind, several processes, and ends before the end."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from library.data import latent_encoding
from library.data.cache_format import Stamp, cache_path, read_cache, write_cache
from library.data.dataset import TrainingData
from library.data.latent_cache import Peers
from library.errors import UserError
from tests.data.damage import not_a_zip, rewrite
from tests.data.samples import SD, SIZES, Encoder, draw
from tests.data.test_latent_cache import fill, latents_of

Make = Callable[..., TrainingData]


class Processes:
    """Threads that stand for processes: each fills the cache of its own data, and they gather by a barrier."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._barrier = threading.Barrier(count, timeout=30)
        self._items: list[list[Any]] = [[] for _ in range(count)]

    def peers(self, rank: int) -> Peers:
        def gather(items: list[Any]) -> list[Any]:
            self._items[rank] = items
            self._barrier.wait()
            found = [item for items in self._items for item in items]
            self._barrier.wait()
            return found

        return Peers(rank, self._count, gather)

    def run(self, one: Callable[[int, Peers], Any]) -> list[Any]:
        """Return the result of each, or the exception that ended it."""
        results: list[Any] = [None] * self._count

        def work(rank: int) -> None:
            try:
                results[rank] = one(rank, self.peers(rank))
            except BaseException as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self._count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@dataclass
class Filled:
    made: int  # by all, as this process knows it
    encoded: int  # by this one


def fill_as(make_data: Make, rank: int, peers: Peers, **settings: Any) -> Filled:
    encoder = Encoder()
    data = settings.pop("data", None) or make_data()
    arguments = {"batch_size": 2, "to_disk": True, "vae_identity": "vae", **settings}
    return Filled(data.cache_latents(lambda: encoder, peers=peers, **arguments), encoder.encoded)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_files(make_data: Make, folder: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    written: list[Path] = []

    def write(path: Path, *rest: Any) -> None:
        written.append(path)
        write_cache(path, *rest)

    monkeypatch.setattr(latent_encoding, "write_cache", write)
    datas = [make_data() for _ in range(count)]
    done = Processes(count).run(lambda rank, peers: fill_as(make_data, rank, peers, data=datas[rank]))
    assert [d.made for d in done] == [len(SIZES)] * count
    assert sum(d.encoded for d in done) == len(SIZES) and min(d.encoded for d in done) >= len(SIZES) // count
    assert len(written) == len(set(written)) == len(SIZES)
    by_many = {path.name: latents_of(folder, path.name) for path in written}
    for path in written:
        path.unlink()
    assert fill(make_data()) == len(SIZES)
    assert all(np.array_equal(latents_of(folder, name), values) for name, values in by_many.items())


def test_what_is_missing_is_shared_evenly(make_data: Make, folder: Path) -> None:
    """Whoever checked it: of two outdated files that fall to one process, each makes one."""
    draw(folder, {f"{i}.png": (64, 64) for i in range(8)})
    fill(make_data())
    for name in ("0", "2", "4", "6"):
        (folder / f"{name}_0064x0064_sd.npz").unlink()
    datas = [make_data() for _ in range(2)]
    done = Processes(2).run(lambda rank, peers: fill_as(make_data, rank, peers, data=datas[rank]))
    assert [(d.made, d.encoded) for d in done] == [(4, 2), (4, 2)]


def test_sizes_of_one_file_stay_with_one_process(make_data: Make, folder: Path) -> None:
    flux = replace(SD, cache_suffix="_flux.npz", multi_resolution=True)
    more = f"[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = '{folder}'"
    datas = [make_data(more=more, latent=flux) for _ in range(2)]
    total = datas[0].image_count()
    assert total > len(SIZES)
    done = Processes(2).run(lambda rank, peers: fill_as(make_data, rank, peers, data=datas[rank], batch_size=1))
    assert [d.made for d in done] == [total] * 2
    assert fill(make_data(more=more, latent=flux)) == 0


def test_an_error_of_one_process_ends_all(make_data: Make, folder: Path) -> None:
    datas = [make_data() for _ in range(2)]
    content = (folder / "c.png").read_bytes()
    (folder / "c.png").write_bytes(content[: len(content) // 2])
    done = Processes(2).run(lambda rank, peers: fill_as(make_data, rank, peers, data=datas[rank]))
    named = [d for d in done if isinstance(d, UserError)]
    others = [d for d in done if isinstance(d, SystemExit)]
    assert len(named) == 1 and "c.png" in str(named[0])
    assert [d.code for d in others] == [2]


def test_a_run_that_is_stopped_keeps_what_it_has(make_data: Make, folder: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert total == len(SIZES)
        if done == 3:
            raise SystemExit(130)

    with pytest.raises(SystemExit):
        make_data().cache_latents(Encoder, batch_size=1, to_disk=True, vae_identity="vae", report=stop)
    assert not list(folder.glob(".*"))
    kept = len(list(folder.glob("*.npz")))
    assert kept >= 3
    assert fill(make_data()) == len(SIZES) - kept


# ---- the pipeline ----


def test_the_next_batch_is_started_before_the_last_is_fetched(make_data: Make) -> None:
    events: list[str] = []

    class Watched(Encoder):
        def __call__(self, pixels: Tensor, generators: Any) -> Tensor:
            events.append("start")
            return super().__call__(pixels, generators)

    data = make_data()
    data.cache_latents(
        Watched, batch_size=1, to_disk=True, vae_identity="vae", report=lambda done, total: events.append("done")
    )
    assert events[:4] == ["start", "start", "done", "start"]
    assert events.count("start") == events.count("done") == len(SIZES)


def test_reading_ahead_is_bounded(make_data: Make, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(folder, {f"{i}.png": (64, 64) for i in range(40)})
    read: list[str] = []
    prepare = latent_encoding._prepare

    def counted(wanted: Any, identity: str | None) -> Any:
        read.append(wanted.path.name)
        return prepare(wanted, identity)

    monkeypatch.setattr(latent_encoding, "_prepare", counted)
    at_first: list[int] = []

    class Slow(Encoder):
        def __call__(self, pixels: Tensor, generators: Any) -> Tensor:
            if not at_first:
                time.sleep(0.5)
                at_first.append(len(read))
            return super().__call__(pixels, generators)

    make_data().cache_latents(Slow, batch_size=2, to_disk=False, vae_identity="vae")
    assert 4 <= at_first[0] <= 3 * 2 + latent_encoding.THREADS
    assert len(read) == 40 + len(SIZES)


def test_only_what_is_mirrored_is_encoded_twice(make_data: Make, folder: Path, tmp_path: Path) -> None:
    other = draw(tmp_path / "other", {"x.png": (64, 64), "y.png": (64, 64)})
    data = make_data(more=f"[[datasets.subsets]]\nimage_dir = '{other}'\nflip_aug = true")
    assert fill(data, batch_size=4) == len(SIZES) + 2 + 2
    with np.load(other / "x_0064x0064_sd.npz") as file:
        assert np.abs(file["latents_flipped"] - file["latents"][:, :, ::-1]).max() < 0.1


def test_a_full_disk_ends_the_run(make_data: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *rest: Any) -> None:
        raise UserError(f"{path}: the disk is full")

    monkeypatch.setattr(latent_encoding, "write_cache", full)
    with pytest.raises(UserError, match="the disk is full"):
        fill(make_data())


def test_a_folder_that_may_not_be_written_is_named_before_anything_is_encoded(
    make_data: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data()
    # the tests may run as root, whom no folder refuses
    monkeypatch.setattr("library.data.cache_format.os.access", lambda path, mode: False)
    with pytest.raises(UserError) as error:
        fill(data)
    assert str(error.value) == (
        f"{folder}: may not be written, where files are to be cached beside the images; allow it, or train without "
        "--cache_latents_to_disk"
    )
    assert not list(folder.glob("*.npz"))


def test_names_may_be_as_long_as_names_of_files_are(make_data: Make, folder: Path) -> None:
    draw(folder, {f"{'x' * 238}.png": (64, 64), f"{'あ' * 79}.png": (64, 64)})
    assert fill(make_data()) == len(SIZES) + 2
    assert max(len(os.fsencode(path.name)) for path in folder.glob("*_sd.npz")) == 255
    assert fill(make_data()) == 0
    draw(folder, {f"{'x' * 239}.png": (64, 64)})
    with pytest.raises(UserError, match="_sd.npz: the name is too long for a file; shorten the image's, or train"):
        fill(make_data())


# ---- files ----


def test_what_other_programs_put_into_a_file_stays(make_data: Make, folder: Path) -> None:
    fill(make_data())
    rewrite(folder / "a_0064x0064_sd.npz", theirs=np.arange(3))
    assert fill(make_data(), vae="another") == len(SIZES)
    with np.load(folder / "a_0064x0064_sd.npz") as file:
        assert file["theirs"].tolist() == [0, 1, 2]


def test_mirrored_latents_and_masks_that_another_run_needs_stay(make_data: Make, folder: Path) -> None:
    """Runs with different wishes do not undo each other's files."""
    fill(make_data(subset="flip_aug = true"))
    assert fill(make_data(subset="alpha_mask = true")) == len(SIZES)
    assert fill(make_data(subset="flip_aug = true")) == fill(make_data(subset="alpha_mask = true")) == 0
    # but never of another VAE
    assert fill(make_data(), vae="another") == len(SIZES)
    with np.load(folder / "a_0064x0064_sd.npz") as file:
        assert not {"latents_flipped", "alpha_mask"} & set(file.files)


def test_two_programs_may_write_one_file_at_once(tmp_path: Path, make_data: Make) -> None:
    """The second begins while the first is writing: both files are whole, whoever is last."""
    data = make_data()
    fill(data)
    (record,) = (w for w in data._wanted() if w.path.name == "a.png")
    path = cache_path(record.path, record.size, SD)
    cached, stamp = read_cache(path, record.bucket, SD)
    assert isinstance(stamp, Stamp)
    stop = time.monotonic() + 1
    broken: list[Exception] = []

    def write() -> None:
        while time.monotonic() < stop:
            try:
                write_cache(path, cached, stamp, SD)
                read_cache(path, record.bucket, SD)
            except Exception as error:
                broken.append(error)
                return

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not broken
    assert os.listdir(path.parent).count(path.name) == 1 and not list(path.parent.glob(".*"))


def test_warnings_of_a_kind_are_one_line(make_data: Make, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(make_data())
    not_a_zip(folder / "a_0064x0064_sd.npz")
    with caplog.at_level(logging.WARNING), contextlib.suppress(UserError):
        assert fill(make_data(), vae="another") == len(SIZES)
    outdated, damaged = sorted((r.getMessage() for r in caplog.records), key=lambda m: "damaged" in m)
    assert "a_0064x0064_sd.npz: damaged" in damaged
    assert outdated.count("_sd.npz") == 3 and outdated.endswith("and 3 more files")


def test_half_precision_on_a_device_is_stored_as_float32(make_data: Make, folder: Path) -> None:
    class Half(Encoder):
        def __call__(self, pixels: Tensor, generators: Any) -> Tensor:
            return super().__call__(pixels, generators).to(torch.bfloat16)

    make_data().cache_latents(Half, batch_size=2, to_disk=True, vae_identity="vae")
    assert latents_of(folder, "a_0064x0064_sd.npz").dtype == np.float32
