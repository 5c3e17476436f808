"""Blocks that wait in host memory: the same numbers, few copies, little memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.errors import UserError
from library.memory.block_stream import _BUFFERS, BlockStream, spread, stream_blocks, swapped_counts
from library.memory.host_activations import HostActivations
from library.memory.stored_layers import store_weights
from tests.fixtures.streams import Recorded, Streams, late_ways


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width, bias=False)
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x))) + self.shift


class Model(nn.Module):
    """Heavy blocks, then light ones, each with an adapter whose weights are not the model's."""

    def __init__(self, heavy: int = 5, light: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 8)
        self.heavy = nn.ModuleList(Block(8, 32) for _ in range(heavy))
        self.light = nn.ModuleList(Block(8, 16) for _ in range(light))
        self.requires_grad_(False)
        self.checkpointing = True

    @property
    def lists(self) -> tuple[list[nn.Module], list[nn.Module]]:
        return list(self.heavy), list(self.light)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in (*self.heavy, *self.light):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


def adapted(model: Model) -> list[nn.Parameter]:
    """Low-rank adapters that replace the forward of layers, as networks do."""
    torch.manual_seed(1)
    trained = []
    for block in (*model.heavy, *model.light):
        for layer in (block.up, block.down):
            down = nn.Parameter(torch.randn(2, layer.in_features) / 10)
            up = nn.Parameter(torch.randn(layer.out_features, 2) / 10)
            plain = layer.forward
            layer.forward = lambda x, plain=plain, down=down, up=up: plain(x) + x @ down.T @ up.T
            trained += [down, up]
    return trained


def train(model: Model, steps: int = 3) -> tuple[list[float], list[Tensor]]:
    parameters = adapted(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for step in range(steps):
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        with torch.inference_mode():  # a sample image
            losses.append(model(batch).sum().item())
    return losses, parameters


@pytest.mark.parametrize(
    ("lengths", "count", "counts"),
    [
        ((19, 38), 35, [17, 36]),
        ((19, 38), 18, [9, 18]),
        ((19, 38), 1, [0, 2]),
        ((28,), 26, [26]),
        ((19, 38), 0, [0, 0]),
    ],
)
def test_published_counts(lengths: tuple[int, ...], count: int, counts: list[int]) -> None:
    assert swapped_counts(lengths, count) == counts


def test_more_than_can_be_swapped() -> None:
    with pytest.raises(UserError, match="--blocks_to_swap 36: the model has 19 and 38 blocks, of which 35 can be"):
        swapped_counts((19, 38), 36)


def test_waiting_blocks_are_spread() -> None:
    assert spread(19, 9) == [1, 3, 5, 7, 9, 11, 13, 15, 17]
    for length in range(1, 40):
        for count in range(1, length + 1):
            places = spread(length, count)
            assert len(set(places)) == count and places == sorted(places) and 0 <= places[0] and places[-1] < length


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("form", ["plain", "fp8", "bf16"])
def test_training_and_sampling_are_the_same(count: int, form: str) -> None:
    def made() -> Model:
        model = Model()
        if form == "fp8":
            store_weights(model, "fp8", torch.device("cpu"), home="cpu")
        return model.to(torch.bfloat16).float() if form == "bf16" else model

    plain = made()
    expected, trained = train(plain)
    streamed = made()
    stream_blocks(streamed, streamed.lists, count, torch.device("cpu"))
    losses, parameters = train(streamed)
    assert losses == expected
    assert all(torch.equal(one, other) for one, other in zip(trained, parameters, strict=True))
    for name, tensor in plain.state_dict().items():  # frozen weights never change
        assert torch.equal(tensor, streamed.state_dict()[name])


def on_host(model: Model, moved: list[int]) -> Model:
    """Let the activations of each pass wait on the host, with copies that come as late as they may."""
    plain = model.forward

    def forward(x: Tensor) -> Tensor:
        context = HostActivations(least_bytes=0, from_host=True, ways=late_ways)
        with context:
            out = plain(x)
        moved.append(context.moved_bytes)
        return out

    model.forward = forward
    return model


def test_activations_on_the_host_as_well() -> None:
    """``--cpu_offload_checkpointing`` beside swapped blocks: losses and weights stay the same."""
    moved: list[int] = []
    expected, trained = train(Model())
    streamed = Model()
    stream_blocks(streamed, streamed.lists, 4, torch.device("cpu"))
    losses, parameters = train(on_host(streamed, moved))
    assert losses == expected and max(moved) > 0
    assert all(torch.equal(one, other) for one, other in zip(trained, parameters, strict=True))


def test_no_block_is_copied_twice_in_a_pass() -> None:
    model = Model(heavy=0, light=9)
    adapted(model)
    stream = BlockStream([list(model.light)], [5], torch.device("cpu"))
    x = torch.randn(2, 3)
    with torch.no_grad():
        model(x)
    # each once, and the first for the next pass
    assert stream.copied == 6
    for _ in range(3):
        before = stream.copied
        model(x).sum().backward()
        # forward: all but those that are there already; backward: all but the two at the turn
        assert stream.copied - before <= (5 - 1) + (5 - 2)


def test_what_lies_where() -> None:
    """On the device: two buffers for each shape of block, whatever the number of blocks that wait."""
    model = Model(heavy=9, light=18)
    heavy, light = (sum(t.nbytes for t in b[0].state_dict().values()) for b in (model.heavy, model.light))
    stream = stream_blocks(model, model.lists, 12, torch.device("cpu"))
    # each tensor begins at a multiple of 256 bytes, which kernels want
    assert 6 * heavy + 12 * light <= stream.host_bytes <= 6 * (heavy + 4 * 256) + 12 * (light + 4 * 256)
    assert 2 * (heavy + light) <= stream.buffer_bytes <= 2 * (heavy + light + 8 * 256)


def test_no_memory_moves_while_it_runs() -> None:
    """Waiting blocks are views of one host memory each, running ones of two buffers."""
    model = Model()
    stream = stream_blocks(model, model.lists, 4, torch.device("cpu"))
    places = {block.tensors[0].data_ptr() for block in stream._blocks}
    buffers = {b.views[0].data_ptr() for group in stream._buffers.values() for b in group}
    hosts = {block.views[0].data_ptr() for block in stream._blocks}
    assert places == hosts and len(buffers) == 4
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(2, 3))
    assert {block.tensors[0].data_ptr() for block in stream._blocks} <= hosts | buffers


