"""Measure how busy the VAE is kept while latents are cached: the share of time that is spent encoding.

    python benchmarks/cache_latents.py --size full --resolution 512 --count 60
    python benchmarks/cache_latents.py --size tiny --count 200
    python benchmarks/cache_latents.py --size none --count 200
    python benchmarks/cache_latents.py --size none --milliseconds 100 --count 200
    python benchmarks/cache_latents.py --size full --resolution 1024 --device cuda --precision bf16 --batch_size 4

Makes JPEG images of 1024 to 1536 pixels a side in a temporary folder and an autoencoder with random weights, of
Stable Diffusion's size or tiny, and fills the cache on disk through the code that training uses. The time runs from the
end of the first batch to the end of the last; on a GPU it is taken by the device's own events. With ``--size none``
nothing is encoded: that many images a second are read, stamped and written, so a faster VAE would wait. With
``--milliseconds`` such a stand-in waits that long for each image, as for a GPU, which leaves the CPU to the readers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

#: widths and layers of the encoder
SIZES = {"full": ((128, 256, 512, 512), 2), "tiny": ((32, 32, 32, 32), 1)}


@dataclass(frozen=True)
class Case:
    size: str  # "full", "tiny" or "none"
    count: int  # images
    resolution: int  # pixels; buckets have about its square
    batch_size: int
    device: str
    precision: str  # "no", "fp16" or "bf16"
    milliseconds: int  # that "none" takes for an image


@dataclass(frozen=True)
class Metrics:
    busy_share: float  # of the time after the first batch
    images_per_second: float  # in that time
    seconds_total: float  # until all is on disk


@dataclass
class Watch:
    """The times in seconds at which the VAE was at work; by events on a GPU, where calls return before it is done."""

    on_gpu: bool
    marks: list[tuple[Any, Any]] = field(default_factory=list)

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self.on_gpu else end - start

    def busy_share(self) -> tuple[float, float]:
        """The share after the first batch, and that time's seconds."""
        whole = self.between(self.marks[0][1], self.marks[-1][1])
        return sum(self.between(*mark) for mark in self.marks[1:]) / whole, whole


def make_images(folder: Path, count: int) -> None:
    """JPEG files of smooth noise, which take about as long to decode as photographs do."""
    import numpy as np
    from PIL import Image

    for index in range(count):
        draw = np.random.default_rng(index)
        width, height = (int(side) for side in draw.integers(1024, 1537, 2))
        coarse = draw.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"image_{index:05d}.jpg", quality=92)
        (folder / f"image_{index:05d}.txt").write_text("noise")


def make_vae(case: Case) -> nn.Module:
    import torch

    from library.architectures.common.kl_vae import build_vae

    channels, layers = SIZES[case.size]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(case.precision, torch.float32)
    torch.manual_seed(0)
    vae = build_vae(
        {
            "block_out_channels": channels,
            "layers_per_block": layers,
            "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * len(channels),
            "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        }
    )
    return vae.requires_grad_(False).eval().to(case.device, dtype)


def measure(case: Case) -> Metrics:
    import torch

    from library.architectures.common.kl_vae import encode_images
    from library.architectures.sd import SD
    from library.config.arguments import DatasetOptions
    from library.data.dataset import TrainingData
    from library.data.dataset_config import load_dataset_config

    on_gpu = case.device.startswith("cuda")
    watch = Watch(on_gpu)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        folder.mkdir()
        make_images(folder, case.count)
        config = Path(scratch) / "data.json"
        dataset = {
            "resolution": case.resolution,
            "enable_bucket": True,
            "max_bucket_reso": 2 * case.resolution,
            "subsets": [{"image_dir": str(folder), "caption_extension": ".txt"}],
        }
        config.write_text(json.dumps({"datasets": [dataset]}), encoding="utf-8")
        data = TrainingData(load_dataset_config(config, DatasetOptions()), seed=0, latent=SD.latent)
        vae = None if case.size == "none" else make_vae(case)

        def encoder() -> Callable[[Tensor, Sequence[torch.Generator]], Tensor]:
            def encode(pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
                # the copy to the device is not the VAE's work
                pixels = pixels.to(case.device, non_blocking=True)
                start = watch.now()
                if vae is None:
                    time.sleep(case.milliseconds / 1000 * len(pixels))
                    latents = pixels[:, [0, 1, 2, 0], ::8, ::8]
                else:
                    with torch.no_grad():
                        latents = encode_images(vae, pixels, generators)
                watch.marks.append((start, watch.now()))
                return latents

            return encode

        began = time.perf_counter()
        done = data.cache_latents(
            encoder,
            batch_size=case.batch_size,
            to_disk=True,
            vae_identity="random",
            pin_memory=on_gpu,
        )
        total = time.perf_counter() - began
        if on_gpu:
            torch.cuda.synchronize()
    share, seconds = watch.busy_share()
    return Metrics(
        busy_share=round(share, 3),
        images_per_second=round((done - case.batch_size) / seconds, 2),
        seconds_total=round(total, 2),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "none"], default="full")
    parser.add_argument("--count", type=int, default=200, help="images")
    parser.add_argument("--resolution", type=int, default=512, help="of training, pixels")
    parser.add_argument("--batch_size", type=int, default=1, help="as --vae_batch_size")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--milliseconds", type=int, default=0, help="that --size none takes for an image")
    case = Case(**vars(parser.parse_args()))
    print(json.dumps({**asdict(case), **asdict(measure(case))}, indent=1))


if __name__ == "__main__":
    main()
