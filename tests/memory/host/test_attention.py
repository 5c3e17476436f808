"""Attention on the CPU that keeps its probabilities: as exact as torch's kernel, used only where it is quicker."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from library.architectures.common.ldm_unet import set_unet_attention
from library.memory.host import attention as host_attention
from library.memory.host import use_host_kernels
from tests.memory.test_attention import kernels_of, predict
from tests.networks.conftest import make_tiny_unet


def drawn(tokens: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value (2, 3, T, 16), with scores up to about 30."""
    generator = torch.Generator().manual_seed(3)
    return [
        (2.5 * torch.randn(2, 3, n, 16, generator=generator)).to(dtype).requires_grad_() for n in (tokens, keys, keys)
    ]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [64, 11])
def test_output_and_gradients_are_as_close_to_exact_as_those_of_torchs_kernel(dtype: torch.dtype, keys: int) -> None:
    gradient = torch.randn(2, 3, 64, 16, generator=torch.Generator().manual_seed(5))
    found = {}
    for name, attend in (
        ("exact", functional.scaled_dot_product_attention),
        ("torch", functional.scaled_dot_product_attention),
        ("ours", host_attention.attend),
    ):
        inputs = drawn(64, keys, dtype)
        used = [t.double() for t in inputs] if name == "exact" else inputs
        with torch.autocast("cpu", dtype, enabled=name == "ours"):  # training runs under it
            output = attend(*used)
        output.backward(gradient.to(output.dtype))
        found[name] = [output.detach(), *(t.grad for t in inputs)]
    for exact, torchs, ours in zip(found["exact"], found["torch"], found["ours"], strict=True):
        assert ours.dtype == dtype
        assert error(ours, exact.double()) < 2.5 * error(torchs, exact.double()) + 1e-4


def test_it_is_used_for_training_in_half_precision_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, _ = drawn(32, 32, torch.bfloat16)
    assert host_attention.is_quicker(query, key)
    with torch.no_grad():
        assert not host_attention.is_quicker(query, key)
    assert not host_attention.is_quicker(query.detach(), key.detach())
    assert not host_attention.is_quicker(query.float(), key.float())
    monkeypatch.setattr(host_attention, "MOST_KEPT", 2 * 3 * 32 * 32 - 1)
    assert not host_attention.is_quicker(query, key)


def test_a_unet_trains_by_it_in_half_precision_alone() -> None:
    unet = make_tiny_unet()
    unet.conv_in.requires_grad_(True)  # so that there is something to train
    set_unet_attention(unet, "torch")
    use_host_kernels(unet)
    assert kernels_of(unet) != set()
    with torch.autocast("cpu", torch.bfloat16):
        ours = predict(unet)
        assert kernels_of(unet) == set()
        set_unet_attention(unet, "efficient")
        torch.testing.assert_close(ours, predict(unet), rtol=0.05, atol=0.05)
