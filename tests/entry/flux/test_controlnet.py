"""ControlNets of FLUX.1 trained by the real script: a step is that of a plain loop, files are the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.entry.flux import test_step
from tests.entry.flux.test_step import Drawn, drawn, mean_square, plain_step  # noqa: F401
from tests.entry.test_controlnet import Guides
from tests.fixtures.families import FLUX
from tests.fixtures.guides import make_pairs
from tests.fixtures.runs import logged
from tests.fixtures.tiny_flux import make_tiny_controlnet, make_tiny_flux
from tests.fixtures.whole import Whole

pytestmark = pytest.mark.usefixtures("own_root_logger")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    torch.set_num_threads(1)
    return Whole("flux_train_control_net", FLUX, make_tiny_flux(tmp_path_factory.mktemp("flux")))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = make_pairs(tmp_path, sizes=((64, 64),) * 2)
    for index, caption in enumerate(test_step.CAPTIONS):
        (tmp_path / "images" / f"{index}.txt").write_text(caption, encoding="utf-8")
    return path


class Controlled(nn.Module):
    """A transformer of diffusers with a ControlNet of diffusers."""

    def __init__(self, transformer: nn.Module, controlnet: nn.Module, image: Tensor) -> None:
        super().__init__()
        self.transformer, self.controlnet, self.image = transformer, controlnet, image

    def forward(self, tokens: Tensor, states: Tensor, *, return_dict: bool, **settings: Any) -> Any:
        blocks, _ = self.controlnet(
            tokens, controlnet_cond=self.image, encoder_hidden_states=states, return_dict=False, **settings
        )
        assert max(block.abs().max() for block in blocks) > 0
        return self.transformer(
            tokens,
            states,
            controlnet_block_samples=blocks,
            controlnet_blocks_repeat=True,
            return_dict=False,
            **settings,
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_that_of_a_plain_diffusers_loop(
    tmp_path: Path,
    flux: Whole,
    dataset: Path,
    drawn: Drawn,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    checkpointing: bool,
) -> None:
    """With plain SGD at a rate of 1 the weights move by their gradient; the start has outputs that are not zero."""
    from diffusers import FluxControlNetModel

    descent = {"optimizer_type": "torch.optim.SGD", "max_grad_norm": 0, "max_train_steps": 1}
    folder = {"controlnet_layout": "diffusers", "timestep_sampling": "sigmoid", "model_prediction_type": "raw"}
    flux.train(dataset, tmp_path / "start", **folder, learning_rate=0.05, max_train_steps=2)
    start = tmp_path / "start" / "tiny"
    for values in vars(drawn).values():
        values.clear()
    guides = Guides(monkeypatch)
    flux.train(
        dataset, tmp_path / "out", **folder, **descent, learning_rate=1.0, controlnet_model_name_or_path=start,
        gradient_checkpointing=checkpointing, guidance_scale=2.5,
    )  # fmt: skip
    controlnet = FluxControlNetModel.from_pretrained(start)
    made = test_step.diffusers_model
    monkeypatch.setattr(
        test_step, "diffusers_model", lambda *args: Controlled(made(*args), controlnet, guides.images[0])
    )
    plain = plain_step("dev", flux.model, drawn, guidance=2.5, masked=False, weigh=mean_square)  # type: ignore[arg-type]
    assert logged(tmp_path / "out", "loss/current") == pytest.approx([plain.loss.item()], rel=1e-5)
    last = FluxControlNetModel.from_pretrained(tmp_path / "out" / "tiny").state_dict()
    for name, parameter in controlnet.named_parameters():
        if parameter.grad is None:
            assert torch.equal(parameter, last[name]), name  # the text stream's end of the last block
            continue
        moved = parameter.detach() - last[name]
        torch.testing.assert_close(moved, parameter.grad, rtol=2e-3, atol=2e-6, msg=name)


def test_it_starts_from_the_transformer(tmp_path: Path, flux: Whole, dataset: Path) -> None:
    """The published names; input layers and first blocks are the transformer's bits, the outputs are zero."""
    flux.train(dataset, tmp_path / "out", learning_rate=1e-30, max_train_steps=1)
    saved, base = load_file(tmp_path / "out" / "tiny.safetensors"), load_file(flux.model.path)
    top = {name.partition(".")[0] for name in saved}
    assert top == {
        "img_in", "time_in", "vector_in", "guidance_in", "txt_in", "double_blocks", "controlnet_blocks",
        "pos_embed_input", "input_hint_block",
    }  # fmt: skip
    hint = {name.split(".")[1] for name in saved if name.startswith("input_hint_block.")}
    assert hint == {str(number) for number in range(0, 16, 2)}
    for name, tensor in saved.items():
        if name in base:
            torch.testing.assert_close(tensor, base[name], rtol=0, atol=1e-29, msg=name)
        elif name.startswith(("controlnet_blocks.", "input_hint_block.14.")):
            assert tensor.abs().max() < 1e-29, name
        else:
            assert name.startswith(("pos_embed_input.", "input_hint_block.")), name
    assert {name for name in base if name.startswith(("double_blocks.0.", "double_blocks.1."))} <= saved.keys()


