"""Clean captions as CLIP was trained on them.

OpenAI's tokenizer (and OpenCLIP's) fixes text with ftfy and resolves HTML entities before it splits words; see
``basic_clean`` in https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py. Curly quotes, ligatures,
full-width letters and ``&amp;`` so become the plain characters that the vocabulary has words for. The rest of that
function, lower case and white space, is done by the tokenizers themselves.
"""

from __future__ import annotations

import html


def clean_text(text: str) -> str:
    """The text as CLIP's tokenizer expects it; plain ASCII without entities is returned as it is."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


def is_changed_by_cleaning(text: str) -> bool:
    """Whether CLIP sees other words after cleaning; white space alone makes no difference to it."""
    return clean_text(text).split() != text.split()
