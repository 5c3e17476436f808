"""The limits of Windows, tried here: no POSIX modules, workers that are spawned, a console of few characters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.fixtures.families import Tiny
from tests.fixtures.runs import ROOT, environment, make_images, run_script, write_dataset

IMPORT_ALL = """
import importlib, os, signal, sys
from pathlib import Path

for name in ("fcntl", "resource", "pwd", "grp", "termios", "readline"):
    sys.modules[name] = None  # as if there were none
import torch, transformers, diffusers, accelerate  # they know Windows by its name
for place, names in ((os, ("pread", "getuid", "geteuid", "fchmod", "statvfs", "killpg", "setsid")),
                     (signal, ("SIGHUP", "SIGKILL", "SIGALRM", "SIGCHLD", "pthread_sigmask"))):
    for name in names:
        delattr(place, name)
root = Path(sys.argv[1])
sys.path.insert(0, str(root))
found = [path for folder in ("library", "networks", "tools", "finetune") for path in (root / folder).rglob("*.py")]
for path in sorted([*found, *root.glob("*.py")]):
    if path.name != "setup.py":  # which installs
        importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))
"""

SPAWN = """
import multiprocessing, os, runpy, sys

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    del sys.argv[0]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_every_module_imports_without_what_only_posix_has() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(ROOT)], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_workers_that_are_spawned_give_the_same_weights(tmp_path: Path, sd: Tiny) -> None:
    dataset = write_dataset(tmp_path / "data.toml", make_images(tmp_path / "images"))
    program = tmp_path / "spawn.py"
    program.write_text(SPAWN, encoding="utf-8")
    plain = sd.run(dataset, tmp_path / "plain")
    words = sd.words(dataset, tmp_path / "spawned", max_data_loader_n_workers=2)
    spawned = run_script(str(program), ROOT / sd.file, *words)
    assert plain.code == spawned.code == 0, plain.text + spawned.text
    one, other = (load_file(tmp_path / name / "tiny.safetensors") for name in ("plain", "spawned"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_console_of_few_characters(tmp_path: Path, sd: Tiny) -> None:
    """A Western Windows console has cp1252, which knows no Japanese and no box drawing."""
    dataset = write_dataset(tmp_path / "data.toml", make_images(tmp_path / "猫の画像"))
    words = sd.words(dataset, tmp_path / "出力", console_log_simple=None, dry_run=True)
    done = run_script(sd.file, *words, env={"PYTHONIOENCODING": "cp1252:strict", "PYTHONUTF8": "0"})
    assert done.code == 0 and "Traceback" not in done.text, done.text


def test_paths_with_drives_and_backslashes_are_named_as_they_are(tmp_path: Path, sd: Tiny) -> None:
    dataset = write_dataset(tmp_path / "data.toml", Path(r"C:\Users\me\images"))
    done = sd.run(dataset, tmp_path / "out")
    assert done.code == 2 and r"C:\Users\me\images" in done.err, done.text
    broken = tmp_path / "broken.toml"
    broken.write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\Users\\me"\n', encoding="utf-8")
    done = sd.run(broken, tmp_path / "out")
    assert done.code == 2 and "broken.toml" in done.err and "'" in done.err, done.text
