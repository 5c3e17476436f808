"""Conditions on every bucket and every assignment, over many settings."""

from __future__ import annotations

import random

import pytest

from library.data.buckets import BucketRules, Buckets, Size, make_sizes, mean_aspect_error, own_size

SETTINGS = [
    BucketRules((512, 512), True),
    BucketRules((768, 512), True),
    BucketRules((1024, 1024), True, 256, 2048, 32),
    BucketRules((500, 500), True, 250, 1000, 64),  # nothing is a multiple of the step
    BucketRules((64, 64), True, 32, 128, 8),
]


@pytest.mark.parametrize("rules", SETTINGS)
def test_sizes(rules: BucketRules) -> None:
    sizes = make_sizes(rules)
    area = rules.resolution[0] * rules.resolution[1]
    assert sizes == sorted(sizes, key=lambda s: s[0] / s[1])
    assert len({w / h for w, h in sizes}) == len(sizes)
    assert {(h, w) for w, h in sizes} == set(sizes)
    for width, height in sizes:
        assert width % rules.step == height % rules.step == 0
        assert rules.min_side <= min(width, height) <= max(width, height) <= rules.max_side
        assert width * height <= area
    assert any(w == h for w, h in sizes)


@pytest.mark.parametrize("rules", SETTINGS)
def test_the_nearest_aspect_ratio_is_chosen(rules: BucketRules) -> None:
    sizes, buckets = make_sizes(rules), Buckets(rules)
    rng = random.Random(0)
    for _ in range(300):
        size = rng.randint(20, 4000), rng.randint(20, 4000)
        ratio = size[0] / size[1]
        chosen = buckets.assign(size)
        assert chosen in sizes
        assert abs(chosen[0] / chosen[1] - ratio) == min(abs(w / h - ratio) for w, h in sizes)


def test_published_sizes_of_512() -> None:
    buckets = Buckets(BucketRules((512, 512), True))
    assert buckets.assign((2000, 2000)) == (512, 512)
    assert buckets.assign((1920, 1080)) == (640, 384)
    assert buckets.assign((1080, 1920)) == (384, 640)
    assert buckets.assign((5000, 100)) == (1024, 256)


def test_bounds_may_lie_far_apart() -> None:
    sizes = make_sizes(BucketRules((512, 512), True, min_side=8, max_side=100_000, step=8))
    assert (8, 32768) in sizes and (32768, 8) in sizes and (512, 512) in sizes
    assert all(width * height <= 512 * 512 for width, height in sizes)


def test_without_buckets_all_are_of_the_resolution() -> None:
    assert Buckets(BucketRules((512, 768))).assign((30, 4000)) == (512, 768)


def test_without_upscaling() -> None:
    rules = BucketRules((512, 512), True, step=64, no_upscale=True)
    assert own_size((300, 200), rules) == (256, 192)  # its own size, cut to the step
    assert own_size((1024, 1024), rules) == (512, 512)
    assert own_size((700, 300), rules) == (640, 256)  # within the area, so not shrunk
    assert own_size((10, 300), rules) == (64, 256)  # nothing smaller than a step can be trained on
    assert own_size((20_000, 100), rules) == (4096, 64)  # nor more than the area
    assert own_size((1, 20_000), rules) == (64, 4096)
    assert own_size((1, 1), rules) == (64, 64)
    rng = random.Random(0)
    for _ in range(300):
        size = rng.randint(1, 3000), rng.randint(1, 3000)
        width, height = Buckets(rules).assign(size)
        assert width % 64 == height % 64 == 0
        assert width * height <= 512 * 512


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((640, 480), (512, 384)), ((4000, 3000), (512, 384)), ((1000, 999), (448, 448)), ((3000, 4000), (384, 512))],
)
def test_without_upscaling_large_images_keep_their_shape(size: Size, bucket: Size) -> None:
    assert own_size(size, BucketRules((512, 512), True, step=64, no_upscale=True)) == bucket


def test_without_upscaling_little_is_cropped() -> None:
    """3.5% on the mean of large images; 6.5% when both sides were cut to the step by themselves."""
    rules = BucketRules((512, 512), True, step=64, no_upscale=True)
    rng = random.Random(0)
    lost = []
    for _ in range(5000):
        size = rng.randint(520, 4200), rng.randint(520, 4200)
        bucket = own_size(size, rules)
        assert bucket[0] * bucket[1] <= 512 * 512 and bucket[0] <= size[0] and bucket[1] <= size[1]
        scale = max(bucket[0] / size[0], bucket[1] / size[1])
        lost.append(1 - bucket[0] * bucket[1] / (size[0] * scale * size[1] * scale))
    assert sum(lost) / len(lost) < 0.036


def test_a_bound_that_no_image_reaches_takes_no_time() -> None:
    far = make_sizes(BucketRules((512, 512), True, min_side=256, max_side=2_000_000_000, step=64))
    assert far == make_sizes(BucketRules((512, 512), True, min_side=256, max_side=1024, step=64))


def test_mean_aspect_error() -> None:
    assert mean_aspect_error([((100, 100), (512, 512)), ((150, 100), (512, 512))]) == 0.25
    assert mean_aspect_error([]) == 0.0
