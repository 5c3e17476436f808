"""Fixtures of the entry-script tests: one tiny checkpoint a family and one image folder for the session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.families import FAMILIES, SD, Tiny
from tests.fixtures.runs import make_images
from tests.fixtures.tiny_sd import MadeCheckpoint, make_tiny_sd
from tests.fixtures.tiny_sdxl import make_tiny_sdxl


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of ``tiny`` is one for each family: slow ones but for the first family and for ``every_family``."""
    if "tiny" not in metafunc.fixturenames:
        return
    everyone = metafunc.definition.get_closest_marker("every_family") is not None
    families = [
        pytest.param(name, marks=() if name == SD.name or (everyone and not family.is_variant) else pytest.mark.slow)
        for name, family in FAMILIES.items()
    ]
    metafunc.parametrize("tiny", families, indirect=True, scope="session")


@pytest.fixture(scope="session")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    family = FAMILIES[request.param]
    return Tiny(family, family.make(tmp_path_factory.mktemp(family.name)))


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    return make_tiny_sd(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="session")
def sd(tiny_sd: MadeCheckpoint) -> Tiny:
    """For what is Stable Diffusion's own, and for what is no matter of families."""
    return Tiny(SD, tiny_sd)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    return make_tiny_sdxl(tmp_path_factory.mktemp("model") / "tiny_xl.safetensors")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))
