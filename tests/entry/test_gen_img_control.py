"""``gen_img.py`` with ControlNets and ControlNet-LLLites, as a user runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from library.architectures.sd import SD
from library.architectures.sdxl import SDXL
from tests.fixtures.control import random_controlnet, save_lllite, save_original
from tests.fixtures.drawn import pixels, text_of
from tests.fixtures.runs import Finished, run_script
from tests.fixtures.tiny_sd import MadeCheckpoint, make_tiny_sd
from tests.fixtures.tiny_sdxl import make_tiny_sdxl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with their ControlNets, and two images to read."""
    folder = tmp_path_factory.mktemp("control")
    for name, family, made in (
        ("sd", SD, make_tiny_sd(folder / "sd.safetensors")),
        ("xl", SDXL, make_tiny_sdxl(folder / "xl.safetensors")),
    ):
        cache = str(made.tokenizer_cache_dir)
        checkpoint = family.inspect(
            str(made.path), v2=False, v_parameterization=False, vae=None, tokenizer_cache_dir=cache
        )
        unet = family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
        for seed in (1, 2):
            net = random_controlnet(unet, seed)
            save_original(net, folder / f"{name}_net{seed}.safetensors", prefix="control_model.")
            if family is SDXL:
                save_file(net.state_dict(), folder / f"{name}_net{seed}.safetensors")
                save_lllite(unet, folder / f"lllite{seed}.safetensors", seed)
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((64, 64)).save(folder / f"{name}.png")
    return folder


def generate(folder: Path, model: str, out: Path, *arguments: object) -> Finished:
    made = MadeCheckpoint(folder / f"{model}.safetensors", folder / "tokenizers")
    usual = ("--ckpt", made.path, "--tokenizer_cache_dir", made.tokenizer_cache_dir, "--outdir", out, "--W", 64)
    more = ("--H", 64, "--steps", 4, "--console_log_simple", "--sequential_file_name", "--seed", 1)
    return run_script("gen_img.py", *usual, *more, *arguments)


def images(finished: Finished, out: Path) -> list[np.ndarray]:
    assert finished.code == 0, finished.text
    return [pixels(path) for path in sorted(out.iterdir())]


@pytest.mark.parametrize("model", ["sd", "xl"])
def test_controlnets(folder: Path, tmp_path: Path, model: str) -> None:
    """Several with canny and strengths, images taken in turn; one at strength 0 changes nothing."""
    a, b = folder / "a.png", folder / "b.png"
    nets = ("--control_net_models", folder / f"{model}_net1.safetensors", folder / f"{model}_net2.safetensors")
    more = ("--control_net_preps", "canny", "none", "--control_net_ratios", 1, 0.5, "--guide_image_path", a, b, b, a)
    out = tmp_path / "out"
    prompt = ("--prompt", "cat --d 1,1", "--images_per_prompt", 2, "--batch_size", 2)
    first, second = images(generate(folder, model, out, *prompt, *nets, *more), out)
    assert np.abs(first - second).max() > 1  # the same seed with other images
    assert text_of(out / "im_000001.png")["control"] == "a.png,b.png"
    out = tmp_path / "off"
    (off,) = images(
        generate(folder, model, out, "--prompt", "cat --d 1", *nets, *more, "--control_net_weights", 0, 0), out
    )
    out = tmp_path / "plain"
    (plain,) = images(generate(folder, model, out, "--prompt", "cat --d 1"), out)
    assert np.abs(off - plain).max() <= 1 and np.abs(first - plain).max() > 1


