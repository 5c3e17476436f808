"""Images, dataset files and a stand-in for the VAE: latents that tell which image they are of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.architectures.formats import LatentFormat

SD = LatentFormat(channels=4, stride=8, scale=0.18215, shift=0.0, cache_suffix="_sd.npz", multi_resolution=False)


class Encoder:
    """Mean colour over 8x8 pixels, and a keyed draw; counts the images it was given."""

    def __init__(self) -> None:
        self.encoded = 0

    def __call__(self, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        self.encoded += len(pixels)
        means = torch.nn.functional.avg_pool2d(pixels, 8)  # (B, 3, H, W) -> (B, 3, H/8, W/8)
        means = torch.cat([means, means[:, :1]], dim=1)
        return means + torch.stack([0.01 * torch.randn(means.shape[1:], generator=g) for g in generators])


def tokenize(captions: Sequence[str]) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[len(caption)] for caption in captions])}


def draw(folder: Path, names_and_sizes: dict[str, tuple[int, int]], *, captions: bool = True) -> Path:
    """Noise images, each with a caption of three tags."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (width, height) in names_and_sizes.items():
        seed = sum(map(ord, folder.name + name))
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        if captions:
            (folder / name).with_suffix(".txt").write_text(f"cat, dog, {Path(name).stem}", encoding="utf-8")
    return folder


def dataset_file(path: Path, folder: Path, *, dataset: str = "", subset: str = "", more: str = "") -> Path:
    """A dataset at 64 pixels, batch size 2; lines of ``dataset`` add to or replace its settings."""
    settings = {
        "resolution": "64",
        "enable_bucket": "true",
        "min_bucket_reso": "32",
        "max_bucket_reso": "128",
        "bucket_reso_steps": "32",
        "batch_size": "2",
        **dict(line.split(" = ") for line in dataset.splitlines()),
    }
    lines = "\n".join(f"{key} = {value}" for key, value in settings.items())
    path.write_text(
        f"[general]\ncaption_extension = 'txt'\n[[datasets]]\n{lines}\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder}'\n{subset}\n{more}\n",
        encoding="utf-8",
    )
    return path


#: three shapes: square, wide and tall
SIZES = {
    "a.png": (64, 64), "b.png": (80, 80), "c.png": (100, 100),
    "d.png": (128, 32), "e.png": (140, 36), "f.jpg": (32, 128), "g.webp": (70, 68),
}  # fmt: skip
