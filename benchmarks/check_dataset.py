"""Measure the time of ``tools/check_dataset.py`` over a folder of images, and of its search for look-alikes alone.

    python benchmarks/check_dataset.py --count 2000

Images are JPEGs of 1024x768 with some texture, one in a hundred a smaller copy of another; all parts of the tool are
timed, the start of Python and the HTML page included.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

#: one image in so many is a copy
COPIES = 100


@dataclass(frozen=True)
class Metrics:
    count: int
    seconds: float  # of the whole tool
    look_alikes_found: int
    search_count: int  # fingerprints in the search below
    search_seconds: float


def make_images(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Large shapes under a fine grain, each another, with captions."""
    import numpy as np
    from PIL import Image

    grain = np.random.default_rng(0).integers(-12, 13, (size[1], size[0], 3), dtype=np.int16)

    def make(index: int) -> None:
        is_copy = index > 0 and index % COPIES == 0
        coarse = np.random.default_rng(index - is_copy).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        shapes = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
        image = Image.fromarray((shapes + grain).clip(0, 255).astype(np.uint8))
        if is_copy:
            image = image.resize((size[0] * 3 // 4, size[1] * 3 // 4))
        image.save(folder / f"{index:06d}.jpg", quality=90)
        (folder / f"{index:06d}.txt").write_text(f"an image, shapes, number {index}", encoding="utf-8")

    with ThreadPoolExecutor() as pool:
        list(pool.map(make, range(count)))


def search(count: int) -> float:
    """Seconds to find the look-alikes among so many fingerprints."""
    from library.data.report.looks import BITS
    from library.data.report.near_duplicates import DISTANCE, pairs_within

    rng = random.Random(1)
    fingerprints = [rng.getrandbits(BITS) for _ in range(count)]
    began = time.perf_counter()
    pairs_within(fingerprints, DISTANCE)
    return time.perf_counter() - began


def measure(count: int, search_count: int, size: tuple[int, int] = (1024, 768)) -> Metrics:
    """Make the images, run the tool in its own process, and time it.

    Raises:
        CalledProcessError: it failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder, report = Path(scratch) / "images", Path(scratch) / "report.json"
        folder.mkdir()
        make_images(folder, count, size)
        config = Path(scratch) / "data.json"
        subset = {"image_dir": str(folder), "caption_extension": ".txt"}
        dataset = {"resolution": 512, "enable_bucket": True, "subsets": [subset]}
        config.write_text(json.dumps({"datasets": [dataset]}), encoding="utf-8")
        command = [sys.executable, str(ROOT / "tools" / "check_dataset.py"), "--dataset_config", str(config)]
        command += ["--json", str(report), "--html", str(Path(scratch) / "report.html")]
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        found = json.loads(report.read_text(encoding="utf-8"))["counts_by_kind"].get("near_duplicate", 0)
    return Metrics(count, round(seconds, 2), found, search_count, round(search(search_count), 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="images")
    parser.add_argument("--search", type=int, default=10000, help="fingerprints in the search for look-alikes")
    args = parser.parse_args()
    print(json.dumps(asdict(measure(args.count, args.search)), indent=1))


if __name__ == "__main__":
    main()
