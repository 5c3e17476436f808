"""Description of a family's files, folders and scripts, for messages and for recognizing files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recognised:
    what: str  # "a Stable Diffusion XL checkpoint"
    remedy: str  # "use sdxl_train_network.py or sdxl_train.py": all scripts that train it
    family: str = ""  # the family whose plain checkpoint it is


@dataclass(frozen=True)
class Sign:
    """Fragments that must all occur in tensor names of a file, and what such a file is."""

    fragments: tuple[str, ...]
    found: Recognised


@dataclass(frozen=True)
class About:
    """One family.

    Attributes:
        instance: name of the ``Architecture`` in the family's folder.
        script: name of its LoRA script, without ``.py``.
        training: the remedy of its signs, which names all scripts that train it.
        images: the same with the program that generates with it.
        title: name for people.
        tool_flag: the flag for this family in tools for several families, without dashes; "" for the default family.
        signs: how to recognize single files; the first that fits wins.
        pipelines: beginnings of ``_class_name`` in model_index.json, and what such a folder is.
        adapter_keys: ``AdapterFamily.key`` of its adapters, the values of the tools' ``--family``.
    """

    instance: str
    script: str
    training: str
    images: str
    title: str
    tool_flag: str
    signs: tuple[Sign, ...]
    pipelines: tuple[tuple[str, Recognised], ...]
    adapter_keys: tuple[str, ...]
    #: own options that name its files and say what they are
    model_options: tuple[str, ...] = ()
    #: own options that encoded captions depend on
    text_options: tuple[str, ...] = ()
    #: whether gen_img.py generates with it
    in_gen_img: bool = False
