"""A split behind a URL, whose shards are kept on the node while they are in use.

Whoever needs a shard that is not here fetches it, one at a time. Along an order the node's first
process also fetches ahead of need, so that the others find their shards here. The processes of a
job are about at the same place of the order, since each step waits for the gradients of all: so
what the first one has passed goes, and a process that is far behind fetches it again.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ...errors import BadInput
from .folder import CacheFolder, ShardFiles
from .follower import Follower, ShardUse
from .job_folder import claim, make_private, remove_abandoned
from .names import MANIFEST, shard_name
from .transfer import Remote


class NodeCache:
    """A split behind a URL, whose shards are kept in a folder of the node."""

    def __init__(
        self,
        remote: Remote,
        split: str,
        folder: Path,
        gigabytes: float = 0.0,
        process: int = 0,
        *,
        temporary: bool = False,
    ) -> None:
        """Nothing is made or fetched yet.

        `folder` is for this split alone; where it is `temporary` the folder above is this job's,
        and is removed when the job is over. `process` is this one's number on the node.
        """
        self._remote, self._split, self._path = remote, split, folder
        self._gigabytes, self._process, self._temporary = gigabytes, process, temporary
        self._closing, self._stop = threading.Lock(), threading.Event()
        self._folder: CacheFolder | None = None
        self._follower: Follower | None = None
        # Held by this object, whichever of its threads took it and gives it back.
        self._evicting: FileLock | None = None

    def read(self, name: str) -> bytes:
        """The content of a small file; FileNotFoundError where there is none."""
        return self._remote.read(f"{self._split}/{name}")

    def describe(self, name: str) -> str:
        """A file as messages name it."""
        return self._remote.describe(f"{self._split}/{name}")

    def splits(self) -> list[str]:
        """The splits beside this one, where the server lists its folders."""
        return self._remote.folders_with(MANIFEST)

    def expect(self, shards: ShardFiles) -> None:
        """Say what the manifest says of the shards, and make the folder, which must be private."""
        if self._temporary:
            claim(self, self._path.parent)
            if self._process == 0:
                remove_abandoned(self._path.parent)
        self._open_folder(self._path, shards)

    @property
    def folder(self) -> CacheFolder:
        assert self._folder, "expect() comes first"
        return self._folder

    def path(self, number: int) -> Path:
        """A shard's tar, once it is in the cache; its index lies beside it.

        A process that has it open may read on when the cache gives its place to another.

        Raises:
            WrongFile: the server has no such file, or another than the manifest says.
            BadInput: it cannot be fetched, or the cache cannot hold it.
            Stopped: the cache was closed in the meantime.
        """
        stop, folder = self._stop, self.folder
        while not folder.is_whole(number):
            folder.fetch(number, stop)
        entry = folder.entry(number)
        with contextlib.suppress(FileNotFoundError):
            os.utime(entry)  # when it was asked for last
        return entry / shard_name(number)

    def discard(self, number: int) -> bool:
        """Remove a shard that was damaged here, so that it is fetched again."""
        self.folder.remove(number)
        return True

    def follow(self, uses: Iterator[ShardUse]) -> None:
        """Fetch ahead of need, for all processes of the node, what `uses` will read.

        The first process of the node calls this; the others call `passed` alone. Another process
        that calls it reads a stream of its own, and gets a cache of its own. `uses` are sorted by
        `first`, and read by other threads, as far as needed.

        Raises:
            BadInput: another job follows in the same folder.
        """
        self.close()
        if self._process:
            self._open_folder(self._path / f"process-{self._process}", self.folder.shards)
        evicting = FileLock(self.folder.path / ".evict", thread_local=False)
        try:
            evicting.acquire(timeout=1.0)  # others hold it for a moment
        except Timeout:
            raise BadInput(
                f"{self.folder.path}: another job of this node reads the same shards through this "
                "cache: give each its own cache.folder"
            ) from None
        self.folder.position = 0
        self._evicting, self._follower = evicting, Follower(self.folder, uses)

    def passed(self, position: int) -> None:
        """Say that this process, and those like it, read nothing before `position` any more."""
        self.folder.position = position

    def close(self) -> None:
        """Stop what is under way; what was fetched stays, and reading may begin anew."""
        with self._closing:
            self._stop.set()
            self._stop = threading.Event()
            if self._folder:
                self._folder.position = None
            if self._follower and self._evicting:
                self._follower.close()
                self._evicting.release()
            self._follower = self._evicting = None

    def _open_folder(self, path: Path, shards: ShardFiles) -> None:
        make_private(path)
        self._folder = CacheFolder(self._remote, self._split, path, shards, self._gigabytes)
