"""``--blocks_to_swap`` while whole models are trained: the weights of a run without it, resumed exactly."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.entry.full.test_training import ADAFACTOR, HALF, changed, weights
from tests.fixtures.tiny_flux import FluxFileSizes, make_tiny_flux
from tests.fixtures.whole import Whole


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, flux_train: Whole) -> Whole:
    sizes = FluxFileSizes(double_blocks=4, single_blocks=6)
    return Whole("flux_train", flux_train.family, make_tiny_flux(tmp_path_factory.mktemp("deep"), sizes=sizes))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"fused_backward_pass": True, **HALF, **ADAFACTOR, "ema_decay": 0.5}, id="bf16-Adafactor-average"),
        pytest.param({"blockwise_fused_optimizers": True}, id="blocks", marks=pytest.mark.slow),
        pytest.param(
            {"fused_backward_pass": True, "gradient_accumulation_steps": 2}, id="accumulation", marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_with_swapped_blocks_is_the_run_without(
    tmp_path: Path, deep: Whole, dataset: Path, options: dict[str, object]
) -> None:
    """With sample images and states in the middle, from which it is resumed with another number of blocks."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 1\n")
    options = {
        **options, "max_train_steps": 4, "max_grad_norm": 0, "lr_scheduler": "cosine", "cache_latents": True,
        "sample_prompts": prompts, "sample_every_n_steps": 2, "cache_text_encoder_outputs": True,
    }  # fmt: skip
    deep.train(dataset, tmp_path / "plain", **options, gradient_checkpointing=True)
    saves = {"save_every_n_steps": 2, "save_state": True}
    deep.train(dataset, tmp_path / "swapped", **options, **saves, blocks_to_swap=3)
    state = tmp_path / "swapped" / "tiny-step00000002-state"
    deep.train(dataset, tmp_path / "rest", **options, double_blocks_to_swap=1, single_blocks_to_swap=2, resume=state)
    for name in ("tiny", *(("tiny-ema",) if "ema_decay" in options else ())):
        plain = weights(tmp_path / "plain", name)
        assert not changed(plain, weights(tmp_path / "swapped", name)), name
        assert not changed(plain, weights(tmp_path / "rest", name)), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blocks_to_swap": 2}, "--blocks_to_swap: trained blocks are updated while they are on the device; add"),
        ({"blocks_to_swap": 2, "fused_optimizer_groups": 2, "max_grad_norm": 0}, "add --blockwise_fused_optimizers"),
    ],
)
def test_swapped_blocks_need_a_fused_update(
    tmp_path: Path,
    deep: Whole,
    dataset: Path,
    options: dict[str, object],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        deep.train(dataset, tmp_path, **options)
    assert words in capsys.readouterr().err
