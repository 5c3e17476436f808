"""Measure a whole training run on random weights: seconds before the first step, per step, and peak memory.

    python benchmarks/train_step.py --size full --precision bf16
    python benchmarks/train_step.py --size tiny --precision no
    python benchmarks/train_step.py --size full --precision bf16 --compare 3
    python benchmarks/train_step.py --arch sdxl --size full --resolution 1024 --batch_size 4 --checkpointing \
        --cache_text --adamw8bit --compare 3
    python benchmarks/train_step.py --kind full --size full --precision bf16 --steps 4 --compare 1

The run is the real script in its own process. A step's time is taken from the wall times in its TensorBoard
log, without the first step, and so is the share of that time in which the step waited for data; peak host memory is the
process's maximum resident set. With ``--compare`` each run is
followed by one of ``diffusers_lora.py``, the same work written plainly against diffusers and peft, and the ratios are
printed: they hold on any machine, seconds do not. Flags that change the work (``--checkpointing``, ...) hold for both.
``--kind full`` trains all weights of the U-Net, with updates within the backward pass and without clipping; the plain
loop does not clip either.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import median

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peak_memory import PeakMemory

SCRIPTS = {
    "adapter": {"sd": "train_network.py", "sdxl": "sdxl_train_network.py"},
    "full": {"sd": "fine_tune.py", "sdxl": "sdxl_train.py"},
}

#: printed by the trainer when set-up is over; see library/training/run_hooks.py
FIRST_STEP_MARK = "first step"


@dataclass(frozen=True)
class Case:
    """One measured run."""

    size: str  # "full" (published sizes) or "tiny"
    precision: str  # --mixed_precision
    resolution: int  # pixels, square
    batch_size: int
    steps: int
    rank: int
    extra: tuple[str, ...] = ()  # more flags for the script, which the plain loop does not get
    arch: str = "sd"
    checkpointing: bool = False  # recompute activations
    cache_text: bool = False  # encode captions beforehand
    uncached: bool = False  # encode images in each step, not beforehand
    adamw8bit: bool = False  # bitsandbytes' AdamW, not torch's
    compile: bool = False  # blocks of the U-Net
    kind: str = "adapter"  # what is trained

    def switches(self) -> list[str]:
        """The script's options for what is switched on."""
        words = ["--gradient_checkpointing"] * self.checkpointing + ["--cache_text_encoder_outputs"] * self.cache_text
        words += ["--cache_latents"] * (not self.uncached) + ["--torch_compile"] * self.compile
        return words + ["--optimizer_type", "AdamW8bit"] * self.adamw8bit

    def reference_switches(self) -> list[str]:
        """The same for the plain loop."""
        names = ("checkpointing", "cache_text", "uncached", "adamw8bit", "compile")
        return [f"--{name}" for name in names if getattr(self, name)] + ["--full"] * (self.kind == "full")

    def trained(self) -> list[str]:
        """The script's options for what is trained."""
        if self.kind == "full":
            words = ["--learning_rate", "1e-6", "--fused_backward_pass", "--max_grad_norm", "0"]
            return [
                *words,
                "--save_model_as",
                "diffusers_safetensors",
            ]  # streamed; a .bin file is put together in memory
        return [
            *("--network_module", "networks.lora", "--network_dim", str(self.rank), "--network_train_unet_only"),
            *("--learning_rate", "1e-4"),
        ]


@dataclass(frozen=True)
class Metrics:
    seconds_before_first_step: float
    seconds_per_step: float
    samples_per_second: float
    peak_host_gb: float
    peak_device_gb: float | None
    total_seconds: float
    data_wait_share: float | None  # of the time between steps


def make_model(folder: Path, arch: str, size: str) -> Path:
    """A random fp16 Diffusers folder of the published or of tiny sizes; made once and kept."""
    import torch

    from tests.fixtures import tiny_sd, tiny_sdxl

    makers = {
        ("sd", "tiny"): partial(tiny_sd.make_tiny_sd, layout="diffusers", dtype=torch.float16),
        ("sd", "full"): tiny_sd.make_full_sd,
        ("sdxl", "tiny"): partial(tiny_sdxl.make_tiny_sdxl, layout="diffusers", dtype=torch.float16),
        ("sdxl", "full"): tiny_sdxl.make_full_sdxl,
    }
    path = folder / f"random_{arch}_{size}"
    if not (path / "model_index.json").exists():
        makers[arch, size](path)
    return path


