"""One message on captions that are cut has their number and the longest."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from library.architectures.common import clip_text
from library.architectures.conditioning import CaptionLength
from library.architectures.sd import SD
from library.data import caption_lengths
from library.data.caption_lengths import measure_of, warn_of_cut_captions
from library.data.captions import CaptionRules
from library.data.records import ImageRecord
from tests.fixtures.tiny_sd import make_tiny_tokenizer


@pytest.fixture(scope="module")
def measure(tmp_path_factory: pytest.TempPathFactory) -> caption_lengths.Measure:
    tokenizer = clip_text.load_tokenizer(make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    return measure_of(SD, [tokenizer], max_token_length=None, weighted=False)


def records(captions: Sequence[str]) -> list[ImageRecord]:
    return [ImageRecord(Path("images"), f"{n}.png", (8, 8), text, 0) for n, text in enumerate(captions)]


def said(
    captions: Sequence[str], measure: caption_lengths.Measure, caplog: pytest.LogCaptureFixture, **rules: object
) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_cut_captions(((record, CaptionRules(**rules)) for record in records(captions)), measure)
    return [record.getMessage() for record in caplog.records]


def test_the_longest_is_named(measure: caption_lengths.Measure, caplog: pytest.LogCaptureFixture) -> None:
    captions = ["cat", "cat " * 75, "dog " * 76, "cat " * 80 + "photo of the dog"]
    (line,) = said(captions, measure, caplog)
    assert line.startswith(
        "the captions of 2 images are cut, as the text encoder reads 75 tokens; the longest is that of images/3.png "
        'with 84, which loses "cat cat cat cat cat photo of the dog"'
    )
    assert said(captions[:2], measure, caplog) == []


def test_prefix_lines_and_choices_count(measure: caption_lengths.Measure, caplog: pytest.LogCaptureFixture) -> None:
    assert said(["cat"], measure, caplog, prefix="dog " * 75)
    assert said(["cat\n" + "dog " * 80], measure, caplog) == []
    assert said(["cat\n" + "dog " * 80], measure, caplog, wildcards=True)


def test_no_caption_that_is_cut_is_passed_over(measure: caption_lengths.Measure) -> None:
    """Captions are passed over by their length in bytes, which a token never undercuts."""
    rng = random.Random(0)
    characters = "abc dé’ﬁ½…日本 &;" + chr(0x1F600)
    for _ in range(300):
        text = "".join(rng.choices(characters, k=rng.randint(0, 60)))
        assert measure(text).tokens <= len(text.encode())


def test_a_system_prompt_counts(caplog: pytest.LogCaptureFixture) -> None:
    """A caption of fewer bytes than the encoder reads tokens is cut, where something stands before it."""

    def measure(text: str) -> CaptionLength:
        whole = f"system {text}" if text else ""
        return CaptionLength(len(whole), 10, whole[10:])

    (line,) = said(["abc", "abcdef"], measure, caplog)
    assert "captions of 1 image are cut, as the text encoder reads 10 tokens" in line and 'loses "def"' in line


def test_the_option_that_lets_it_read_more_is_named(caplog: pytest.LogCaptureFixture) -> None:
    given = [(record, CaptionRules()) for record in records(["cat"])]
    warn_of_cut_captions(given, lambda text: CaptionLength(len(text), 2, text[2:]), length_option="some_length")
    assert caplog.messages[0].endswith("shorten them, or let it read more with --some_length")


def test_of_very_many_the_longest_are_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption_lengths, "_MOST_COUNTED", 3)
    counted = []

    def measure(text: str) -> CaptionLength:
        counted.append(text)
        return CaptionLength(len(text), 5, text[5:])

    (line,) = said(["x" * n for n in range(4, 12)], measure, caplog)
    assert "at least 3 images" in line and "images/7.png with 11" in line
    assert len(counted) == 4  # with a short one, for the limit
