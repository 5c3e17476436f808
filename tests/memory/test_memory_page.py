"""docs/memory.md agrees with the recorded traces and with the plan's choices."""

from __future__ import annotations

import re

import pytest

from tests.memory.table import PAGE, written


def test_the_page_has_the_values_of_the_records() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert written(page) == page, "run: python tests/memory/table.py"


#: page of a family -> its models, in the order of the columns of its table
MODELS = {
    "sd3.md": ("Stable Diffusion 3 medium", "Stable Diffusion 3.5 large"),
    "hunyuan_image.md": ("HunyuanImage-2.1",),
}


def cells(text: str, first: str) -> list[str]:
    """The row of a table that begins with this cell."""
    return next(line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {first} |"))


@pytest.mark.parametrize("name", MODELS)
def test_pages_of_families_say_the_same(name: str) -> None:
    """What a command with ``--gradient_checkpointing`` needs more, for each size of GPU."""
    page, plan = ((PAGE.parent / file).read_text(encoding="utf-8") for file in (name, "memory.md"))
    planned = plan.partition("<!-- planned -->")[2]
    sizes = [int(size.removesuffix(" GB")) for size in cells(planned, "model")[1:]]
    rows = [line for line in page.splitlines() if re.match(r"\| \d+ GB", line)]
    assert rows
    for row in rows:
        gpus, *columns = row.strip("| ").split(" | ")
        for size in map(int, re.findall(r"(\d+) GB", gpus)):
            for model, column in zip(MODELS[name], columns, strict=True):
                options = cells(planned, model)[1 + sizes.index(size)].partition(":")[0].strip("`")
                more = options.removeprefix("--gradient_checkpointing").strip()
                assert column.strip("`") == (more or "nothing more"), (model, size)
