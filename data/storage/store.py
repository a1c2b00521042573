"""A dataset's files, on this machine or behind a URL."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...options import NonNegativeFloat
from ...records import read_small
from .cache import NodeCache
from .folder import ShardFiles
from .follower import ShardUse
from .job_folder import name_folder
from .names import MANIFEST, shard_name
from .transfer import Remote, is_remote


@dataclass(frozen=True)
class CacheConfig:
    """Where the shards behind a URL are kept while they are in use."""

    folder: str = ""
    """Folder on the node's own disk; "" is one of this job's under the temporary directory."""
    gigabytes: NonNegativeFloat = 0.0
    """Most that the shards take there; 0 is what the order needs, two blocks a lane, or room for
    64 shards where they are read without an order."""


class LocalStore:
    """A split in a folder of this machine, read in place."""

    def __init__(self, root: Path, split: str) -> None:
        self._root, self.folder = root, root / split

    def read(self, name: str) -> bytes:
        """The content of a small file; FileNotFoundError where there is none."""
        return read_small(self.folder / name)

    def describe(self, name: str) -> str:
        """A file as messages name it."""
        return str(self.folder / name)

    def splits(self) -> list[str]:
        """The splits beside this one."""
        return sorted(path.parent.name for path in self._root.glob(f"*/{MANIFEST}"))

    def expect(self, shards: ShardFiles) -> None:
        """Sizes are checked when a shard is opened."""

    def path(self, number: int) -> Path:
        """A shard's tar; its index lies beside it."""
        return self.folder / shard_name(number)

    def discard(self, number: int) -> bool:
        """There is no other copy."""
        return False

    def follow(self, uses: Iterator[ShardUse]) -> None:
        """Nothing needs to be fetched."""

    def passed(self, position: int) -> None:
        """Nothing needs to be removed."""

    def close(self) -> None:
        """Nothing is open."""


Store = LocalStore | NodeCache


def open_store(root: str | Path, split: str, cache: CacheConfig) -> Store:
    """The files of `root`/`split`, without a look at them; BadInput for an unknown protocol."""
    if not is_remote(str(root)):
        return LocalStore(Path(re.sub("^(file|local)://", "", str(root))), split)
    remote = Remote(str(root))
    identity = hashlib.sha256(remote.describe(split).encode()).hexdigest()[:16]
    return NodeCache(
        remote,
        split,
        (Path(cache.folder) if cache.folder else name_folder()) / identity,
        cache.gigabytes,
        int(os.environ.get("LOCAL_RANK", "0")),
        temporary=not cache.folder,
    )
