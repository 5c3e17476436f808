"""GGPO: what training adds to the weights, how it is drawn, and that states and recomputed blocks meet the same."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, load_model, save_model
from torch import nn

from networks.ggpo import Perturbation, PerturbedLoraModule, PerturbedSplitLoraModule
from networks.lora_flux import create_network
from networks.targets import FoundModule, RankAlpha
from tests.fixtures.adapted import randomize
from tests.fixtures.adapted_flux import flux_models, flux_outputs, predict

GGPO = {"ggpo_sigma": "0.05", "ggpo_beta": "0.5"}


def make(models, **args):
    network = randomize(create_network(1.0, 4, 2.0, None, *models, **{**GGPO, **args}))
    network.apply_to(*models)
    return network


def make_module(kind=PerturbedLoraModule, sigma=0.3, beta=0.2):
    torch.manual_seed(0)
    layer = nn.Linear(400, 9).requires_grad_(False)
    split = kind is PerturbedSplitLoraModule
    size = RankAlpha(6, 3.0, widths=(3, 3, 3) if split else ())
    adapter = kind(FoundModule("lora_unet_x", "x", layer), size, perturbation=Perturbation(sigma, beta))
    randomize(adapter).apply_to_original()
    return layer, adapter.train()


@pytest.mark.parametrize("kind", [PerturbedLoraModule, PerturbedSplitLoraModule])
def test_the_noise_has_the_formula_s_spread(kind):
    layer, adapter = make_module(kind)
    gradient_norms = torch.arange(1.0, 10.0)
    eye = torch.eye(400)
    plain = layer(eye)  # no step has begun: a LoRA
    torch.testing.assert_close(plain - layer.bias, (layer.weight + adapter.get_weight()).T)
    drawn = []
    for step in range(20):
        adapter.begin_step(1, step, gradient_norms)
        drawn.append((layer(eye) - plain).T)  # E, (out, in)
    noise = torch.cat(drawn, dim=1)
    scales = 0.3 * torch.linalg.vector_norm(layer.weight + adapter.get_weight(), dim=1) + 0.2 * gradient_norms
    torch.testing.assert_close(noise.std(dim=1), scales / 400**0.5, rtol=0.05, atol=0)
    assert noise.mean(dim=1).abs().max() < 0.05 * noise.std()
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.06

    adapter.begin_step(1, 3, gradient_norms)
    torch.testing.assert_close((layer(eye) - plain).T, drawn[3], rtol=0, atol=0)
    assert (drawn[4] - drawn[3]).abs().max() > 0.01
    adapter.begin_step(2, 3, gradient_norms)
    assert (layer(eye) - plain).T.sub(drawn[3]).abs().max() > 0.01
    adapter.begin_step(1, 3, gradient_norms)
    adapter.lora_name = "lora_unet_y"  # every module has its own
    assert (layer(eye) - plain).T.sub(drawn[3]).abs().max() > 0.01
    adapter.eval()
    assert torch.equal(layer(eye), plain)


def test_inputs_get_the_gradient_of_the_perturbed_weight():
    layer, adapter = make_module()
    adapter.begin_step(1, 0, torch.ones(9))
    x = torch.randn(2, 3, 400, requires_grad=True)
    weights = torch.randn(2, 3, 9)
    (layer(x) * weights).sum().backward()
    with torch.no_grad():
        perturbed = (layer(torch.eye(400)) - layer.bias).T
    torch.testing.assert_close(x.grad, weights @ perturbed)
    assert adapter.lora_up.weight.grad is not None and layer.weight.grad is None


@pytest.mark.parametrize("kind", [PerturbedLoraModule, PerturbedSplitLoraModule])
def test_gradient_norms_are_those_within_the_down_half_s_span(kind):
    layer, adapter = make_module(kind)
    x, weights = torch.randn(30, 400), torch.randn(30, 9)
    (layer(x) * weights).sum().backward()
    whole = weights.T @ x  # dL/dW', (out, in)
    norms = adapter.gradient_norms(torch.zeros(9))
    for rows, row_norms, down in zip(
        whole.split(3 if kind is PerturbedSplitLoraModule else 9),
        norms.split(3 if kind is PerturbedSplitLoraModule else 9),
        adapter._downs(),
        strict=True,
    ):
        projected = rows @ torch.linalg.pinv(down.detach()) @ down.detach()
        torch.testing.assert_close(row_norms, torch.linalg.vector_norm(projected, dim=1), rtol=1e-4, atol=1e-4)
    # a gradient that is not finite, or none, leaves what is known
    for up in adapter.up_parameters():
        up.grad[0] = float("nan")
    kept = adapter.gradient_norms(torch.full((9,), 7.0))
    assert kept[0] == 7.0 and torch.equal(kept[1:3], norms[1:3])
    adapter.zero_grad()
    assert torch.equal(adapter.gradient_norms(norms), norms)


def test_only_training_is_perturbed_and_files_do_not_tell(tmp_path):
    models = flux_models("dev")
    network = make(models)
    network.eval()
    plain = flux_outputs(*models)
    network.begin_step(0, 0)
    network.train()
    noisy = flux_outputs(*models)
    assert all((noisy[name] - plain[name]).abs().max() > 1e-4 for name in ("text 1", "prediction"))
    assert torch.equal(noisy["text 2"], plain["text 2"])  # T5 carries no adapters here
    network.eval()
    assert torch.equal(flux_outputs(*models)["prediction"], plain["prediction"])
    network.save_weights(tmp_path / "a.safetensors", None, {})
    names = set(load_file(tmp_path / "a.safetensors"))
    assert names == {name for name in network.state_dict() if name != "ggpo_gradient_norms"}
    network.load_weights(tmp_path / "a.safetensors")
    # both 0 is a LoRA
    assert (
        "ggpo_gradient_norms"
        not in create_network(1.0, 4, 2.0, None, *models, ggpo_sigma="0", ggpo_beta="0").state_dict()
    )


def train(models, network, optimizer, steps, *, checkpointing=False):
    models[1].gradient_checkpointing = checkpointing
    for step in steps:
        network.begin_step(11, step)
        for _ in range(2):  # accumulated
            predict(models[1]).square().mean().backward()
        network.before_update()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("args", [{}, {"split_qkv": "True"}], ids=["plain", "split"])
def test_a_resumed_run_is_the_run(tmp_path, args):
    def start():
        models = flux_models("dev")
        network = make(models, **args)
        network.remove()
        network.apply_to(*models, False, True)
        network.train()
        groups, _ = network.prepare_optimizer_params(None, 1e-2, 1e-2)
        return models, network, torch.optim.AdamW(groups)

    models, network, optimizer = start()
    train(models, network, optimizer, range(2))
    save_model(network, str(tmp_path / "state.safetensors"))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert (network.ggpo_gradient_norms > 0).all()
    train(models, network, optimizer, range(2, 4))

    again_models, again, again_optimizer = start()
    load_model(again, str(tmp_path / "state.safetensors"))
    again_optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    # recomputed blocks meet the same perturbation
    train(again_models, again, again_optimizer, range(2, 4), checkpointing=True)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-6, atol=1e-7, msg=name)

    # states of runs without GGPO, and the other way round
    plain = create_network(1.0, 4, 2.0, None, *models, **args)
    plain.apply_to(*again_models, False, True)
    load_model(plain, str(tmp_path / "state.safetensors"))
    save_model(plain, str(tmp_path / "plain.safetensors"))
    load_model(again, str(tmp_path / "plain.safetensors"))


def test_half_precision_is_perturbed_too():
    models = flux_models("dev")
    network = make(models)
    network.train()
    network.begin_step(3, 0)
    expected = predict(models[1]).detach()
    gradients = []
    for half in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            prediction = predict(models[1])
        assert (prediction - expected).abs().max() < (0.1 if half else 1e-6) * expected.abs().max()
        prediction.float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.slow
def test_compiled_blocks_are_perturbed_too():
    models = flux_models("dev")
    network = make(models)
    network.train()
    network.begin_step(3, 0)
    expected = predict(models[1]).detach()
    models[1].single_blocks[0].compile(backend="eager")
    torch.testing.assert_close(predict(models[1]).detach(), expected)