def test_lllites(folder: Path, tmp_path: Path) -> None:
    """Two together, in both stages of the highres fix or in the first alone; sides that 32 does not divide."""
    nets = ("--control_net_lllite_models", folder / "lllite1.safetensors", folder / "lllite2.safetensors")
    more = ("--guide_image_path", folder / "a.png", folder / "b.png", "--control_net_multipliers", 1, 0.5)
    found = []
    for name, extra in (("plain", ()), ("on", (*nets, *more)), ("off", (*nets, *more, "--control_net_ratios", 0, 0))):
        out = tmp_path / name
        (image,) = images(generate(folder, "xl", out, "--prompt", "cat --d 1 --w 72 --h 104", *extra), out)
        found.append(image)
    plain, on, first_step = found
    assert np.abs(plain - on).max() > 1 and np.abs(plain - first_step).max() > 0
    fixed = (*nets, *more, "--highres_fix_scale", 0.5, "--highres_fix_steps", 2)
    large = []
    for name, extra in (("both", ()), ("one", ("--highres_fix_disable_control_net",))):
        out = tmp_path / name
        large += images(generate(folder, "xl", out, "--prompt", "cat --d 1 --w 128 --h 128", *fixed, *extra), out)
    assert np.abs(large[0] - large[1]).max() > 0


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        ("sd", ("--control_net_models", "gone.safetensors"), "--control_net_models gone.safetensors: no such file"),
        ("sd", ("--control_net_models", "{}/xl_net1.safetensors"), "it is for another model"),
        (
            "sd",
            ("--control_net_models", "{}/lllite1.safetensors"),
            "gen_img.py reads it with --control_net_lllite_models",
        ),
        (
            "sd",
            ("--control_net_lllite_models", "{}/lllite1.safetensors"),
            "fits no layer of this model; it is for another one",
        ),
        ("xl", ("--control_net_lllite_models", "gone.pt"), "--control_net_lllite_models gone.pt: no such file"),
        ("xl", ("--control_net_lllite_models", "{}/xl_net1.safetensors"), "holds no ControlNet-LLLite"),
        (
            "sd",
            ("--control_net_models", "{}/sd_net1.safetensors", "{}/sd_net2.safetensors"),
            "1 images for 2 ControlNets",
        ),
        ("sd", ("--control_net_models", "a", "--control_net_ratios", "1", "1"), "2 values for 1 ControlNets"),
    ],
)
def test_mistakes(folder: Path, tmp_path: Path, model: str, arguments: tuple[str, ...], said: str) -> None:
    given = [str(word).format(folder) for word in arguments]
    finished = generate(
        folder, model, tmp_path / "out", "--prompt", "a", *given, "--guide_image_path", folder / "a.png"
    )
    assert finished.code == 2 and said in finished.err and "Traceback" not in finished.text
    assert not (tmp_path / "out").exists()


def test_each_layer_of_a_controlnet_reads_its_own_text(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --XTI_embeddings a ControlNet's layers read the texts of the U-Net's layers that they are copies of."""
    import gen_img
    from library.architectures.common import latent_diffusion

    texts: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    original = latent_diffusion.residuals

    def noted(controlnet: Any, *args: Any, **more: Any) -> Any:
        layers = [*controlnet.down_blocks[0].attentions, *controlnet.mid_block.attentions]
        hooks = [
            layer.transformer_blocks[0].attn2.register_forward_pre_hook(
                lambda module, args, given: seen.append(given["encoder_hidden_states"]), with_kwargs=True
            )
            for layer in layers
        ]
        texts.append(args[2]["encoder_hidden_states"])
        made = original(controlnet, *args, **more)
        for hook in hooks:
            hook.remove()
        return made

    monkeypatch.setattr(latent_diffusion, "residuals", noted)
    layers = ("IN01", "MID", "OUT02", "OUT03")  # of the tiny U-Net
    save_file({name: torch.randn(2, 32) for name in layers}, tmp_path / "qux.safetensors")
    words = (
        *("--ckpt", folder / "sd.safetensors", "--tokenizer_cache_dir", folder / "tokenizers"),
        *("--outdir", tmp_path / "a"),
        *("--W", 64, "--H", 64, "--steps", 1, "--seed", 1, "--prompt", "qux", "--images_per_prompt", 1),
        *("--XTI_embeddings", tmp_path / "qux.safetensors", "--guide_image_path", folder / "a.png"),
        *("--control_net_models", folder / "sd_net1.safetensors"),
    )  # fmt: skip
    gen_img.main(gen_img.setup_parser().parse_args([str(word) for word in words]))
    assert texts and len(seen) == 2 * len(texts)
    for call, joined in enumerate(texts):
        first, middle = seen[2 * call : 2 * call + 2]
        parts = joined.chunk(len(layers), dim=1)
        assert torch.equal(first, parts[0]) and torch.equal(middle, parts[1]) and not torch.equal(first, middle)
