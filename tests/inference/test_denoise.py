"""The chain of a generation: features wrap the prediction in their order and act between the steps."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from library.architectures.conditioning import Conditioning
from library.architectures.sd import SD
from library.config.image_settings import ImageSettings
from library.errors import UserError
from library.inference import denoise, features
from library.inference.denoise import Denoise, Feature, Generation, StepInfo, wanted_features
from library.inference.features.deep_shrink import DeepShrink
from library.inference.features.guidance import Guidance
from library.inference.features.image_to_image import ImageToImage
from library.inference.features.inpainting import Inpainting
from library.inference.gen_img import FEATURES
from library.inference.generate import begin, generate_latents
from library.inference.models import GenerateOptions, ImageModels
from library.inference.plan import Repetition, batches, plan_images
from library.inference.prompt_line import parse_image_prompt


class Recorder(Feature):
    def __init__(self, name: str, seen: list[str]) -> None:
        self._name, self._seen = name, seen

    def prepare(self, generation: Generation) -> None:
        self._seen.append(f"{self._name} prepare {len(generation.timesteps)}")

    def wrap(self, denoise: Denoise) -> Denoise:
        def wrapped(noisy: Tensor, timesteps: Tensor, step: StepInfo) -> Tensor:
            self._seen.append(f"{self._name} in")
            prediction = denoise(noisy, timesteps, step)
            self._seen.append(f"{self._name} out")
            return prediction

        return wrapped

    def after_step(self, latents: Tensor, step: StepInfo) -> Tensor:
        self._seen.append(f"{self._name} after {step.index} of {step.count}")
        return latents + 1 if self._name == "a" else latents


@torch.inference_mode()
def test_the_order_of_features(models: ImageModels, options: GenerateOptions, settings: ImageSettings) -> None:
    seen: list[str] = []
    generation = begin(models, [replace(settings, steps=2)], options, {})
    denoise.run(generation, [Recorder("a", seen), Recorder("b", seen)])
    step = ["a in", "b in", "b out", "a out"]
    after = [[f"{name} after {n} of 2" for name in "ab"] for n in range(2)]
    assert seen == ["a prepare 2", "b prepare 2", *step, *after[0], *step, *after[1]]


def test_which_images_get_a_feature(settings: ImageSettings) -> None:
    asked = replace(settings, image=Path("a.png"), mask=Path("b.png"), own={"ds_ratio": 0.5})
    found = [type(feature) for feature in wanted_features(asked, FEATURES)]
    assert found == [DeepShrink, ImageToImage, Inpainting]
    assert wanted_features(settings, FEATURES) == []
    assert [type(f) for f in wanted_features(replace(settings, image=Path("a.png")), FEATURES)] == [ImageToImage]


@torch.inference_mode()
def test_what_a_feature_returns_is_gone_on_with(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings
) -> None:
    one = replace(settings, steps=1)
    plain = denoise.run(begin(models, [one], options, {}), [Guidance()])
    moved = denoise.run(begin(models, [one], options, {}), [Guidance(), Recorder("a", [])])
    torch.testing.assert_close(moved, plain + 1)


@torch.inference_mode()
def test_guidance_is_the_published_formula(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings
) -> None:
    """u + s (c - u), each as the model gives it alone."""
    one = replace(settings, steps=1)
    found: dict[str, Tensor] = {}

    class Kept(Feature):
        def __init__(self, name: str) -> None:
            self._name = name

        def wrap(self, denoise: Denoise) -> Denoise:
            def kept(noisy: Tensor, timesteps: Tensor, step: StepInfo) -> Tensor:
                found[self._name] = denoise(noisy, timesteps, step)
                return found[self._name]

            return kept

    for name, text in (("c", one.prompt), ("u", one.negative_prompt)):
        denoise.run(begin(models, [replace(one, prompt=text, scale=1.0)], options, {}), [Kept(name)])
    denoise.run(begin(models, [one], options, {}), [Kept("guided"), Guidance()])
    expected = found["u"] + one.scale * (found["c"] - found["u"])
    torch.testing.assert_close(found["guided"], expected, atol=1e-5, rtol=1e-4)


def test_without_guidance_the_model_is_asked_once(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings
) -> None:
    rows = []
    models.denoiser.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    generate_latents(models, [replace(settings, scale=1.0)], options)
    generate_latents(models, [settings], options)
    assert rows == [1] * settings.steps + [2] * settings.steps


class Worded(type(SD)):  # type: ignore[misc]
    """A family with a text before its prompts alone."""

    def worded(self, text: str, role: str) -> str:
        return f"photo of the {text}" if role == "prompt" else text


def test_texts_are_worded_by_their_role(models: ImageModels, options: GenerateOptions, settings: ImageSettings) -> None:
    plain = replace(settings, prompt="photo of the cat", negative_prompt="cat")
    encoded: dict[str, Conditioning] = {}
    worded = replace(models, architecture=Worded())
    found = generate_latents(worded, [replace(plain, prompt="cat")], options, encoded)
    assert torch.equal(found, generate_latents(models, [plain], options))
    assert set(encoded) == {"photo of the cat", "cat"} == set(replace(plain, prompt="cat").texts(Worded().worded))


def test_a_family_names_its_guidance(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Doubled(type(SD)):  # type: ignore[misc]
        guidance = "doubled_guidance"

    class DoubledGuidance(Guidance):
        def prepare(self, generation: Generation) -> None:
            super().prepare(generation)
            self._scale *= 2

    name = "library.inference.features.doubled_guidance"
    DoubledGuidance.__module__ = name
    module = ModuleType(name)
    module.DoubledGuidance, module.Guidance = DoubledGuidance, Guidance  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    found = generate_latents(replace(models, architecture=Doubled()), [settings], options)
    assert torch.equal(found, generate_latents(models, [replace(settings, scale=2 * settings.scale)], options))


BRIGHTER = """
from library.config import prompt_options as read
from library.config.prompt_options import PromptOption
from library.inference.denoise import Feature

class Brighter(Feature):
    prompt_options = (PromptOption("br", "brighter", read.number),)

    @classmethod
    def is_wanted(cls, settings):
        return "brighter" in settings.own

    def prepare(self, generation):
        self._more = generation.first.own["brighter"]

    def after_step(self, latents, step):
        return latents + self._more
"""


@torch.inference_mode()
def test_a_feature_with_a_prompt_option_is_one_file(
    models: ImageModels,
    options: GenerateOptions,
    settings: ImageSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "brighter.py").write_text(BRIGHTER)
    monkeypatch.setattr(features, "__path__", [*features.__path__, str(tmp_path)])
    with pytest.raises(UserError, match="--br x: a number"):
        parse_image_prompt("a cat --br x", options=features.prompt_options())
    prompts = [parse_image_prompt(line, options=features.prompt_options()) for line in ("cat", "cat --br 0.5 --d 7")]
    plain, bright = plan_images(prompts, replace(settings, steps=1), Repetition(7))
    assert bright.settings.own == {"brighter": 0.5} and bright.settings.record(model="m")["brighter"] == "0.5"
    assert len(list(batches([replace(plain, settings=replace(plain.settings, seed=7)), bright], 2))) == 2
    wanted = wanted_features(bright.settings, features.all_features())
    assert [type(one).__name__ for one in wanted] == ["Brighter"]
    without = generate_latents(models, [replace(bright.settings, own={})], options)
    assert torch.equal(generate_latents(models, [bright.settings], options, features=wanted), without + 0.5)
    monkeypatch.delitem(sys.modules, "library.inference.features.brighter")