def make_images(folder: Path, count: int, side: int) -> Path:
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a random image, number {index}", encoding="utf-8")
    return folder


def run_case(case: Case, model: Path, workspace: Path) -> Metrics:
    """Run the family's script once.

    Raises:
        RuntimeError: the run failed; its output is in the message.
    """
    images = make_images(workspace / "images", case.batch_size * 4, case.resolution)
    config = workspace / "dataset.toml"
    config.write_text(
        f"[[datasets]]\nresolution = {case.resolution}\nbatch_size = {case.batch_size}\n"
        f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(images))}\ncaption_extension = '.txt'\nnum_repeats = 4\n",
        encoding="utf-8",
    )
    output = workspace / "output"
    command = [sys.executable, str(ROOT / SCRIPTS[case.kind][case.arch]), "--pretrained_model_name_or_path", str(model)]
    command += ["--dataset_config", str(config), "--output_dir", str(output), "--output_name", "bench"]
    command += [*case.trained(), "--max_train_steps", str(case.steps), "--seed", "0"]
    command += ["--mixed_precision", case.precision, "--sdpa", "--console_log_simple"]
    command += [*case.switches(), *case.extra]
    ran = run(command)
    per_step, data_wait = _step_times(output / "logs")
    peak_device = next((float(line.rsplit(" ", 2)[-2]) for line in ran.lines if "peak device memory" in line), None)
    return _metrics(ran, per_step, case.batch_size, peak_device, data_wait)


def run_reference(case: Case, model: Path, workspace: Path) -> Metrics:
    """Run the plain loop of ``diffusers_lora.py`` once, on the same model and images.

    Raises:
        RuntimeError: the run failed; its output is in the message.
    """
    images = make_images(workspace / "images", case.batch_size * 4, case.resolution)
    command = [sys.executable, str(ROOT / "benchmarks" / "diffusers_lora.py"), "--model", str(model)]
    command += ["--images", str(images), "--precision", case.precision, "--batch_size", str(case.batch_size)]
    command += ["--steps", str(case.steps), "--rank", str(case.rank), *case.reference_switches()]
    ran = run(command)
    report = json.loads(ran.lines[-1])
    seconds = report["seconds"][1:]
    return _metrics(ran, sum(seconds) / len(seconds), case.batch_size, report["peak_device_gb"])


@dataclass(frozen=True)
class Ran:
    """A finished process."""

    lines: list[str]
    before_first_step: float  # seconds
    cpu_before_first_step: float  # seconds that the process itself used
    total: float  # seconds
    peak_host_bytes: int


