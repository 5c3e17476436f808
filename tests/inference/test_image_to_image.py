"""img2img, inpainting, highres fix and negative scale: equal to diffusers' pipelines, or to the published formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.config.image_settings import ImageSettings
from library.data.image_io import read_image
from library.diffusion.samplers import SAMPLER_NAMES, create_scheduler_for
from library.errors import UserError
from library.inference import denoise
from library.inference.denoise import Denoise, Feature, StepInfo
from library.inference.features.guidance import Guidance
from library.inference.features.image_to_image import ImageToImage, encode_sources
from library.inference.features.inpainting import Inpainting
from library.inference.file_names import FileNames
from library.inference.generate import begin, decode_images, generate_image, generate_latents
from library.inference.highres_fix import HighresFix, latents_of_two_stages
from library.inference.models import GenerateOptions, ImageModels
from library.inference.options import ImageOutputOptions
from library.inference.plan import PlannedImage
from library.inference.png import save_png
from library.inference.sources import Sources, find_sources, prompts_of_images, read_mask, size_of_source
from tests.fixtures.tiny_sd import MadeCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

#: each class of scheduler once
SAMPLERS = [name for name in SAMPLER_NAMES if not name.startswith("k_")]
SOURCE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def pipelines(folder: MadeCheckpoint) -> dict[str, Any]:
    import diffusers

    plain = diffusers.StableDiffusionPipeline.from_pretrained(folder.path, safety_checker=None, feature_extractor=None)
    kinds = {"image": diffusers.StableDiffusionImg2ImgPipeline, "mask": diffusers.StableDiffusionInpaintPipeline}
    parts = dict(plain.components, requires_safety_checker=False)
    made = {"plain": plain} | {name: kind(**parts) for name, kind in kinds.items()}
    for pipeline in made.values():
        pipeline.set_progress_bar_config(disable=True)
    return made


def of_diffusers(pipeline: Any, settings: ImageSettings, **more: object) -> Tensor:
    pipeline.scheduler = create_scheduler_for(settings.sampler, v_prediction=False)
    return pipeline(
        prompt=settings.prompt,
        negative_prompt=settings.negative_prompt,
        num_inference_steps=settings.steps,
        guidance_scale=settings.scale,
        generator=torch.Generator().manual_seed(settings.seed),
        output_type="latent",
        **more,
    ).images


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_from_text_as_diffusers(
    pipelines: dict[str, Any], models: ImageModels, options: GenerateOptions, settings: ImageSettings, sampler: str
) -> None:
    settings = replace(settings, sampler=sampler, steps=6)
    expected = of_diffusers(pipelines["plain"], settings, width=64, height=64)
    torch.testing.assert_close(generate_latents(models, [settings], options), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("strength", [0.5, 0.9])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_from_an_image_as_diffusers(
    pipelines: dict[str, Any],
    models: ImageModels,
    options: GenerateOptions,
    settings: ImageSettings,
    sampler: str,
    strength: float,
) -> None:
    settings = replace(settings, sampler=sampler, steps=6, strength=strength)
    expected = of_diffusers(pipelines["image"], settings, image=SOURCE, strength=strength)
    found = generate_latents(models, [settings], options, features=[ImageToImage(SOURCE)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_repainting_as_diffusers(
    pipelines: dict[str, Any],
    models: ImageModels,
    options: GenerateOptions,
    settings: ImageSettings,
    sampler: str,
    tmp_path: Path,
) -> None:
    white = np.zeros((64, 64), np.uint8)
    white[:, 24:] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    settings = replace(settings, sampler=sampler, steps=6, strength=0.7, mask=tmp_path / "mask.png")
    given = {"image": SOURCE, "mask_image": Image.fromarray(white), "masked_image_latents": SOURCE}
    expected = of_diffusers(pipelines["mask"], settings, **given, strength=0.7, width=64, height=64)
    found = generate_latents(models, [settings], options, features=[ImageToImage(SOURCE), Inpainting()])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(found[..., :3], SOURCE[..., :3])  # what is kept is the source itself


def test_all_of_the_strength_leaves_nothing_of_the_image(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings
) -> None:
    plain = generate_latents(models, [settings], options)
    found = generate_latents(models, [replace(settings, strength=1.0)], options, features=[ImageToImage(SOURCE)])
    assert torch.equal(found, plain)


@pytest.mark.parametrize("strength", [0.0, 0.2])
def test_a_strength_without_a_step_leaves_the_image(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, strength: float
) -> None:
    one = replace(settings, strength=strength)
    assert torch.equal(generate_latents(models, [one], options, features=[ImageToImage(SOURCE)]), SOURCE)


def test_images_from_files_do_not_depend_on_their_batch(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (80, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    batch = [
        replace(settings, strength=0.7, seed=seed, image=tmp_path / f"{name}.png")
        for name, seed in (("a", 1), ("b", 2))
    ]
    assert batch[0].shares_batch_with(batch[1]) and not batch[0].shares_batch_with(settings)
    together = generate_latents(models, batch, options, features=[ImageToImage()])
    alone = [generate_latents(models, [one], options, features=[ImageToImage()]) for one in batch]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
    other = generate_latents(models, [replace(batch[0], image=batch[1].image)], options, features=[ImageToImage()])
    assert (other - alone[0]).abs().max() > 0.01


# ---- negative scale ----


@torch.inference_mode()
def test_a_scale_of_the_negative_prompt_is_the_published_formula(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings
) -> None:
    """e + s (c - e) - n (neg - e), e with the empty prompt."""
    found: dict[str, Tensor] = {}

    class Kept(Feature):
        def __init__(self, name: str) -> None:
            self._name = name

        def wrap(self, denoise: Denoise) -> Denoise:
            def kept(noisy: Tensor, timesteps: Tensor, step: StepInfo) -> Tensor:
                found[self._name] = denoise(noisy, timesteps, step)
                return found[self._name]

            return kept

    one = replace(settings, steps=1, scale=4.0, negative_scale=1.5)
    for name, text in (("c", one.prompt), ("n", one.negative_prompt), ("e", "")):
        plain = replace(one, prompt=text, scale=1.0)
        denoise.run(begin(models, [plain], options, {}), [Kept(name)])
    denoise.run(begin(models, [one], options, {}), [Kept("all"), Guidance()])
    expected = found["e"] + 4.0 * (found["c"] - found["e"]) - 1.5 * (found["n"] - found["e"])
    torch.testing.assert_close(found["all"], expected, atol=1e-5, rtol=1e-4)
    assert one.texts(models.architecture.worded) == (one.prompt, one.negative_prompt, "")


# ---- highres fix ----


@pytest.mark.parametrize("in_latents", [False, True])
def test_highres_fix_is_two_images(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, in_latents: bool
) -> None:
    large = replace(settings, width=128, height=128, steps=5, strength=0.6)
    fix = HighresFix(0.5, steps=2, in_latents=in_latents, saves_first=True)
    (small,), found = latents_of_two_stages(models, [large], options, {}, fix)
    (image,) = decode_images(models, found, options)
    alone = replace(settings, steps=2)
    assert np.array_equal(np.asarray(small), np.asarray(generate_image(models, alone, options)))
    assert image.size == (128, 128)
    if in_latents:
        latents = generate_latents(models, [alone], options)
        sources = torch.nn.functional.interpolate(latents, (16, 16), mode="bicubic", align_corners=False)
    else:
        enlarged = np.asarray(small.resize((128, 128), Image.Resampling.LANCZOS))
        pixels = torch.from_numpy(enlarged.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        sources = encode_sources(models, pixels, [settings.seed + 1], options.device)
    second = replace(large, seed=settings.seed + 1)
    again = generate_latents(models, [second], options, features=[ImageToImage(sources)])

    assert np.abs(np.asarray(decode_images(models, again, options)[0]).astype(int) - np.asarray(image)).max() <= 1


def test_sizes_and_strengths_of_the_stages(settings: ImageSettings) -> None:
    fix = HighresFix(0.5, strength=0.3)
    large = replace(settings, width=200, height=128)
    assert (fix.first(large).width, fix.first(large).height, fix.first(large).steps) == (96, 64, 28)
    assert fix.first(large).strength is None and fix.second(large).strength == 0.8
    assert fix.first(replace(large, image=Path("a.png"), strength=0.5)).strength == 0.3
    assert fix.second(replace(large, strength=0.5)).strength == 0.5
    assert fix.second(large).seed == large.seed + 1


# ---- sources ----


def noise_image(path: Path, size: tuple[int, int]) -> Path:
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_finding_sources(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "notes.txt", "10.webp"):
        noise_image(tmp_path / name, (64, 64)) if name != "notes.txt" else (tmp_path / name).touch()
    assert [path.name for path in find_sources(tmp_path, "--image_path")] == ["10.webp", "a.jpg", "b.png"]
    (tmp_path / "empty").mkdir()
    for wrong, message in (("gone", "no such file or folder"), ("empty", "holds no images")):
        with pytest.raises(UserError, match=f"--image_path .*{wrong}: .*{message}"):
            find_sources(tmp_path / wrong, "--image_path")


def test_new_images_do_not_replace_their_sources(tmp_path: Path) -> None:
    noise_image(tmp_path / "a.jpg", (64, 64))
    (tmp_path / "out").mkdir()
    for outdir in (tmp_path, tmp_path / "out"):
        named = ImageOutputOptions(image_path=str(tmp_path), outdir=str(outdir), use_original_file_name=True)
        assert len(Sources.of(named).images) == 1  # a.jpg becomes a.png
    noise_image(tmp_path / "a.png", (64, 64))
    assert len(Sources.of(named).images) == 2
    with pytest.raises(
        UserError, match=r"--use_original_file_name: .*a\.png .*would replace it; give another --outdir"
    ):
        Sources.of(replace(named, outdir=str(tmp_path / "out" / "..")))
    assert len(Sources.of(replace(named, outdir=str(tmp_path), use_original_file_name=False)).images) == 2


def test_several_images_of_one_source_have_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()  # of an older run
    names = FileNames(tmp_path)
    assert names.named("cats/own") == tmp_path / "cats" / "own.png"
    assert names.named("own.PNG") == tmp_path / "own.PNG"
    assert [names.once(stem).name for stem in ("a", "b", "a", "a")] == ["a.png", "b.png", "a_2.png", "a_3.png"]


def test_the_size_of_an_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert size_of_source(noise_image(tmp_path / "a.png", (128, 64))) == (128, 64)
    assert caplog.text == ""
    assert size_of_source(noise_image(tmp_path / "b.png", (95, 190))) == (64, 160)
    assert "b.png: 95x190 is stretched to the shape of 64x160" in caplog.text


def test_a_mask_of_another_shape_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image, mask = noise_image(tmp_path / "a.png", (64, 64)), noise_image(tmp_path / "m.png", (64, 96))
    sources = Sources.of(ImageOutputOptions(outdir="out", image_path=str(image), mask_path=str(mask)))
    planned = PlannedImage(ImageSettings("a", "", 64, 64, 1, 1.0, "ddim", 0))
    for _ in range(2):
        sources.assigned([planned])
    assert caplog.text.count("m.png: 64x96 is stretched to the shape of 64x64") == 1
    assert "a.png" not in caplog.text


def test_masks_are_means(tmp_path: Path) -> None:
    white = np.zeros((16, 16), np.uint8)
    white[:, 4:] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    torch.testing.assert_close(
        read_mask(tmp_path / "mask.png", (2, 2)), torch.tensor([[0.5, 1.0]] * 2), atol=0.003, rtol=0
    )


def test_sources_are_taken_in_turn(tmp_path: Path, settings: ImageSettings) -> None:
    from library.inference.plan import PlannedImage

    images = [noise_image(tmp_path / f"{n}.png", (64, 96)) for n in range(2)]
    planned = [PlannedImage(settings, place=n) for n in range(3)]

    def taken(found: Sequence[PlannedImage]) -> list[tuple[str, int, int, float | None]]:
        return [(p.settings.image.name, p.settings.width, p.settings.height, p.settings.strength) for p in found]

    assert taken(Sources(images).assigned(planned)) == [
        ("0.png", 64, 96, 0.8),
        ("1.png", 64, 96, 0.8),
        ("0.png", 64, 96, 0.8),
    ]
    assert taken(Sources(images, size=(128, 64)).assigned(planned[:1], first=1)) == [("1.png", 128, 64, 0.8)]
    assert Sources().assigned(planned) == planned


def test_prompts_of_images(tmp_path: Path, settings: ImageSettings) -> None:
    image = Image.fromarray(read_image(noise_image(tmp_path / "plain.png", (64, 64))))
    save_png(image, tmp_path / "made.png", settings.record(model="m"))
    (prompt,) = prompts_of_images([tmp_path / "made.png"])
    assert (prompt.prompt, prompt.negative_prompt) == (settings.prompt, settings.negative_prompt)
    with pytest.raises(UserError, match=r"plain\.png: its PNG texts hold no prompt"):
        prompts_of_images([tmp_path / "plain.png"])
