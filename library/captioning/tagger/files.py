"""Find a tagger's files: in a folder, or on the Hub, from which they are copied into ``--model_dir``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from library.captioning.tagger.labels import CSV, MAPPING
from library.captioning.tagger.model import ONNX_FILES, TIMM_FILES, Form, timm_is_installed
from library.errors import UserError

logger = logging.getLogger(__name__)

FLAG = "--repo_id"


def locate(repo_id: str, model_dir: Path, *, onnx: bool, download: bool) -> Form:
    """Return a tagger's files, after downloading them where they are missing.

    Args:
        repo_id: a folder, ``owner/name``, or ``owner/name/folder`` for a tagger with a mapping.
        onnx: take ONNX's form, where there are others.
        download: even if the files are there.

    Raises:
        UserError: no such tagger; offline without the files; a tagger in Keras' form alone.
    """
    if Path(repo_id).is_dir():
        found = form_in(Path(repo_id), onnx=onnx)
        if found is None:
            raise UserError(f"{FLAG} {repo_id}: {_what_is_missing(Path(repo_id))}")
        return found
    parts = repo_id.strip("/").split("/")
    if len(parts) < 2 or not all(parts):
        raise UserError(f"{FLAG} {repo_id}: no such folder here, and ids on the Hub are owner/name")
    repository, inner = "/".join(parts[:2]), "/".join(parts[2:])
    root = model_dir / repository.replace("/", "_")
    folder = root / inner if inner else root
    found = None if download else form_in(folder, onnx=onnx)
    if found is None:
        _download(repository, inner, root, onnx=onnx)
        found = form_in(folder, onnx=onnx)
    if found is None:
        raise UserError(f"{FLAG} {repo_id}: {_what_is_missing(folder)}")
    return found


def form_in(folder: Path, *, onnx: bool) -> Form | None:
    """Return the files of a tagger in a folder that has all of them."""
    for labels, weights in ONNX_FILES.items():
        if not (folder / labels).is_file():
            continue
        has_onnx = (folder / weights).is_file()
        has_timm = labels == CSV and all((folder / name).is_file() for name in TIMM_FILES)
        if has_timm and not onnx and (not has_onnx or timm_is_installed()):
            return Form(folder, folder / TIMM_FILES[0], folder / labels)
        if has_onnx:
            return Form(folder, folder / weights, folder / labels)
    return None


def _what_is_missing(folder: Path) -> str:
    if (folder / "saved_model.pb").exists():
        return (
            "holds a model in Keras' form, which needs TensorFlow and is not read; give --onnx, with model.onnx in it"
        )
    for labels, weights in ONNX_FILES.items():
        if (folder / labels).exists():
            others = f", nor {' and '.join(TIMM_FILES)}" if labels == CSV else ""
            return f"has no {weights}{others}"
    return f"holds no tagger: neither {CSV} nor {MAPPING} is in it"


def _download(repository: str, inner: str, root: Path, *, onnx: bool) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        names = {file.rfilename for file in HfApi().model_info(repository).siblings or ()}
        wanted = files_to_get(names, inner, onnx=onnx, timm=timm_is_installed())
        logger.info("downloading %s of %s to %s", ", ".join(wanted), repository, root)
        # weights of more than 2 GB are in files of their own beside the .onnx
        patterns = [f"{name}*" if name.endswith(".onnx") else name for name in wanted]
        snapshot_download(repository, local_dir=root, allow_patterns=patterns)
    except RepositoryNotFoundError:
        raise UserError(f"{FLAG} {repository}: no such folder here, and no such repository on the Hub") from None
    except UserError:
        raise
    except Exception as error:  # offline shows in many ways: DNS, proxy, timeout, HF_HUB_OFFLINE
        raise UserError(
            f"{FLAG} {repository}: its files are not in {root}, and the Hub cannot be reached "
            f"({type(error).__name__}); give a folder with model.onnx and {CSV}, or download it once while online"
        ) from None


def files_to_get(names: set[str], inner: str, *, onnx: bool, timm: bool) -> Sequence[str]:
    """Return which files of a repository are needed.

    Raises:
        UserError: it has none of the forms.
    """
    prefix = f"{inner}/" if inner else ""
    for labels, weights in ONNX_FILES.items():
        if prefix + labels not in names:
            continue
        has_timm = labels == CSV and {prefix + name for name in TIMM_FILES} <= names
        if has_timm and not onnx and (timm or prefix + weights not in names):
            return [prefix + name for name in (labels, *TIMM_FILES)]
        if prefix + weights in names:
            return [prefix + labels, prefix + weights]
    raise UserError(f"{FLAG}: the repository has no tagger in ONNX's or timm's form{f' in {inner}' if inner else ''}")
