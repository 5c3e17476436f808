"""Deferred imports: nothing is executed before it is used, and then all of it is there."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.lazy_imports import defer_import, hide_from, without_collection
from tests.fixtures.runs import ROOT

NAME = "deferred_example"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that leaves a file behind when it is executed; returns that file's path."""
    mark = tmp_path / "executed"
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / "__init__.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\nVALUE = 3\n")
    (folder / "part.py").write_text(f"from {NAME} import VALUE\nTWICE = 2 * VALUE\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield mark
    for name in [name for name in sys.modules if name.split(".")[0] == NAME]:
        del sys.modules[name]


def test_nothing_is_executed_by_import_and_lookup(package: Path) -> None:
    defer_import(NAME)
    module = importlib.import_module(NAME)
    assert importlib.util.find_spec(NAME) is not None
    assert not package.exists()
    assert module.VALUE == 3 and package.exists()


def test_a_submodule_finds_its_package_executed(package: Path) -> None:
    defer_import(NAME)
    assert importlib.import_module(f"{NAME}.part").TWICE == 6
    assert package.exists() and importlib.import_module(NAME).part.TWICE == 6


def test_a_module_that_fails_is_not_left_behind(package: Path) -> None:
    package.parent.joinpath(NAME, "__init__.py").write_text("raise OSError('a library is missing')\n")
    defer_import(NAME)
    with pytest.raises(OSError, match="a library is missing"):
        importlib.import_module(NAME).VALUE  # noqa: B018
    assert NAME not in sys.modules


def test_missing_packages_are_left_alone() -> None:
    defer_import("no_such_package_anywhere")
    assert "no_such_package_anywhere" not in sys.modules


def test_models_are_imported_without_the_compiler() -> None:
    """The code that defers bitsandbytes runs before the first import of diffusers."""
    program = (
        "import sys, train_network\n"
        "from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel\n"
        "sys.exit('bitsandbytes.functional' in sys.modules)\n"
    )
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0


def test_a_package_is_hidden_from_one_module_alone(package: Path, tmp_path: Path) -> None:
    (tmp_path / "looking.py").write_text(f"from importlib.util import find_spec\nFOUND = find_spec({NAME!r})\n")
    hide_from("looking", NAME)
    try:
        assert importlib.import_module("looking").FOUND is None
        assert importlib.import_module(NAME).VALUE == 3
        assert importlib.reload(sys.modules["looking"]).FOUND is not None
    finally:
        del sys.modules["looking"], sys.meta_path[0]


def test_optimizers_import_no_compiler_and_models_no_torchao() -> None:
    code = (
        "import sys, torch; from library.optim.optimizers import leave_compiler_out; leave_compiler_out();"
        "o = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]); o.zero_grad(); o.state_dict();"
        "print('torch._dynamo' in sys.modules);"
        "import library.architectures; from diffusers import UNet2DConditionModel; print('torchao' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_collection_goes_on_after_an_error() -> None:
    with pytest.raises(OSError), without_collection():
        assert not gc.isenabled()
        raise OSError
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled(), "as it was before"
    finally:
        gc.enable()


def test_objects_of_imports_are_left_out_of_collections() -> None:
    code = (
        "import gc; from library.lazy_imports import without_collection\n"
        "with without_collection(): kept = [[] for _ in range(1000)]\n"
        "with without_collection(freeze=None): pass\n"
        "print(gc.get_freeze_count())\n"
        "with without_collection(freeze=True): pass\n"
        "before = gc.get_freeze_count()\n"
        "with without_collection(freeze=None): more = [[] for _ in range(1000)]\n"
        "print(before > 1000, gc.get_freeze_count() > before, gc.isenabled())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True", "True", "True"]


def test_threads_wait_a_short_time_unless_the_environment_says_otherwise() -> None:
    code = "import os, library; print(os.environ.get('GOMP_SPINCOUNT'))"
    free = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for more, expected in (({}, "30000"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**free, **more}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected
