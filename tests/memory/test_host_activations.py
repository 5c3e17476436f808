"""``--cpu_offload_checkpointing``: block inputs go to the host, gradients are bit for bit the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from library.memory.host_activations import HostActivations
from networks.lora import create_network
from tests.networks.conftest import make_tiny_text_encoder, make_tiny_unet


def gradients(context: HostActivations | None, device: str = "cpu", width: int = 8) -> tuple[Tensor, dict[str, Tensor]]:
    unet, text = make_tiny_unet().to(device), make_tiny_text_encoder()
    unet.enable_gradient_checkpointing()
    unet.train()
    torch.manual_seed(3)
    network = create_network(1.0, 2, 1.0, None, [text], unet)
    network.apply_to([text], unet, False, True)
    for name, parameter in network.named_parameters():
        if "lora_up" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    network.to(device)
    generator = torch.Generator().manual_seed(7)
    latents, context_of_text = (torch.randn(*s, generator=generator) for s in ((2, 4, width, width), (2, 5, 16)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t) if context is None else context:
        out = unet(latents.to(device), torch.tensor([10, 700], device=device), context_of_text.to(device)).sample
        loss = out.square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in network.named_parameters()}


def test_gradients_are_the_same_and_activations_moved() -> None:
    host = HostActivations(least_bytes=1024, from_host=True)
    (loss, plain), (other, moved) = gradients(None), gradients(host)
    assert torch.equal(loss, other)
    assert plain.keys() == moved.keys() and all(torch.equal(plain[name], moved[name]) for name in plain)
    assert host.moved_bytes > 20_000


def test_weights_small_tensors_and_those_on_the_host_stay() -> None:
    linear = torch.nn.Linear(64, 64)
    x = torch.randn(64, 64, requires_grad=True)
    # for the input's gradient the transposed weight is kept, for the weight's the input
    for host, moved in (
        (HostActivations(least_bytes=1, from_host=True), 64 * 64 * 4),
        (HostActivations(least_bytes=10**6, from_host=True), 0),
        (HostActivations(least_bytes=1), 0),
    ):
        with host:
            y = linear(x * 1.0)
        assert host.moved_bytes <= moved + (64 * 4 if moved else 0)
        y.sum().backward()


@pytest.mark.gpu
def test_on_a_gpu_less_memory_is_held_between_the_passes() -> None:
    held = []
    for context in (None, HostActivations()):
        unet = make_tiny_unet().to("cuda")
        unet.enable_gradient_checkpointing()
        unet.train()
        unet.conv_in.requires_grad_(True)
        latents = torch.randn(2, 4, 128, 128, device="cuda")
        start = torch.cuda.memory_allocated()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t) if context is None else context:
            loss = unet(latents, torch.tensor([10, 700], device="cuda"), torch.randn(2, 5, 16, device="cuda")).sample
            loss = loss.square().mean()
        held.append(torch.cuda.memory_allocated() - start)
        loss.backward()
    assert held[1] < 0.7 * held[0]
