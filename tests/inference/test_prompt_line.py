"""Prompt lines and files: what is prompt, what is an option, and what is said about mistakes."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from library.errors import UserError
from library.inference.feature_options.deep_shrink import PROMPT_OPTIONS as DEEP_SHRINK
from library.inference.prompt_file import read_image_prompts, read_prompt_file
from library.inference.prompt_line import (
    DDPM_FIELDS,
    TRAINING_OPTIONS,
    ImagePrompt,
    SamplePrompt,
    family_options,
    parse_image_prompt,
    parse_prompt_line,
    without_idle_settings,
)

EVERYTHING = frozenset(option.field for option in (*TRAINING_OPTIONS, *family_options())) | {"prompt"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a cat", SamplePrompt("a cat")),
        ("  a cat  ", SamplePrompt("a cat")),
        # the prompt's own words look like options without their dashes
        ("n girl --w 64", SamplePrompt("n girl", width=64)),
        ("w 512", SamplePrompt("w 512")),
        ("s 20 h 64", SamplePrompt("s 20 h 64")),
        ("l 3 --l 4", SamplePrompt("l 3", scale=4.0)),
        ("d 7, 1girl --n s 5, w 3 --d 9", SamplePrompt("d 7, 1girl", negative_prompt="s 5, w 3", seed=9)),
        # dashes that are no options
        ("a cat -- on a mat --w 64", SamplePrompt("a cat -- on a mat", width=64)),
        ("well--known, x-ray - film --h 64", SamplePrompt("well--known, x-ray - film", height=64)),
        # an empty prompt
        ("--w 64 --n blurry", SamplePrompt("", negative_prompt="blurry", width=64)),
        # every option
        (
            "p --n a b --w 72 --h 80 --d 1 --s 3 --l 7.5 --ss k_euler_a",
            SamplePrompt("p", "a b", 72, 80, 3, 7.5, seed=1, sample_sampler="k_euler_a"),
        ),
        (
            "p --g 3.5 --cn dir/c d.png --ctr 0.25 --rcfg 1.0 --fs 3.0",
            SamplePrompt(
                "p",
                guidance_scale=3.5,
                controlnet_image="dir/c d.png",
                own={"cfg_trunc_ratio": 0.25, "renorm_cfg": 1.0, "flow_shift": 3.0},
            ),
        ),
        ("p --l -1.5", SamplePrompt("p", scale=-1.5)),
        ("p --l 1e1", SamplePrompt("p", scale=10.0)),
        ("p --L 2 --W 64 --SS ddim", SamplePrompt("p", scale=2.0, width=64, sample_sampler="ddim")),
        ("p --w 64 --w 128", SamplePrompt("p", width=128)),
        ("p --n one --n two", SamplePrompt("p", negative_prompt="two")),
        ("p\t--w  64", SamplePrompt("p", width=64)),
        ("p --n", SamplePrompt("p", negative_prompt="")),
        ("猫 --n 犬", SamplePrompt("猫", negative_prompt="犬")),
    ],
)
def test_line(line: str, expected: SamplePrompt) -> None:
    assert parse_prompt_line(line, used=EVERYTHING) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("p --q 1", ["unknown option --q", "--w"]),
        ("p --ws 64", ["unknown option --ws"]),
        ("p --w64", ["unknown option --w64"]),
        ("p --rcgf 1", ["unknown option --rcgf", 'did you mean "rcfg"']),
        ("p --w wide", ["--w wide", "whole number"]),
        ("p --w 64px", ["--w 64px", "whole number"]),
        ("p --w -64", ["--w -64", "whole number"]),
        ("p --w", ["--w: ", "whole number"]),
        ("p --d 1,2", ["--d 1,2", "whole number"]),
        ("p --d 99999999999999999999", ["--d", "at most"]),
        ("p --l big", ["--l big", "number"]),
        ("p --l nan", ["--l nan", "finite"]),
        ("p --ss eulr_a", ["--ss eulr_a", 'did you mean "euler_a"']),
        ("p --cn", ["--cn", "file"]),
    ],
)
def test_mistakes_name_the_place(line: str, said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse_prompt_line(line, where="prompts.txt:3", used=EVERYTHING)
    assert str(error.value).startswith("prompts.txt:3: ")
    for text in said:
        assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("multiple", "given", "used"), [(8, 64, 64), (8, 71, 64), (8, 10, 64), (16, 520, 512), (16, 17, 64), (8, 520, 520)]
)
def test_sizes_are_rounded_down_with_a_warning(
    caplog: pytest.LogCaptureFixture, multiple: int, given: int, used: int
) -> None:
    with caplog.at_level(logging.WARNING):
        prompt = parse_prompt_line(f"p --w {given} --h {given}", where="here", size_multiple=multiple)
    assert (prompt.width, prompt.height) == (used, used)
    assert len(caplog.messages) == (0 if given == used else 2)
    assert all("here" in message and str(used) in message for message in caplog.messages)


@pytest.mark.parametrize(("given", "used"), [(0, 1), (1, 1), (1000, 1000), (5000, 1000)])
def test_steps_are_limited_with_a_warning(caplog: pytest.LogCaptureFixture, given: int, used: int) -> None:
    assert parse_prompt_line(f"p --s {given}").sample_steps == used
    assert bool(caplog.messages) == (given != used)


def test_settings_the_family_lacks_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    found = parse_prompt_line("p --g 3.5 --w 64", where="f.txt:1")
    assert (found.guidance_scale, found.width) == (None, 64)  # and left out
    assert caplog.messages == ["f.txt:1: guidance_scale (--g) has no effect with this model"]
    caplog.clear()
    parse_prompt_line("p --g 3.5", used=DDPM_FIELDS | {"guidance_scale"})
    assert not caplog.messages


def test_what_a_model_has_no_use_for_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    prompts = [
        parse_prompt_line(line, used=EVERYTHING) for line in ("p --g 3.5 --n q", "p --g 0 --n q --l 4", "p --g 2")
    ]
    used = without_idle_settings(prompts, {"guidance_scale": "with this model"}, scale=1.0)
    assert [prompt.guidance_scale for prompt in used] == [None] * 3 and used[1].scale == 4.0
    assert caplog.messages == [
        "--g of 2 sample prompts has no effect with this model",
        "--n of a sample prompt has no effect at a guidance scale of 1; add --l 4, say",
    ]
    caplog.clear()
    assert without_idle_settings(prompts, {}, scale=7.5) == tuple(prompts) and not caplog.messages
    without_idle_settings(prompts[1:2], {"guidance_scale": "with this model"}, scale=1.0)
    assert not caplog.messages


def test_defaults() -> None:
    defaults = SamplePrompt("unused", width=128, scale=3.0)
    assert parse_prompt_line("p --w 64", defaults) == SamplePrompt("p", width=64, scale=3.0)


# ---- files ----


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\ufeff# comment\n\n n girl --w 64 \n  # another\nb --l -2\n", encoding="utf-8")
    assert read_prompt_file(path) == [SamplePrompt("n girl", width=64), SamplePrompt("b", scale=-2.0)]


def test_text_file_error_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("# comment\n\nfine --w 64\nbad --w x\n")
    with pytest.raises(UserError) as error:
        read_prompt_file(path)
    assert str(error.value).startswith(f"{path}:4: --w x")


def test_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(
        '[prompt]\nwidth = 64\nnegative_prompt = "bad"\nscale = 5\n'
        '[[prompt.subset]]\nprompt = "n girl"\nseed = 3\n'
        '[[prompt.subset]]\nprompt = "b --w 1"\nwidth = 128\nsample_sampler = "euler"\nscale = -1.5\n'
    )
    assert read_prompt_file(path) == [
        SamplePrompt("n girl", "bad", width=64, seed=3, scale=5.0),
        # in a table the text is the prompt, whole
        SamplePrompt("b --w 1", "bad", width=128, scale=-1.5, sample_sampler="euler"),
    ]


def test_toml_file_of_one_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text('[prompt]\nprompt = "a"\n')
    assert read_prompt_file(path) == [SamplePrompt("a")]


def test_json_file(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(["s 1 --s 2", {"prompt": "b", "height": 72, "seed": None, "scale": 2}]))
    assert read_prompt_file(path) == [SamplePrompt("s 1", sample_steps=2), SamplePrompt("b", height=72, scale=2.0)]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "# nothing\n", ["a.txt", "no prompt"]),
        ("a.toml", "", ["no prompt"]),
        ("a.json", "[]", ["no prompt"]),
        ("a.yaml", "a", ["a.yaml", ".txt, .toml or .json"]),
        ("a.toml", "[prompt\n", ["a.toml", "not valid TOML", "line 1"]),
        ("a.toml", "[prompts]\n", ['"prompts"', 'did you mean "prompt"']),
        ("a.toml", 'prompt = "a"', ["must be a table"]),
        ("a.toml", "[prompt]\nsubset = 1", ["[[prompt.subset]]"]),
        ("a.toml", "[prompt]\nwidth = 64\n[[prompt.subset]]\nseed = 1", ["[[prompt.subset]] 1", 'has no "prompt"']),
        ("a.toml", '[[prompt.subset]]\nprompt = "a"\nwidht = 64', ['unknown key "widht"', 'did you mean "width"']),
        ("a.toml", '[[prompt.subset]]\nprompt = "a"\nwidth = true', ["width = true", "number"]),
        ("a.toml", '[[prompt.subset]]\nprompt = "a"\nwidth = 64.5', ["width = 64.5", "whole number"]),
        ("a.toml", "[[prompt.subset]]\nprompt = 5", ["prompt = 5", "text"]),
        ("a.json", '["a",\nb]', ["a.json:2", "not valid JSON"]),
        ("a.json", '{"prompt": "a"}', ["list"]),
        ("a.json", "[5]", ["item 1"]),
        ("a.json", '["a", "b --w x"]', ["item 2", "--w x"]),
        ("a.json", '[{"prompt": "a", "sample_sampler": "dim"}]', ["item 1", 'did you mean "ddim"']),
    ],
)
def test_file_mistakes(tmp_path: Path, name: str, text: str, said: list[str]) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        read_prompt_file(tmp_path / name)
    for part in [name, *said]:
        assert part in str(error.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.txt: no such prompt file"):
        read_prompt_file(tmp_path / "gone.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00p")
    with pytest.raises(UserError, match=r"b\.txt: not UTF-8"):
        read_prompt_file(tmp_path / "b.txt")


# ---- gen_img.py ----


def test_image_prompt_line() -> None:
    assert parse_image_prompt("n girl --n bad --w 64 --h 72 --s 3 --l -2 --d 1,2, 3 --am 0.5,-1") == ImagePrompt(
        "n girl", "bad", 64, 72, 3, -2.0, seeds=(1, 2, 3), multipliers=(0.5, -1.0)
    )
    assert parse_image_prompt("d 5") == ImagePrompt("d 5")
    own = parse_image_prompt("a --t 0.5 --nl none --f cat.png")
    assert own == ImagePrompt("a", file_name="cat.png", own={"strength": 0.5, "negative_scale": None})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("p --nl x", "--nl x: a number"),
        ("p --t 1.5", "--t 1.5: a number from 0 to 1"),
        ("p --DSR 2", "--dsr 2: a number above 0"),
        ("p --ow 6.5", "--ow 6.5: a whole number"),
        ("p --f", "--f: a file"),
        ("p --f ../cat.png", "--f ../cat.png: a name below --outdir"),
        ("p --f /cat.png", "--f /cat.png: a name below --outdir"),
        ("p --ss ddim", "unknown option --ss"),
        ("p --d 1,x", "whole number"),
        ("p --am", "number"),
    ],
)
def test_image_prompt_mistakes(line: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_image_prompt(line, options=DEEP_SHRINK)


def test_image_prompt_file(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("# c\na --d 1\n\nb --q 1\n")
    with pytest.raises(UserError) as error:
        read_image_prompts(path)
    assert str(error.value).startswith(f"{path}:4: unknown option --q")
    path.write_text("# c\na --d 1\n")
    assert read_image_prompts(path) == [ImagePrompt("a", seeds=(1,))]


def test_does_not_import_torch() -> None:
    code = "import sys, library.inference.prompt_file; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
