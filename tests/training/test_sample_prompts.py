"""Sample prompts may be edited while a run goes on."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

from library.inference.failures import NotFinite
from library.inference.prompt_file import read_prompt_file
from library.inference.prompt_line import SamplePrompt
from library.interrupt import Stopped
from library.training.previews import generate_previews
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


# ---- generating them ----


def generated(failures: dict[str, Exception], caplog: pytest.LogCaptureFixture, **processes: object) -> list[str]:
    def generate(prompts: Sequence[SamplePrompt], paths: Sequence[Path | None]) -> list[str]:
        batches.append([prompt.prompt for prompt in prompts])
        for prompt in prompts:
            if prompt.prompt in failures:
                raise failures[prompt.prompt]
        return batches[-1]

    batches: list[list[str]] = []
    prompts = [SamplePrompt("cat", seed=1), SamplePrompt("dog", width=64), SamplePrompt("bird", seed=2)]
    with caplog.at_level(logging.INFO):
        found = generate_previews(
            prompts, generate, lambda index, prompt: Path(f"{index}.png"), **{"rank": 0, "world_size": 1, **processes}
        )
    made.extend(batches)
    return [f"{name} {image}" for name, image in found.items()]


made: list[list[str]] = []


def test_images_of_equal_settings_are_generated_together(caplog: pytest.LogCaptureFixture) -> None:
    made.clear()
    assert generated({}, caplog, batch_size=2) == ["sample_0 cat", "sample_1 dog", "sample_2 bird"]
    assert made == [["cat", "bird"], ["dog"]]
    made.clear()
    found = generated({"bird": NotFinite("no image: the weight x")}, caplog, batch_size=2)
    assert found == ["sample_0 cat", "sample_1 dog"], "the others of its batch are not left out"
    assert made == [["cat", "bird"], ["cat"], ["bird"], ["dog"]]


def test_an_interrupt_leaves_the_images_that_are_complete(caplog: pytest.LogCaptureFixture) -> None:
    assert generated({"dog": Stopped()}, caplog) == ["sample_0 cat"]
    assert "sample images: stopped after 1 of 3" in caplog.text


def test_an_image_that_is_not_finite_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    assert generated({"dog": NotFinite("no image: the weight x")}, caplog) == ["sample_0 cat", "sample_2 bird"]
    assert 'sample image of "dog" left out: no image: the weight x' in caplog.text
