"""Every caption rule, as a table; then what is random and what is not."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from library.data.captions import CaptionRules, expand_wildcards, final_caption


def caption(text: str, *, epoch: int = 0, seed: int = 0, **rules: object) -> str:
    return final_caption(text, CaptionRules(**rules), epoch=epoch, rng=random.Random(seed))


@pytest.mark.parametrize(
    ("text", "rules", "expected"),
    [
        ("a ,b,  c", {}, "a ,b,  c"),  # nothing asked for: the text as it is
        ("first\nsecond", {}, "first"),
        ("\n  \nfirst", {}, "first"),
        ("", {}, ""),
        ("cat", {"prefix": "photo of", "suffix": ", sharp"}, "photo of cat , sharp"),
        ("a||| b|||c", {"keep_tokens_separator": "|||"}, "a, b, c"),
        ("a, b;;;c", {"secondary_separator": ";;;"}, "a, b,c"),
        ("a, {{b}}", {"wildcards": True}, "a, {b}"),
        ("a, {{b}}", {}, "a, {{b}}"),
        ("a, {b}", {"wildcards": True}, "a, b"),
        ("a;b", {"separator": ";", "tag_dropout_rate": 1e-9}, "a, b"),  # joined again with comma and space
        ("a,, b,", {"tag_dropout_rate": 1e-9}, "a, b"),
        ("a, b, c", {"tag_dropout_rate": 1.0}, ""),
        ("a, b, c", {"tag_dropout_rate": 1.0, "keep_tokens": 2}, "a, b"),
        ("a ||| b, c ||| d", {"tag_dropout_rate": 1.0, "keep_tokens_separator": "|||"}, "a, d"),
        # the mark wins over the number, and an absent mark leaves the number
        ("a, b ||| c", {"tag_dropout_rate": 1.0, "keep_tokens_separator": "|||", "keep_tokens": 1}, "a, b"),
        ("a, b, c", {"tag_dropout_rate": 1.0, "keep_tokens_separator": "|||", "keep_tokens": 1}, "a"),
        # joined tags are dropped as one
        ("a;;;b", {"tag_dropout_rate": 1.0, "secondary_separator": ";;;"}, ""),
        ("cat", {"dropout_rate": 1.0, "prefix": "photo of"}, ""),  # dropped means wholly empty
    ],
)
def test_rule(text: str, rules: dict[str, object], expected: str) -> None:
    assert caption(text, **rules) == expected


def test_shuffle_keeps_front_and_end() -> None:
    rules = {"shuffle": True, "keep_tokens_separator": "|||"}
    seen = {caption("a, b ||| c, d, e ||| y, z", seed=seed, **rules) for seed in range(200)}
    assert len(seen) == 6
    assert all(s.startswith("a, b, ") and s.endswith(", y, z") for s in seen)


def test_shuffle_moves_joined_tags_as_one() -> None:
    seen = {caption("a, x;;;y, b", seed=s, shuffle=True, secondary_separator=";;;") for s in range(100)}
    assert len(seen) == 6
    assert all("x,y" in s for s in seen)


def test_prefix_and_suffix_take_part_in_marks_and_wildcards() -> None:
    rules = {"wildcards": True, "tag_dropout_rate": 1.0, "keep_tokens_separator": "|||"}
    assert caption("c, d", prefix="{a}, b |||", suffix=", e ||| z", **rules) == "a, b, z"


def test_each_line_gets_the_prefix() -> None:
    seen = {caption("one\n\ntwo", seed=s, wildcards=True, prefix="p") for s in range(50)}
    assert seen == {"p one", "p two"}


def test_wildcards_are_uniform_and_nest() -> None:
    counts = Counter(expand_wildcards("{a|b|c}", random.Random(seed)) for seed in range(3000))
    assert set(counts) == {"a", "b", "c"}
    assert all(900 < n < 1100 for n in counts.values())
    assert {expand_wildcards("{a|x {b|c} }", random.Random(s)) for s in range(100)} == {"a", "x b ", "x c "}


def test_tag_dropout_rate() -> None:
    kept = sum(len(caption("a,b,c,d", seed=s, tag_dropout_rate=0.25).split(", ")) for s in range(2000))
    assert 0.72 < kept / 8000 < 0.78


def test_dropout_of_every_nth_epoch() -> None:
    assert [caption("a", epoch=e, dropout_every_n_epochs=3) for e in range(6)] == ["a", "a", "", "a", "a", ""]


def test_a_caption_is_a_function_of_its_generator() -> None:
    rules = {"shuffle": True, "wildcards": True, "tag_dropout_rate": 0.3, "dropout_rate": 0.2}
    text = "a, {b|c}, d, e, f"
    assert [caption(text, seed=s, **rules) for s in range(30)] == [caption(text, seed=s, **rules) for s in range(30)]
    assert CaptionRules(**rules).is_random
    assert not CaptionRules(prefix="a", keep_tokens=1, keep_tokens_separator="|||").is_random
