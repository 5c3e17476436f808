"""The Hugging Face Hub: upload what a run saves, and download states to resume from, with ``huggingface_hub``.

A failed upload never ends a run. One line reports it, with the command that does it by hand. It is retried after the
next successful upload and at the end. No message contains a token.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import shlex
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from library.errors import UserError

logger = logging.getLogger(__name__)

#: types of repositories that hold files; a Space is a program
REPO_TYPES = ("model", "dataset")
#: attempts for one upload
ATTEMPTS = 3
#: seconds that the end of a run waits for uploads
WAIT_AT_END = 1800.0
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]*")
_LONGEST_REASON = 300  # characters of the Hub's own messages


@dataclass(frozen=True)
class HubTarget:
    """The repository that saves are uploaded to, and the way of uploading."""

    repo_id: str  # user/name
    repo_type: str = "model"
    folder: str = ""  # in the repository; "" is its root
    token: str | None = field(default=None, repr=False)  # None: that of ``hf auth login``
    visibility: str | None = None  # "public" or "private"; None: private, if it is made now
    in_background: bool = False

    def place(self, path: Path) -> str:
        """Return the path of a file or folder in the repository."""
        return f"{self.folder}/{path.name}" if self.folder else path.name

    def command(self, path: Path) -> str:
        """Return the command that uploads by hand."""
        words = ["hf", "upload", self.repo_id, str(path), self.place(path), "--repo-type", self.repo_type]
        return shlex.join(words)


# ---- before a run ----


def check_target(target: HubTarget, *, create: bool) -> HubTarget:
    """Check before any heavy work that uploads will be accepted, and return the target with its full name.

    Args:
        create: create the repository if it does not exist.

    Raises:
        UserError: no token, a wrong one, or one without write access; a repository that cannot be created or has
            another visibility; no connection.
    """
    from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError

    api = _api(target.token)
    where = f"--huggingface_repo_id {target.repo_id}"
    try:
        user = api.whoami()
        if "/" not in target.repo_id:
            target = replace(target, repo_id=f"{user['name']}/{target.repo_id}")
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(f"{where}: the token may only read; make one that may write, at {api.endpoint}")
        if create:
            api.create_repo(
                target.repo_id, private=target.visibility != "public", repo_type=target.repo_type, exist_ok=True
            )
        try:
            found = api.repo_info(target.repo_id, repo_type=target.repo_type)
        except RepositoryNotFoundError:
            if create:
                raise
            return target  # the run itself would create it
    except LocalTokenNotFoundError:
        raise UserError(f"{where}: no token; give --huggingface_token, or log in with: hf auth login") from None
    except UserError:
        raise
    except Exception as error:  # the client has about ten error classes, its own and its transport's
        why = reason(error, target.token)
        raise UserError(
            f"{where}: cannot be uploaded to ({why}); check name, --huggingface_token and connection"
        ) from None
    visibility = "private" if found.private else "public"
    if target.visibility is not None and target.visibility != visibility:
        raise UserError(
            f"--huggingface_repo_visibility {target.visibility}: {target.repo_id} is {visibility} already; change "
            "that on the Hub, or remove the option"
        )
    return target


def reason(error: BaseException, token: str | None) -> str:
    """Return what went wrong, in one line without the token."""
    text = " ".join(str(error).split()) or type(error).__name__
    if error.__cause__ is not None and type(error) is RuntimeError:  # "Error while uploading": its cause says why
        text = f"{text} {reason(error.__cause__, token)}"
    text = _QUERY.sub(r"\1", text)  # upload URLs are signed, which makes them as secret as a token
    if token:
        text = text.replace(token, "***")
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + " ..."


def _api(token: str | None) -> Any:
    """Return the client of the server that ``HF_ENDPOINT`` names."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)


