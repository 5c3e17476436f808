"""Records what steps take on the stand-in accelerator: python tests/memory/record.py [FILE:CASE ...]

FILE is steps, full or kinds; without cases, all that are recorded are measured again. Each record is written when it is
there. Run ``python tests/memory/table.py`` afterwards.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.files.atomic import write_text
from library.memory import stand_in
from tests.fixtures import traced_full, traced_kinds, traced_steps

FILES = {name: Path(__file__).parent / f"recorded_{word}steps.json" for name, word in
         {"steps": "", "full": "full_", "kinds": "kind_"}.items()}  # fmt: skip


def measured(file: str, case: str) -> stand_in.Measured:
    device, words = stand_in.install(), case.split()
    settings: dict[str, Any] = {"device": device, "short": "--short" in words}
    if file == "steps":
        return traced_steps.traced(traced_steps.CASES[words[0]], **settings)
    trace: Callable[..., stand_in.Measured] = traced_full.traced if file == "full" else traced_kinds.traced
    return trace(*words[: 1 if file == "full" else 2], **settings)


def record(file: str, case: str) -> None:
    found = asdict(measured(file, case))
    steps = json.loads(FILES[file].read_text(encoding="utf-8"))
    print(f"{file}:{case} {steps.get(case)} -> {found}", flush=True)
    steps[case] = found
    write_text(FILES[file], json.dumps(steps, indent=1) + "\n")


def all_cases() -> list[str]:
    return [f"{file}:{case}" for file, path in FILES.items() for case in json.loads(path.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    traced_full.round_as_the_device()
    for chosen in sys.argv[1:] or all_cases():
        record(*chosen.split(":", 1))
