"""Caches of encoded captions: what they are made from is known, and nothing outdated or damaged is trained on."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from library.architectures.base import Conditioning, TextFormat, WeightsIdentity
from library.config.arguments import ConsoleOptions, DatasetOptions, ModelOptions
from library.data.dataset import TrainingData
from library.data.latent_cache import Peers
from library.errors import UserError
from library.training import text_caching
from library.training.caching import CacheJob
from library.training.interrupt import Interrupt
from library.training.text_caching import cache_texts
from tests.data.samples import SIZES

Make = Callable[..., TrainingData]
Uses = list[tuple[str, str, dict[str, Tensor]]]

ON_DISK: dict[str, Any] = {"cache_text_encoder_outputs_to_disk": True}


@dataclass
class Encoders:
    """Stands for a family: outputs are a function of all that real ones depend on; counts what it encodes."""

    files: str = "files"
    weights: str = "weights"
    width: int = 6
    overflow: bool = False
    encoded: list[int] = field(default_factory=list)  # captions of each call
    loaded: int = 0
    read: int = 0  # how often the weights were read for their identity
    text = TextFormat("_x_te.npz", {"context": ("T", "D"), "pooled": ("D",), "mask": ("T",), "has_text": ()})

    def text_identity(self, checkpoint: object) -> WeightsIdentity:
        def read() -> str:
            self.read += 1
            return self.weights

        return WeightsIdentity(self.files, read)

    def load_tokenizers(self, checkpoint: object) -> list[str]:
        return ["tokenizer"]

    def load_text_encoders(self, checkpoint: object, *, dtype: torch.dtype, device: str) -> list[str]:
        self.loaded += 1
        return ["encoder"]

    def tokenize(
        self, tokenizers: Sequence[Any], captions: Sequence[str], *, max_token_length: int | None, weighted: bool
    ) -> dict[str, Tensor]:
        texts = [f"{max_token_length} {weighted} {caption}".encode() for caption in captions]
        return {"input_ids": torch.tensor([list(hashlib.sha256(text).digest()[:6]) for text in texts])}

    def encode_text(
        self, encoders: Sequence[Any], tokens: Mapping[str, Tensor], *, clip_skip: int | None
    ) -> Conditioning:
        ids = tokens["input_ids"]  # (B, 6)
        self.encoded.append(len(ids))
        context = (ids[:, :, None] + (clip_skip or 0) / 3 + torch.arange(self.width)) / len(self.weights)
        if self.overflow:
            context = context * float("inf")
        return Conditioning(
            {"context": context, "pooled": context.mean(1), "mask": (ids > 99).long(), "has_text": ids[:, 0] > 50}
        )


class OneProcess:
    """What of an accelerator is used."""

    num_processes, process_index, is_main_process, device = 1, 0, True, torch.device("cpu")

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def gather_items(self, items: list[Any]) -> list[Any]:
        return items


@pytest.fixture(autouse=True)
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's own exchange knows of real processes only."""
    monkeypatch.setattr(
        text_caching, "peers_of", lambda a: Peers(a.process_index, a.num_processes, lambda items: a.gather_items(items))
    )


def fill(
    data: TrainingData,
    encoders: Encoders | None = None,
    *,
    accelerator: Any = None,
    interrupt: Interrupt | None = None,
    dtype: torch.dtype = torch.float32,
    max_token_length: int | None = None,
    clip_skip: int | None = None,
    weighted_captions: bool = False,
    **options: object,
) -> int:
    """Number of captions that were encoded."""
    encoders = encoders or Encoders()
    chosen = SimpleNamespace(
        dataset=DatasetOptions(**{**ON_DISK, **options}),
        model=ModelOptions(max_token_length=max_token_length, clip_skip=clip_skip, weighted_captions=weighted_captions),
        console=ConsoleOptions(console_log_simple=True),
    )
    cache_texts(
        CacheJob(
            architecture=encoders,
            checkpoint=None,
            data=data,
            options=chosen,
            accelerator=accelerator or OneProcess(),
            weight_dtype=dtype,
            interrupt=interrupt or Interrupt(),
        )
    )
    return sum(encoders.encoded)


def uses(data: TrainingData, epochs: Sequence[int] = (0,), workers: int = 0) -> Uses:
    """(picture, caption, conditioning) of every use, in order."""
    found = []
    for epoch in epochs:
        for batch in data.dataloader(epoch=epoch, start_batch=0, tokenize=no_tokens, num_workers=workers):
            assert batch.tokens == {}
            for i, path in enumerate(batch.paths):
                row = {name: values[i] for name, values in batch.text.items()}
                found.append((Path(path).name, batch.captions[i], row))
    return found


def no_tokens(captions: Sequence[str]) -> dict[str, Tensor]:
    raise AssertionError("captions were tokenised in training")


