"""A model sharded by FSDP computes the same, in a group of one process; tests/entry/test_fsdp.py has two."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from library.architectures.lora_target import LORA_TARGET, LoraTarget
from library.architectures.sd import SD
from library.errors import UserError
from library.memory.sharding import Sharding, find_units, shard_model, shard_sizes
from networks.lora import create_network
from tests.architectures.flux.test_models import inputs, ours_of, run_ours
from tests.fixtures.adapted import randomize
from tests.networks.conftest import make_tiny_unet

BLOCKS = ("DoubleStreamBlock", "SingleStreamBlock")
CPU = torch.device("cpu")


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(network: nn.Module, predict: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    for parameter in network.parameters():
        parameter.grad = None
    loss = predict().square().mean()
    loss.backward()
    return loss, [p.grad for p in network.parameters()]


@pytest.mark.parametrize("dora", ["False", "True", "output"])
@pytest.mark.parametrize("kind", ["dev", "chroma"])
def test_a_transformer_with_adapters(group: None, kind: str, dora: str) -> None:
    """With checkpointing and without, after a preview in inference mode; DoRA reads the weights in its forward."""
    model = ours_of(kind).requires_grad_(False)
    whole = copy.deepcopy(model)
    given, found = inputs(), []
    args = {"dora": str(dora != "False"), **({"dora_on_output": "True"} if dora == "output" else {})}
    for each in (whole, model):
        setattr(each, LORA_TARGET, LoraTarget("lora_unet", BLOCKS))
        network = randomize(create_network(1.0, 2, 1.0, None, [], each, **args))
        network.apply_to([], each, False, True)
        if each is model:
            shard_model(model, BLOCKS, Sharding(), CPU)
            assert all(isinstance(p, DTensor) for p in model.parameters())
        with torch.inference_mode():
            drawn = run_ours(each, kind, given)
        results = [gradients(network, lambda: run_ours(each, kind, given))]  # noqa: B023
        each.enable_gradient_checkpointing()
        results.append(gradients(network, lambda: run_ours(each, kind, given)))  # noqa: B023
        found.append((drawn, results))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
    # gathered weights are let go
    assert all(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_unet_with_dropout(group: None, checkpointing: bool) -> None:
    """A batch of one, whose strides FSDP changes; blocks that run again must drop the same elements."""
    latents, context = torch.randn(1, 4, 4, 12), torch.randn(1, 5, 16)
    args = {"conv_dim": "2", "rank_dropout": "0.2", "module_dropout": "0.1"}
    found = []
    for unet in (make_tiny_unet().train(), make_tiny_unet().train()):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        network = randomize(create_network(1.0, 2, 1.0, None, [], unet, neuron_dropout=0.3, **args)).train()
        network.apply_to([], unet, False, True)
        if found:
            shard_model(unet, SD.compiled_blocks, Sharding(), CPU)
        torch.manual_seed(0)
        found.append(gradients(network, lambda: unet(latents, torch.tensor([5]), context).sample))  # noqa: B023
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_modules_that_are_kept_whole(group: None) -> None:
    model = ours_of("dev").requires_grad_(False)
    weight = model.double_blocks[0].img_attn.proj.weight
    weight.data = weight.data.t().contiguous().t()  # as slices of a file may lie
    expected = run_ours(model, "dev", inputs())
    total = sum(p.numel() for p in model.parameters())
    shard_model(model, BLOCKS, Sharding(free_after_forward=False, kept_whole=r"img_in|.*\.img_mlp\.0"), CPU)
    plain = {name.rpartition(".")[0] for name, p in model.named_parameters() if not isinstance(p, DTensor)}
    assert plain == {"img_in", "double_blocks.0.img_mlp.0", "double_blocks.1.img_mlp.0"}
    torch.testing.assert_close(run_ours(model, "dev", inputs()), expected)
    assert shard_sizes(model).total == total


def test_blocks_that_the_model_does_not_have() -> None:
    model = ours_of("dev")
    assert len(find_units(model, ["SingleStreamBlock", "Modulation"], BLOCKS)) == 2 + 2 * 2 + 2
    with pytest.raises(UserError, match=r'SingleStreamBlok: .*did you mean "SingleStreamBlock".*leave it empty'):
        find_units(model, ["SingleStreamBlok"], BLOCKS)
    # its layers are used without its being called, so that nothing would gather them
    with pytest.raises(UserError, match="SelfAttention: the model has no such blocks"):
        find_units(model, ["SelfAttention"], BLOCKS)


@pytest.mark.parametrize(("pattern", "words"), [("blocks", "fits no module"), ("(", "no regular expression")])
def test_modules_that_are_not_there(group: None, pattern: str, words: str) -> None:
    with pytest.raises(UserError, match=f"fsdp_ignored_modules .*{words}"):
        shard_model(ours_of("dev"), BLOCKS, Sharding(kept_whole=pattern), CPU)
