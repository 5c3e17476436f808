"""A page to look through: each image with its caption, and what may be wrong with it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path

from library.data.report.page import thumbnail
from library.plain_text import printable

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1000px;padding:0 1em;color:#222;background:#fff}
table{border-collapse:collapse;width:100%}td{border-top:1px solid #ccc;padding:.5em .6em;vertical-align:top;
overflow-wrap:anywhere}td:first-child{width:170px}img{display:block;max-width:160px}
.name{color:#666;font-size:12px}.doubt{color:#8a5a00;font-weight:600}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181a1d}td{border-color:#444}.name{color:#aaa}
.doubt{color:#f0b849}}
"""

#: words that stand twice in a row as a sign of a model that repeats itself
_REPEATED = 3


def doubts(captions: Mapping[Path, str | None]) -> dict[Path, list[str]]:
    """Return what may be wrong with captions; nothing for those that look right."""
    counts = Counter(text for text in captions.values() if text)
    return {path: found for path, text in captions.items() if (found := list(_doubts(text, counts)))}


def _doubts(text: str | None, counts: Mapping[str, int]) -> Iterator[str]:
    if text is None:
        yield "no caption"
        return
    if not text:
        yield "empty"
        return
    if counts[text] > 1:
        yield f"the same for {counts[text]} images"
    words = re.findall(r"\w+", text.lower())
    if any(
        words[start : start + _REPEATED] == words[start + _REPEATED : start + 2 * _REPEATED]
        for start in range(len(words) - 2 * _REPEATED + 1)
    ):
        yield "repeats itself"
    if len(words) > 8 and text[-1] not in ".!?\"')" and "," not in text[-40:]:
        yield "ends within a sentence; more --max_new_tokens may help"


def review_page(captions: Mapping[Path, str | None], title: str) -> str:
    """Return the page's HTML; it loads nothing from elsewhere. Captions that may be wrong come first.

    Args:
        captions: of each image; ``None`` where there is none.
    """
    doubted = doubts(captions)
    order: Sequence[Path] = sorted(captions, key=lambda path: (path not in doubted, path))
    with ThreadPoolExecutor(4) as pool:
        thumbnails = list(pool.map(lambda path: thumbnail(path, None), order))
    parts = [
        "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>",
        f'<meta http-equiv=Content-Security-Policy content="{_POLICY}">',
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1><p>{len(captions)} images, {len(doubted)} to look at first.</p><table>",
    ]
    for path, small in zip(order, thumbnails, strict=True):
        image = f'<img src="{small}" alt="">' if small else "<span class=doubt>unreadable</span>"
        marks = "".join(f"<p class=doubt>{_text(doubt)}</p>" for doubt in doubted.get(path, ()))
        parts.append(
            f"<tr><td>{image}<td><p class=name>{_text(path)}</p>{marks}<p>{_text(captions[path] or '')}</p></tr>"
        )
    return "\n".join([*parts, "</table></body></html>\n"])


def _text(value: object) -> str:
    return escape(printable(str(value)))
