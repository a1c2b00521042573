"""A cache's folder in the temporary directory: one for each job, removed when the job is gone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
import weakref
from pathlib import Path

from ...errors import BadInput
from ...files import _is_at, _try_lock

_IN_USE = "in-use"


def _name_folder() -> Path:
    """A folder that the processes of one job on one node agree on."""
    names = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "MASTER_PORT")
    said = [os.environ.get(name, "") for name in names]
    job = next((job for job in said if job not in ("", "none")), "alone")  # torchrun's default
    return Path(tempfile.gettempdir()) / (_prefix() + re.sub(r"[^\w-]", "_", job))


def _prefix() -> str:
    return f"vidfill-cache-{os.getuid()}-"


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise BadInput(
            f"{folder} could be written by others: remove it, or choose another cache.folder"
        )


def _claim(owner: object, folder: Path) -> None:
    """Mark a job's folder as in use for as long as `owner` lives."""
    while True:
        _make_private(folder)
        try:
            lock = os.open(folder / _IN_USE, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            continue  # the folder was removed as abandoned in this moment
        fcntl.flock(lock, fcntl.LOCK_SH)
        if _is_at(lock, folder / _IN_USE):
            weakref.finalize(owner, os.close, lock)
            return
        os.close(lock)  # it was removed as abandoned in this moment


def _remove_abandoned(folder: Path) -> None:
    """Remove the folders of jobs of this user that are over."""
    for other in folder.parent.glob(f"{_prefix()}*"):
        with contextlib.suppress(OSError):  # other jobs may do the same in this moment
            if other == folder or other.lstat().st_uid != os.getuid():
                continue
            lock = os.open(other / _IN_USE, os.O_RDWR)
            try:
                if _try_lock(lock, fcntl.LOCK_EX):
                    shutil.rmtree(other)
            finally:
                os.close(lock)
