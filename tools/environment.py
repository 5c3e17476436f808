"""Makes the environment of ``quickstart.py`` and ``run_tests.py``: a virtual environment with what they need.

Environment variables that change what it does:

    PYTHON           the interpreter that makes .venv, 3.10 or newer (default: the one that runs the script)
    VENV             folder of the environment (default: .venv)
    TORCH_VERSION    the torch release to install where there is none
    TORCH_INDEX_URL  the package index to take torch from, e.g. one with CUDA or CPU builds
    NEWEST           1: the newest releases that requirements.txt allows, not those of constraints.txt

The standard library alone is used, and it works on Linux, macOS and Windows.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH_VERSION = "2.13.0"


def set_up(requirements: str) -> Path:
    """Make the virtual environment where it is missing, and install what it lacks; returns its interpreter.

    Args:
        requirements: the name of a requirements file in the root of this project.

    Raises:
        SystemExit: a step failed; its own messages say why.
    """
    folder = ROOT / os.environ.get("VENV", ".venv")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        maker = os.environ.get("PYTHON") or sys.executable
        print(f"making {folder} with {_asked(maker, 'import sys; print(sys.version.split()[0])') or maker}", flush=True)
        _run(maker, "-m", "venv", str(folder), failed="the virtual environment could not be made")
    if _asked(str(python), "import sys; print(sys.version_info >= (3, 10))") != "True":
        sys.exit(f"error: {python} is not Python 3.10 or newer: remove {folder} and set PYTHON to one that is")
    if _asked(str(python), "import torch; print(True)") != "True":
        _install_torch(python)
    newest = os.environ.get("NEWEST", "") not in ("", "0")
    files = ["requirements.txt", requirements] + ([] if newest else ["constraints.txt"])
    contents = b"".join((ROOT / name).read_bytes() for name in files)
    stamp = folder / f".installed-{hashlib.sha256(contents).hexdigest()[:16]}"
    if not stamp.exists():
        print(f"installing {requirements}{', the newest releases' if newest else ''}", flush=True)
        how = (
            ["--upgrade", "--upgrade-strategy", "eager"] if newest else ["--constraint", str(ROOT / "constraints.txt")]
        )
        # torch is what was chosen above, whatever release the index has by now
        keep = folder / "torch.txt"
        keep.write_text("torch==" + _asked(str(python), "import torch; print(torch.__version__)"), encoding="utf-8")
        _pip(python, "--requirement", str(ROOT / requirements), "--constraint", str(keep), *how)
        stamp.touch()
    return python


def _install_torch(python: Path) -> None:
    version = os.environ.get("TORCH_VERSION", TORCH_VERSION)
    print(f"installing torch {version}", flush=True)
    url = os.environ.get("TORCH_INDEX_URL")
    index = ["--index-url", url] if url else []
    if sys.platform != "darwin" and not has_gpu():
        # the CPU build is a tenth of the size; not every index has one
        quiet = subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", *index, f"torch=={version}+cpu"],
            stderr=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        if quiet.returncode == 0:
            return
    _pip(python, *index, f"torch=={version}")


def has_gpu() -> bool:
    """Whether there is a GPU of NVIDIA's that torch could use."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def _pip(python: Path, *words: str) -> None:
    _run(str(python), "-m", "pip", "install", "--quiet", *words, failed="packages could not be installed")


def _run(*command: str, failed: str) -> None:
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(f"error: {failed}: {' '.join(command)} ended with code {code}")


def _asked(python: str, program: str) -> str:
    """Return the output of a program; nothing where it fails."""
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
