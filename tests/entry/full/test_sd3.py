"""Text encoders and frozen blocks of Stable Diffusion 3 in ``sd3_train.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.entry.full.test_training import changed, weights
from tests.fixtures.runs import logged
from tests.fixtures.tiny_sd3 import make_tiny_sd3
from tests.fixtures.whole import Whole

BUNDLED = "text_encoders.{}.transformer."


def bundled(whole: Whole, name: str) -> dict[str, Tensor]:
    """A text encoder of the checkpoint by the names of a file of its own."""
    prefix = BUNDLED.format(name)
    return {n.removeprefix(prefix): t for n, t in load_file(whole.model.path).items() if n.startswith(prefix)}


def moved(whole: Whole, folder: Path, name: str, stem: str = "tiny") -> set[str]:
    return changed(bundled(whole, name), weights(folder, f"{stem}_{name}"))


def test_all_three_encoders_are_trained(tmp_path: Path, sd3_train: Whole, dataset: Path) -> None:
    """Each has its own learning rate and file; the files are what a run starts from again."""
    rates = {"learning_rate_te1": 1e-3, "learning_rate_te2": 2e-3, "learning_rate_te3": 3e-3}
    options = {"train_text_encoder": True, "train_t5xxl": True, **rates, "ema_decay": 0.5, "save_every_n_steps": 1}
    sd3_train.train(dataset, tmp_path, **options, save_last_n_steps=1, max_train_steps=3)
    for number, (name, rate) in enumerate(zip(("clip_l", "clip_g", "t5xxl"), rates.values(), strict=True), start=1):
        assert logged(tmp_path, f"lr/text_encoder{number}") == pytest.approx([rate] * 3)
        assert moved(sd3_train, tmp_path, name)
        assert changed(weights(tmp_path, f"tiny_{name}"), weights(tmp_path, f"tiny-ema_{name}"))
    assert not [name for name in weights(tmp_path) if name.startswith("text_encoders.")]
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert not [name for name in files if "step00000001" in name], "retention removes them with their model"
    assert {f"tiny-step00000003{more}.safetensors" for more in ("", "_t5xxl", "-ema_clip_l")} <= files
    again = {name: tmp_path / f"tiny_{name}.safetensors" for name in ("clip_l", "clip_g", "t5xxl")}
    model = {"pretrained_model_name_or_path": tmp_path / "tiny.safetensors", **again}
    sd3_train.train(dataset, tmp_path / "again", **model, max_train_steps=1)
    assert not list((tmp_path / "again").glob("tiny_*.safetensors")), "frozen encoders are not written"


def test_t5_alone_is_cached(tmp_path: Path, sd3_train: Whole, dataset: Path) -> None:
    """--use_t5xxl_cache_only trains CLIP beside cached outputs of T5, to the bits of a run without the cache."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    options = {"train_text_encoder": True, "learning_rate_te2": 0, "sample_prompts": prompts, "sample_at_first": True}
    sd3_train.train(dataset, tmp_path / "live", **options)
    sd3_train.train(dataset, tmp_path / "cached", **options, use_t5xxl_cache_only=True)
    for name in ("tiny", "tiny_clip_l"):
        assert not changed(weights(tmp_path / "live", name), weights(tmp_path / "cached", name)), name
    assert moved(sd3_train, tmp_path / "cached", "clip_l")
    assert not (tmp_path / "cached" / "tiny_clip_g.safetensors").exists(), "frozen by its learning rate of 0"
    one, two = (next((tmp_path / name / "sample").glob("*.png")) for name in ("live", "cached"))
    assert Image.open(one).tobytes() == Image.open(two).tobytes()


@pytest.mark.slow
def test_text_encoders_alone(tmp_path: Path, sd3_train: Whole, dataset: Path) -> None:
    """A learning rate of 0 leaves the transformer as it is, and saving works; --save_t5xxl writes a frozen T5."""
    options = {"learning_rate": 0, "learning_rate_te": 1e-3, "train_text_encoder": True, "save_t5xxl": True}
    sd3_train.train(dataset, tmp_path, **options)
    names = ("model.", "first_stage_model.")
    before = {n: t for n, t in load_file(sd3_train.model.path).items() if n.startswith(names)}
    assert not changed(before, weights(tmp_path))
    assert logged(tmp_path, "lr/text_encoder1") and not logged(tmp_path, "lr/unet"), "named by part, not by position"
    assert moved(sd3_train, tmp_path, "clip_l") and moved(sd3_train, tmp_path, "clip_g")
    assert not moved(sd3_train, tmp_path, "t5xxl")


