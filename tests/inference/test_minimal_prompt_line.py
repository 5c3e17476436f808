"""Lines of ``flux_minimal_inference.py --interactive``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.errors import UserError
from library.inference.prompt_line import MINIMAL_OPTIONS, ImagePrompt, parse_minimal_prompt


def parse(line: str) -> ImagePrompt:
    return parse_minimal_prompt(line, where="prompt 1", size_step=16)


def test_options_are_the_published_ones() -> None:
    path = Path(__file__).parents[1] / "compat/data/interactive_options.json"
    published = json.loads(path.read_text())["flux_minimal_inference.py"]["options"]
    assert {f"--{option.name}" for option in MINIMAL_OPTIONS} == {option["option"] for option in published}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a cat", ImagePrompt("a cat")),
        (
            "w 3, d 2 --w 512 --h 768 --s 8 --d 5 --g 2.5 --m 0.5,1 --n red dog --c 3",
            ImagePrompt("w 3, d 2", "red dog", 512, 768, 8, 3.0, 2.5, (5,), (0.5, 1.0)),
        ),
        # words count by their first letter
        (
            "a cat --width 64 --height 80 --steps 2 --guidance 1 --multipliers 0 --negative x --cfg 2",
            ImagePrompt("a cat", "x", 64, 80, 2, 2.0, 1.0, multipliers=(0.0,)),
        ),
        ("a cat --n -", ImagePrompt("a cat", "")),
        ("a cat --c -1", ImagePrompt("a cat", scale=-1.0)),
        ("well--known -- cat --W 64", ImagePrompt("well--known -- cat", width=64)),
    ],
)
def test_lines(line: str, expected: ImagePrompt) -> None:
    assert parse(line) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a --w 500", "prompt 1: width 500: must be a multiple of 16, such as 496 or 512"),
        ("a --h 48", "prompt 1: height 48: must be at least 64 pixels"),
        ("a --s 0", "prompt 1: steps 0: must be 1 to 1000"),
        ("a --g -1", "prompt 1: --g -1: must be at least 0"),
        ("a --seed 3", "prompt 1: --seed: write --d for the seed, --s for the steps"),
        ("a --d 1,2", "prompt 1: --d 1,2: a whole number, 0 or more, is needed"),
        ("a --m 1,x", "prompt 1: --m 1,x: a number is needed"),
        ("a --l 3", "prompt 1: unknown option --l; options are --w, --h, --s, --d, --g, --m, --n, --c"),
        ("a --negativ_prompt x", 'prompt 1: unknown option --negativ_prompt (did you mean "negative_prompt"?)'),
    ],
)
def test_mistakes(line: str, said: str) -> None:
    with pytest.raises(UserError) as raised:
        parse(line)
    assert str(raised.value).startswith(said)
    assert "\n" not in str(raised.value)
