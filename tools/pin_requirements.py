"""Writes constraints.txt: the exact releases with which the commands of README.md install.

python tools/pin_requirements.py [--upgrade]

Releases that are pinned already stay, unless a range in requirements.txt or requirements-dev.txt excludes them or
--upgrade is given. It needs uv (pip install uv), which resolves for all systems and versions of Python at once.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.environment import TORCH_VERSION

HEADER = """\
# The releases that were tested together; quickstart.py and run_tests.py install them. NEWEST=1 goes without them.
# Made by: python tools/pin_requirements.py
"""
#: what belongs to a build of torch; torch itself is chosen in tools/environment.py
OF_TORCH = ("torch==", "nvidia-", "cuda-", "triton")


def pin(previous: str, *, upgrade: bool) -> str:
    """The lines of constraints.txt.

    Args:
        previous: the releases to keep where they are allowed.

    Raises:
        SystemExit: no combination of releases is in the ranges.
    """
    uv = shutil.which("uv") or sys.exit("error: uv is not installed: pip install uv")
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder) / "pinned.txt"
        pinned.write_text(previous, encoding="utf-8")
        torch = Path(folder) / "torch.txt"
        torch.write_text(f"torch=={TORCH_VERSION}\n", encoding="utf-8")
        command = [
            uv, "pip", "compile", "--quiet", "--universal", "--python-version", "3.10", "--no-header",
            "--no-annotate", "--output-file", str(pinned), *(["--upgrade"] if upgrade else []),
            "--constraint", str(torch), str(ROOT / "requirements-dev.txt"),
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"error: {done.stderr.strip()}")
        lines = pinned.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(OF_TORCH) and "== 'emscripten'" not in line]
    return "".join(f"{line.strip()}\n" for line in kept if line.strip() and not line.startswith("#"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="pin the newest releases in the ranges")
    upgrade = parser.parse_args().upgrade
    path = ROOT / "constraints.txt"
    previous = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(HEADER + pin(previous, upgrade=upgrade), encoding="utf-8")


if __name__ == "__main__":
    main()
