"""Two processes through the real script: one gradient of both, every process's state, shared sample images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.data.dataset import TrainingData
from library.training import setup
from tests.entry.test_resume import GENERAL, assert_same_weights, hard
from tests.fixtures.families import Tiny
from tests.fixtures.runs import launch_script, make_images, write_dataset

#: gradient descent at rate 1: what a step changes is the gradient
DESCENT = {
    "optimizer_type": "SGD",
    "learning_rate": 1.0,
    "max_grad_norm": 0,
    "max_train_steps": 3,
    "save_every_n_steps": 1,
    "cache_latents": True,
}


def test_two_at_batch_1_are_one_at_batch_2(tmp_path: Path, tiny: Tiny) -> None:
    """Plain gradient descent at rate 1, so that what a step changes is the gradient, to 1e-6."""
    images = make_images(tmp_path / "images", sizes=[(64, 64)] * 2)
    (tmp_path / "prompts.txt").write_text("".join(f"a cat --w 64 --h 64 --s 1 --d {seed}\n" for seed in (1, 2, 3)))
    drawn = {"sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 3, "save_state_on_train_end": True}
    one = write_dataset(tmp_path / "one.toml", images, dataset="batch_size = 2")
    tiny.train(one, tmp_path / "one", **DESCENT)
    two = write_dataset(tmp_path / "two.toml", images, dataset="batch_size = 1")
    done = tiny.launch(2, two, tmp_path / "two", **DESCENT, **drawn)
    assert [process.code for process in done] == [0, 0], done[0].text + done[1].text

    before: dict[str, torch.Tensor] = {}
    moved = 0.0
    for name in ("tiny-step00000001", "tiny-step00000002", "tiny"):
        together, alone = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("two", "one"))
        for key, tensor in alone.items():
            torch.testing.assert_close(together[key], tensor, rtol=0, atol=1e-6)
            moved = max(moved, float((tensor - before.get(key, tensor)).abs().max()))
        before = alone
    assert moved > 1e-4, "gradients are far larger than the difference that is allowed"

    state = tmp_path / "two" / "tiny-state"
    assert {f"random_states_{rank}.pkl" for rank in (0, 1)} <= {p.name for p in state.iterdir()}
    assert json.loads((state / "train_state.json").read_text())["fingerprint"]["processes"] == 2
    # each process draws its share, and the trackers, which are the first one's, have all
    samples = {path.name: "" for path in (tmp_path / "two" / "sample").glob("*.png")}
    assert len(samples) == 3
    drew = [[name for name in samples if name in process.text] for process in done]
    assert [len(names) for names in drew] == [2, 1]
    events = b"".join(p.read_bytes() for p in (tmp_path / "two" / "logs").rglob("events.out.tfevents.*"))
    assert all(f"sample_{index}".encode() in events for index in range(3))


@pytest.mark.parametrize("odd", [False, True])
def test_several_processes_see_the_images_of_one(tmp_path: Path, sd: Tiny, odd: bool) -> None:
    """Two buckets over three epochs of 4 steps: 1 process x 2 images, 2 x 1 and 1 x 1 with 2 batches to a step.

    With an odd number in a bucket one process has no image in some steps. Accumulation may then mix buckets in a step,
    so that it is compared with even numbers only, and with two processes at twice the batch.
    """
    images = make_images(tmp_path / "images", sizes=[(64, 64)] * 4 + [(96, 40)] * (3 if odd else 4))
    settings = {**DESCENT, "max_train_steps": 10, "save_every_n_steps": 5}
    single, pairs = (
        write_dataset(tmp_path / f"{size}.toml", images, dataset=f"batch_size = {size}") for size in (1, 2)
    )
    if not odd:
        sd.train(single, tmp_path / "accumulated", **settings, gradient_accumulation_steps=2)
    sd.train(pairs, tmp_path / "one", **settings, gradient_accumulation_steps=2 if odd else 1)
    done = sd.launch(2, single, tmp_path / "two", **settings, gradient_accumulation_steps=2 if odd else 1)
    assert [process.code for process in done] == [0, 0], done[0].text + done[1].text
    for name in ("tiny-step00000005", "tiny"):
        together = load_file(tmp_path / "two" / f"{name}.safetensors")
        for folder in ("one",) if odd else ("accumulated", "one"):
            other = load_file(tmp_path / folder / f"{name}.safetensors")
            for key, tensor in together.items():
                torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-5)


def test_states_of_older_versions_keep_their_order(
    tmp_path: Path, sd: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They do not say how they ordered the images of a step; a state of the resumed run does not, either."""
    images = make_images(tmp_path / "images", sizes=[(64, 64)] * 4 + [(96, 40)] * 3)
    dataset = write_dataset(tmp_path / "data.toml", images)
    settings = {**DESCENT, "max_train_steps": 8, "gradient_accumulation_steps": 2, "save_state": True}
    settings["save_every_n_steps"] = 3
    with monkeypatch.context() as patch:

        def of_older_version(*args: object, **settings: object) -> TrainingData:
            return TrainingData(*args, **{**settings, "order": "by batch"})

        patch.setattr(setup, "TrainingData", of_older_version)
        sd.train(dataset, tmp_path / "old", **settings)
    sd.train(dataset, tmp_path / "new", **settings)
    for step, origin in ((3, "old"), (6, "first")):
        state = tmp_path / origin / f"tiny-step{step:08d}-state"
        output = tmp_path / ("first" if step == 3 else "second")
        sd.train(dataset, output, **settings, resume=state)
        assert_same_weights(output / "tiny.safetensors", tmp_path / "old" / "tiny.safetensors")
    assert "not exactly" not in caplog.text
    new, old = (load_file(tmp_path / folder / "tiny.safetensors") for folder in ("new", "old"))
    assert any(not torch.equal(new[key], old[key]) for key in new)


