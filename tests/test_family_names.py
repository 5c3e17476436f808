"""Nothing outside a family's folder names that family."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from library.architectures.registry import FOLDERS
from tests.fixtures.runs import ROOT

NAMES = re.compile(r"(?i)(?<![a-z])(flux|chroma|sd3|sdxl|lumina|hunyuan(_?image)?|stable_?diffusion(xl|_3)?)(?![a-z])")
#: files that name one, because a published name or interface does; this list may only shrink
NAMED = {
    "library/flux_train_utils.py": "published module",
    "library/inference/options.py": "published flag --sdxl",
    "library/inference/textual_inversion.py": "two published forms of embedding files",
    "networks/extract_lora_from_dylora.py": "repairs files of sd-scripts for one family",
    "networks/flux_merge_lora.py": "published flag --flux_model",
    "networks/lora_diffusers.py": "published flag --sdxl",
    "networks/lora_flux.py": "published module of a family",
    "networks/lora_hunyuan_image.py": "published module of a family",
    "networks/lora_lumina.py": "published module of a family",
    "networks/lora_sd3.py": "published module of a family",
    "networks/oft_flux.py": "published module of a family",
    "tools/convert_diffusers_to_flux.py": "published script of a family",
}


def names_in(path: Path) -> Iterator[str]:
    """Names in the code that are a family's, and imports from its folder; not words in texts and comments."""
    text = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", token.string).replace("_", " ")
            if NAMES.search(spaced):
                yield token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("library.architectures."):
            if node.module.split(".")[2] in FOLDERS:
                yield node.module


def files() -> Iterator[str]:
    own = tuple(f"library/architectures/{folder}/" for folder in FOLDERS)
    for folder in ("library", "networks", "tools", "finetune"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(own):
                yield name


def test_no_file_outside_of_its_folder_names_a_family() -> None:
    found = {name: sorted(set(names_in(ROOT / name))) for name in files()}
    named = {name: names for name, names in found.items() if names}
    assert not {name: names for name, names in named.items() if name not in NAMED}
    assert not NAMED.keys() - named.keys(), "these name none: strike them from NAMED"


def test_names_are_found(tmp_path: Path) -> None:
    path = tmp_path / "one.py"
    path.write_text(
        '"""Of SDXL."""\nfrom library.architectures.sd import SD\nis_sdxl, FluxOptions = SD, "flux"\ninfluxed = 1\n'
    )
    assert sorted(names_in(path)) == ["FluxOptions", "is_sdxl", "library.architectures.sd"]
