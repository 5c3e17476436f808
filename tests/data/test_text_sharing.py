"""Processes share the encoding of captions, and end together."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.errors import UserError
from library.interrupt import Interrupt
from tests.data.samples import SIZES
from tests.data.text_samples import Encoders, Make, OneProcess, fill, options_for, outputs_of, uses

pytestmark = pytest.mark.usefixtures("peers_without_accelerate")


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


def test_a_folder_that_may_not_be_written_is_named_before_anything_is_encoded(
    make_data: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data()
    # the tests may run as root, whom no folder refuses
    monkeypatch.setattr("library.data.cache_format.os.access", lambda path, mode: False)
    with pytest.raises(
        UserError, match=f"^{folder}: may not be written.* without --cache_text_encoder_outputs_to_disk$"
    ):
        fill(data)
    assert not list(folder.glob("*_te.npz"))