def outputs_of(caption: str, encoders: Encoders | None = None, **settings: Any) -> dict[str, Tensor]:
    """What encoding one caption by itself gives."""
    encoders = encoders or Encoders()
    settings = {"max_token_length": None, "weighted": False, **settings}
    tokens = encoders.tokenize([], [caption], **settings)
    return {name: v[0] for name, v in encoders.encode_text([], tokens, clip_skip=None).tensors.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rewrite(path: Path, **changes: np.ndarray | None) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays.update(changes)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


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


def options_for(to_disk: bool) -> dict[str, object]:
    return {"cache_text_encoder_outputs": True, "cache_text_encoder_outputs_to_disk": to_disk}


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
    """The captions of one picture differ in two datasets: both are in its file."""
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


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def not_a_zip(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs")


def lacks_an_array(path: Path) -> None:
    rewrite(path, pooled=None)


def lacks_an_axis(path: Path) -> None:
    rewrite(path, context=np.zeros(6, np.float32))


def not_finite(path: Path) -> None:
    rewrite(path, context=np.full((6, 6), np.nan, np.float32))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign_stamp(path: Path) -> None:
    rewrite(path, stamp=np.array('{"version": 99}'))


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
from tests.data.test_text_cache import Encoders

def killed(file, **arrays):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

np.savez = killed
stamp = TextStamp(("cat",), "f", "w", "float32", None, None, False)
write_texts(Path({str(path)!r}), [{{n: torch.zeros(6) for n in Encoders.text.arrays}}], stamp, Encoders.text)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == before
    assert list(folder.glob(".a_x_te.npz*.tmp"))  # it was in the middle
    (folder / "a.txt").write_text("edited", encoding="utf-8")
    assert fill(make_data()) == 1


# ---- captions that vary ----

VARIED = "shuffle_caption = true\nnum_repeats = 24"


@pytest.fixture
def tags(folder: Path) -> Path:
    for name in SIZES:
        (folder / name).with_suffix(".txt").write_text("a, b, c, d, e, f", encoding="utf-8")
    return folder


@pytest.mark.parametrize("to_disk", [True, False])
def test_variants_are_used_evenly_and_repeatably(make_data: Make, tags: Path, to_disk: bool) -> None:
    settings = {"text_encoder_cache_variants": 4, **options_for(to_disk)}
    data = make_data(subset=VARIED, **settings)
    assert 4 * len(SIZES) - 3 <= fill(data, **settings) <= 4 * len(SIZES)
    found = uses(data, epochs=(0, 1))
    assert all(same(row, outputs_of(caption)) for _, caption, row in found)
    of_picture = {name: Counter(caption for other, caption, _ in found if other == name) for name in SIZES}
    for counts in of_picture.values():
        assert len(counts) == 4 and sum(counts.values()) == 48
        assert min(counts.values()) > 2  # 12 expected, standard deviation 3
    assert len({tuple(sorted(counts)) for counts in of_picture.values()}) == len(SIZES), "each picture has its own"

    again = make_data(subset=VARIED, **settings)
    fill(again, **settings)
    assert [use[:2] for use in uses(again, epochs=(0, 1))] == [use[:2] for use in found]
    assert [use[:2] for use in uses(again, epochs=(1,))] == [use[:2] for use in found[len(found) // 2 :]], "resumed"
    other = make_data(subset=VARIED, seed=2, **settings)
    assert fill(other, **settings) == 0 or not to_disk, "files serve runs of other seeds"
    assert [use[:2] for use in uses(other)] != [use[:2] for use in found[: len(found) // 2]]


def test_variants_follow_the_rules(make_data: Make, tags: Path) -> None:
    subset = "shuffle_caption = true\nkeep_tokens = 1\ncaption_tag_dropout_rate = 0.4\nnum_repeats = 40"
    settings = {"text_encoder_cache_variants": 30}
    data = make_data(subset=subset, **ON_DISK, **settings)
    fill(data, **settings)
    captions = [caption.split(", ") for _, caption, _ in uses(data)]
    assert all(words[0] == "a" and set(words) <= set("abcdef") for words in captions)
    kept = sum(len(words) - 1 for words in captions) / (5 * len(captions))
    assert 0.5 < kept < 0.7


def test_more_variants_keep_those_there_are(make_data: Make, tags: Path) -> None:
    """The first of eight are the four of before, so that a run with fewer finds its own."""
    many = {"text_encoder_cache_variants": 8}
    few = {"text_encoder_cache_variants": 4}
    fill(make_data(subset=VARIED, **ON_DISK, **many), **many)
    assert fill(make_data(subset=VARIED, **ON_DISK, **few), **few) == 0


def test_captions_that_do_not_vary_have_one_variant(make_data: Make) -> None:
    assert fill(make_data(), text_encoder_cache_variants=8) == len(SIZES)


@pytest.mark.parametrize("to_disk", [True, False])
@pytest.mark.parametrize("variants", [1, 3])
def test_dropped_are_the_uses_that_would_be_without_a_cache(
    make_data: Make, folder: Path, tags: Path, variants: int, to_disk: bool
) -> None:
    subset = "caption_dropout_rate = 0.3\ncaption_dropout_every_n_epochs = 3\nnum_repeats = 20"
    subset += "\nshuffle_caption = true" if variants > 1 else ""
    plain = make_data(subset=subset)
    expected = [
        caption == ""
        for epoch in range(3)
        for batch in plain.dataloader(epoch=epoch, start_batch=0, tokenize=lambda c: {}, num_workers=0)
        for caption in batch.captions
    ]
    settings = {"text_encoder_cache_variants": variants, **options_for(to_disk)}
    data = make_data(subset=subset, **settings)
    fill(data, **settings)
    found = uses(data, epochs=range(3))
    assert [caption == "" for _, caption, _ in found] == expected
    assert 0.5 < sum(expected) / len(expected) < 0.57  # 0.3, 0.3 and 1
    assert all(same(row, outputs_of(caption)) for _, caption, row in found)
    assert (folder / "empty_caption_x_te.npz").exists() == to_disk


@pytest.mark.parametrize("flag", ["cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"])
@pytest.mark.parametrize(
    "setting", ["shuffle_caption = true", "enable_wildcard = true", "caption_tag_dropout_rate = 0.1"]
)
def test_varying_captions_need_variants(make_data: Make, flag: str, setting: str) -> None:
    with pytest.raises(UserError) as found:
        make_data(subset=setting, **{flag: True})
    words = (f"subsets]] 1: {setting.split()[0]}: with --{flag}, ", "--text_encoder_cache_variants 8")
    assert all(word in str(found.value) for word in words)
    make_data(subset=setting, **{flag: True}, text_encoder_cache_variants=2)


def test_tags_that_come_with_time_are_refused(make_data: Make) -> None:
    with pytest.raises(UserError, match=r"subsets\]\] 1: token_warmup_step: not with --cache_text_encoder_outputs,"):
        make_data(subset="token_warmup_step = 5", cache_text_encoder_outputs=True, text_encoder_cache_variants=4)


# ---- several processes ----


class Process(OneProcess):
    """One of several that meet at a barrier, as those of an accelerator do."""

    def __init__(self, index: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.process_index, self.num_processes = index, barrier.parties
        self.is_main_process = index == 0
        self._shared, self._barrier = shared, barrier

    def gather(self, values: Tensor) -> Tensor:
        return torch.cat(self._all(values))

    def gather_items(self, items: list[Any]) -> list[Any]:
        return [item for part in self._all(items) for item in part]

    def _all(self, value: Any) -> list[Any]:
        self._shared[self.process_index] = value
        self._barrier.wait(30)
        found = list(self._shared)
        self._barrier.wait(30)
        return found


def in_processes(count: int, work: Callable[[Process], None]) -> None:
    shared, barrier, errors = [None] * count, threading.Barrier(count), []

    def one(index: int) -> None:
        try:
            work(Process(index, shared, barrier))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@pytest.mark.parametrize("to_disk", [True, False])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_processes_share_the_work(
    make_data: Make, folder: Path, monkeypatch: pytest.MonkeyPatch, count: int, to_disk: bool
) -> None:
    written: Counter[Path] = Counter()
    replace = os.replace

    def counted(source: Path, target: Path) -> None:
        written[Path(target)] += 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", counted)
    data = [make_data(subset="caption_dropout_rate = 0.5") for _ in range(count)]
    encoders = [Encoders() for _ in range(count)]

    def work(process: Process) -> None:
        index = process.process_index
        fill(
            data[index],
            encoders[index],
            accelerator=process,
            dtype=torch.bfloat16,
            text_encoder_batch_size=2,
            **options_for(to_disk),
        )

    in_processes(count, work)
    shares = [sum(e.encoded) for e in encoders]
    assert max(shares) == -(-(len(SIZES) + 1) // count) and min(shares) > 0
    assert all(times == 1 for times in written.values()) and len(written) == (len(SIZES) + 1 if to_disk else 0)
    for each in data:
        for _, caption, row in uses(each):
            assert torch.equal(row["context"], outputs_of(caption)["context"].bfloat16())
            assert torch.equal(row["has_text"], outputs_of(caption)["has_text"])


def test_an_error_in_one_process_ends_all(make_data: Make, folder: Path) -> None:
    ended: dict[int, BaseException] = {}
    data = [make_data() for _ in range(2)]  # here, as both would write one dataset file

    def work(process: Process) -> None:
        try:
            fill(data[process.process_index], Encoders(overflow=process.process_index == 1), accelerator=process)
        except BaseException as error:
            ended[process.process_index] = error

    in_processes(2, work)
    assert isinstance(ended[1], UserError)
    assert isinstance(ended[0], SystemExit) and ended[0].code == 2


def test_a_signal_keeps_what_is_encoded(make_data: Make, folder: Path) -> None:
    interrupt = Interrupt()
    interrupt.signal_number = signal.SIGTERM
    with pytest.raises(SystemExit) as ended:
        fill(make_data(), interrupt=interrupt, text_encoder_batch_size=2)
    assert ended.value.code == 143
    made = len(list(folder.glob("*_te.npz")))
    assert 0 < made < len(SIZES)
    assert fill(make_data()) == len(SIZES) - made
