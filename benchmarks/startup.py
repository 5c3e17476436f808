"""CPU time until a script answers, and until it trains. The aims on a quiet machine: --help 1 s, --dry_run and the first
step of a tiny model 4 s, the first step of Stable Diffusion 1.5 8 s.

    python benchmarks/startup.py [--runs 3] [--against COMMIT] [--full]

CPU time (of the process itself, user and system) is printed beside the time that passed, because it says more where other
work uses the cores. With ``--against`` another commit runs the same commands in turn.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.commits import checked_out, in_turn
from benchmarks.train_step import run
from tests.fixtures.runs import lora_arguments, make_images, write_dataset
from tests.fixtures.tiny_sd import make_full_sd, make_tiny_sd


def seconds(tree: Path, words: list[str], *, trains: bool) -> tuple[float, float]:
    """Return the seconds that passed, and those of CPU time, until a command ended, or took its first step."""
    command = [sys.executable, "train_network.py", *words]
    if trains:
        ran = run(command, tree)
        return ran.before_first_step, ran.cpu_before_first_step
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=tree, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"{' '.join(words)}: ended with {status}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of each command; the median counts")
    parser.add_argument("--against", help="a commit that is measured in turn")
    parser.add_argument("--full", action="store_true", help="also a model of the sizes of Stable Diffusion 1.5 (4 GB)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, checked_out(args.against) as other:
        folder = Path(name)
        dataset = write_dataset(folder / "data.toml", make_images(folder / "images"))

        def words(model, **more: object) -> list[str]:  # type: ignore[no-untyped-def]
            return list(map(str, lora_arguments(model, dataset, folder / "out", max_train_steps=1, **more)))

        tiny = make_tiny_sd(folder / "tiny.safetensors")
        commands = {
            "--help": (["--help"], False),
            "--dry_run": (words(tiny, dry_run=True), False),
            "first step": (words(tiny), True),
        }
        if args.full:
            full = make_full_sd(folder / "full")
            commands["first step, full size"] = (words(full, mixed_precision="bf16", cache_latents=True), True)
        trees = [("", ROOT)] if args.against is None else [(args.against, other), ("here", ROOT)]
        for text, (given, trains) in commands.items():
            measured: dict[str, list[tuple[float, float]]] = {label: [] for label, _ in trees}
            for number in range(args.runs):
                for label, tree in in_turn(number, trees):
                    measured[label].append(seconds(tree, given, trains=trains))
            for label, values in measured.items():
                passed, used = (median(column) for column in zip(*values, strict=True))
                print(f"{text} {label}: {passed:.2f} s, {used:.2f} s of CPU time", flush=True)


if __name__ == "__main__":
    main()
