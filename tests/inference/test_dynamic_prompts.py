"""Choices in prompts: the published grammar, drawn by the image's seed or enumerated."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from library.config.image_settings import ImageSettings
from library.errors import UserError
from library.inference.dynamic_prompts import MAX_LINES, enumerates, expanded, is_dynamic
from library.inference.plan import Repetition, plan_images
from library.inference.prompt_line import parse_image_prompt

COMMON = ImageSettings("", "", 64, 64, 2, 5.0, "ddim", 0)


def possible(line: str, seeds: int = 400) -> set[str]:
    return {text for seed in range(seeds) for text in expanded(line, seed)}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a {cat|dog}", {"a cat", "a dog"}),
        ("{one}", {"one"}),
        ("{2$$a|b|c}", {"a, b", "b, a", "a, c", "c, a", "b, c", "c, b"}),
        ("{1-2$$ and $$a|b}", {"a", "b", "a and b", "b and a"}),
        ("{2-1$$a|b}", {"a", "b", "a, b", "b, a"}),  # a reversed range
        ("{5$$a|b}", {"a, b", "b, a"}),  # no more than there are
        ("{0$$a|b}x", {"x"}),
        ("{0-1$$smile,|blush,} x", {" x", "smile, x", "blush, x"}),
        ("{$$-$$a|b}", {"a", "b"}),
        ("{a|}", {"a", ""}),
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("{ |, dynamic pose}", {" ", ", dynamic pose"}),
        ("{} and {|a}", {"{} and {|a}"}),  # no group: the first variant is empty
        (r"\{a|b\} {c|d}", {"{a|b} c", "{a|b} d"}),
        ("{1-2-3$$a|b}", {"a", "b"}),
        ("a } b { c", {"a } b { c"}),
    ],
)
def test_the_grammar(line: str, expected: set[str]) -> None:
    assert possible(line) == expected


def test_draws_follow_from_the_seed_and_are_even() -> None:
    line = "{a|b|c} {d|e}"
    assert expanded(line, 7) == expanded(line, 7)
    counts = Counter(expanded("{a|b|c}", seed)[0] for seed in range(3000))
    assert all(abs(count - 1000) < 120 for count in counts.values())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{e$$a|b} x", ["a x", "b x"]),
        ("{E$$a|b} {e$$c|d}", ["a c", "a d", "b c", "b d"]),  # the first is the slowest
        ("{e$$2$$a|b|c}", ["a, b", "a, c", "b, c"]),
        ("{e$$1-2$$+$$a|b}", ["a", "b", "a+b"]),
        ("{e$$a|{e$$b|c}}", ["a", "b", "a", "c"]),
    ],
)
def test_enumeration(line: str, expected: list[str]) -> None:
    assert enumerates(line) and expanded(line, 1) == expected


def test_enumeration_around_and_inside_of_draws() -> None:
    for line in ("{e$${a|b} x|y}", "{p {e$$a|b}|p {e$$a|b}}"):
        for seed in range(5):
            assert len(expanded(line, seed)) in (2, 4)
    with pytest.raises(UserError, match=f"more than {MAX_LINES} images"):
        expanded("{e$$0|1|2|3|4|5|6|7|8|9}" * 5, 0)


def test_the_published_long_example() -> None:
    line = (
        "{portrait|digital art|anime screen cap|detailed illustration} of 1girl, {standing|sitting|walking|running|"
        "dancing} on {classroom|street|town|beach|indoors|outdoors}, {in|wearing} {shirt and skirt|school uniform} "
        "{ |, dynamic pose}, (solo), {0-1$$smile,|blush,|kind smile,} {0-2$$depth of fields,|8k wallpaper,|pov,} "
        "beautiful face { |, from below|, from above} --n nsfw, bad face --d 5"
    )
    prompts = {p.settings.prompt for p in plan_images([parse_image_prompt(line)], COMMON, Repetition(1, 1, 50))}
    assert len(prompts) > 40
    shape = r"(portrait|digital art|anime screen cap|detailed illustration) of 1girl, \w+ on \w+, (in|wearing) s"
    assert all(re.match(shape, prompt) and "{" not in prompt and "$" not in prompt for prompt in prompts)


def test_images_of_a_prompt_with_choices() -> None:
    """Each image draws by its own seed, options may be among the choices, and enumerated images share the first."""
    drawn = plan_images([parse_image_prompt("{cat|dog} --s {3|4} --d 5,6")], COMMON, Repetition(1, 1, 4))
    assert [p.settings.seed for p in drawn] == [5, 6, 7, 8]
    for image in drawn:
        (line,) = expanded("{cat|dog} --s {3|4} --d 5,6", image.settings.seed)
        assert line.startswith(f"{image.settings.prompt} --s {image.settings.steps}")
    listed = plan_images([parse_image_prompt("{e$$cat|dog|bird}")], COMMON, Repetition(9, 1, 4))
    assert [(p.settings.prompt, p.settings.seed, p.place) for p in listed] == [
        ("cat", 9, 0),
        ("dog", 9, 1),
        ("bird", 9, 2),
    ]


def test_plain_lines_are_left_alone() -> None:
    assert not is_dynamic("a cat, {} --n b") and parse_image_prompt("a cat").template is None
    with pytest.raises(UserError, match="unknown option --q"):
        parse_image_prompt("{a|b} --q 1")
