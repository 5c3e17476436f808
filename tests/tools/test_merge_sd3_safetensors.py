"""The parts of Stable Diffusion 3 in one file, which training then reads as a whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.sd3 import SD3
from library.files.safetensors_io import read_header
from tests.fixtures.tiny_sd3 import make_tiny_sd3
from tools.merge_sd3_safetensors import main, setup_parser


def run(*words: object) -> None:
    main(setup_parser().parse_args([str(word) for word in words]))


def test_parts_apart_become_the_whole_model(tmp_path: Path) -> None:
    whole, apart = make_tiny_sd3(tmp_path / "whole"), make_tiny_sd3(tmp_path / "apart", apart=True)
    tensors = load_file(apart.path)
    bare = {name.removeprefix("model.diffusion_model."): t for name, t in tensors.items() if "joint" in name}
    rest = {name: t for name, t in tensors.items() if name.startswith("model.") and "joint" not in name}
    save_file({**bare, **rest}, tmp_path / "dit.safetensors", {"modelspec.title": "mine"})
    vae = {n.removeprefix("first_stage_model."): t for n, t in tensors.items() if n.startswith("first_stage_model.")}
    save_file(vae, tmp_path / "vae.safetensors")
    encoders = [word for name, path in apart.apart.items() for word in (f"--{name}", path)]
    target = tmp_path / "merged.safetensors"
    run("--dit", tmp_path / "dit.safetensors", "--vae", tmp_path / "vae.safetensors", *encoders, "--output", target)
    expected, found = load_file(whole.path), load_file(target)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert read_header(target).metadata == {"modelspec.title": "mine"}
    checkpoint = SD3.inspect(str(target), vae=None, tokenizer_cache_dir=str(whole.tokenizer_cache_dir))
    assert checkpoint.has_t5


def test_precision_and_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_tiny_sd3(tmp_path / "m", t5=False)
    apart = make_tiny_sd3(tmp_path / "apart", apart=True)
    small, large, out = apart.apart["clip_l"], apart.apart["clip_g"], tmp_path / "out.safetensors"
    target = tmp_path / "half.safetensors"
    run("--dit", made.path, "--save_precision", "fp16", "--output", target)
    assert {tensor.dtype for tensor in load_file(target).values()} == {torch.float16}
    for words, message in (
        (("--dit", tmp_path / "none.safetensors"), "no such file"),
        (("--dit", made.path, "--save_precision", "fp17"), "--save_precision fp17: unknown"),
        (("--dit", made.path, "--output", made.path), "--output"),
        (("--dit", apart.path, "--clip_l", large, "--clip_g", small, "--output", out), "exchange them"),
        (("--dit", apart.path, "--t5xxl", small, "--output", out), "not this text encoder (no shared.weight)"),
        (("--dit", apart.path, "--clip_l", apart.path, "--output", out), "not this text encoder"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(*words)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
