"""Take words out of captions that models read in images: signs, letters, numbers on clothes.

Each rule is a pattern; what it matches is removed. They are applied in this order.
"""

from __future__ import annotations

import re

_QUOTED = r"""(?:"[^"]*"|'[^']*'|[^\s"']+)"""
_PLACE = r"""(?:\s+(?:is\s+)?(?:on|in)\s+(?:the|her|their|him)\s+\w+)?"""

RULES = tuple(
    re.compile(pattern)
    for pattern in (
        rf"\s*\b(?:has|with|and)\s+the\s+(?:words?|letters?|name)\s+{_QUOTED}{_PLACE}",
        r"""\s*(?:\bwith\s+a\s+sign\s+)?\bthat\s+says\s+(?:"[^"]*"|[^\s"']+)(?:\s+on\s+it)?""",
        r"""\s*(?:\bwith\s+a\s+sign\s+)?\bthat\s+says\s+(?:'[^']*'|[^\s"']+)(?:\s+on\s+it)?""",
        r"\s*\bwith\s+the\s+number\s+\d+\s+on\s+(?:it\b|\w+\s+\w+)",
        r'\s*\bwith\s+the\s+words\s+"',
        r"\s*\bword\s+\w+\s+on\s+it\b",
        r"\s*\bthat\s+says\s+the\s+word\s+\w+\s+on\s+it\b",
        r"""\s*\bthat\s+says\s*'\s*the\s+word\s+"(?:\s*on\s+it)?""",
    )
)


def without_written_words(caption: str) -> str:
    """Return the caption without what it says of words in the image."""
    for rule in RULES:
        caption = rule.sub("", caption)
    return re.sub(r"\s+", " ", caption).strip()
