"""Captions reach every CLIP tokenizer as OpenAI's and OpenCLIP's own tokenizers would have them."""

from __future__ import annotations

import random
from pathlib import Path

import ftfy
import pytest
import torch

from library.architectures.common import clip_text
from library.architectures.common.clean_text import clean_text, is_changed_by_cleaning
from library.architectures.flux import FLUX
from library.architectures.sd import SD
from library.architectures.sdxl import SDXL
from tests.fixtures.tiny_sd import make_tiny_tokenizer

#: text -> what CLIP reads; that the tokens are those of OpenCLIP's SimpleTokenizer was checked with its vocabulary
CLEANED = {
    "it’s": "it's",
    "“hello”": '"hello"',
    "ﬁne": "fine",
    "Ｆｕｌｌ\u3000ｗｉｄｔｈ": "Full width",
    "a &amp; b": "a & b",
    "&amp;amp;": "&",
    "&lt;b&gt; &#39;x&#39;": "<b> 'x'",
    "<a &amp; b>": "<a & b>",
    "a&nbsp;b": "a\u00a0b",
    "schÃ¶n": "schön",
    "cafe\u0301": "café",
    "ｶﾀｶﾅ": "カタカナ",
    "\x1b[31mred\x1b[0m": "red",
    "1girl, (solo:1.2)": "1girl, (solo:1.2)",
    "日本語": "日本語",
}


@pytest.mark.parametrize("text", CLEANED)
def test_cleaned_text(text: str) -> None:
    assert clean_text(text) == CLEANED[text]
    assert is_changed_by_cleaning(text) == (CLEANED[text] != text)


def test_plain_text_needs_no_cleaning() -> None:
    """The quick way out for plain ASCII gives what ftfy gives."""
    rng = random.Random(0)
    plain = [chr(code) for code in range(32, 127) if chr(code) != "&"]
    for _ in range(300):
        text = "".join(rng.choices(plain, k=40))
        assert clean_text(text) == text == ftfy.fix_text(text)


def test_white_space_alone_is_no_change() -> None:
    assert not is_changed_by_cleaning("a  cat\r\n")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("text", ["it’s a cat", "“the cat”", "ｃａｔ", "cat &amp; dog"])
def test_every_clip_tokenizer_gets_clean_text(tmp_path: Path, text: str, weighted: bool) -> None:
    first = clip_text.load_tokenizer(make_tiny_tokenizer(tmp_path / "1"))
    second = clip_text.load_tokenizer(make_tiny_tokenizer(tmp_path / "2", v2=True), padding="!")
    for family, tokenizers in ((SD, [first]), (SD, [second]), (SDXL, [first, second])):
        found, expected = (
            family.tokenize(tokenizers, [caption], max_token_length=None, weighted=weighted)
            for caption in (text, clean_text(text))
        )
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert family.caption_length(tokenizers, text, max_token_length=None, weighted=weighted) == (
            family.caption_length(tokenizers, clean_text(text), max_token_length=None, weighted=weighted)
        )


def test_t5_gets_the_text_as_it_is() -> None:
    """Only CLIP's published tokenizers clean; FLUX's T5 takes captions as they are."""

    class Recorder:
        pad_token_id, eos_token_id, bos_token_id = 0, 1, 2

        def __init__(self) -> None:
            self.seen: list[str] = []

        def __call__(self, text: str, **_: object) -> object:
            self.seen.append(text)
            return type("Found", (), {"input_ids": [5]})

    clip, t5 = Recorder(), Recorder()
    FLUX.tokenize([clip, t5], ["it’s"], max_token_length=None, weighted=False)
    assert clip.seen == ["it's"] and t5.seen == ["it’s"]


def test_emphasis_is_read_before_cleaning(tmp_path: Path) -> None:
    """Full-width brackets are text: they become brackets that no longer emphasise."""
    tokenizer = clip_text.load_tokenizer(make_tiny_tokenizer(tmp_path))
    tokens = clip_text.tokenize(tokenizer, ["（cat：1.5）"], max_token_length=None, weighted=True)
    assert torch.equal(tokens["weights"], torch.ones_like(tokens["weights"]))
