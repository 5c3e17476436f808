"""README.md's commands install exact releases, all of them within the ranges of the requirements files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.fixtures.runs import ROOT, environment

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
SYSTEMS = {"Linux": ("linux", "x86_64"), "Windows": ("win32", "AMD64"), "Darwin": ("darwin", "arm64")}


def lines(name: str) -> Iterator[Requirement]:
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("-r "):
            yield from lines(text.removeprefix("-r "))
        elif text:
            yield Requirement(text)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_each_requirement_is_pinned_within_its_range(python: str, system: str) -> None:
    platform, machine = SYSTEMS[system]
    here = {
        "python_version": python, "python_full_version": f"{python}.0", "platform_system": system,
        "sys_platform": platform, "platform_machine": machine, "platform_python_implementation": "CPython",
    }  # fmt: skip
    pins: dict[str, str] = {}
    for pin in lines("constraints.txt"):
        if pin.marker is None or pin.marker.evaluate(here):
            (exact,) = pin.specifier
            assert (
                exact.operator == "==" and pins.setdefault(canonicalize_name(pin.name), exact.version) == exact.version
            )
    for wanted in lines("requirements-dev.txt"):
        if wanted.marker is None or wanted.marker.evaluate(here):
            pinned = pins.get(canonicalize_name(wanted.name))
            assert pinned is not None, f"{wanted.name} is not pinned: python tools/pin_requirements.py"
            assert wanted.specifier.contains(pinned), f"{wanted} is pinned to {pinned}"
    assert "torch" not in pins and not [name for name in pins if name.startswith("nvidia")]  # the user's choice


#: tests that touch most of what the packages give, in about a minute
SMOKE = ("tests/architectures/sd", "tests/networks/test_lora_sdxl.py", "tests/optim", "tests/config")


@pytest.mark.slow
def test_the_newest_releases_in_the_ranges_work(tmp_path: Path) -> None:
    """Installed over the present ones for this test alone. What breaks here needs a bound in requirements.txt."""
    torch = tmp_path / "torch.txt"
    torch.write_text(f"torch=={importlib.metadata.version('torch')}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(torch)]
    report = tmp_path / "report.json"
    dry = [*pip, "--dry-run", "--upgrade", "--upgrade-strategy", "eager", "--report", str(report)]
    found = subprocess.run(
        [*dry, "-r", str(ROOT / "requirements-dev.txt")], capture_output=True, text=True, check=False
    )
    if "Could not find a version" in found.stderr and "from versions: none" in found.stderr:
        pytest.skip("there is no package index")
    assert found.returncode == 0, found.stderr
    newer = [
        f"{item['metadata']['name']}=={item['metadata']['version']}"
        for item in json.loads(report.read_text(encoding="utf-8"))["install"]
    ]
    if not newer:
        pytest.skip("the newest releases are installed: the whole suite tests them")
    target = tmp_path / "packages"
    subprocess.run([*pip, "--no-deps", "--target", str(target), *newer], check=True)
    env = {**environment(), "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)])}
    command = [sys.executable, "-m", "pytest", "-q", "-x", *SMOKE]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"with {', '.join(newer)}:\n{done.stdout}{done.stderr}"
