"""Measure what recording a step costs: metrics to the host, TensorBoard, the running mean, and progress.

    python benchmarks/logging_cost.py

What a run does beside the model's work, for 2000 steps with the metrics of a usual LoRA run: the loop's, two learning
rates, no terminal. Wanted: under 1% of a step of 20 ms, that is 0.2 ms.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STEP_SECONDS = 0.02


def milliseconds_per_step(steps: int, folder: Path) -> dict[str, float]:
    """Median over steps, of recording as a whole and of its parts."""
    import torch
    from accelerate import Accelerator

    from library.training.logs import Progress, Trackers, TrackerSettings
    from library.training.metrics import DeferredMetrics, LossAverage

    settings = TrackerSettings.make(
        logging_dir=str(folder),
        output_dir=folder,
        output_name=None,
        log_prefix=None,
        log_with=None,
        tracker_name="benchmark",
        wandb_run_name=None,
        tracker_config={},
    )
    accelerator = Accelerator(log_with=list(settings.backends), project_dir=str(settings.directory))
    trackers = Trackers(accelerator, settings, {})
    progress = Progress(total=steps, done=0, simple=True, enabled=True)
    metrics, average = DeferredMetrics(), LossAverage(1000)
    device = accelerator.device
    packed = {name: torch.tensor(1.0, device=device) for name in ("loss", "grad_norm", "finite", "batch 0")}
    times: dict[str, list[float]] = {"metrics": [], "trackers": [], "progress": []}
    for step in range(1, steps + 1):
        started = time.perf_counter()
        metrics.push(step, packed)
        ready = metrics.pop(keep=1)
        read = time.perf_counter()
        for entry in ready:
            average.add(entry.values["loss"])
            values = {"loss/current": 1.0, "loss/average": average.mean, "norm/grad_norm": 1.0}
            trackers.log({**values, "lr/textencoder": 1e-4, "lr/unet": 1e-4}, step=entry.step)
        logged = time.perf_counter()
        progress.update(step, epoch=1, loss=1.0)
        done = time.perf_counter()
        for name, seconds in zip(times, (read - started, logged - read, done - logged), strict=True):
            times[name].append(seconds * 1000)
    trackers.close()
    return {name: median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        found = milliseconds_per_step(arguments.steps, Path(folder))
    total = sum(found.values())
    for name, value in found.items():
        print(f"{name}: {value:.4f} ms a step")
    print(f"all: {total:.4f} ms a step, {total / 10 / STEP_SECONDS:.2f}% of a step of {STEP_SECONDS * 1000:.0f} ms")


if __name__ == "__main__":
    main()
