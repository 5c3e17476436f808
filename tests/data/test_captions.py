"""Every caption rule, as a table; then what is random and what is not."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from library.data.captions import CaptionRules, Progress, expand_wildcards, final_caption, tags_of


def caption(text: str, *, epoch: int = 0, seed: int = 0, progress: Progress | None = None, **rules: object) -> str:
    return final_caption(text, CaptionRules(**rules), epoch=epoch, rng=random.Random(seed), progress=progress)


def possible(text: str, *, seeds: int = 3000, **rules: object) -> set[str]:
    return {caption(text, seed=seed, **rules) for seed in range(seeds)}


# ---- the published examples ----

MIKU = "1girl, hatsune miku, vocaloid"
SKY = f"{MIKU}, upper body, looking at viewer, sky;;;cloud;;;day, outdoors"
STAGE = f"{MIKU} ||| stage, microphone, white shirt, smile ||| best quality, rating: general"
CHANGED = {"shuffle": True, "tag_dropout_rate": 0.1}
MARK = {"keep_tokens_separator": "|||"}
JOINED = {"secondary_separator": ";;;"}


@pytest.mark.parametrize(
    ("text", "rules", "expected"),
    [
        (SKY, JOINED, {f"{MIKU}, upper body, looking at viewer, sky,cloud,day, outdoors"}),
        (
            f"{MIKU}, upper body, looking at viewer, {{simple|white}} background",
            {"wildcards": True},
            {f"{MIKU}, upper body, looking at viewer, {choice} background" for choice in ("simple", "white")},
        ),
        (f"{MIKU}, {{{{retro style}}}}", {"wildcards": True}, {f"{MIKU}, {{retro style}}"}),
        ("first line\nsecond line", {"wildcards": True}, {"first line", "second line"}),
        ("first line\nsecond line", {}, {"first line"}),
    ],
    ids=["secondary separator", "wildcard", "braces", "lines", "first line"],
)
def test_published_examples(text: str, rules: dict[str, object], expected: set[str]) -> None:
    assert possible(text, seeds=50, **rules) == expected


class Chosen(random.Random):
    """Draws what leads to a wanted result: tags in its order, and those dropped that it lacks."""

    def __init__(self, result: str) -> None:
        super().__init__(0)
        self._result = result

    def shuffle(self, tags: list[str]) -> None:  # type: ignore[override]
        places = {tag: self._result.find(tag.replace(";;;", ",")) for tag in tags}
        tags.sort(key=lambda tag: places[tag])
        self._draws = [0.0 if places[tag] < 0 else 1.0 for tag in tags]

    def random(self) -> float:
        return self._draws.pop(0)


@pytest.mark.parametrize(
    ("text", "rules", "result"),
    [
        (STAGE, MARK, f"{MIKU}, microphone, stage, white shirt, best quality, rating: general"),
        (STAGE, MARK, f"{MIKU}, white shirt, smile, stage, microphone, best quality, rating: general"),
        (SKY, JOINED, "vocaloid, 1girl, upper body, sky,cloud,day, outdoors, hatsune miku"),
        (SKY, JOINED, "vocaloid, 1girl, outdoors, looking at viewer, upper body, hatsune miku"),
    ],
)
def test_published_examples_of_shuffling_and_dropping(text: str, rules: dict[str, object], result: str) -> None:
    assert final_caption(text, CaptionRules(**rules, **CHANGED), epoch=0, rng=Chosen(result)) == result


def test_published_example_of_two_marks() -> None:
    found = possible(STAGE, seeds=300, **MARK, **CHANGED)
    assert len(found) > 24
    assert all(s.startswith(f"{MIKU}, ") and s.endswith(", best quality, rating: general") for s in found)


def test_published_example_of_a_tag_of_several() -> None:
    tags = set(SKY.replace(";;;", ",").split(", "))
    found = possible(SKY, **JOINED, **CHANGED)
    assert all(set(s.split(", ")) <= tags for s in found)
    assert any("sky,cloud,day" in s for s in found)
    assert any("sky" not in s and "cloud" not in s and "day" not in s for s in found)


def test_published_example_of_a_dataset_file() -> None:
    """Prefix and suffix with their marks, wildcard, tags joined, shuffled and dropped, all at once."""
    text = "stage;;;light, {smile|laugh}, {{retro}}"
    found = possible(
        text,
        prefix=f"{MIKU} |||",
        suffix=", anime screencap ||| masterpiece, rating: general",
        keep_tokens_separator="|||",
        secondary_separator=";;;",
        wildcards=True,
        **CHANGED,
    )
    middles = set()
    for result in found:
        assert result.startswith(f"{MIKU}, ") and result.endswith(", masterpiece, rating: general")
        middles.add(result.removeprefix(f"{MIKU}, ").removesuffix("masterpiece, rating: general"))
    assert "anime screencap, {retro}, laugh, stage,light, " in middles
    assert "smile, stage,light, anime screencap, " in middles
    assert {tag for middle in middles for tag in middle.split(", ") if tag} == {
        "stage,light", "smile", "laugh", "{retro}", "anime screencap",
    }  # fmt: skip


# ---- every rule ----


@pytest.mark.parametrize(
    ("text", "rules", "expected"),
    [
        ("a ,b,  c", {}, "a ,b,  c"),  # nothing asked for: the text as it is
        ("first\nsecond", {}, "first"),
        ("\n  \nfirst", {}, "first"),
        ("", {}, ""),
        ("cat", {"prefix": "photo of", "suffix": ", sharp"}, "photo of cat , sharp"),
        ("a||| b|||c", {"keep_tokens_separator": "|||"}, "a, b, c"),
        ("a ,b", {"keep_tokens_separator": "|||"}, "a ,b"),  # no mark: the text as it is
        ("a, b;;;c", {"secondary_separator": ";;;"}, "a, b,c"),
        ("a, {{b}}", {"wildcards": True}, "a, {b}"),
        ("a, {{b}}", {}, "a, {{b}}"),
        ("a, {b}", {"wildcards": True}, "a, b"),
        ("a;b", {"separator": ";", "tag_dropout_rate": 1e-9}, "a; b"),  # joined with the separator that split it
        ("a;b|||c", {"separator": ";", "keep_tokens_separator": "|||"}, "a; b; c"),
        ("a b  c", {"separator": " ", "tag_dropout_rate": 1e-9}, "a b c"),
        ("a,, b,", {"tag_dropout_rate": 1e-9}, "a, b"),
        ("a, b, c", {"tag_dropout_rate": 1.0}, ""),
        ("a, b, c", {"tag_dropout_rate": 1.0, "keep_tokens": 2}, "a, b"),
        ("a ||| b, c ||| d", {"tag_dropout_rate": 1.0, "keep_tokens_separator": "|||"}, "a, d"),
        # marks at the ends, and more than two: what follows the second is the end
        ("||| a, b", {"tag_dropout_rate": 1.0, "keep_tokens_separator": "|||"}, ""),
        ("a, b |||", {"tag_dropout_rate": 1.0, "keep_tokens_separator": "|||"}, "a, b"),
        ("a ||| b ||| c ||| d", {"tag_dropout_rate": 1.0, "keep_tokens_separator": "|||"}, "a, c, d"),
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{a|x {b|c} }", {"a", "x b ", "x c "}),
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("{{a|b}|c}", {"a", "b", "c"}),
        ("{a|{b|{c|d}}}", {"a", "b", "c", "d"}),
        ("{a|}", {"a", ""}),
        ("{a}", {"a"}),
        ("x|y", {"x|y"}),
        ("{{a|b}}", {"{a|b}"}),
        ("{a|{{b|c}}}", {"a", "{b|c}"}),  # the bar inside of plain braces is plain
        ("{{{a|b}}}", {"{a}", "{b}"}),
        ("{a :}}|b}", {"a :}", "b"}),
        ("{{{{a}}}}", {"{{a}}"}),
        ("{a|b", {"{a|b"}),  # without a partner
        ("a}b {{ }}", {"a}b { }"}),
        ("{a|{b", {"{a|{b"}),
    ],
)
def test_wildcards(text: str, expected: set[str]) -> None:
    assert {expand_wildcards(text, random.Random(seed)) for seed in range(100)} == expected


def test_parts_of_a_choice_are_equally_likely_whatever_is_in_them() -> None:
    counts = Counter(expand_wildcards("{a|{b|c}}", random.Random(seed)) for seed in range(4000))
    assert 1850 < counts["a"] < 2150
    assert all(900 < counts[name] < 1100 for name in "bc")


def test_tag_dropout_rate() -> None:
    kept = sum(len(caption("a,b,c,d", seed=s, tag_dropout_rate=0.25).split(", ")) for s in range(2000))
    assert 0.72 < kept / 8000 < 0.78


def test_dropout_of_every_nth_epoch() -> None:
    assert [caption("a", epoch=e, dropout_every_n_epochs=3) for e in range(6)] == ["a", "a", "", "a", "a", ""]


# ---- the tag warm-up ----


@pytest.mark.parametrize(
    ("step", "rules", "expected"),
    [
        (0, {}, "a"),
        (2, {}, "a"),
        (3, {}, "a, b"),  # 1 + 3 * 4 / 10
        (5, {}, "a, b, c"),
        (9, {}, "a, b, c, d"),
        (10, {}, "a, b, c, d, e"),
        (99, {}, "a, b, c, d, e"),
        (0, {"warmup_min": 3}, "a, b, c"),
        (5, {"warmup_min": 3}, "a, b, c, d"),
        (0, {"warmup_min": 9}, "a, b, c, d, e"),
        (0, {"warmup_min": 0}, ""),
        (10, {"warmup_step": 0.5}, "a, b, c"),  # half of 40 steps
        (20, {"warmup_step": 0.5}, "a, b, c, d, e"),
        (39, {"warmup_step": 1}, "a, b, c, d, e"),  # one step, not all of the run
        (0, {"warmup_step": 0}, "a, b, c, d, e"),
        (0, {"keep_tokens": 2}, "a, b, c"),  # what is kept is there from the start
        (0, {"tag_dropout_rate": 1.0}, ""),
    ],
)
def test_warm_up(step: int, rules: dict[str, object], expected: str) -> None:
    progress = Progress(step, total_steps=40)
    assert caption("a, b, c, d, e", progress=progress, **{"warmup_step": 10, **rules}) == expected


def test_warm_up_leaves_kept_parts_and_shuffles_what_is_used() -> None:
    rules = {"warmup_step": 10, "warmup_min": 2, "shuffle": True, "keep_tokens_separator": "|||"}
    text = "x ||| a, b, c, d ||| z"
    assert {caption(text, seed=s, progress=Progress(0, 40), **rules) for s in range(30)} == {
        "x, a, b, z", "x, b, a, z",
    }  # fmt: skip
    assert caption(text, **{**rules, "shuffle": False}) == "x, a, b, c, d, z"  # without a run, it is over


def test_a_caption_is_a_function_of_its_generator() -> None:
    rules = {"shuffle": True, "wildcards": True, "tag_dropout_rate": 0.3, "dropout_rate": 0.2}
    text = "a, {b|c}, d, e, f"
    assert [caption(text, seed=s, **rules) for s in range(30)] == [caption(text, seed=s, **rules) for s in range(30)]


@pytest.mark.parametrize(
    ("rules", "written_anew", "drops"),
    [
        ({"shuffle": True}, True, False),
        ({"wildcards": True}, True, False),
        ({"tag_dropout_rate": 0.1}, True, False),
        ({"dropout_rate": 0.1}, False, True),
        ({"dropout_every_n_epochs": 2}, False, True),
        ({"prefix": "a", "keep_tokens": 1, "keep_tokens_separator": "|||", "warmup_step": 0.1}, False, False),
    ],
)
def test_what_differs_from_use_to_use(rules: dict[str, object], written_anew: bool, drops: bool) -> None:
    assert CaptionRules(**rules).is_written_anew == written_anew
    assert CaptionRules(**rules).drops == drops


@pytest.mark.parametrize(
    ("text", "rules", "expected"),
    [
        ("a, b\nc, d", {}, ["a", "b"]),  # without wildcards the first line alone is trained on
        ("\na, b\nc, d", {"wildcards": True}, ["a", "b", "c", "d"]),
        ("a, b; c", {"separator": ";"}, ["a, b", "c"]),
        ("a ||| b, c ||| d", MARK, ["a", "b", "c", "d"]),
        ("sky;;;cloud, day", JOINED, ["sky", "cloud", "day"]),
        (", ,", {}, []),
    ],
)
def test_tags_are_counted_as_training_splits_them(text: str, rules: dict[str, object], expected: list[str]) -> None:
    assert tags_of(text, CaptionRules(**rules)) == expected
