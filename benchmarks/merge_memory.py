"""Memory of merging a LoRA into a checkpoint of full size: what the process holds beyond the mapped input files.

    python benchmarks/merge_memory.py --folder /tmp/merge --rank 64

The checkpoint has the names and shapes of Stable Diffusion XL in fp16 and takes no space on the disk (its numbers are
zeros in a sparse file); the LoRA is random. Measured on Linux: the largest anonymous memory of the process, which is
all memory but that of mapped files, sampled every 5 ms, and the same of a process that only imports.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from tests.fixtures.layouts import table

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "networks" / "sdxl_merge_lora.py"


def write_sparse_checkpoint(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of fp16 zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_lora(path: Path, rank: int) -> None:
    """Write an fp16 LoRA of all modules of the published layout."""
    tensors = {}
    for name, shape in table("lora_sdxl").items():
        if name.endswith(".alpha"):
            tensors[name] = torch.tensor(float(rank))
            continue
        axis = 0 if "lora_down" in name else 1
        sizes = [rank if place == axis else size for place, size in enumerate(shape)]
        tensors[name] = torch.randn(sizes).mul_(0.02).half()
    save_file(tensors, path)


def peak(command: list[str]) -> tuple[float, float]:
    """Run a command; return its largest anonymous memory in MB, and its seconds."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    most = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        if found := re.search(r"RssAnon:\s+(\d+) kB", status):
            most = max(most, int(found[1]))
        time.sleep(0.005)
    if process.wait():
        raise SystemExit(f"{command[1]} ended with code {process.returncode}")
    return most / 1e3, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the files; the result takes 7 GB")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    model, lora, merged = (args.folder / f"{name}.safetensors" for name in ("model", "lora", "merged"))
    shapes = table("sdxl_base_checkpoint")
    write_sparse_checkpoint(model, shapes)
    write_lora(lora, args.rank)
    imports = "import torch, networks.sdxl_merge_lora, networks.files.merge_script, networks.files.merging"
    idle, _ = peak([sys.executable, "-c", f"{imports}; import time; time.sleep(0.5)"])
    words = ["--sd_model", model, "--models", lora, "--ratios", "0.8", "--save_to", merged, "--save_precision", "fp16"]
    held, seconds = peak([sys.executable, str(TOOL), *map(str, words)])
    largest = max(shapes.values(), key=math.prod)
    print(f"inputs {model.stat().st_size / 1e9:.2f} + {lora.stat().st_size / 1e9:.2f} GB, merged in {seconds:.0f} s")
    print(
        f"anonymous memory: {held:.0f} MB at most, {idle:.0f} MB after the imports alone, so {held - idle:.0f} MB more"
    )
    print(f"the largest tensor, {'x'.join(map(str, largest))}: {4 * math.prod(largest) / 1e6:.0f} MB in float32")
    merged.unlink()


if __name__ == "__main__":
    main()
