"""``--debug_dataset`` below the script: which keys lead where, how much is written, and in which order."""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from library.architectures.sd import SD as SD_FAMILY
from library.config.arguments import DatasetOptions
from library.data.contact_sheet import Shown, draw_sheet
from library.data.dataset import TrainingData
from library.data.dataset_config import load_dataset_config
from library.data.run_plan import RunPlan
from library.training import debug_dataset
from library.training.debug_dataset import batches_of, browse, why_no_windows, write_sheets
from library.training.kinds.adapter_options import TrainNetworkOptions
from tests.data.samples import SD, SIZES, dataset_file, draw, tokenize


def make_data(tmp_path: Path, subset: str = "") -> TrainingData:
    folder = draw(tmp_path / "images", SIZES)
    return TrainingData(
        load_dataset_config(dataset_file(tmp_path / "data.toml", folder, subset=subset), DatasetOptions()),
        seed=1,
        latent=SD,
    )


def plan_of(data: TrainingData, accumulation: int = 1) -> RunPlan:
    return RunPlan.make(
        batches_per_epoch=data.batches_per_process(1),
        gradient_accumulation_steps=accumulation,
        max_train_steps=10,
        max_train_epochs=2,
    )


def test_the_order_and_captions_are_those_of_training(tmp_path: Path) -> None:
    data = make_data(tmp_path, "shuffle_caption = true\nflip_aug = true\ntoken_warmup_step = 4")
    plan = plan_of(data, accumulation=2)
    for epoch in (0, 1):
        loaded = list(data.dataloader(epoch=epoch, start_batch=0, tokenize=tokenize, num_workers=0, plan=plan))
        shown = list(batches_of(data, plan, epoch))
        assert [[s.path for s in samples] for samples in shown] == [batch.paths for batch in loaded]
        assert [[s.caption for s in samples] for samples in shown] == [batch.captions for batch in loaded]
        assert [[s.flipped for s in samples] for samples in shown] == [batch.flipped for batch in loaded]
        assert [samples[0].step for samples in shown] == [1 + plan.step_of(epoch, i) for i in range(len(shown))]


def test_several_processes_are_shown_in_turn(tmp_path: Path) -> None:
    """Batches that some processes have no image of keep their steps."""
    data = make_data(tmp_path)
    plan = RunPlan(data.batches_per_process(3), 1, total_steps=10)
    shown = [samples for epoch in (0, 1) for samples in batches_of(data, plan, epoch, 3)]
    paths = [[s.path for s in samples] for samples in shown]
    for epoch in (0, 1):
        by_step = [data.batches(epoch, world_size=3, rank=rank) for rank in range(3)]
        for index, refs in enumerate(zip(*by_step, strict=True)):
            step = plan.step_of(epoch, index) + 1
            expected = [len(ref.uses) for ref in refs if ref.weight > 0]
            assert [len(samples) for samples in shown if samples[0].step == step] == expected
    assert sorted(sum(paths, [])) == sorted(2 * [str(r.path) for r in data.datasets[0].records])


def test_there_is_a_bound_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(debug_dataset, "MOST_IMAGES", 5)
    data = make_data(tmp_path)
    with caplog.at_level(logging.INFO):
        write_sheets(batches_of(data, plan_of(data), 0), tmp_path / "out", total=data.batches_per_process(1))
    facts = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert 5 <= len(facts) <= 6  # batches stay whole
    assert str(tmp_path / "out") in caplog.text and "are not shown, as 5 images are the most" in caplog.text


KEYS = [
    # images are named <epoch><batch><place>; two epochs of two batches of two
    ("nnnnnnnn", "111 112 121 122 211 212 221 222"),
    ("sn", "111 121 122 211 212 221 222"),
    ("e", "111 211 212 221 222"),
    ("nq", "111 112"),
    ("\x1b", "111"),
    ("nee", "111 112 211"),
]


@pytest.mark.parametrize(("keys", "expected"), KEYS, ids=lambda v: repr(v))
def test_keys(keys: str, expected: str, tmp_path: Path) -> None:
    data = make_data(tmp_path)
    template = next(batches_of(data, plan_of(data), 0))[0]
    seen: list[str] = []
    pressed: Iterator[str] = iter(keys)

    def numbered(epoch: int, batch: int, place: int) -> Shown:
        return replace(template, epoch=epoch, batch=batch, place=place)

    def show(sample: Shown) -> str:
        seen.append(f"{sample.epoch}{sample.batch}{sample.place}")
        return next(pressed, " ")

    epochs = (iter([[numbered(e, b, p) for p in (1, 2)] for b in (1, 2)]) for e in (1, 2))
    browse(epochs, show)
    assert " ".join(seen) == expected


def test_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV's part is played here, as no display is at hand: what is shown, and what each answer means."""
    import cv2

    shown: list[np.ndarray] = []
    codes = iter([-1, ord("S"), -1, -1])
    visible = iter([1.0, 1.0, 0.0])
    monkeypatch.setattr(cv2, "imshow", lambda name, image: shown.append(image))
    monkeypatch.setattr(cv2, "waitKey", lambda wait: next(codes))
    monkeypatch.setattr(cv2, "getWindowProperty", lambda name, what: next(visible))
    data = make_data(tmp_path)
    sample = next(batches_of(data, plan_of(data), 0))[0]
    window = debug_dataset._Window()
    assert window.show(sample) == "s"
    assert window.show(sample) in debug_dataset.QUIT  # closed by its button
    assert np.array_equal(shown[0][:, :, ::-1], np.asarray(draw_sheet([sample])))


def test_only_the_first_process_shows_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "images", SIZES)
    given = argparse.Namespace(
        dataset_config=dataset_file(tmp_path / "data.toml", tmp_path / "images"),
        output_dir=str(tmp_path / "out"),
        debug_dataset=True,
        max_train_epochs=1,
    )
    options = TrainNetworkOptions.from_args(given)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, there in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        debug_dataset.show_dataset(options, SD_FAMILY, "mask")
        assert (tmp_path / "out").exists() == there
    facts = [json.loads(line) for line in (tmp_path / "out/debug_dataset/images.jsonl").read_text().splitlines()]
    assert len(facts) == len(SIZES)
    steps = {fact["batch"]: fact["step"] for fact in facts}
    # two processes share the images of a bucket; the last bucket has one image for both
    assert sorted(Counter(steps.values()).values()) == [1, 2, 2] and set(steps.values()) == {1, 2, 3}


def test_without_a_display_there_are_no_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert why_no_windows() == "there is no display"
    monkeypatch.setenv("DISPLAY", ":987")  # none is there; or this OpenCV cannot open windows at all
    assert why_no_windows() is not None
