"""Options that only HunyuanImage-2.1 has: what has no effect, what is refused, and what attention comes of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hunyuan_image_train
import hunyuan_image_train_network
from library.architectures.common import attention
from library.architectures.hunyuan_image import HUNYUAN_IMAGE
from library.architectures.hunyuan_image.model import HunyuanImage, MMDoubleStreamBlock
from library.config.flow import FlowOptions
from library.errors import UserError
from tests.architectures.hunyuan_image.test_model import SIZES


def model() -> HunyuanImage:
    torch.manual_seed(0)
    made = HunyuanImage(SIZES)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made


def test_published_defaults() -> None:
    for script in (hunyuan_image_train_network, hunyuan_image_train):
        given = script.setup_parser().parse_args([])
        assert (given.discrete_flow_shift, given.model_prediction_type, given.timestep_sampling) == (
            5.0,
            "raw",
            "sigma",
        )
    assert HUNYUAN_IMAGE.chosen(FlowOptions).discrete_flow_shift == 5.0
    objective = HUNYUAN_IMAGE.objective(v_prediction=False, zero_terminal_snr=False)
    sigmas = objective.scheduler("euler", 4, (2, 2), torch.device("cpu")).sigmas
    expected = [5 * s / (1 + 4 * s) for s in (1, 0.75, 0.5, 0.25, 0)]
    assert sigmas.tolist() == pytest.approx(expected, abs=1e-6)


def test_torchs_kernels_are_the_default() -> None:
    """As published; other families compute the plain formula without a flag."""
    for asked, used in (("math", "torch"), ("efficient", "efficient"), ("flex", "flex")):
        made = model()
        HUNYUAN_IMAGE.set_attention(made, asked)
        blocks = [*made.double_blocks, *made.single_blocks, *made.txt_in.individual_token_refiner.blocks]
        assert {block.attention for block in blocks} == {used}


def test_a_package_that_is_not_installed() -> None:
    with pytest.raises(UserError, match="needs the package flash_attn, which is not installed"):
        HUNYUAN_IMAGE.set_attention(model(), "flash")


def test_attention_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call gets one image, and the result is the same."""
    made = model().eval()
    generator = torch.Generator().manual_seed(1)
    latents, context, glyphs = (
        torch.randn(shape, generator=generator) for shape in ((2, 8, 2, 3), (2, 7, 32), (2, 5, 24))
    )
    masks = torch.tensor([[1] * 4 + [0] * 3, [1] * 7]), torch.tensor([[1] * 3 + [0] * 2, [0] * 5])
    inputs = (latents, torch.tensor([200.0, 900.0]), context, masks[0], glyphs, masks[1])
    with torch.no_grad():
        whole = made(*inputs)
        HUNYUAN_IMAGE.set_attention(made, "torch", split=True)
        rows: list[int] = []
        plain = attention._IMPLEMENTATIONS["torch"]
        monkeypatch.setitem(
            attention._IMPLEMENTATIONS, "torch", lambda query, *rest: rows.append(len(query)) or plain(query, *rest)
        )
        torch.testing.assert_close(made(*inputs), whole, rtol=0, atol=1e-5)
    assert set(rows) == {1} and isinstance(made.double_blocks[0], MMDoubleStreamBlock)


def test_a_single_image_needs_no_mask() -> None:
    """Without padding the result is that with masks of ones; quoted text may have no tokens at all."""
    made = model().eval()
    latents, context, glyphs = torch.randn(1, 8, 2, 2), torch.randn(1, 6, 32), torch.randn(1, 3, 24)
    time = torch.tensor([500.0])
    with torch.no_grad():
        for quoted in (glyphs, glyphs[:, :0]):
            ones = torch.ones(1, 6), torch.ones(1, quoted.shape[1])
            found = made(latents, time, context, None, quoted, None)
            torch.testing.assert_close(found, made(latents, time, context, ones[0], quoted, ones[1]), rtol=0, atol=1e-5)
            padded = torch.cat([quoted, torch.randn(1, 2, 24)], dim=1)
            mask = torch.cat([ones[1], torch.zeros(1, 2)], dim=1)
            torch.testing.assert_close(found, made(latents, time, context, ones[0], padded, mask), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--attn_mode", "sageattn"], "--attn_mode sageattn: has no backward pass"),
        (["--network_train_text_encoder_only"], "the text encoders of HunyuanImage-2.1 are not trained; remove it"),
        (["--vae_chunk_size", "0"], "--vae_chunk_size 0"),
    ],
)
def test_what_cannot_work_is_refused(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str], own_root_logger: None
) -> None:
    from library.config.config_file import read_args

    usual = ["--pretrained_model_name_or_path", "x", "--network_module", "networks.lora_hunyuan_image"]
    usual += ["--output_dir", "y", "--train_data_dir", "z", "--resolution", "64"]
    with pytest.raises(SystemExit):
        arguments = read_args(hunyuan_image_train_network.setup_parser(), [*usual, *words])
        hunyuan_image_train_network.HunyuanImageNetworkTrainer().train(arguments)
    assert text in capsys.readouterr().err
