"""``--attn_mode`` and ``--split_attn`` of gen_img.py, and the older flags beside them."""

from __future__ import annotations

import pytest
import torch

import gen_img
from library.architectures.sd import SD
from library.errors import UserError
from library.inference.loading import load_models
from library.inference.options import check_options, idle_options, image_options
from tests.fixtures.tiny_sd import MadeCheckpoint


def given(*words: str):  # type: ignore[no-untyped-def]
    return image_options(gen_img.setup_parser().parse_args(["--ckpt", "m.safetensors", "--prompt", "cat", *words]))


@pytest.mark.parametrize(
    ("words", "kind", "backend"),
    [
        ((), "AttnProcessor2_0", None),
        (("--attn_mode", "sdpa"), "AttnProcessor2_0", None),
        (("--split_attn",), "UnetAttention", "torch"),
        (("--attn_mode", "flex"), "UnetAttention", "flex"),
    ],
)
def test_the_unet_attends_as_asked(
    folder: MadeCheckpoint, words: tuple[str, ...], kind: str, backend: str | None
) -> None:
    options = given(*words)
    check_options(options)
    checkpoint = SD.inspect(
        str(folder.path), v2=False, v_parameterization=False, vae=None,
        tokenizer_cache_dir=str(folder.tokenizer_cache_dir),
    )  # fmt: skip
    denoiser = load_models(options, SD, checkpoint, torch.float32, torch.device("cpu")).denoiser
    assert denoiser is not None
    found = set(denoiser.attn_processors.values())
    assert {type(one).__name__ for one in found} == {kind}
    assert backend is None or {(one._backend, one._split) for one in found} == {(backend, "--split_attn" in words)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--attn_mode", "flash"), "--attn_mode flash: the package flash_attn is not installed"),
        (("--attn_mode", "sageattn", "--bf16"), "--attn_mode sageattn: the package sageattention is not installed"),
        (("--xformers",), "--xformers: the package xformers is not installed"),
        (("--diffusers_xformers", "--sdpa"), "--xformers and --sdpa were both given"),
    ],
)
def test_what_cannot_work_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_options(given(*words))


def test_half_precision_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.inference.options.missing_package", lambda *given: None)
    with pytest.raises(UserError, match="--attn_mode flash: works in half precision only; add --bf16"):
        check_options(given("--attn_mode", "flash"))
    check_options(given("--attn_mode", "flash", "--bf16"))


def test_what_attn_mode_wins_over_is_warned_of() -> None:
    warnings = idle_options(given("--attn_mode", "torch", "--sdpa"))
    assert warnings == ["--sdpa has no effect beside --attn_mode, which wins"]
