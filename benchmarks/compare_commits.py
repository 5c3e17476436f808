"""Compare two commits: seconds per step, start, peak memory and start-up of the same runs, one after the other in turn.

    python benchmarks/compare_commits.py e072f17~1
    python benchmarks/compare_commits.py v0.8 v0.9 --cases sd sd_full --rounds 5
    python benchmarks/compare_commits.py e072f17~1 --quick

The second commit is the present folder if none is given. Both run the same command lines on the same files; those of the
cases are published ones, which any commit has. A ratio is that of the medians over all rounds, new by old: it holds on any
machine, and beside other work that does not change, where seconds do not. Beside it stand the least and the largest ratio
of a round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.commits import checked_out, in_turn
from benchmarks.train_step import make_images, run, step_ends

Words = list[str]


@dataclass(frozen=True)
class Case:
    """A LoRA run on random weights."""

    script: str
    make: Callable[[Path], dict[str, object]]  # writes the model, returns the options that name its files
    resolution: int  # pixels, square
    options: tuple[str, ...] = ()
    steps: int = 20
    network: str = "networks.lora"


def _sd(folder: Path, *, full: bool = False) -> dict[str, object]:
    from tests.fixtures import tiny_sd

    if full:
        return dict(tiny_sd.make_full_sd(folder / "model").flags)
    return dict(tiny_sd.make_tiny_sd(folder / "model.safetensors").flags)


def _sdxl_wide(folder: Path) -> dict[str, object]:
    """An SDXL of few blocks, each a quarter as wide as the published ones."""
    from tests.fixtures import tiny_sdxl

    sizes = tiny_sdxl.SdxlSizes()
    wide = replace(sizes, base=replace(sizes.base, unet_channels=(160, 320), unet_depths=(0, 4)))
    return dict(tiny_sdxl.make_tiny_sdxl(folder / "model.safetensors", sizes=wide).flags)


def _flux_wide(folder: Path) -> dict[str, object]:
    """A FLUX.1 of few blocks, each a quarter as wide as the published ones."""
    from tests.fixtures import tiny_flux

    wide = replace(tiny_flux.FluxFileSizes(), hidden=768, head=128)
    return dict(tiny_flux.make_tiny_flux(folder / "model", sizes=wide).flags)


_CACHED = ("--cache_latents", "--sdpa", "--network_train_unet_only")
_TEXTS = (*_CACHED, "--cache_text_encoder_outputs", "--mixed_precision", "bf16")
CASES = {
    "sd": Case("train_network.py", _sd, 64, _CACHED, steps=60),
    "sd_full": Case("train_network.py", partial(_sd, full=True), 256, (*_CACHED, "--mixed_precision", "bf16"), steps=12),
    "sdxl_wide": Case("sdxl_train_network.py", _sdxl_wide, 256, _TEXTS),
    "flux_wide": Case(
        "flux_train_network.py", _flux_wide, 256, _TEXTS, network="networks.lora_flux"
    ),
}  # fmt: skip
#: what ``--quick`` runs: the least that shows the commands to work
QUICK = {"steps": 4, "resolution": 64}


def command_of(case: Case, model: dict[str, object], folder: Path) -> Words:
    """Return the options of a run, which writes below ``folder``."""
    images = make_images(folder / "images", 8, case.resolution)
    config = folder / "dataset.toml"
    config.write_text(
        f"[[datasets]]\nresolution = {case.resolution}\nbatch_size = 1\n"
        f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(images))}\ncaption_extension = '.txt'\nnum_repeats = 4\n",
        encoding="utf-8",
    )
    flags: dict[str, object] = {
        **model,
        "dataset_config": config,
        "output_dir": folder / "out",
        "output_name": "run",
        "network_module": case.network,
        "network_dim": 8,
        "learning_rate": 1e-4,
        "max_train_steps": case.steps,
        "seed": 0,
        "max_data_loader_n_workers": 1,
        "console_log_simple": True,
    }
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
    return [*words, *case.options]


def measured(tree: Path, case: Case, model: dict[str, object]) -> dict[str, float]:
    """Train once with a tree's script; returns the metrics of the run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ran = run([sys.executable, case.script, *command_of(case, model, folder)], tree)
        ends = step_ends(folder / "out" / "logs")
    return {
        "seconds per step": median(later - earlier for earlier, later in zip(ends, ends[1:], strict=False)),
        "seconds before the first step": ran.before_first_step,
        "CPU seconds before the first step": ran.cpu_before_first_step,
        "peak host memory, GB": ran.peak_host_bytes / 1e9,
    }


def answered(tree: Path, script: str, words: Words) -> dict[str, float]:
    """Run a command that does not train; returns its CPU seconds."""
    process = subprocess.Popen(
        [sys.executable, script, *words], cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"{script} failed ({status}):\n{text}")
    return {"CPU seconds": usage.ru_utime + usage.ru_stime}


def rounds_of(
    count: int, trees: list[tuple[str, Path]], measure: Callable[[Path], dict[str, float]]
) -> list[dict[str, dict[str, float]]]:
    """Return the metrics of each round: name of the tree -> metric -> value."""
    return [{name: measure(tree) for name, tree in in_turn(number, trees)} for number in range(count)]


def report(title: str, rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Print and return the ratios of the medians."""
    found = {}
    for metric in rounds[0]["new"]:
        old, new = (median(one[tree][metric] for one in rounds) for tree in ("old", "new"))
        each = [one["new"][metric] / one["old"][metric] for one in rounds]
        found[metric] = {"old": old, "new": new, "ratio": new / old, "ratios": each}
        print(
            f"{title}, {metric}: {old:.3f} before, {new:.3f} after, ratio {new / old:.3f} "
            f"({min(each):.3f} to {max(each):.3f})",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", nargs="?", help="a commit; the present folder, if not given")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="runs of each commit and case")
    parser.add_argument("--quick", action="store_true", help="few steps of small images, to try the commands")
    parser.add_argument("--json", type=Path, help="write all numbers into this file")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with checked_out(args.old) as old, checked_out(args.new) as new, tempfile.TemporaryDirectory() as name:
        trees = [("old", old), ("new", new)]
        for title in args.cases:
            case, folder = CASES[title], Path(name) / title
            if args.quick:
                case = replace(case, **QUICK)
            folder.mkdir()
            model = case.make(folder)
            dry = [*command_of(case, model, folder), "--dry_run"]
            found[title] = report(title, rounds_of(args.rounds, trees, lambda tree: measured(tree, case, model)))  # noqa: B023
            for flag, words in (("--help", ["--help"]), ("--dry_run", dry)):
                runs = rounds_of(args.rounds, trees, lambda tree: answered(tree, case.script, words))  # noqa: B023
                found[title][flag] = report(f"{title} {flag}", runs)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
