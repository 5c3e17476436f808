"""Emphasis syntax of prompts."""

from __future__ import annotations

import pytest

from library.architectures.common.emphasis import parse_emphasis

ROUND, SQUARE = 1.1, 1 / 1.1


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", [("", 1.0)]),
        ("a cat", [("a cat", 1.0)]),
        ("(abc), [abc], (abc:1.23)", [("abc", ROUND), (", ", 1.0), ("abc", SQUARE), (", ", 1.0), ("abc", 1.23)]),
        ("a (cat)", [("a ", 1.0), ("cat", ROUND)]),
        ("a ((cat))", [("a ", 1.0), ("cat", ROUND**2)]),
        ("[cat] x", [("cat", SQUARE), (" x", 1.0)]),
        ("(cat:1.3), dog", [("cat", 1.3), (", dog", 1.0)]),
        ("(cat: .5 )", [("cat", 0.5)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        (r"\(cat\) \[x\] \\", [("(cat) [x] \\", 1.0)]),
        (r"(a \(b\):1.2)", [("a (b)", 1.2)]),
        ("a:b", [("a:b", 1.0)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
        ("x :1.3) y", [("x :1.3) y", 1.0)]),
        ("a) b]", [("a) b]", 1.0)]),
        ("(never closed", [("never closed", ROUND)]),
        ("a [b (c", [("a ", 1.0), ("b ", SQUARE), ("c", SQUARE * ROUND)]),
        ("([x])", [("x", 1.0)]),
        ("12:30 (see 1:2)", [("12:30 ", 1.0), ("see 1", 2.0)]),
    ],
)
def test_pieces(text: str, pieces: list[tuple[str, float]]) -> None:
    found = parse_emphasis(text)
    assert [piece for piece, _ in found] == [piece for piece, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])