def run(command: list[str], tree: Path = ROOT) -> Ran:
    """Run a command that trains, in a folder with the project's files.

    Raises:
        RuntimeError: it failed, or did not reach its first step; its output is in the message.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tree, env=dict(os.environ)
    )
    watched = psutil.Process(process.pid)
    first_step: list[float] = []
    used: list[float] = []
    lines: list[str] = []

    def read() -> None:
        for line in process.stdout:
            lines.append(line)
            if FIRST_STEP_MARK in line and not first_step:
                first_step.append(time.perf_counter())
                times = watched.cpu_times()
                used.append(times.user + times.system)

    reader = threading.Thread(target=read)
    reader.start()
    with PeakMemory(process.pid) as peak:
        status = process.wait()
    reader.join()
    if status != 0 or not first_step:
        raise RuntimeError(f"the run failed ({status}):\n{''.join(lines)}")
    return Ran(lines, first_step[0] - began, used[0], time.perf_counter() - began, peak.bytes)


def _metrics(
    ran: Ran, per_step: float, batch_size: int, peak_device: float | None, data_wait: float | None = None
) -> Metrics:
    return Metrics(
        seconds_before_first_step=round(ran.before_first_step, 2),
        seconds_per_step=round(per_step, 3),
        samples_per_second=round(batch_size / per_step, 2),
        peak_host_gb=round(ran.peak_host_bytes / 1e9, 2),
        peak_device_gb=peak_device,
        total_seconds=round(ran.total, 1),
        data_wait_share=None if data_wait is None else round(data_wait, 4),
    )


def step_ends(logs: Path) -> list[float]:
    """Return the times at which steps ended, from the second to the last, in seconds."""
    return _read_log(logs)[0]


def _read_log(logs: Path) -> tuple[list[float], float, float]:
    """Return the ends of steps, and the seconds of all steps but the first: waiting for data, and altogether."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ended: list[float] = []
    waited = took = 0.0
    for events in logs.rglob("events.out.tfevents.*"):  # one for metrics, one for the run's settings
        accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0})
        accumulator.Reload()
        if "loss/current" in accumulator.Tags()["scalars"]:
            ended = [event.wall_time for event in accumulator.Scalars("loss/current")]
            waited = sum(event.value for event in accumulator.Scalars("time/data_wait")[1:])
            took = sum(event.value for event in accumulator.Scalars("time/step")[1:])
    # a step's metrics are logged at the end of the next one, and the last two together: first entry = end of
    # step 2, last entry = end of the last step
    return ended[:-1], waited, took


def _step_times(logs: Path) -> tuple[float, float]:
    """Seconds per step, and the share of them in which it waited for data; without the first step."""
    ended, waited, took = _read_log(logs)
    return (ended[-1] - ended[0]) / (len(ended) - 1), waited / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=list(SCRIPTS["adapter"]), default="sd", help="model family")
    parser.add_argument("--kind", choices=list(SCRIPTS), default="adapter", help="a LoRA, or all weights of the U-Net")
    parser.add_argument("--size", choices=["full", "tiny"], default="tiny", help="published sizes, or tiny ones")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="bf16")
    parser.add_argument("--resolution", type=int, default=256, help="pixels, square")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rank", type=int, default=8, help="LoRA rank")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--cache_text", action="store_true", help="encode captions beforehand")
    parser.add_argument("--uncached", action="store_true", help="encode images in each step")
    parser.add_argument("--adamw8bit", action="store_true", help="AdamW of bitsandbytes")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of the U-Net")
    parser.add_argument("--model_dir", type=Path, help="keep the random model here instead of making it anew")
    parser.add_argument("--compare", type=int, metavar="ROUNDS", help="rounds of a run and a plain diffusers loop")
    parser.add_argument("extra", nargs="*", help="more flags for the script, after --")
    args = parser.parse_args()
    if args.compare and args.precision == "fp16":
        parser.error("--compare: the plain loop has no gradient scaling; use --precision bf16 or no")
    given = {field.name: getattr(args, field.name) for field in fields(Case)}
    case = Case(**{**given, "extra": tuple(args.extra)})
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(args.model_dir or Path(scratch), case.arch, case.size)
        ours, reference = [], []
        for round_number in range(args.compare or 1):
            workspace = Path(scratch) / str(round_number)
            workspace.mkdir()
            ours.append(run_case(case, model, workspace))
            if args.compare:
                reference.append(run_reference(case, model, workspace))
    print(json.dumps({"case": asdict(case), "metrics": [asdict(metrics) for metrics in ours]}, indent=1))
    if reference:
        print(json.dumps({"diffusers": [asdict(metrics) for metrics in reference]}, indent=1))
        print(f"seconds per step, of diffusers': {_ratio(ours, reference, 'seconds_per_step'):.2f}")
        print(f"peak host memory, of diffusers': {_ratio(ours, reference, 'peak_host_gb'):.2f}")
        if reference[0].peak_device_gb is not None:
            print(f"peak device memory, of diffusers': {_ratio(ours, reference, 'peak_device_gb'):.2f}")


def _ratio(ours: list[Metrics], reference: list[Metrics], name: str) -> float:
    """Return the ratio of the medians over the rounds."""
    return median(getattr(f, name) for f in ours) / median(getattr(f, name) for f in reference)


if __name__ == "__main__":
    main()