@pytest.mark.parametrize("form", ["plain", "fp8"])
def test_without_checkpointing_the_backward_pass_is_refused(form: str) -> None:
    """It would read weights of other blocks."""
    model = Model()
    model.checkpointing = False
    if form == "fp8":
        store_weights(model, "fp8", torch.device("cpu"), home="cpu")
    stream_blocks(model, model.lists, 4, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train(model, steps=1)


def test_order_of_copies_and_computation() -> None:
    """Each block waits for its own copy alone, and a copy for what was computed before it in its buffer."""
    model = Model(heavy=0, light=6)
    device = Streams()
    BlockStream([list(model.light)], [3], torch.device("cpu"), copies=Recorded(device, "copies"))
    for number, block in enumerate(model.light):
        block.register_forward_hook(lambda *_, number=number: device.log.append(f"block {number}"))
    with torch.no_grad():
        model(torch.randn(2, 3))
    assert device.log == [
        "block 0",
        # the first one that waits on the host, and at once the next
        "copies waits for compute", "copy 0 on copies", "compute waits for copy 0",
        "copies waits for compute", "copy 1 on copies", "block 1",
        "block 2",
        # its buffer is that of block 1, whose work is queued by now
        "compute waits for copy 1", "copies waits for compute", "copy 2 on copies", "block 3",
        "block 4",
        "compute waits for copy 2", "copies waits for compute", "copy 3 on copies", "block 5",
    ]  # fmt: skip


# ---- trained blocks ----


def whole(model: Model) -> list[Tensor]:
    """Train the model's own weights, each updated as soon as its gradient is there, as fused updates do."""
    parameters = list(model.requires_grad_(True).parameters())
    optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in parameters}

    def update(parameter: Tensor) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(update)
    return parameters


@pytest.mark.parametrize("host", [False, True], ids=["", "activations on the host"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_trained_blocks_are_copied_back(count: int, host: bool) -> None:
    """With sample images between the steps, in which nothing changes."""
    torch.manual_seed(0)
    plain, swapped = Model(), Model()
    expected = whole(plain)
    swapped.requires_grad_(True)
    stream = stream_blocks(swapped, swapped.lists, count, torch.device("cpu")) if count else None
    found = whole(swapped)
    moved: list[int] = []
    if host:
        on_host(swapped, moved)
    for step in range(4):
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        for model in (plain, swapped):
            model(batch).square().mean().backward()
        before = stream.returned if stream else 0
        for _ in range(3):
            with torch.inference_mode():
                assert torch.equal(plain(batch), swapped(batch))
        # the two in their buffers at the end of the backward pass at most
        assert stream is None or stream.returned - before <= 2 * _BUFFERS
    if stream is not None:
        stream.settle()
        waiting = sum(swapped_counts([5, 7], count))
        assert stream.returned >= 4 * (waiting - 2 * _BUFFERS)
    assert not host or max(moved) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_weights_changed_from_outside_are_kept() -> None:
    """A rollback writes into weights, some of which are in buffers just then."""
    model = Model()
    model.requires_grad_(True)
    stream_blocks(model, model.lists, 4, torch.device("cpu"))
    batch = torch.randn(4, 3)
    with torch.no_grad():
        model(batch)
        for parameter in model.parameters():
            parameter.fill_(0.01)
        first = model(batch)
        assert all((p == 0.01).all() for p in model.parameters())
        assert torch.equal(first, model(batch))


def test_weights_that_an_optimizer_replaces_are_kept() -> None:
    model = Model()
    model.requires_grad_(True)
    stream_blocks(model, model.lists, 4, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "data", torch.full_like(p, 0.5)))
    model(torch.randn(4, 3)).sum().backward()
    with torch.no_grad():
        model(torch.randn(4, 3))
    for parameter in (*model.heavy.parameters(), *model.light.parameters()):
        assert (parameter == 0.5).all()
