"""``docs/options/`` is what the options say, and ``docs/troubleshooting.md`` quotes what the code says."""

from __future__ import annotations

import ast
import dataclasses
import re
from functools import lru_cache
from pathlib import Path

import pytest

from library.config.document import FOLDER, is_number, pages, write
from library.training.kinds.adapter_options import TrainNetworkOptions
from library.training.kinds.full_options import FullOptions

ROOT = Path(__file__).parents[2]
FIELDS = [f for group in TrainNetworkOptions.groups().values() for f in dataclasses.fields(group)]


def test_the_committed_pages_are_current() -> None:
    committed = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    stale = sorted(name for name, text in pages().items() if committed.get(name) != text)
    stale += sorted(set(committed) - set(pages()))
    assert not stale, f"run: python -m library.config.document   (docs/options/ is not current: {', '.join(stale)})"


def test_every_option_is_on_a_page(tmp_path: Path) -> None:
    (tmp_path / "of_a_group_that_is_gone.md").touch()
    write(tmp_path)
    assert {path.name for path in tmp_path.glob("*.md")} == set(pages())
    # the scripts' own pages name options once more that are not for them
    groups = [name for name in TrainNetworkOptions.groups() if f"{name}.md" in pages()]  # some share their kind's page
    text = "".join((tmp_path / f"{name}.md").read_text(encoding="utf-8") for name in groups)
    for field in FIELDS:
        (row,) = re.findall(rf"^\| `--{field.name}` \|.*$", text, re.MULTILINE)
        assert len(re.findall(r"(?<!\\)\|", row)) == 7, row
    (row,) = re.findall(r"^\| `--dynamo_backend` .*$", text, re.MULTILINE)
    assert "`aot_eager`" in row and "`inductor`" in row and "without --torch_compile" in row


def test_every_number_has_a_unit() -> None:
    for field in FIELDS:
        if is_number(field) and field.metadata["unit"] is None:
            pytest.fail(f"--{field.name}: say with unit= what its number counts or measures")


# ---- docs/troubleshooting.md ----

TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
SOURCES = ("library", "networks")


@lru_cache(maxsize=1)
def texts_of_the_source() -> list[str]:
    """Every string of the source as one template, with ``...`` where it puts values in."""
    found = []
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"%[sdg]|%\.\df", "...", node.value))
    return found


def quoted_messages() -> list[str]:
    """The page quotes messages as headings, ``### `message` ``."""
    return re.findall(r"^#+ `(.+)`$", TROUBLESHOOTING.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_page_quotes_enough() -> None:
    assert len(quoted_messages()) >= 40
    assert len(set(quoted_messages())) == len(quoted_messages())


@pytest.mark.parametrize("message", quoted_messages())
def test_quoted_messages_are_those_of_the_source(message: str) -> None:
    assert any(message in text for text in texts_of_the_source()), (
        f"docs/troubleshooting.md quotes a message that no source file has: {message}"
    )


@pytest.mark.parametrize(
    "page",
    [
        "troubleshooting.md",
        "options/README.md",
        "train_network.md",
        "sdxl_train_network.md",
        "hub.md",
        "multi_gpu.md",
    ],
)
def test_options_named_on_the_pages_exist(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    elsewhere = {
        "num_cpu_threads_per_process",
        "num_processes",
        "multi_gpu",
        "nproc_per_node",
        "help",
        "cpu",
    }  # of others
    elsewhere |= {"n", "w", "h", "d", "l", "s"}  # of prompt lines
    elsewhere |= {"sdxl"}  # of the caching tools
    elsewhere |= {field.name for field in dataclasses.fields(FullOptions)} | {"blocks_to_swap"}  # of whole models
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9_]*)", text))
    assert named - elsewhere <= {field.name for field in FIELDS}
