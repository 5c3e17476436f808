"""Emphasis in prompts and weighted captions, in the syntax of the common web interfaces.

``(word)`` multiplies the weight by 1.1, ``[word]`` divides it by 1.1, ``(word:1.3)`` multiplies it by 1.3; all nest.
``\\(``, ``\\)``, ``\\[``, ``\\]`` and ``\\\\`` stand for the characters themselves.
"""

from __future__ import annotations

import re

ROUND_FACTOR = 1.1
SQUARE_FACTOR = 1 / 1.1

_TOKEN = re.compile(
    r"""
    \\[()\[\]\\]                              # an escaped character
    | : \s* (?P<weight> [+-]? (?:\d+\.?\d*|\.\d+) ) \s* \)   # the end of "(text:weight)"
    | [()\[\]]
    | [^\\()\[\]:]+ | .                       # plain text
    """,
    re.VERBOSE | re.DOTALL,
)


def parse_emphasis(text: str) -> list[tuple[str, float]]:
    """Split a prompt into pieces of equal weight, in order; weights are 1.0 without emphasis.

    A bracket that is never closed counts to the end of the prompt; one that closes nothing is plain text. The result
    is never empty: an empty prompt is one empty piece.
    """
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where each open bracket's pieces begin

    def multiply(start: int, factor: float) -> None:
        pieces[start:] = [(piece, weight * factor) for piece, weight in pieces[start:]]

    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in opened:
            opened[token].append(len(pieces))
        elif match["weight"] is not None and opened["("]:
            multiply(opened["("].pop(), float(match["weight"]))
        elif token == ")" and opened["("]:
            multiply(opened["("].pop(), ROUND_FACTOR)
        elif token == "]" and opened["["]:
            multiply(opened["["].pop(), SQUARE_FACTOR)
        elif len(token) == 2 and token[0] == "\\":
            pieces.append((token[1], 1.0))
        else:
            pieces.append((token, 1.0))
    for bracket, factor in (("(", ROUND_FACTOR), ("[", SQUARE_FACTOR)):
        for start in opened[bracket]:
            multiply(start, factor)
    return _joined(pieces) or [("", 1.0)]


def _joined(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Join neighbours of equal weight, so that words are not split."""
    joined: list[tuple[str, float]] = []
    for piece, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + piece, weight)
        else:
            joined.append((piece, weight))
    return joined
