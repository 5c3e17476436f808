"""Frozen weights in scaled fp8: accuracy, gradients, memory, and adapters on top."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.memory.forms import FORMS, FP8
from library.memory.stored_layers import (
    StoredConv2d,
    StoredLayer,
    StoredLinear,
    multiplies_fp8,
    store_weights,
    weight_bytes,
)
from networks.lora import create_network
from tests.networks.conftest import make_tiny_text_encoder, make_tiny_unet

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def restored(form: str, weight: torch.Tensor) -> torch.Tensor:
    numbers, scale = FORMS[form].quantise(weight, None)
    return FORMS[form].dequantise(numbers, scale, weight.shape, torch.float32)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().float() - exact.detach().float()).norm() / exact.detach().float().norm())


@pytest.mark.parametrize("size", [1.0, 0.02, 1e-3, 1e-5])
def test_weights_of_any_size_keep_their_first_digits(size: float) -> None:
    weight = normal(64, 256) * size
    weight[3] *= 50  # a row that one scale for the whole tensor would let all others pay for
    weight[5] = 0.0
    found = restored("fp8", weight)
    large = weight.abs() > weight.abs().amax(dim=1, keepdim=True) / 2**14  # above the smallest normal number
    assert (((found - weight).abs() <= weight.abs() * 2**-4 * 1.001) | ~large).all()
    assert relative_error(found, weight) < 0.03
    assert not found[5].any()
    # what a cast without scales leaves of the usual rows
    unscaled, scaled = relative_error(weight.to(FP8)[:3], weight[:3]), relative_error(found[:3], weight[:3])
    assert unscaled > {1.0: 1.0, 0.02: 1.15, 1e-3: 15, 1e-5: 30}[size] * scaled


#: form -> root mean square error of normal weights, as the page on precision says, and bytes for each of them
ERRORS = {"fp8": (0.026, 1.0), "fp8_scaled": (0.026, 1.0), "int8": (0.0075, 1.0), "nf4": (0.092, 0.5)}


@pytest.mark.parametrize("form", FORMS)
def test_error_and_size_of_each_form(form: str) -> None:
    weight = normal(256, 512) * 0.02
    error, size = ERRORS[form]
    assert relative_error(restored(form, weight), weight) == pytest.approx(error, rel=0.05)
    numbers, scale = FORMS[form].quantise(weight, None)
    assert numbers.nbytes == size * weight.numel()
    assert scale.nbytes <= 4 * weight.numel() / 64
    assert not restored(form, torch.zeros(4, 128)).any()


def test_scales_of_blocks_save_the_rest_of_a_row_from_an_outlier() -> None:
    weight = normal(32, 256) * 1e-5
    weight[:, 5] = 1.0
    others = torch.arange(256) >= 64
    by_row, by_block = (
        relative_error(restored(form, weight)[:, others], weight[:, others]) for form in FORMS if "fp8" in form
    )
    assert by_block < 0.03 < by_row / 2


def test_transformers_store_the_layers_of_their_blocks() -> None:
    """But no norms, embeddings, or layers outside of blocks, even where these have numbers in their paths."""
    block = nn.ModuleDict({"qkv": nn.Linear(64, 64), "q_norm": nn.Linear(64, 64), "t_emb": nn.Linear(64, 64)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block]), "approximator": nn.ModuleList([nn.Linear(64, 64)])})
    store_weights(model, "fp8_scaled", CPU, blocks=[model["blocks"]])
    assert [path for path, module in model.named_modules() if isinstance(module, StoredLayer)] == ["blocks.0.qkv"]


@pytest.mark.skipif(not multiplies_fp8(CPU), reason="this torch does not multiply fp8 numbers on a CPU")
def test_products_of_fp8_numbers() -> None:
    layers = nn.ModuleList([nn.Linear(128, 64), nn.Linear(128, 20), nn.Linear(128, 64)]).to(torch.bfloat16)
    layers.requires_grad_(False)
    plain = copy.deepcopy(layers)
    store_weights(layers, "fp8", CPU, products_in_fp8=True)
    assert [layer.products_in_fp8 for layer in layers] == [True, False, True]  # 20 is no multiple of 16
    upcast = copy.deepcopy(layers[0])
    upcast.products_in_fp8 = False
    x = normal(2, 7, 128).to(torch.bfloat16).requires_grad_()
    out = layers[0](x)
    assert out.shape == (2, 7, 64) and out.dtype == torch.bfloat16
    exact = plain[0](x)
    assert relative_error(upcast(x), exact) < 0.03
    assert 0.03 < relative_error(out, exact) < 0.045  # inputs are rounded as well
    out.sum().backward()
    assert relative_error(x.grad, torch.ones_like(out) @ upcast.weight) < 1e-2


def stored(layer: nn.Module, form: str = "fp8") -> nn.Module:
    """The layer in a small form, as a block of a model would hold it."""
    return store_weights(nn.ModuleList([copy.deepcopy(layer).requires_grad_(False)]), form, CPU)[0]


LAYERS = [
    (nn.Linear(96, 48), (2, 7, 96), StoredLinear),
    (nn.Linear(96, 48, bias=False), (5, 96), StoredLinear),
    (nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 9, 8), StoredConv2d),
    (nn.Conv2d(16, 24, 3, padding=2, dilation=2, groups=2, bias=False), (1, 16, 8, 8), StoredConv2d),
]


@pytest.mark.parametrize(("layer", "shape", "kind"), LAYERS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("autocast", [False, True])
def test_output_and_gradient_are_those_of_the_dequantised_weight(layer, shape, kind, autocast: bool, form: str) -> None:
    small = stored(layer, form)
    assert type(small) is kind and isinstance(small, type(layer))
    plain = copy.deepcopy(layer).requires_grad_(False)
    plain.weight.copy_(small.weight)
    gradients, outputs = [], []
    for module in (small, plain):
        x = normal(*shape).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(x)
        out.backward(normal(*out.shape, seed=1).to(out.dtype))
        outputs.append(out.detach())
        gradients.append(x.grad)
    assert outputs[0].dtype == outputs[1].dtype == (torch.bfloat16 if autocast else torch.float32)
    bound = 2e-2 if autocast else 1e-5
    torch.testing.assert_close(outputs[0], outputs[1], rtol=bound, atol=bound)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=bound, atol=bound)
    assert relative_error(outputs[0], layer(normal(*shape)).detach()) < (0.12 if form == "nf4" else 0.04)


@pytest.mark.parametrize(("layer", "shape", "kind"), LAYERS[::2], ids=["linear", "conv"])
def test_autograd_keeps_no_weight_at_full_size(layer, shape, kind) -> None:
    small, kept = stored(layer), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        small(normal(*shape).requires_grad_())
    weights = [t for t in kept if t.shape == layer.weight.shape]
    assert [t.dtype for t in weights] == [FP8]


def test_memory_is_a_byte_for_each_weight() -> None:
    model = nn.ModuleList([nn.Linear(512, 512, bias=False), nn.Conv2d(64, 64, 3, bias=False)])
    model.to(torch.bfloat16).requires_grad_(False)
    before = weight_bytes(model)
    store_weights(model, "fp8", CPU)
    numbers = 512 * 512 + 64 * 64 * 9
    assert before == 2 * numbers
    assert weight_bytes(model) == numbers + 4 * (512 + 64)


def predict(unet: nn.Module) -> torch.Tensor:
    return unet(normal(2, 4, 8, 8), torch.tensor([10, 700]), normal(2, 5, 16, seed=3)).sample


def test_a_model_keeps_first_and_last_layers_and_its_prediction() -> None:
    plain, scaled, cast = make_tiny_unet(), make_tiny_unet(), make_tiny_unet()
    for unet in (plain, scaled, cast):
        for name, module in unet.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and "block" in name:
                module.weight.data.mul_(0.05)  # wide layers have small weights, these few channels large ones
    store_weights(scaled, "fp8", CPU)
    for outside in (scaled.conv_in, scaled.conv_out, scaled.time_embedding.linear_1):
        assert type(outside) in (nn.Conv2d, nn.Linear)
    kinds = [type(m) for m in scaled.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert sum(issubclass(kind, StoredLayer) for kind in kinds) > 0.9 * len(kinds)
    for one, other in zip(scaled.modules(), cast.modules(), strict=True):
        if isinstance(one, StoredLayer):
            other.weight.data = other.weight.data.to(FP8).float()
    with torch.no_grad():
        exact = predict(plain)
        assert relative_error(predict(scaled), exact) < 0.02
        assert relative_error(predict(scaled), exact) < 0.5 * relative_error(predict(cast), exact)


@pytest.mark.parametrize(
    "kind", [{}, {"dora": "True"}, {"dora": "True", "dora_on_output": "True"}], ids=["lora", "dora", "dora_out"]
)
def test_adapters_work_on_top_and_come_off(kind: dict[str, str]) -> None:
    small, plain = store_weights(make_tiny_unet(), "fp8", CPU), make_tiny_unet()
    for one, other in zip(small.modules(), plain.modules(), strict=True):
        if isinstance(one, StoredLayer):
            other.weight.data.copy_(one.weight)
    found = []
    for unet in (small, plain):
        text = make_tiny_text_encoder()
        torch.manual_seed(4)
        network = create_network(1.0, 2, 1.0, None, [text], unet, conv_dim="2", conv_alpha="1", **kind)
        network.apply_to([text], unet, False, True)
        torch.manual_seed(5)
        for name, parameter in network.named_parameters():
            if "lora_up" in name:
                nn.init.normal_(parameter, std=0.1)
        network.prepare_grad_etc([text], unet)
        out = predict(unet)
        out.square().mean().backward()
        found.append((out.detach(), {name: p.grad for name, p in network.named_parameters()}, network))
    (out, gradients, network), (expected, expected_gradients, _) = found
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-6)

    with pytest.raises(UserError, match="fp8 or fewer bits, into which nothing can be merged"):
        network.merge()
    with pytest.raises(UserError, match="fp8"):
        network.merge_to([make_tiny_text_encoder()], small, None)
    network.remove()
    bare = store_weights(make_tiny_unet(), "fp8", CPU)
    with torch.no_grad():
        assert torch.equal(predict(small), predict(bare))


@pytest.mark.gpu
def test_on_a_gpu_only_fp8_weights_stay_and_the_peak_is_one_layer() -> None:
    model = nn.ModuleList([nn.Linear(4096, 4096, bias=False) for _ in range(8)]).to(torch.bfloat16)
    model.requires_grad_(False)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    store_weights(model, "fp8", torch.device("cuda"))
    numbers = 8 * 4096 * 4096
    assert torch.cuda.memory_allocated() - start < 1.05 * numbers
    # one layer in bf16, and in float32 while it is divided
    assert torch.cuda.max_memory_allocated() - start < numbers + 16 * 4096 * 4096
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    before = torch.cuda.memory_allocated()
    out = x
    for layer in model:
        out = layer(out)
    assert torch.cuda.memory_allocated() - before < 2 * 4096 * 4096  # not one weight is kept for the backward pass
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_numbers_of_an_fp8_file_are_kept() -> None:
    stored = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    numbers, scale = FORMS["fp8"].quantise(stored.to(torch.bfloat16), None)
    assert torch.equal(numbers.view(torch.uint8), stored.view(torch.uint8))
    assert scale.shape == (8, 1) and (scale == 1).all()
