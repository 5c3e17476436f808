"""Sample prompts may be edited while a run goes on."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

import pytest

from library.inference.prompt_line import SamplePrompt, read_prompt_file
from library.training.sample_prompts import SamplePrompts


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("cat --w 64\ndog --w 99")
    return path


def prompts_of(file: Path, encoded: Collection[str] | None = None) -> SamplePrompts:
    def read() -> tuple[SamplePrompt, ...]:
        return tuple(read_prompt_file(file))

    return SamplePrompts(read(), read, texts_of=lambda prompt: (prompt.prompt,), encoded=encoded)


def texts(prompts: SamplePrompts) -> list[str]:
    return [prompt.prompt for prompt in prompts.current()]


def test_edits_are_taken_up(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = prompts_of(file)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert texts(prompts) == ["cat", "dog"]
        assert caplog.text == "", "nothing is said again while nothing changes"
        file.write_text("bird --w 65\n")
        assert texts(prompts) == ["bird"] == texts(prompts)
    assert caplog.text.count("width 65") == 1 and caplog.text.count("edited, 1 are used") == 1


def test_mistakes_do_not_end_a_run(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = prompts_of(file)
    for broken in ("cat --wd 64", "", None):
        file.unlink() if broken is None else file.write_text(broken)
        assert texts(prompts) == ["cat", "dog"] == texts(prompts)
    assert caplog.text.count("sample images keep the prompts before") == 3
    file.write_text("dog")
    assert texts(prompts) == ["dog"]


def test_new_texts_need_encoders(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = prompts_of(file, encoded={"cat", "dog"})
    file.write_text("dog --w 128\nbird")
    assert [(p.prompt, p.width) for p in prompts.current()] == [("dog", 128)]
    assert 'sample prompt "bird": left out' in caplog.text
