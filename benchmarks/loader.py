"""Measure how fast batches come out of the data loader: latents cached on disk, captions shuffled and tokenised.

    python benchmarks/loader.py
    python benchmarks/loader.py --batch_size 4 --workers 1 --count 4000

Nothing takes the batches but a counter, so the result is what the loader can deliver; a step must take longer than a
batch does here. The cache files hold random latents of 512 px images in the published layout, written by the same
code as in a run and warm in the page cache. The first epoch is not counted, as the workers start in it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

RESOLUTION = 512  # pixels, square
TOKENIZER = ROOT / "examples" / "quickstart" / "model" / "tokenizer"


@dataclass(frozen=True)
class Metrics:
    samples: int
    batch_size: int
    workers: int
    samples_per_second: float  # fastest of the epochs
    milliseconds_per_batch: float


def make_images(folder: Path, count: int) -> None:
    """Plain images; their content is not read again once latents are cached."""
    from PIL import Image

    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (RESOLUTION, RESOLUTION), (index % 256, 0, 0)).save(folder / f"{index:05d}.png")
        caption = f"an image, number {index}, red, square, plain, bright, studio light, centred, no text"
        (folder / f"{index:05d}.txt").write_text(caption, encoding="utf-8")


def random_latents(pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Return random latents in place of a VAE's: (B, 3, H, W) -> (B, 4, H / 8, W / 8)."""
    return torch.randn(pixels.shape[0], 4, pixels.shape[2] // 8, pixels.shape[3] // 8)


def measure(count: int, batch_size: int, workers: int, epochs: int) -> Metrics:
    from library.architectures.sd import SD
    from library.architectures.sd.text import load_tokenizer
    from library.config.arguments import DatasetOptions
    from library.data.dataset import TrainingData
    from library.data.dataset_config import load_dataset_config
    from library.training.trainer import Tokenize

    with tempfile.TemporaryDirectory() as scratch:
        make_images(Path(scratch) / "images", count)
        subset = {"image_dir": str(Path(scratch) / "images"), "caption_extension": ".txt", "shuffle_caption": True}
        dataset = {"resolution": RESOLUTION, "batch_size": batch_size, "subsets": [subset]}
        config = Path(scratch) / "data.json"
        config.write_text(json.dumps({"datasets": [dataset]}), encoding="utf-8")
        data = TrainingData(load_dataset_config(config, DatasetOptions()), seed=0, latent=SD.latent)
        data.cache_latents(lambda: random_latents, batch_size=8, to_disk=True, vae_identity="random")
        tokenize = Tokenize(SD, [load_tokenizer(TOKENIZER, v2=False)], None, False)

        def seconds(epoch: int) -> float:
            began = time.perf_counter()
            loaded = data.dataloader(
                epoch=epoch, start_batch=0, tokenize=tokenize, num_workers=workers, persistent=workers > 0
            )
            assert sum(batch.latents.shape[0] for batch in loaded) == count
            return time.perf_counter() - began

        seconds(0)
        fastest = min(seconds(epoch) for epoch in range(1, epochs + 1))
    return Metrics(count, batch_size, workers, round(count / fastest), round(1000 * fastest * batch_size / count, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="images")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1, help="--max_data_loader_n_workers")
    parser.add_argument("--epochs", type=int, default=3, help="the fastest counts")
    args = parser.parse_args()
    print(json.dumps(asdict(measure(args.count, args.batch_size, args.workers, args.epochs)), indent=1))


if __name__ == "__main__":
    main()
