"""Cached captions of which there are several, or that are dropped at times."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from library.errors import UserError
from tests.data.samples import SIZES
from tests.data.text_samples import ON_DISK, Make, fill, options_for, outputs_of, same, uses

pytestmark = pytest.mark.usefixtures("peers_without_accelerate")


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
    of_image = {name: Counter(caption for other, caption, _ in found if other == name) for name in SIZES}
    for counts in of_image.values():
        assert len(counts) == 4 and sum(counts.values()) == 48
        assert min(counts.values()) > 2  # 12 expected, standard deviation 3
    assert len({tuple(sorted(counts)) for counts in of_image.values()}) == len(SIZES), "each image has its own"

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
