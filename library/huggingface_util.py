"""A published name that graphical programs import: ``upload``. See ``library/train_util.py``."""

from __future__ import annotations

import argparse
import atexit
from pathlib import Path

from library.files.hub import HubTarget, Uploads


def upload(args: argparse.Namespace, src: str | Path, dest_suffix: str = "", force_sync_upload: bool = False) -> None:
    """Upload a file or folder to the repository that the ``huggingface_*`` options of ``args`` name.

    A failed upload is named in the log with the command that does it by hand; it is no error.

    Args:
        dest_suffix: the place in ``--huggingface_path_in_repo``; the last part is the name of ``src``.
        force_sync_upload: wait for the upload, with ``--async_upload`` too.
    """
    path = Path(src)
    inner = dest_suffix.strip("/").removesuffix(path.name).strip("/")
    folders = [(getattr(args, "huggingface_path_in_repo", None) or "").strip("/"), inner]
    target = HubTarget(
        repo_id=args.huggingface_repo_id,
        repo_type=getattr(args, "huggingface_repo_type", None) or "model",
        folder="/".join(filter(None, folders)),
        token=getattr(args, "huggingface_token", None),
        in_background=bool(getattr(args, "async_upload", False)) and not force_sync_upload,
    )
    uploads = Uploads(target)
    uploads.add(path)
    if target.in_background:
        atexit.register(uploads.close)
    else:
        uploads.close()