def test_blocks_at_the_end_are_frozen(tmp_path: Path, sd3_train: Whole, dataset: Path) -> None:
    """Whole blocks, with block-wise updates too."""
    for folder, more in (("plain", {}), ("blockwise", {"blockwise_fused_optimizers": True, "max_grad_norm": 0})):
        sd3_train.train(dataset, tmp_path / folder, num_last_block_to_freeze=1, **more)
        now = weights(tmp_path / folder)
        names = changed({n: load_file(sd3_train.model.path)[n] for n in now}, now)
        assert any(".joint_blocks.0." in name for name in names)
        assert not any(".joint_blocks.1." in name for name in names)


@pytest.mark.slow
def test_saved_in_half(tmp_path: Path, sd3_train: Whole, dataset: Path) -> None:
    """--save_precision is for the encoders' files too; full bf16 trains them in it."""
    options = {"train_text_encoder": True, "train_t5xxl": True, "full_bf16": True, "mixed_precision": "bf16"}
    sd3_train.train(dataset, tmp_path, **options, save_precision="fp16", max_grad_norm=0)
    for name in ("tiny", "tiny_clip_l", "tiny_t5xxl"):
        assert {tensor.dtype for tensor in weights(tmp_path, name).values()} == {torch.float16}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"train_t5xxl": True},
            "--train_t5xxl: trains T5-XXL beside the other text encoders; add --train_text_encoder",
        ),
        (
            {"train_t5xxl": True, "train_text_encoder": True, "use_t5xxl_cache_only": True},
            "--train_t5xxl: not with --use_t5xxl_cache_only",
        ),
        (
            {"train_t5xxl": True, "train_text_encoder": True, "cache_text_encoder_outputs": True},
            "--cache_text_encoder_outputs: not while a text encoder is trained",
        ),
        (
            {"train_t5xxl": True, "train_text_encoder": True, "t5xxl_dtype": "fp16"},
            "--t5xxl_dtype: a trained T5-XXL has the device and the dtype of the run",
        ),
        ({"num_last_block_to_freeze": 3}, "--num_last_block_to_freeze 3: the model has 2 blocks"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    dataset: Path,
    sd3_train: Whole,
    options: dict[str, object],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        sd3_train.train(dataset, tmp_path, **options)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1 and words in lines[0], lines


@pytest.mark.slow
def test_a_model_without_t5(
    tmp_path: Path, sd3_train: Whole, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_tiny_sd3(tmp_path / "model", t5=False)
    whole = Whole("sd3_train", sd3_train.family, made)
    with pytest.raises(SystemExit):
        whole.train(dataset, tmp_path, train_text_encoder=True, train_t5xxl=True)
    assert "--train_t5xxl: the model has no T5-XXL" in capsys.readouterr().err
    whole.train(dataset, tmp_path, train_text_encoder=True)
    assert (tmp_path / "tiny_clip_g.safetensors").exists() and not (tmp_path / "tiny_t5xxl.safetensors").exists()


def test_dropped_encoders_are_the_same_with_cached_outputs(tmp_path: Path, sd3_train: Whole, dataset: Path) -> None:
    """And masks of padding, which both ways of encoding know; without dropout the run is another."""
    masks = {"apply_lg_attn_mask": True, "apply_t5_attn_mask": True}
    rates = {"clip_l_dropout_rate": 0.5, "clip_g_dropout_rate": 0.5, "t5_dropout_rate": 0.5}
    sd3_train.train(dataset, tmp_path / "live", **masks, **rates)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 1\n")
    more = {"cache_text_encoder_outputs": True, "sample_prompts": prompts, "sample_every_n_steps": 1}
    sd3_train.train(dataset, tmp_path / "cached", **masks, **rates, **more)
    assert len(list((tmp_path / "cached" / "sample").glob("*.png"))) == 2
    sd3_train.train(dataset, tmp_path / "whole", **masks, cache_text_encoder_outputs=True)
    assert not changed(weights(tmp_path / "live"), weights(tmp_path / "cached"))
    assert changed(weights(tmp_path / "cached"), weights(tmp_path / "whole"))
