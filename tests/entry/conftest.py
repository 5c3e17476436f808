"""Fixtures of the entry-script tests: one tiny checkpoint and one picture folder for the session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.runs import make_pictures
from tests.fixtures.tiny_sd import MadeCheckpoint, make_tiny_sd
from tests.fixtures.tiny_sdxl import make_tiny_sdxl


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    return make_tiny_sd(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    return make_tiny_sdxl(tmp_path_factory.mktemp("model") / "tiny_xl.safetensors")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))
