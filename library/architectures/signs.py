"""What a family says of its files, folders and scripts: data that every message and recogniser reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recognised:
    what: str  # "a Stable Diffusion XL checkpoint"
    remedy: str  # "use sdxl_train_network.py"
    family: str = ""  # whose plain checkpoint it is


@dataclass(frozen=True)
class Sign:
    """Fragments that must all occur in some tensor name of a file, and what the file then is."""

    fragments: tuple[str, ...]
    found: Recognised


@dataclass(frozen=True)
class About:
    """One family.

    Attributes:
        instance: name of the ``Architecture`` in the family's folder.
        script: name of its LoRA script, without ending.
        tool_flag: by which tools for several families know it, without dashes; "" for the family that needs none.
        signs: of single files; the first that fits wins.
        pipelines: beginnings of ``_class_name`` in model_index.json, and what the folder is.
        adapter_keys: ``AdapterFamily.key`` of its adapters, as ``--family`` of tools takes them.
    """

    instance: str
    script: str
    tool_flag: str
    signs: tuple[Sign, ...]
    pipelines: tuple[tuple[str, Recognised], ...]
    adapter_keys: tuple[str, ...]
    #: whether gen_img.py generates with it
    in_gen_img: bool = False
