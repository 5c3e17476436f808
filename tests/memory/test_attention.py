"""``--mem_eff_attn``: the same attention, by a kernel that makes no matrix of tokens by tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from library.architectures.common.ldm_unet import set_unet_attention
from library.architectures.sd import SD
from library.errors import UserError
from tests.networks.conftest import make_tiny_unet


def predict(unet: nn.Module, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(7)
    latents, context = (torch.randn(*s, generator=generator) for s in ((2, 4, 8, 8), (2, 5, 16)))
    return unet(latents.to(device), torch.tensor([10, 700], device=device), context.to(device)).sample


class Recorded(TorchDispatchMode):
    """Names of the attention operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in func.name():
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def kernels_of(unet: nn.Module, device: str = "cpu") -> set[str]:
    with Recorded() as recorded:
        predict(unet, device).sum().backward()
    return recorded.names


def test_it_predicts_the_same_and_never_uses_the_plain_formula() -> None:
    unet = make_tiny_unet()
    unet.conv_in.requires_grad_(True)  # so that there is something to train
    outputs = {}
    for backend in ("math", "torch", "efficient"):
        set_unet_attention(unet, backend)
        outputs[backend] = predict(unet).detach()
    torch.testing.assert_close(outputs["efficient"], outputs["math"], rtol=1e-4, atol=1e-5)
    kernels = kernels_of(unet)
    assert any("flash_attention" in name for name in kernels)
    assert not [name for name in kernels if "_math" in name]


@pytest.mark.parametrize(("backend", "split"), [("torch", True), ("math", True), ("efficient", True), ("flex", False)])
def test_the_implementations_of_the_transformers_serve_a_unet(backend: str, split: bool) -> None:
    unet = make_tiny_unet()
    with torch.no_grad():
        set_unet_attention(unet, "torch")
        expected = predict(unet)
        set_unet_attention(unet, backend, split=split)
        torch.testing.assert_close(predict(unet), expected, rtol=1e-4, atol=1e-5)


def test_xformers_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as found:
        SD.set_attention(make_tiny_unet(), "xformers")
    assert "pip install xformers" in str(found.value) and "\n" not in str(found.value)


@pytest.mark.gpu
def test_on_a_gpu_the_memory_efficient_kernel_runs() -> None:
    unet = make_tiny_unet().to("cuda")
    unet.conv_in.requires_grad_(True)
    set_unet_attention(unet, "efficient")
    kernels = kernels_of(unet, "cuda")
    assert any("_efficient_attention" in name for name in kernels)
    assert not [name for name in kernels if "flash" in name or "_math" in name]
