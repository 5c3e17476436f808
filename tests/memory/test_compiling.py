"""``--torch_compile``: blocks with adapters in them compute the same, under their own names."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn

from library.architectures.sd import SD
from library.errors import UserError
from library.memory.compiling import CompileSettings, check_backend, compile_blocks, uncompiled
from library.memory.stored_layers import store_weights
from networks.lora import create_network
from tests.networks.conftest import make_tiny_text_encoder, make_tiny_unet


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def adapted(*, fp8: bool = False, device: str = "cpu") -> tuple[nn.Module, nn.Module]:
    unet, text = make_tiny_unet(), make_tiny_text_encoder()
    if fp8:
        store_weights(unet, "fp8", torch.device("cpu"))
    torch.manual_seed(3)
    network = create_network(1.0, 2, 1.0, None, [text], unet)
    network.apply_to([text], unet, False, True)
    for name, parameter in network.named_parameters():
        if "lora_up" in name:  # each another, so that blocks that share code do not share weights
            nn.init.normal_(parameter, std=0.1)
    network.prepare_grad_etc([text], unet)
    return unet.to(device), network.to(device)


def step(unet: nn.Module, network: nn.Module, device: str = "cpu", height: int = 8) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    latents, context = (torch.randn(*s, generator=generator).to(device) for s in ((2, 4, height, 8), (2, 5, 16)))
    loss = unet(latents, torch.tensor([10, 700], device=device), context).sample.square().mean()
    network.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in network.named_parameters()}


def assert_compiled_is_the_same(backend: str, *, fp8: bool = False, device: str = "cpu", exact: bool = False) -> None:
    unet, network = adapted(fp8=fp8, device=device)
    plain = step(unet, network, device)
    names, adapters = list(unet.state_dict()), list(network.state_dict())
    count = compile_blocks(unet, SD.compiled_blocks, CompileSettings(backend))
    assert count == 12
    compiled = step(unet, network, device)
    bound = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-3, "atol": 1e-6}
    torch.testing.assert_close(compiled, plain, **bound)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # blocks of one kind and size share their code
    assert 0 < counters["stats"]["unique_graphs"] < count
    assert list(unet.state_dict()) == names and list(network.state_dict()) == adapters
    made = counters["stats"]["unique_graphs"]
    with uncompiled(), torch.no_grad():
        unet(
            torch.randn(1, 4, 16, 16, device=device), torch.tensor([3], device=device), torch.randn(1, 5, 16).to(device)
        )
    assert counters["stats"]["unique_graphs"] == made


@pytest.mark.slow
def test_eager_backend_is_bit_for_bit_the_same() -> None:
    assert_compiled_is_the_same("eager", exact=True)


def test_each_bucket_is_compiled_once() -> None:
    """Whatever the order in which buckets come again."""
    unet, network = adapted()
    compile_blocks(unet, SD.compiled_blocks, CompileSettings("eager"))
    made = []
    for height in (8, 16, 8, 16, 16, 8):
        step(unet, network, height=height)
        made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < made[0] < made[1] and set(made[2:]) == {made[1]}


@pytest.mark.slow  # the test above compiles the same blocks
def test_dynamic_shapes_need_no_code_for_a_third_bucket() -> None:
    unet, network = adapted()
    compile_blocks(unet, SD.compiled_blocks, CompileSettings("eager", dynamic=None, fullgraph=True))
    made = []
    for height in (8, 16, 24, 32):
        step(unet, network, height=height)
        made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert made[0] < made[1] == made[2] == made[3]


@pytest.mark.slow
def test_traced_backward_with_fp8_weights() -> None:
    assert_compiled_is_the_same("aot_eager", fp8=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor_on_a_cpu() -> None:
    assert_compiled_is_the_same("inductor")


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_inductor_on_a_gpu(fp8: bool) -> None:
    assert_compiled_is_the_same("inductor", fp8=fp8, device="cuda")


def test_compilers_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_backend("eager", "cpu")
    with pytest.raises(UserError, match="--dynamo_backend fx2trt: torch .* has no such compiler"):
        check_backend("fx2trt", "cpu")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="C\\+\\+ compiler"):
        check_backend("inductor", "cpu")
    monkeypatch.setattr("library.memory.compiling.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install triton"):
        check_backend("inductor", "cuda")
