"""Deferred metrics: read one step late, averaged over a window."""

import time
from collections.abc import Iterator

import torch

from library.training.metrics import DataWait, DeferredMetrics, LossAverage, StepTimes


def test_the_newest_is_kept_back() -> None:
    metrics = DeferredMetrics()
    metrics.push(1, {"loss": torch.tensor(2.0), "grad_norm": torch.tensor(0.5)})
    assert metrics.pop() == []
    metrics.push(2, {"loss": torch.tensor(3.0), "grad_norm": torch.tensor(0.25)})
    (first,) = metrics.pop()
    assert (first.step, first.values) == (1, {"loss": 2.0, "grad_norm": 0.5})
    (second,) = metrics.pop(keep=0)
    assert second.step == 2


def test_average_over_the_window_and_back_from_a_state() -> None:
    average = LossAverage(2)
    for loss in (1.0, 2.0, 4.0):
        average.add(loss)
    assert average.mean == 3.0
    again = LossAverage(2)
    again.restore(average.state())
    assert again.mean == 3.0


def test_what_the_host_measured_comes_with_the_figures_of_its_step() -> None:
    metrics = DeferredMetrics()
    metrics.push(1, {"loss": torch.tensor(2.0)}, measured={"time/step": 0.5})
    (first,) = metrics.pop(keep=0)
    assert first.values == {"loss": 2.0, "time/step": 0.5}


def test_waiting_for_data_is_part_of_a_steps_time() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.02)
            yield number

    times, batches = StepTimes(), slow()
    assert [times.waiting(batches), times.waiting(batches)] == [0, 1]
    time.sleep(0.03)
    first = times.end_step()
    assert 0.04 <= first["time/data_wait"] <= first["time/step"] - 0.03
    assert times.waiting(batches) == 2
    second = times.end_step()
    assert 0.02 <= second["time/data_wait"] <= second["time/step"]
    assert times.end_step()["time/data_wait"] == 0


def test_the_share_leaves_out_the_first_step() -> None:
    share = DataWait()
    assert share.share is None
    share.add({"time/step": 9.0, "time/data_wait": 9.0})  # workers start in it
    assert share.share is None
    share.add({"time/step": 3.0, "time/data_wait": 0.5})
    share.add({"time/step": 1.0, "time/data_wait": 0.5})
    assert share.share == 0.25
