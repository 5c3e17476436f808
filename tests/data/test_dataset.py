"""The order of epochs and the loader: nothing left out, nothing twice, whatever the workers, ranks or restarts."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.config.arguments import DatasetOptions
from library.data.batch import Batch
from library.data.dataset import TrainingData
from library.data.dataset_config import load_dataset_config
from library.data.image_io import read_image, resize
from library.data.latent_cache import to_pixels
from library.data.run_plan import RunPlan
from library.errors import UserError
from tests.data.samples import SD, SIZES, Encoder, dataset_file, draw, tokenize

Make = Callable[..., TrainingData]
RANDOM = "num_repeats = 3\nflip_aug = true\nshuffle_caption = true\ncaption_dropout_rate = 0.2"


def load(data: TrainingData, epoch: int = 0, *, start: int = 0, workers: int = 0, **settings: object) -> list[Batch]:
    return list(data.dataloader(epoch=epoch, start_batch=start, tokenize=tokenize, num_workers=workers, **settings))


def uses(batches: list[Batch]) -> Counter[str]:
    return Counter(Path(path).name for batch in batches for path in batch.paths)


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert (one.visits, one.paths, one.captions, one.flipped) == (
            other.visits,
            other.paths,
            other.captions,
            other.flipped,
        )
        a, b = (batch.images if batch.images is not None else batch.latents for batch in (one, other))
        assert torch.equal(a, b)
        assert torch.equal(one.tokens["input_ids"], other.tokens["input_ids"])
        assert torch.equal(one.crop_top_lefts, other.crop_top_lefts)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_image_of_every_epoch(make_data: Make, workers: int, persistent: bool) -> None:
    """With late epoch numbers in workers, epochs would leave some out and repeat others."""
    data = make_data(subset=RANDOM)
    for epoch in range(3):
        batches = load(data, epoch, workers=workers, persistent=persistent)
        assert uses(batches) == dict.fromkeys(SIZES, 3)
        assert len(batches) == data.batches_per_process(1)
        assert len({visit for batch in batches for visit in batch.visits}) == 3 * len(SIZES)
        assert_same(batches, load(make_data(subset=RANDOM), epoch))


def test_batches_do_not_mix_sizes_and_few_are_short(make_data: Make) -> None:
    data = make_data(subset="num_repeats = 3")  # square: 4 x 3 uses, wide: 2 x 3, tall: 1 x 3
    batches = load(data)
    assert Counter(batch.bucket for batch in batches) == {(64, 64): 6, (128, 32): 3, (32, 128): 2}
    assert sorted(len(batch.visits) for batch in batches) == [1] + [2] * 10
    for batch in batches:
        assert batch.images.shape[2:] == batch.bucket[::-1]


def test_order_and_samples_differ_by_epoch_and_seed(make_data: Make) -> None:
    first = make_data(subset=RANDOM)
    assert [b.paths for b in load(first, 0)] != [b.paths for b in load(first, 1)]
    assert [b.paths for b in load(first, 0)] != [b.paths for b in load(make_data(subset=RANDOM, seed=2), 0)]
    visits = [v for epoch in range(3) for b in load(first, epoch) for v in b.visits]
    assert len(set(visits)) == len(visits)
    flips = [f for b in load(first, 0) for f in b.flipped]
    assert 0 < sum(flips) < len(flips)


def test_buckets_take_turns(make_data: Make) -> None:
    data = make_data(subset="num_repeats = 3")
    orders = {tuple(data.datasets[0].bucket_of[ref.uses[0].record] for ref in data.batches(e)) for e in range(3)}
    assert len(orders) == 3 and not any(order == tuple(sorted(order)) for order in orders)


def test_other_images_meet_in_a_batch_in_another_epoch(make_data: Make) -> None:
    data = make_data(dataset="enable_bucket = false\nbatch_size = 3")

    def met(epoch: int) -> set[frozenset[int]]:
        return {frozenset(use.record for use in ref.uses) for ref in data.batches(epoch)}

    assert len({frozenset(met(epoch)) for epoch in range(4)}) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_entered_at_any_batch(make_data: Make, workers: int) -> None:
    whole = load(make_data(subset=RANDOM), 1)
    for start in (1, 5, len(whole) - 1):
        assert_same(load(make_data(subset=RANDOM), 1, start=start, workers=workers), whole[start:])
    assert load(make_data(subset=RANDOM), 1, start=len(whole)) == []


def test_an_epoch_left_half_way_does_not_leak_into_the_next(make_data: Make) -> None:
    data = make_data(subset=RANDOM)
    batches = data.dataloader(epoch=0, start_batch=0, tokenize=tokenize, num_workers=2, persistent=True)
    next(batches)
    assert_same(load(data, 1, workers=2, persistent=True), load(make_data(subset=RANDOM), 1))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_processes_share_every_batch_of_an_epoch(make_data: Make, accumulation: int) -> None:
    """N processes at batch size B take in every step what one takes at N x B, weighted so that the mean is the same."""
    for world_size in (1, 2, 3, 4, 25):
        data = make_data(subset=RANDOM)
        larger = make_data(subset=RANDOM, dataset=f"batch_size = {2 * world_size}")
        for epoch in range(3):
            dealt = [
                data.batches(epoch, world_size=world_size, rank=rank, accumulation=accumulation)
                for rank in range(world_size)
            ]
            alone = larger.batches(epoch, accumulation=accumulation)
            assert {len(refs) for refs in dealt} == {data.batches_per_process(world_size)} == {len(alone)}
            for parts, whole in zip(zip(*dealt, strict=True), alone, strict=True):
                assert [use for ref in parts if ref.weight > 0 for use in ref.uses] == list(whole.uses)
                assert max(len(ref.uses) for ref in parts) == -(-len(whole.uses) // world_size)
                for ref in parts:  # each image counts as much as every other
                    assert ref.weight in (0.0, pytest.approx(len(ref.uses) * world_size / len(whole.uses)))


@pytest.mark.parametrize("size", [2, 4])
def test_the_images_of_a_step_follow_from_their_number(tmp_path: Path, size: int) -> None:
    """Buckets of 8 and 4 images, over several epochs: however 4 (2) images are shared by processes and batches."""
    draw(tmp_path / "more", {f"{n}.png": ((64, 64) if n < 8 else (140, 36)) for n in range(12)})

    def steps(epoch: int, processes: int, batch: int, accumulation: int) -> list[set[tuple[int, int]]]:
        path = dataset_file(tmp_path / "more.toml", tmp_path / "more", dataset=f"batch_size = {batch}")
        config = load_dataset_config(path, DatasetOptions())
        data = TrainingData(config, seed=1, latent=SD, prior_loss_weight=1.0)
        shares = [
            data.batches(epoch, world_size=processes, rank=rank, accumulation=accumulation) for rank in range(processes)
        ]
        refs = [ref for turn in zip(*shares, strict=True) for ref in turn]
        together = processes * accumulation
        return [
            {use for ref in refs[start : start + together] for use in ref.uses}
            for start in range(0, len(refs), together)
        ]

    ways = [
        (processes, batch, size // processes // batch)
        for processes in (1, 2, 4)
        for batch in (1, 2, 4)
        if size % (processes * batch) == 0
    ]
    for epoch in range(3):
        found = [steps(epoch, *way) for way in ways]
        assert len(ways) >= 3 and all(other == found[0] for other in found)
        assert [len(step) for step in found[0]] == [size] * (12 // size)
    assert steps(0, *ways[0]) != steps(1, *ways[0])


def test_length_does_not_depend_on_the_epoch(make_data: Make) -> None:
    data = make_data(subset="num_repeats = 2")
    assert {len(data.batches(epoch)) for epoch in range(20)} == {data.batches_per_process(1)}
    assert data.batches_per_process(2) == 4 and data.batches_per_process(1) == data.batches_per_process(1) == 7


# ---- the tag warm-up ----


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_tag_warm_up_goes_by_the_step(make_data: Make, accumulation: int) -> None:
    """Captions are those of the step, whatever the workers, ranks or the batch at which a run is resumed."""
    rules = "token_warmup_step = 6\ntoken_warmup_min = 1"
    data = make_data(subset=rules)  # captions of three tags, four batches an epoch
    plan = RunPlan(data.batches_per_process(1), accumulation, total_steps=20)
    step = 0
    while step < 10:
        position = plan.position(step)
        batches = load(data, position.epoch, start=position.batch_in_epoch, plan=plan)
        count = plan.batches_of_step(position.batch_in_epoch)
        lengths = {len(caption.split(", ")) for batch in batches[:count] for caption in batch.captions}
        assert lengths == {1 + step * 2 // 6 if step < 6 else 3}
        step += 1
    assert_same(load(make_data(subset=rules), 1, start=2, workers=2, plan=plan), load(data, 1, plan=plan)[2:])


def test_the_tag_warm_up_is_at_one_step_on_all_ranks(make_data: Make) -> None:
    rules = "token_warmup_step = 0.5"
    data = make_data(subset=rules)
    plan = RunPlan(data.batches_per_process(2), 1, total_steps=16)  # three steps an epoch
    for rank in range(2):
        batches = load(make_data(subset=rules), 1, rank=rank, world_size=2, plan=plan)
        lengths = [{len(caption.split(", ")) for caption in batch.captions} for batch in batches]
        assert lengths == [{1}, {2}, {2}]  # steps 3, 4 and 5, of a warm-up of 8
        batches = load(make_data(subset=rules), 0, rank=rank, world_size=2, plan=plan)
        assert {len(caption.split(", ")) for batch in batches for caption in batch.captions} == {1}


def test_without_a_plan_the_tag_warm_up_is_over(make_data: Make) -> None:
    batches = load(make_data(subset="token_warmup_step = 6"))
    assert {len(caption.split(", ")) for batch in batches for caption in batch.captions} == {3}


# ---- several subsets and datasets ----


def test_several_subsets_and_datasets_in_one_epoch(make_data: Make, tmp_path: Path) -> None:
    """Each subset has its repeats, each dataset its resolution and batch size; the count is known before loading."""
    draw(tmp_path / "more", {"x.png": (64, 64), "y.png": (140, 36)})
    draw(tmp_path / "small", {f"s{i}.png": (40, 40) for i in range(5)})
    more = (
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'more'}'\nnum_repeats = 3\n"
        "[[datasets]]\nresolution = 32\nbatch_size = 4\n"
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'small'}'\n"
    )
    data = make_data(more=more, subset="num_repeats = 2", dataset="batch_size = 3")
    # square 4 x 2 + 3 uses, wide 2 x 2 + 3, tall 1 x 2 by threes: 4 + 3 + 1 batches; 5 uses by fours: 2 batches
    assert data.batches_per_process(1) == 10
    batches = load(data)
    assert uses(batches) == dict.fromkeys(SIZES, 2) | {"x.png": 3, "y.png": 3} | {f"s{i}.png": 1 for i in range(5)}
    found = Counter((batch.bucket, len(batch.visits)) for batch in batches)
    assert found == {
        ((64, 64), 3): 3, ((64, 64), 2): 1, ((128, 32), 3): 2, ((128, 32), 1): 1, ((32, 128), 2): 1,
        ((32, 32), 4): 1, ((32, 32), 1): 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dataset", "subset", "expected"),
    [
        # each direction has its own: one image is shrunk, the other enlarged
        ("", "", {"wide": "area", "small": "lanczos"}),
        ("interpolation_type = 'nearest'", "", {"wide": "nearest", "small": "nearest"}),
        (
            "resize_interpolation = 'nearest'",
            "resize_interpolation = 'bicubic'",
            {"wide": "bicubic", "small": "bicubic"},
        ),
    ],
)
def test_images_are_resized_as_asked_for(
    make_data: Make, folder: Path, dataset: str, subset: str, expected: dict[str, str]
) -> None:
    for path in folder.iterdir():
        path.unlink()
    draw(folder, {"wide.png": (256, 64), "small.png": (40, 40)})
    for batch in load(make_data(dataset=dataset, subset=subset)):
        for path, image in zip(batch.paths, batch.images, strict=True):
            resized = resize(read_image(Path(path)), batch.bucket, expected[Path(path).stem])
            assert torch.equal(image, to_pixels(resized))


# ---- regularization images ----


def regularised(
    make_data: Make, tmp_path: Path, count: int, *, repeats: int = 1, train_repeats: int = 1
) -> TrainingData:
    reg = draw(tmp_path / "reg", {f"r{i:02d}.png": (64, 64) for i in range(count)}, captions=False)
    more = f"[[datasets.subsets]]\nimage_dir = '{reg}'\nclass_tokens = 'cat'\nis_reg = true\nnum_repeats = {repeats}"
    return make_data(more=more, subset=f"num_repeats = {train_repeats}")


@pytest.mark.parametrize(
    ("count", "repeats", "train_repeats", "expected"),
    [
        (20, 1, 1, [1] * 7),  # more than needed: the rest is left out
        (7, 1, 1, [1] * 7),
        (4, 3, 1, [2, 2, 2, 1]),  # each is used before one is used again
        (2, 1, 1, [4, 3]),
        (2, 2, 3, [11, 10]),
    ],
)
def test_as_many_regularization_as_training_images(
    make_data: Make, tmp_path: Path, count: int, repeats: int, train_repeats: int, expected: list[int]
) -> None:
    data = regularised(make_data, tmp_path, count, repeats=repeats, train_repeats=train_repeats)
    batches = load(data)
    found = uses(batches)
    assert sorted((n for name, n in found.items() if name.startswith("r")), reverse=True) == expected
    assert all(found[name] == train_repeats for name in SIZES)
    assert (data.datasets[0].num_train, data.datasets[0].num_reg) == (7 * train_repeats, count * repeats)
    visits = [visit for batch in batches for visit in batch.visits]
    assert len(set(visits)) == len(visits)


@pytest.mark.parametrize("workers", [0, 1])
def test_attributes_of_ones_own_reach_the_batch(make_data: Make, folder: Path, workers: int) -> None:
    other = draw(folder.parent / "other", {"x.png": (64, 64)})
    data = make_data(
        subset="custom_attributes = {kind = 'photo'}",
        more=f"[[datasets.subsets]]\nimage_dir = '{other}'\ncustom_attributes = {{kind = 'drawing', level = 2}}",
    )
    for batch in load(data, workers=workers):
        drawn = [Path(path).name == "x.png" for path in batch.paths]
        kinds = [{"kind": "drawing", "level": 2} if of_other else {"kind": "photo"} for of_other in drawn]
        assert batch.to("cpu").custom_attributes == kinds


def test_an_epoch_that_no_memory_holds_is_refused(make_data: Make) -> None:
    with pytest.raises(UserError, match=r"subsets\]\] 1: num_repeats 1000000000: an epoch would have 7,000,000,000 im"):
        make_data(subset="num_repeats = 1_000_000_000")
    assert make_data(subset="num_repeats = 1000").batches_per_process(1) == 3500


def test_regularization_images_have_the_prior_loss_weight(make_data: Make, tmp_path: Path) -> None:
    for batch in load(regularised(make_data, tmp_path, 7)):
        expected = [0.5 if Path(path).name.startswith("r") else 1.0 for path in batch.paths]
        assert batch.loss_weights.tolist() == expected


# ---- what a batch holds ----


def test_samples_of_images(make_data: Make, folder: Path) -> None:
    (folder / "a.txt").write_text("one")
    data = make_data(dataset="network_multiplier = 0.5\nbatch_size = 1")
    (batch,) = [b for b in load(data) if b.paths[0].endswith("e.png")]
    assert batch.images.shape == (1, 3, 32, 128)
    assert batch.images.dtype == torch.float32
    assert -1.0 <= batch.images.min() < -0.3 and 0.3 < batch.images.max() <= 1.0
    assert batch.latents is None
    assert batch.captions == ["cat, dog, e"]
    assert batch.tokens["input_ids"].tolist() == [[11]]
    assert batch.original_sizes.tolist() == [[36, 140]]
    assert batch.target_sizes.tolist() == [[32, 128]]
    assert batch.crop_top_lefts.tolist() == [[0, 0]]
    assert batch.network_multiplier == 0.5


def test_crops_are_recorded_for_mirrored_images_too(make_data: Make, folder: Path) -> None:
    draw(folder, {"w.png": (113, 64)})  # between two sizes: cropped left and right, by unequal pixels
    data = make_data(subset="flip_aug = true\nnum_repeats = 20", dataset="enable_bucket = false")
    lefts = {
        (flipped, crop[1])
        for batch in load(data)
        for path, flipped, crop in zip(batch.paths, batch.flipped, batch.crop_top_lefts.tolist(), strict=True)
        if path.endswith("w.png")
    }
    assert lefts == {(False, 24), (True, 25)}


def test_random_crop_is_keyed_by_the_visit(make_data: Make) -> None:
    settings = {"subset": "random_crop = true\nnum_repeats = 8", "dataset": "enable_bucket = false"}
    data = make_data(**settings)
    batches = load(data)
    crops = {
        tuple(crop)
        for batch in batches
        for path, crop in zip(batch.paths, batch.crop_top_lefts.tolist(), strict=True)
        if path.endswith("d.png")
    }
    assert len(crops) > 3
    assert_same(load(make_data(**settings), workers=2), batches)


def test_batches_move_without_their_tokens(make_data: Make) -> None:
    batch = load(make_data())[0].to("meta")
    assert batch.images.device.type == batch.loss_weights.device.type == "meta"
    assert batch.tokens["input_ids"].device.type == "cpu"


# ---- workers ----


@pytest.mark.parametrize("to_disk", [False, True])
def test_cached_latents_in_workers(make_data: Make, to_disk: bool) -> None:
    made = []
    for workers in (0, 2):
        data = make_data(subset=RANDOM)
        data.cache_latents(Encoder, batch_size=2, to_disk=to_disk, vae_identity="vae")
        made.append(load(data, workers=workers))
    assert_same(*made)


def test_data_can_be_sent_to_spawned_workers(make_data: Make) -> None:
    data = make_data(subset=RANDOM)
    data.cache_latents(Encoder, batch_size=2, to_disk=False, vae_identity="vae")
    sent = pickle.loads(pickle.dumps(data.maker))
    assert_same([sent.make(ref, tokenize) for ref in data.batches(1)], load(data, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_ends_the_epoch_with_its_name(make_data: Make, folder: Path, workers: int) -> None:
    content = (folder / "c.png").read_bytes()
    (folder / "c.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError) as error:
        load(make_data(), workers=workers)
    assert str(error.value).startswith(f"{folder / 'c.png'}: the image cannot be read")
    assert "Traceback" not in str(error.value)


def test_global_random_state_is_left_alone(make_data: Make) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    load(make_data(), workers=1)
    load(make_data(), workers=0)
    assert torch.equal(torch.get_rng_state(), state)


class _Caught:
    """A tokenizer that, in its worker, gets the signals of a Ctrl-C in the terminal."""

    def __init__(self, main: int) -> None:
        self.main = main

    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        assert os.getpid() != self.main
        os.kill(os.getpid(), signal.SIGINT)
        return {**tokenize(captions), "own_group": torch.tensor(os.getpgid(0) == os.getpid())}


def test_workers_outlive_a_ctrl_c(make_data: Make) -> None:
    batches = list(make_data().dataloader(epoch=0, start_batch=0, tokenize=_Caught(os.getpid()), num_workers=1))
    assert uses(batches) == dict.fromkeys(SIZES, 1)
    assert all(batch.tokens["own_group"] for batch in batches)


class _Killed:
    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


def test_a_killed_worker_is_said_so(make_data: Make) -> None:
    with pytest.raises(UserError, match="DataLoader worker .*: lower --max_data_loader_n_workers"):
        list(make_data().dataloader(epoch=0, start_batch=0, tokenize=_Killed(), num_workers=1))


class _Large:
    """Batches that a pipe does not hold, so that workers wait for the main process when it is gone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        (self.folder / str(os.getpid())).touch()
        return {"input_ids": torch.zeros(len(captions), 30_000)}  # below what is shared instead of sent


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_end_with_a_main_process_that_is_killed(make_data: Make, tmp_path: Path) -> None:
    """Also those that are busy, or wait for each other's pipes."""
    pids = tmp_path / "pids"
    pids.mkdir()
    main = os.fork()
    if main == 0:
        data = make_data(subset="num_repeats = 20")
        batches = iter(data.dataloader(epoch=0, start_batch=0, tokenize=_Large(pids), num_workers=3))
        next(batches)
        time.sleep(0.5)  # until pipes are full
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(main, 0)[1] == signal.SIGKILL
    workers = [int(path.name) for path in pids.iterdir()]
    deadline = time.monotonic() + 30
    while workers and time.monotonic() < deadline:
        workers = [pid for pid in workers if is_running(pid)]
        time.sleep(0.1)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    assert not workers, "they outlived the main process"


def is_running(pid: int) -> bool:
    """Whether a process is there that no longer is a child of this one; one that nobody waits for has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- sizes ----


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("bucket_reso_steps = 12", "bucket_reso_steps 12: must be a multiple of 8"),
        ("enable_bucket = false", "resolution 60x60: both sides must be multiples of 8, such as 56x56"),
    ],
)
def test_sizes_must_fit_the_latents(make_data: Make, dataset: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        make_data(dataset=f"resolution = 60\nmin_bucket_reso = 24\nmax_bucket_reso = 96\n{dataset}")