@pytest.mark.slow
@pytest.mark.parametrize("as_views", [False, True])
def test_what_a_step_does_not_train_stays_in_two_as_in_one(tmp_path: Path, sd: Tiny, as_views: bool) -> None:
    """DyLoRA trains some of its ranks in a step; a gradient of zero would let momentum move the others."""
    images = make_images(tmp_path / "images", sizes=[(64, 64)] * 2)
    settings = {"optimizer_type": "SGD", "optimizer_args": ["momentum=0.9"], "learning_rate": 1.0, "network_dim": 4}
    settings |= {"network_module": "networks.dylora", "max_train_steps": 5}
    one = write_dataset(tmp_path / "one.toml", images, dataset="batch_size = 2")
    sd.train(one, tmp_path / "one", **settings)
    two = write_dataset(tmp_path / "two.toml", images, dataset="batch_size = 1")
    done = sd.launch(2, two, tmp_path / "two", **settings, ddp_gradient_as_bucket_view=as_views)
    assert [process.code for process in done] == [0, 0], done[0].text + done[1].text
    together, alone = (load_file(tmp_path / folder / "tiny.safetensors") for folder in ("two", "one"))
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key], tensor, rtol=0, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}")


@pytest.mark.slow
def test_two_processes_resume_exactly(tmp_path: Path, tiny: Tiny) -> None:
    images = make_images(tmp_path / "images")
    dataset = write_dataset(tmp_path / "data.toml", images, general=GENERAL, subset="num_repeats = 3")
    settings = hard(tiny, ema_decay=0.9, max_train_steps=6)
    whole = tiny.launch(2, dataset, tmp_path / "whole", **settings)
    assert [process.code for process in whole] == [0, 0], whole[0].text + whole[1].text
    state = tmp_path / "whole" / "tiny-step00000002-state"
    arguments = tiny.words(dataset, tmp_path / "rest", **settings, resume=state)
    rest = launch_script(tiny.file, 2, *arguments)
    assert [process.code for process in rest] == [0, 0], rest[0].text + rest[1].text
    for name in ("tiny.safetensors", "tiny-ema.safetensors", "tiny-step00000004.safetensors"):
        assert_same_weights(tmp_path / "rest" / name, tmp_path / "whole" / name)
    assert "not exactly" not in rest[0].text
    # another number of processes is named
    alone = tiny.run(dataset, tmp_path / "alone", **settings, resume=state)
    assert alone.code == 0 and "processes was 2 and is now 1" in alone.err
