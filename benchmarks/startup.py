"""Time until a script answers: --help, and --dry_run of a tiny model. The aims are 1 s and 4 s on a quiet machine.

python benchmarks/startup.py [--runs 3]

CPU time is printed beside the time that passed, because it says more where other work uses the cores.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.fixtures.runs import lora_arguments, make_images, write_dataset
from tests.fixtures.tiny_sd import make_tiny_sd


def seconds(words: list[object]) -> tuple[float, float]:
    """Seconds that passed, and seconds of CPU time, of one run of train_network.py."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "train_network.py", *map(str, words)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    passed, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return passed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of each command; the quickest counts")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_tiny_sd(folder / "tiny.safetensors")
        dataset = write_dataset(folder / "data.toml", make_images(folder / "images"))
        commands = {"--help": ["--help"], "--dry_run": lora_arguments(model, dataset, folder / "out", dry_run=True)}
        for text, words in commands.items():
            measured = [seconds(words) for _ in range(runs)]
            passed, used = (min(values) for values in zip(*measured, strict=True))
            print(f"{text}: {passed:.1f} s, {used:.1f} s of CPU time")


if __name__ == "__main__":
    main()
