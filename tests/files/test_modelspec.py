"""ModelSpec entries."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest

from library.files.modelspec import build_modelspec


def build(**given: object) -> dict[str, str]:
    base = {
        "architecture_id": "stable-diffusion-v1/lora",
        "implementation": "diffusers",
        "title": "mine",
        "resolution": None,
        "default_resolution": "512x512",
        "prediction_type": "epsilon",
    }
    return build_modelspec(**{**base, **given})


def test_the_least() -> None:
    entries = build()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", entries.pop("modelspec.date"))
    assert entries == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "mine",
        "modelspec.resolution": "512x512",
        "modelspec.prediction_type": "epsilon",
        "modelspec.implementation_version": "sd-scripts/unknown",
    }


@pytest.mark.parametrize(
    ("given", "text"), [("768", "768x768"), ("512,768", "512x768"), (640, "640x640"), ((1, 2), "1x2")]
)
def test_resolution(given: object, text: str) -> None:
    assert build(resolution=given)["modelspec.resolution"] == text


def test_the_rest(tmp_path: Path) -> None:
    entries = build(
        title=None, now=1770000000.7, timestep_range=(0, 500), encoder_layer=2, source_revision="abc", author="me"
    )
    assert entries["modelspec.title"] == "LoRA@1770000000"
    assert entries["modelspec.timestep_range"] == "0,500"
    assert entries["modelspec.encoder_layer"] == "2"
    assert entries["modelspec.implementation_version"] == "sd-scripts/abc"
    assert entries["modelspec.author"] == "me"
    assert "modelspec.prediction_type" not in build(prediction_type=None)


def test_thumbnails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = tmp_path / "t.png"
    image.write_bytes(b"\x89PNG")
    expected = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    assert build(thumbnail=str(image))["modelspec.thumbnail"] == expected
    assert build(thumbnail="data:image/png;base64,AA==")["modelspec.thumbnail"] == "data:image/png;base64,AA=="
    assert "modelspec.thumbnail" not in build(thumbnail=str(tmp_path / "none.png"))
    assert "none.png" in caplog.text
