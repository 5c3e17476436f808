"""``--help``: a short page with an example and the topics; ``--help TOPIC``, ``--help OPTION``, ``--help all``."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from library.config.declaration import Declaration
from library.errors import did_you_mean

ALL = "all"
_COMMANDS = ("accelerate launch ", "python ")


def split_doc(doc: str | None) -> tuple[str, str, str]:
    """Split a script's docstring: a summary line, an example command, and the rest."""
    summary, _, rest = (doc or "").strip().partition("\n\n")
    paragraphs = rest.split("\n\n")
    # from Python 3.13 on, an example that ends a docstring has lost its indentation
    examples = [text for text in paragraphs if text.startswith("    ") or text.lstrip().startswith(_COMMANDS)]
    more = "\n\n".join(text for text in paragraphs if text not in examples).strip()
    example = textwrap.indent(textwrap.dedent("\n\n".join(examples)), "    ")
    return " ".join(summary.split()), example, more


def marks(own: Declaration) -> dict[str, str]:
    """Return the help's marks of options that are refused, or never have an effect."""
    unused = {name: f"[no effect {why}]" for name, why in own.unused.items()}
    return unused | {name: f"[refused: {why}]" for name, why in own.refused.items()}


class HelpAction(argparse.Action):
    """``--help [TOPIC]``."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(
            option_strings,
            dest=dest,
            default=argparse.SUPPRESS,
            nargs="?",
            metavar="TOPIC",
            help="show this page, the options of a topic, one option, or all",
        )

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        topics = topics_of(parser)
        asked = str(values).lstrip("-") if values else ""
        option = next((a for a in parser._actions if a.dest == asked and a.option_strings), None)
        if not asked:
            parser._print_message(front_page(parser), sys.stdout)
        elif asked == ALL:
            parser._print_message(_pages(parser, list(topics.values())), sys.stdout)
        elif asked in topics:
            parser._print_message(_pages(parser, [topics[asked]]), sys.stdout)
        elif option is not None:
            parser._print_message(_page(parser, None, [option]), sys.stdout)
        else:
            names = [ALL, *topics, *(action.dest for action in parser._actions if action.option_strings)]
            parser.error(f"--help {values}: no such topic or option{did_you_mean(asked, names)}")
        parser.exit()


def topics_of(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the parser's visible sections, by the word for ``--help TOPIC``."""
    sections = (s for s in parser._action_groups if any(_is_shown(action) for action in s._group_actions))
    return {getattr(section, "topic", _word(section.title or "")): section for section in sections}


def front_page(parser: argparse.ArgumentParser) -> str:
    """Return the page of ``--help`` alone: usage, example, topics."""
    topics = {word: section for word, section in topics_of(parser).items() if section is not parser._optionals}
    width = max((len(word) for word in topics), default=0)
    lines = [f"usage: {parser.prog} [options]", "", parser.description or "", ""]
    if parser.epilog:
        lines += ["example:", "", parser.epilog.strip("\n"), ""]
    lines.append("options, by topic; --help TOPIC, --help OPTION or --help all explains them:")
    lines.append("")
    for word, section in topics.items():
        count = sum(map(_is_shown, section._group_actions))
        lines.append(f"    {word.ljust(width)}  {count:3d}  {section.title or ''}")
    more = getattr(parser, "more", "")
    return "\n".join([*lines, *(["", more] if more else [])]) + "\n"


def _pages(parser: argparse.ArgumentParser, sections: Sequence[Any]) -> str:
    pages = [_page(parser, s.title, s._group_actions) for s in sections if s is not parser._optionals]
    return "\n".join(pages)


def _page(parser: argparse.ArgumentParser, title: str | None, actions: Sequence[argparse.Action]) -> str:
    formatter = parser._get_formatter()
    formatter.start_section(title)
    formatter.add_arguments(actions)
    formatter.end_section()
    return formatter.format_help()


def _is_shown(action: argparse.Action) -> bool:
    return action.help is not argparse.SUPPRESS


def _word(title: str) -> str:
    return re.sub(r"\W+", "_", title.lower()).strip("_")


def topic_word(group: type, groups: Mapping[str, type] | Sequence[type]) -> str:
    """Return the word for a group: its name among all options, or that of its class."""
    if isinstance(groups, Mapping):
        return next(name for name, found in groups.items() if found is group)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", group.__name__.removesuffix("Options")).lower()
