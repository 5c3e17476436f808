"""Options of features of generation: found by their file, and declared by the features that use them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from gen_img import setup_parser
from library.config.declaration import Declaration, joined
from library.errors import UserError
from library.inference import feature_options
from library.inference.features import all_features
from library.inference.options import check_options, idle_options, image_options

WARMTH = '''
from dataclasses import dataclass

from library.config.declaration import Declaration, error, idle
from library.config.fields import option


@dataclass(frozen=True)
class WarmthOptions:
    """Warmth."""

    warmth: float | None = option(None, "warmth of images", type=float)
    warmth_steps: int = option(3, "steps in which it acts", type=int)


def _range(o, facts):
    if o.warmth.warmth_steps < 1:
        yield error(f"--warmth_steps {o.warmth.warmth_steps}: must be at least 1")


@idle("warmth_steps", reason="without --warmth")
def _off(o):
    return o.warmth.warmth is None


DECLARATION = Declaration(groups={"warmth": WarmthOptions}, rules=(_range,), idle=(_off,))
'''


def given(*args: str) -> argparse.Namespace:
    return setup_parser().parse_args(["--ckpt", "model.safetensors", "--prompt", "a", *args])


def test_each_file_is_declared_by_a_feature() -> None:
    declared = joined(*(feature.declaration for feature in all_features()))
    assert declared.groups.keys() == feature_options.declared().groups.keys()
    assert set(declared.rules) == set(feature_options.declared().rules)
    assert declared != Declaration()


def test_a_new_file_brings_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "warmth.py").write_text(WARMTH)
    monkeypatch.setattr(feature_options, "__path__", [*feature_options.__path__, str(tmp_path)])

    options = image_options(given("--warmth", "0.5", "--warmth_steps", "0"))
    group = feature_options.declared().groups["warmth"]
    assert vars(options.of(group)) == {"warmth": 0.5, "warmth_steps": 0}
    with pytest.raises(UserError, match="^--warmth_steps 0: must be at least 1$"):
        check_options(options)
    assert idle_options(options) == []
    assert idle_options(image_options(given("--warmth_steps", "2"))) == [
        "--warmth_steps has no effect without --warmth"
    ]


@pytest.mark.parametrize(
    ("args", "warnings"),
    [
        (["--ds_ratio", "0.4"], ["--ds_ratio has no effect without --ds_depth_1"]),
        (["--ds_ratio", "0.4", "--ds_depth_1", "1"], []),
        (
            ["--gradual_latent_s_noise", "0.9"],
            ["--gradual_latent_s_noise has no effect without --gradual_latent_timesteps, or --glt in a prompt"],
        ),
        (["--vgg16_guidance_layer", "9"], ["--vgg16_guidance_layer has no effect without --vgg16_guidance_scale"]),
        (
            ["--guide_image_path", "guide.png"],
            ["--guide_image_path has no effect without a ControlNet, or CLIP-image or VGG16 guidance"],
        ),
        (
            ["--highres_fix_disable_control_net"],
            ["--highres_fix_disable_control_net has no effect without --highres_fix_scale"],
        ),
        (
            ["--highres_fix_disable_control_net", "--highres_fix_scale", "0.5"],
            ["--highres_fix_disable_control_net has no effect without a ControlNet"],
        ),
    ],
)
def test_options_without_effect_are_named(args: list[str], warnings: list[str]) -> None:
    assert idle_options(image_options(given(*args))) == warnings


@pytest.mark.parametrize(
    ("args", "finding"),
    [
        (["--ds_ratio", "1.5"], "--ds_ratio 1.5: must be above 0, and at most 1"),
        (["--control_net_models", "a"], "--control_net_models: there is no image to read; give --guide_image_path"),
        (["--control_net_preps", "blur"], '--control_net_preps: no such preparation "blur"'),
        (["--gradual_latent_unsharp_params", "2,1,1"], "--gradual_latent_unsharp_params 2,1,1: an odd size"),
        (["--vgg16_guidance_layer", "99"], "--vgg16_guidance_layer 99: must be 0 to 30"),
    ],
)
def test_what_cannot_work_is_refused(args: list[str], finding: str) -> None:
    with pytest.raises(UserError, match=finding):
        check_options(image_options(given(*args)))
