"""Deferred figures: read one step late, averaged over a window."""

import torch

from library.training.figures import DeferredFigures, LossAverage


def test_the_newest_is_kept_back() -> None:
    figures = DeferredFigures()
    figures.push(1, {"loss": torch.tensor(2.0), "grad_norm": torch.tensor(0.5)})
    assert figures.pop() == []
    figures.push(2, {"loss": torch.tensor(3.0), "grad_norm": torch.tensor(0.25)})
    (first,) = figures.pop()
    assert (first.step, first.values) == (1, {"loss": 2.0, "grad_norm": 0.5})
    (second,) = figures.pop(keep=0)
    assert second.step == 2


def test_average_over_the_window_and_back_from_a_state() -> None:
    average = LossAverage(2)
    for loss in (1.0, 2.0, 4.0):
        average.add(loss)
    assert average.mean == 3.0
    again = LossAverage(2)
    again.restore(average.state())
    assert again.mean == 3.0