def test_the_published_file_has_the_published_size() -> None:
    from library.architectures.flux.controlnet import build
    from library.architectures.flux.controlnet_files import config_of, published_layout
    from library.architectures.flux.sizes import FluxSizes

    with torch.device("meta"):
        controlnet = build(config_of(FluxSizes()))
    tensors = dict(published_layout(2, guidance=True).write(controlnet.state_dict()))
    assert len(tensors) == 86
    assert sum(tensor.numel() for tensor in tensors.values()) == 743_807_280


def test_it_continues_from_both_layouts_and_samples(tmp_path: Path, flux: Whole, dataset: Path) -> None:
    """A file and a folder of one run are the same ControlNet; sample images use the image of their prompt."""
    prompts, guides = tmp_path / "prompts.txt", tmp_path / "guides"
    prompts.write_text("".join(f"a cat --w 64 --h 64 --s 2 --d 1 --cn {guides}/{n}.png\n" for n in (0, 1)))
    samples = {"sample_prompts": prompts, "sample_every_n_steps": 2}
    common = {"learning_rate": 0.02, "max_train_steps": 2, "cache_latents": True, "cache_text_encoder_outputs": True}
    flux.train(dataset, tmp_path / "file", **common, **samples)
    first, second = (Image.open(image).tobytes() for image in sorted((tmp_path / "file" / "sample").glob("*.png")))
    assert first != second
    flux.train(dataset, tmp_path / "folder", **common, save_model_as="diffusers")
    ends = []
    for name, start in (("file", "tiny.safetensors"), ("folder", "tiny")):
        still = {**common, "learning_rate": 1e-30, "max_train_steps": 1}
        path = tmp_path / name / start
        flux.train(dataset, tmp_path / f"again_{name}", **still, controlnet_model_name_or_path=path)
        ends.append(load_file(tmp_path / f"again_{name}" / "tiny.safetensors"))
    for name, tensor in load_file(tmp_path / "file" / "tiny.safetensors").items():
        torch.testing.assert_close(ends[0][name], tensor, rtol=0, atol=1e-29)
        torch.testing.assert_close(ends[1][name], tensor, rtol=0, atol=1e-29)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"controlnet_model_name_or_path": "LATENTS"}, "it reads latents; give one that reads pixels"),
        ({"model_type": "chroma"}, "--model_type chroma: ControlNets are trained for FLUX.1"),
        ({"fused_optimizer_groups": 2}, "--fused_optimizer_groups: --fused_backward_pass updates each weight"),
        ({"controlnet_layout": "control_model"}, "saved as published, diffusers"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    flux: Whole,
    dataset: Path,
    options: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "controlnet_model_name_or_path" in options:
        options = {"controlnet_model_name_or_path": make_tiny_controlnet(tmp_path / "net")}
    with pytest.raises(SystemExit) as ended:
        flux.train(dataset, tmp_path / "out", **options)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and words in "\n".join(lines), lines
