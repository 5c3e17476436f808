"""The images that a run generates, their seeds and their batches."""

from __future__ import annotations

from library.config.image_settings import ImageSettings
from library.inference.plan import Repetition, batches, plan_images
from library.inference.prompt_line import ImagePrompt

COMMON = ImageSettings("", "", 64, 64, 10, 7.0, "ddim", 0)
A, B, C = ImagePrompt("a"), ImagePrompt("b"), ImagePrompt("c", "n", 72, 80, 5, -1.0, seeds=(5, 6), multipliers=(0.5,))


def seeds(prompts: list[ImagePrompt], repetition: Repetition) -> list[tuple[str, int]]:
    return [(image.settings.prompt, image.settings.seed) for image in plan_images(prompts, COMMON, repetition)]


def test_one_prompt_counts_up_from_the_seed() -> None:
    assert seeds([A], Repetition(7, images_per_prompt=3)) == [("a", 7), ("a", 8), ("a", 9)]


def test_own_settings_win() -> None:
    (image,) = plan_images([C], COMMON, Repetition(1))
    assert image.settings == ImageSettings("c", "n", 72, 80, 5, -1.0, "ddim", 5)
    assert image.multipliers == (0.5,)
    (image,) = plan_images([A], COMMON, Repetition(1))
    assert image.settings == ImageSettings("a", "", 64, 64, 10, 7.0, "ddim", 1)


def test_own_seeds_count_on_after_the_last() -> None:
    assert [seed for _, seed in seeds([C], Repetition(1, images_per_prompt=4))] == [5, 6, 7, 8]


def test_prompts_and_iterations_have_their_own_seeds_defined_by_the_runs() -> None:
    planned = seeds([A, B], Repetition(1, n_iter=2, images_per_prompt=2))
    assert [prompt for prompt, _ in planned] == ["a", "a", "b", "b"] * 2
    assert len({seed for _, seed in planned}) == 8
    assert planned == seeds([A, B], Repetition(1, n_iter=2, images_per_prompt=2))
    assert not set(planned) & set(seeds([A, B], Repetition(2, n_iter=2, images_per_prompt=2)))


def test_iter_same_seed_compares_prompts() -> None:
    planned = seeds([A, B], Repetition(3, n_iter=2, images_per_prompt=2, iter_same_seed=True))
    assert planned == [("a", 3), ("a", 4), ("b", 3), ("b", 4), ("a", 5), ("a", 6), ("b", 5), ("b", 6)]


def test_shuffling_changes_the_order_only() -> None:
    prompts = [ImagePrompt(str(n)) for n in range(8)]
    plain, shuffled = (seeds(prompts, Repetition(1, n_iter=2, shuffle_prompts=on)) for on in (False, True))
    assert plain != shuffled
    assert sorted(plain) == sorted(shuffled)
    assert [p for p, _ in shuffled[:8]] != [p for p, _ in shuffled[8:]]


def test_batches_hold_neighbours_that_agree() -> None:
    prompts = [A, B, C, A, ImagePrompt("d", multipliers=(1.0,))]
    planned = plan_images(prompts, COMMON, Repetition(1, images_per_prompt=2))
    groups = [[image.settings.prompt for image in batch] for batch in batches(planned, 3)]
    assert groups == [["a", "a", "b"], ["b"], ["c", "c"], ["a", "a"], ["d", "d"]]
    assert [len(batch) for batch in batches(planned, 1)] == [1] * 10