# ---- states from the Hub ----


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of a repository: ``user/name/folder:revision:type``, the last two with defaults."""

    repo_id: str
    folder: str
    revision: str = "main"
    repo_type: str = "model"

    @staticmethod
    def parse(text: str) -> RemoteFolder:
        """Parse the text; raises UserError if it has another form."""
        name, *more = text.split(":")
        parts = [part for part in name.split("/") if part]
        revision, repo_type = [*more, "", ""][:2]
        if len(parts) < 3 or len(more) > 2:
            raise UserError(
                f"--resume {text}: with --resume_from_huggingface it is user/name/path-of-the-state:revision:type, "
                "e.g. me/my-lora/my_lora-state:main:model"
            )
        if repo_type and repo_type not in REPO_TYPES:
            raise UserError(f"--resume {text}: {repo_type} is no type of repository; write {' or '.join(REPO_TYPES)}")
        return RemoteFolder("/".join(parts[:2]), "/".join(parts[2:]), revision or "main", repo_type or "model")


def download_folder(remote: RemoteFolder, token: str | None) -> Path:
    """Download the folder into the local Hub cache, except files that are there, and return its path.

    Raises:
        UserError: no such repository, revision or folder; no access or connection.
    """
    api = _api(token)
    asked = f"--resume {remote.repo_id}/{remote.folder}:{remote.revision}:{remote.repo_type}"
    logger.info("fetching %s from %s", remote.folder, remote.repo_id)
    try:
        snapshot = api.snapshot_download(
            remote.repo_id,
            repo_type=remote.repo_type,
            revision=remote.revision,
            allow_patterns=[f"{glob.escape(remote.folder)}/*"],
        )
        folder = Path(snapshot, remote.folder)
        if folder.is_dir():
            return folder
        files = api.list_repo_files(remote.repo_id, repo_type=remote.repo_type, revision=remote.revision)
    except Exception as error:  # see check_target
        raise UserError(f"{asked}: cannot be fetched from the Hub: {reason(error, token)}") from None
    states = sorted({name.rpartition("/")[0] for name in files if name.rpartition("/")[0].endswith("-state")})
    raise UserError(f"{asked}: no such folder there; it holds {', '.join(states) or 'no states'}")


# ---- uploads ----


@dataclass(eq=False)
class _Upload:
    path: Path
    target: HubTarget
    attempts: int = 0
    afterwards: Callable[[Path], None] | None = None


class Uploads:
    """The uploads of a run, in one thread; without a target it does nothing.

    Args:
        patience: seconds that ``close`` waits.
    """

    def __init__(self, target: HubTarget | None, *, patience: float = WAIT_AT_END) -> None:
        self._target = target
        self._patience = patience
        self._pending: dict[Path, _Upload] = {}  # in the order of ``add``
        self._changed = threading.Condition()
        self._added = 0
        self._worked = 0  # the value of ``_added`` up to which the thread is done
        self._closing = False
        self._thread: threading.Thread | None = None

    def add(self, path: Path) -> None:
        """Upload a file or a folder, in the background if the target says so."""
        if self._target is None:
            return
        with self._changed:
            self._pending.pop(path, None)  # an earlier file of this name no longer exists
            self._pending[path] = _Upload(path, self._target)
            self._added += 1
            self._changed.notify_all()
            if self._thread is None:
                # a daemon, so that a hanging connection cannot keep the program from ending
                self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
                self._thread.start()
            if not self._target.in_background:
                mine = self._added
                self._changed.wait_for(lambda: self._worked >= mine)

    def when_free(self, path: Path, action: Callable[[Path], None]) -> None:
        """Call ``action`` on a file, such as removing it, now or when its upload is done."""
        with self._changed:
            if (upload := self._pending.get(path)) is not None:
                upload.afterwards = action
                return
        action(path)

    def close(self) -> None:
        """Retry failed uploads once and wait for the others, within ``patience`` in all."""
        if self._thread is None:
            return
        with self._changed:
            if self._pending:
                logger.info("waiting for uploads: %d (at most %.0f minutes)", len(self._pending), self._patience / 60)
            self._closing = True
            self._changed.notify_all()
        self._thread.join(self._patience)
        with self._changed:
            left, self._pending = list(self._pending.values()), {}
        for upload in left:
            logger.warning(
                "%s: its upload is not done after %.0f minutes; do it by hand: %s",
                *(upload.path, self._patience / 60, upload.target.command(upload.path)),
            )

    # ---- in the thread ----

    def _work(self) -> None:
        from huggingface_hub.utils import disable_progress_bars
        from huggingface_hub.utils import logging as hub_logging

        disable_progress_bars()  # the run has one of its own
        hub_logging.set_verbosity_error()  # its messages contain signed URLs; failures are reported here
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._added > self._worked or self._closing)
                seen = self._added
                last = self._closing and seen == self._worked
                due = list(reversed(self._pending.values()))
            for upload in due:
                # the newest first; if it fails, the older ones are not tried
                if not self._attempt(upload, last=last) and not last:
                    break
            with self._changed:
                self._worked = seen
                self._changed.notify_all()
                if last:
                    return

    def _attempt(self, upload: _Upload, *, last: bool) -> bool:
        target, path = upload.target, upload.path
        upload.attempts += 1
        try:
            if not path.exists():
                raise FileNotFoundError("it is no longer there")
            _send(path, target)
        except Exception as error:  # whatever the error is, the run continues
            gone = not path.exists()
            gives_up = last or gone or upload.attempts >= ATTEMPTS
            logger.warning(
                "%s: not uploaded to %s: %s; %s",
                path,
                target.repo_id,
                reason(error, target.token),
                "nothing is left to upload"
                if gone
                else f"do it by hand: {target.command(path)}"
                if gives_up
                else f"it is tried again later; by hand: {target.command(path)}",
            )
            if gives_up:
                self._forget(upload)  # retention then keeps the file
            return False
        logger.info("uploaded %s to %s as %s", path, target.repo_id, target.place(path))
        if self._forget(upload) and upload.afterwards is not None:
            upload.afterwards(path)
        return True

    def _forget(self, upload: _Upload) -> bool:
        """Forget an upload; returns False if the file was saved again in the meantime."""
        with self._changed:
            is_newest = self._pending.get(upload.path) is upload
            if is_newest:
                del self._pending[upload.path]
            return is_newest


def _send(path: Path, target: HubTarget) -> None:
    api = _api(target.token)
    where = {"repo_id": target.repo_id, "repo_type": target.repo_type, "path_in_repo": target.place(path)}
    if path.is_dir():
        api.upload_folder(folder_path=str(path), commit_message=f"Upload {path.name}", **where)
    else:
        api.upload_file(path_or_fileobj=str(path), commit_message=f"Upload {path.name}", **where)
