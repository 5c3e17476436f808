"""From nothing to a trained LoRA and an image of what it taught the model.

python quickstart.py [--output FOLDER]

Makes .venv where it is missing, installs, trains on the embedded model and example images, and generates the same
prompts with the same seeds before and after. ``tools/environment.py`` lists the environment variables that change what
is installed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tools.environment import ROOT, set_up

EXAMPLE = "examples/quickstart"
#: a file with the paths of all that the script made in its output folder
MADE = ".made_by_quickstart"


def prepare(output: Path) -> None:
    """Make the output folder, or remove from it what an earlier quickstart made, and nothing else.

    Raises:
        SystemExit: the folder holds files of someone else.
    """
    listed = output / MADE
    if listed.is_file():
        for name in listed.read_text(encoding="utf-8").splitlines():
            path = output / name
            if path.resolve().is_relative_to(output.resolve()) and path.is_file():
                path.unlink()
        listed.unlink()
        for folder in sorted((path for path in output.rglob("*") if path.is_dir()), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        sys.exit(f"error: {output} exists and holds what this script did not make: name a new folder with --output")
    output.mkdir(parents=True, exist_ok=True)


def record(output: Path) -> None:
    """List all files of the output folder, for ``prepare``."""
    files = sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
    (output / MADE).write_text("".join(f"{name}\n" for name in files if name != MADE), encoding="utf-8")


def generate(python: Path, folder: Path, *words: str) -> None:
    """Generate the prompts of the example."""
    _run(
        python, "gen_img.py", "--ckpt", f"{EXAMPLE}/model", "--from_file", f"{EXAMPLE}/prompts.txt",
        "--outdir", str(folder), "--sequential_file_name", "--sdpa", *words,
    )  # fmt: skip


def _run(python: Path, *words: str) -> None:
    code = subprocess.run([str(python), *words], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path(os.environ.get("OUTPUT") or ROOT / "quickstart_output"),
        help="a new folder, or one that an earlier quickstart made (default: quickstart_output here)",
    )  # fmt: skip
    output = parser.parse_args().output.absolute()
    prepare(output)
    try:
        python = set_up("requirements.txt")
        print("1/3 generating with the base model", flush=True)
        generate(python, output / "before")
        print("2/3 training the LoRA", flush=True)
        _run(python, "train_network.py", "--config_file", f"{EXAMPLE}/lora.toml", "--output_dir", str(output))
        print("3/3 generating the same prompts and seeds with the LoRA", flush=True)
        weights = output / "quickstart_lora.safetensors"
        generate(python, output / "after", "--network_module", "networks.lora", "--network_weights", str(weights))
        folders = [str(output / "before"), str(output / "after")]
        sheet = str(output / "before_after.png")
        _run(python, f"{EXAMPLE}/side_by_side.py", *folders, f"{EXAMPLE}/prompts.txt", sheet)
    finally:
        record(output)


if __name__ == "__main__":
    main()
