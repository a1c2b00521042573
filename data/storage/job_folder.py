"""A cache's folder in the temporary directory: one for each job, removed when the job is over."""

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

# Locked by every process of the job. That takes a shared lock, which filelock does not have; and
# the temporary directory is on the node's own disk, where flock works.
_IN_USE = "in-use"
_PREFIX = f"vidfill-cache-{os.getuid()}-"


def name_folder() -> Path:
    """A folder that the processes of one job on one node agree on."""
    names = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "MASTER_PORT")
    said = [os.environ.get(name, "") for name in names]
    job = next((job for job in said if job not in ("", "none")), "alone")  # torchrun's default
    return Path(tempfile.gettempdir()) / (_PREFIX + re.sub(r"[^\w-]", "_", job))


def make_private(folder: Path) -> None:
    """Make a folder that nobody else can write to; BadInput where it is there, and others can."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise BadInput(
            f"{folder} could be written by others: remove it, or choose another cache.folder"
        )


def claim(owner: object, folder: Path) -> None:
    """Mark a job's folder as in use for as long as `owner` lives."""
    while True:
        make_private(folder)
        with contextlib.suppress(FileNotFoundError):  # it was removed as abandoned meanwhile
            lock = os.open(folder / _IN_USE, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if os.fstat(lock).st_nlink:
                weakref.finalize(owner, os.close, lock)
                return
            os.close(lock)


def remove_abandoned(folder: Path) -> None:
    """Remove the folders of this user's jobs that are over."""
    for other in folder.parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, or another job removes it too
            if other == folder or other.lstat().st_uid != os.getuid():
                continue
            with (other / _IN_USE).open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other)
