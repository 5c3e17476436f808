"""``--cpu_offload_checkpointing``: block inputs go to the host, gradients are bit for bit the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.memory.host_activations import HostActivations
from networks.lora import create_network
from tests.fixtures.streams import Recorded, Streams, late_ways
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


def test_copies_may_come_as_late_as_they_are_waited_for() -> None:
    """Nothing is read before it has arrived, and nothing is freed before it has left."""
    host = HostActivations(least_bytes=1, from_host=True, ways=late_ways)
    (loss, plain), (other, moved) = gradients(None), gradients(host)
    assert torch.equal(loss, other)
    assert all(torch.equal(plain[name], moved[name]) for name in plain)
    assert host.moved_bytes > 20_000


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x * self.weight + positions


def test_inputs_come_back_ahead_of_their_blocks() -> None:
    """Two are on their way while a block is recomputed; what all blocks share is moved once."""
    device = Streams()
    ways = Recorded(device, "out"), Recorded(device, "back")
    blocks = [Block() for _ in range(5)]
    x, positions = torch.ones(4), torch.ones(4)
    host = HostActivations(least_bytes=1, from_host=True, ways=lambda _: ways)
    with host:
        y = x
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, number=number: device.log.append(f"block {number}"))
            y = checkpoint(block, y, positions, use_reentrant=False)
    away = ["out waits for compute", "copy {} on out", "memory held for out"]
    expected = []
    for number in range(5):
        sent = [number + 1] if number else [0, 1]  # the input, and once the positions
        expected += [line.format(copy) for copy in sent for line in away] + [f"block {number}"]
    assert device.log == expected and host.moved_bytes == 6 * x.nbytes
    device.log.clear()
    y.sum().backward()
    copies = [line for line in device.log if line.startswith(("copy", "block"))]
    assert copies == [
        # the inputs of blocks 4, 3 and 2, and the positions; then always one more
        "copy 0 on back", "copy 1 on back", "copy 2 on back", "copy 3 on back", "block 4",
        "copy 4 on back", "block 3",
        "copy 5 on back", "block 2",
        "block 1",
        "block 0",
    ]  # fmt: skip
    # each copy back comes after the one that left, and the computation waits for it
    sent = {"copy 0 on back": 5, "copy 1 on back": 4, "copy 2 on back": 3, "copy 3 on back": 1, "copy 4 on back": 2}
    for line, number in sent.items():
        assert device.log[device.log.index(line) - 1] == f"back waits for copy {number}"
    waits = [line for line in device.log if line.startswith(("compute", "block"))]
    assert waits[:6] == [
        "compute waits for copy 0", "compute waits for copy 3", "block 4",
        "compute waits for copy 1", "compute waits for copy 3", "block 3",
    ]  # fmt: skip


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
