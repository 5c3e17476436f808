"""Convolutions as products of matrices: as exact as torch's, used only where they are quicker."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from library.memory.host import convolution as host_convolution
from tests.memory.host.test_attention import error
from tests.networks.conftest import make_tiny_unet

HALVES = (torch.bfloat16, torch.float16)


def frozen(inputs: int = 24, outputs: int = 160, dtype: torch.dtype = torch.bfloat16, **options: object) -> nn.Conv2d:
    torch.manual_seed(1)
    layer = nn.Conv2d(inputs, outputs, **({"kernel_size": 3, "padding": 1} | options))
    return layer.to(dtype, memory_format=torch.channels_last).requires_grad_(False)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def products_of(layer: nn.Module, image: Tensor) -> set[str]:
    """Record which of the two ways a forward pass goes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(image)
    return {event.name for event in profile.events() or ()} & {"_AsProduct", "aten::conv2d"}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_are_as_close_to_exact_as_those_of_torchs(dtype: torch.dtype, bias: bool) -> None:
    layer = frozen(dtype=dtype, bias=bias)
    inputs, towards = drawn(2, 24, 5, 3).to(dtype), drawn(2, 160, 5, 3).to(dtype)
    found = {}
    for way in ("torch", "exact", "ours"):
        if way == "ours":
            host_convolution.convolve_as_products(layer.to(dtype))
        used = layer.double() if way == "exact" else layer
        image = inputs.to(used.weight.dtype, copy=True).requires_grad_()
        output = used(image)
        output.backward(towards.to(output.dtype))
        assert output.dtype == image.grad.dtype == used.weight.dtype
        found[way] = (output.detach(), image.grad)
    for exact, torchs, ours in zip(found["exact"], found["torch"], found["ours"], strict=True):
        assert ours.shape == exact.shape
        assert error(ours, exact) < 1.5 * error(torchs, exact)


def test_the_image_may_be_float32_under_autocast() -> None:
    layer = frozen()
    host_convolution.convolve_as_products(layer)
    image = drawn(1, 24, 6, 6).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(image)
    output.sum().backward()
    assert output.dtype == torch.bfloat16 and image.grad.dtype == torch.float32
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_changed_weights_count_at_once() -> None:
    layer = frozen()
    host_convolution.convolve_as_products(layer)
    image = drawn(1, 24, 6, 6).bfloat16().requires_grad_()
    before = layer(image)
    layer.weight.mul_(2)
    layer.bias.mul_(2)
    torch.testing.assert_close(layer(image), 2 * before)


def test_where_it_is_used() -> None:
    small, large = drawn(1, 24, 6, 6).bfloat16(), drawn(1, 24, 7, 6).bfloat16()  # 36 and 42 pixels, of 0.25 * 160
    layer = frozen()
    assert products_of(layer, small) == {"aten::conv2d"}
    host_convolution.convolve_as_products(layer)
    assert products_of(layer, small) == {"_AsProduct"}
    assert products_of(layer, large) == {"aten::conv2d"}
    layer.weight.requires_grad_(True)
    assert products_of(layer, small) == {"aten::conv2d"}
    layer.requires_grad_(False).bias.requires_grad_(True)
    assert products_of(layer, small) == {"aten::conv2d"}
    layer.requires_grad_(False).to(memory_format=torch.contiguous_format)
    assert products_of(layer, small) == {"aten::conv2d"}
    assert products_of(layer.float(), small.float()) == {"aten::conv2d"}


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"padding": 0}, {"dilation": 2}, {"groups": 2}, {"padding_mode": "circular"}, {"kernel_size": 5}],
    ids=str,
)
def test_other_convolutions_stay_as_they_are(options: dict[str, object]) -> None:
    layer = frozen(**options)
    host_convolution.convolve_as_products(layer)
    assert products_of(layer, drawn(1, 24, 4, 4).bfloat16()) == {"aten::conv2d"}


def test_a_unet_trains_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient() -> Tensor:
        image = drawn(1, 4, 8, 8).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(image, torch.tensor([10]), drawn(1, 7, unet.config.cross_attention_dim)).sample
        output.float().square().sum().backward()
        return image.grad

    monkeypatch.setattr(host_convolution, "MOST_PIXELS_PER_CHANNEL", 100)
    unet = make_tiny_unet().to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_(False)
    torchs = gradient()
    host_convolution.convolve_as_products(unet)
    ours = gradient()
    assert not torch.equal(ours, torchs)  # other roundings: the other way was taken
    assert error(ours, torchs.double()) < 0.05
