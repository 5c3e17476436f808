"""Measure how fast a folder of images is indexed: the first time, the second with ``cache_info``, and the memory.

    python benchmarks/dataset_index.py --count 20000
    python benchmarks/dataset_index.py --count 100000 --repeat 3

Makes small PNG, JPEG and WebP images, a quarter of them turned by EXIF, each with a caption file, in a temporary
folder; so all is in the page cache, and what is measured is the work. Every scan is a process of its own that imports
what a run does, and the fastest of ``--repeat`` counts. Memory is what tracemalloc finds alive after the scan, captions
and names included. ``--pillow`` measures Pillow's own reading of the headers beside it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Metrics:
    count: int
    seconds_plain: float  # without cache_info
    seconds_first: float  # with cache_info, which writes the file
    seconds_second: float  # with the file there
    bytes_per_record: float
    cache_bytes_per_image: float
    seconds_pillow: float | None  # headers alone, one after the other


def make_images(folder: Path, count: int) -> None:
    """Noise of 24 sizes and three formats; captions of about 40 characters."""
    import numpy as np
    from PIL import Image

    turned = Image.Exif()
    turned[0x0112] = 6
    contents: list[tuple[str, bytes]] = []
    for index in range(24):
        width, height = 64 + 8 * (index % 6), 64 + 16 * (index // 6)
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        ending = ("png", "jpg", "webp")[index % 3]
        file = io.BytesIO()
        format = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[ending]
        Image.fromarray(pixels).save(file, format, **({"exif": turned} if index % 4 == 0 else {}))
        contents.append((ending, file.getvalue()))
    for index in range(count):
        ending, content = contents[index % len(contents)]
        (folder / f"image_{index:06d}.{ending}").write_bytes(content)
        (folder / f"image_{index:06d}.txt").write_text(f"a noisy image, square, number {index:06d}")


def scan(folder: Path, *, cache_info: bool, memory: bool = False) -> float:
    """Seconds of one scan, or bytes per record."""
    from library.config.arguments import DatasetOptions
    from library.data.dataset_config import load_dataset_config
    from library.data.discover import discover

    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "data.json"
        subset = {"image_dir": str(folder), "caption_extension": ".txt", "cache_info": cache_info}
        config.write_text(json.dumps({"datasets": [{"resolution": 64, "subsets": [subset]}]}), encoding="utf-8")
        spec = load_dataset_config(config, DatasetOptions()).datasets[0].subsets[0]
    if memory:
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        records = discover(spec, 0)
        return (tracemalloc.get_traced_memory()[0] - before) / len(records)
    began = time.perf_counter()
    discover(spec, 0)
    return time.perf_counter() - began


def scan_with_pillow(folder: Path) -> float:
    from PIL import Image

    names = [entry.path for entry in os.scandir(folder) if not entry.name.endswith((".txt", ".json"))]
    began = time.perf_counter()
    for name in names:
        with Image.open(name) as image:
            if image.format != "PNG" or "exif" in image.info:
                image.getexif()
    return time.perf_counter() - began


def in_process(folder: Path, kind: str) -> float:
    """Run one measurement in a process of its own.

    Raises:
        CalledProcessError: it failed.
    """
    command = [sys.executable, __file__, "--folder", str(folder), "--measure", kind]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(count: int, repeat: int, *, pillow: bool) -> Metrics:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_images(folder, count)
        cache = folder / "metadata_cache.json"
        plain = min(in_process(folder, "plain") for _ in range(repeat))
        first = []
        for _ in range(repeat):
            cache.unlink(missing_ok=True)
            first.append(in_process(folder, "cached"))
        return Metrics(
            count=count,
            seconds_plain=round(plain, 2),
            seconds_first=round(min(first), 2),
            seconds_second=round(min(in_process(folder, "cached") for _ in range(repeat)), 2),
            bytes_per_record=round(in_process(folder, "memory"), 1),
            cache_bytes_per_image=round(cache.stat().st_size / count, 1),
            seconds_pillow=round(in_process(folder, "pillow"), 2) if pillow else None,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20000, help="images")
    parser.add_argument("--repeat", type=int, default=3, help="scans of each kind; the fastest counts")
    parser.add_argument("--pillow", action="store_true", help="time Pillow's header reading too")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=["plain", "cached", "memory", "pillow"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure == "pillow":
        print(scan_with_pillow(args.folder))
    elif args.measure:
        print(scan(args.folder, cache_info=args.measure != "plain", memory=args.measure == "memory"))
    else:
        print(json.dumps(asdict(measure(args.count, args.repeat, pillow=args.pillow)), indent=1))


if __name__ == "__main__":
    main()
