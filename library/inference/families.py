"""Find the family of a checkpoint, for programs that generate with all families."""

from __future__ import annotations

import logging
from pathlib import Path

from library.architectures.base import Architecture
from library.architectures.common.diffusers_folder import read_json
from library.architectures.common.recognise import recognise_pipeline, recognise_tensors
from library.architectures.registry import FOLDERS, about, architecture
from library.errors import UserError
from library.files.safetensors_io import PICKLE_SUFFIXES, is_pickle, read_header
from library.inference.options import ImageModelOptions

logger = logging.getLogger(__name__)

#: folders of the families that are generated with here
_FOLDERS = [folder for folder in FOLDERS if about(folder).in_gen_img]


def family_of(options: ImageModelOptions) -> Architecture:
    """Return the family that the flags name, else that of the checkpoint, else the one that needs no flag.

    Pickled files and Hub ids are not inspected.

    Raises:
        UserError: options that the family refuses.
    """
    flagged = [folder for folder in _FOLDERS if (flag := about(folder).tool_flag) and getattr(options, flag)]
    found = flagged[0] if flagged else _found(options.ckpt or "")
    plain = next(folder for folder in _FOLDERS if about(folder).tool_flag == "")
    family = architecture(found if found in _FOLDERS else plain)
    for name, why in family.declaration.refused.items():
        if getattr(options, name, None):
            raise UserError(f"--{name}: {why}")
    for name, why in family.declaration.unused.items():
        if getattr(options, name, None) is not None:
            logger.warning("--%s has no effect %s", name, why)
    return family


def _found(path_or_id: str) -> str:
    path = Path(path_or_id).expanduser()
    if (path / "model_index.json").is_file():
        found = recognise_pipeline(str(read_json(path / "model_index.json").get("_class_name", "")), "")
    elif path.is_file() and path.suffix in (".safetensors", *PICKLE_SUFFIXES) and not is_pickle(path):
        found = recognise_tensors(read_header(path).tensors.keys(), "")
    else:
        found = None
    return found.family if found is not None else ""
