"""Where each process of a node stands, as its cache needs to know."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np


class _Board:
    """What the node's processes tell each other: where each is, and which shard it waits for."""

    def __init__(self, path: Path, process: int, processes: int) -> None:
        _extend(path, processes * 3 * 8)
        # By process: position + 1, the shard that it waits for + 1, and the same once that cannot
        # come and there is no room to write why; 0 is none. The machine writes 8 bytes at once.
        self._values = np.memmap(path, np.int64, "r+", shape=(processes, 3))
        self._mine = self._values[process]
        self._position = self._asked = 0

    def clear(self) -> None:
        self._values[:] = 0

    def move(self, position: int) -> None:
        self._position = position + 1
        self.say()

    def ask(self, number: int | None) -> None:
        self._asked = 0 if number is None else number + 1
        self._mine[2] = 0
        self.say()

    def say(self) -> None:
        """Say all again: who follows clears the board when it begins."""
        self._mine[:2] = self._position, self._asked

    def leave(self) -> None:
        self._mine[:] = 0

    def refuse(self, number: int) -> None:
        """Tell those who wait for a shard that it does not come."""
        self._values[self._values[:, 1] == number + 1, 2] = number + 1

    def is_refused(self, number: int) -> bool:
        return int(self._mine[2]) == number + 1

    def floor(self) -> int:
        """Position that all processes have passed which said where they are."""
        said = self._values[:, 0].copy()  # others write meanwhile
        said = said[said > 0]
        return int(said.min()) - 1 if said.size else 0

    def requests(self) -> list[int]:
        """Shards that processes wait for."""
        return [int(number) - 1 for number in self._values[:, 1].copy() if number]

    def state(self) -> bytes:
        return self._values[:, :2].tobytes()


def _extend(path: Path, size: int) -> None:
    """Make a file `size` bytes long, of written zeros: a hole could fail when it is mapped."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        there = os.fstat(descriptor).st_size
        if there < size:
            os.pwrite(descriptor, bytes(size - there), there)
    finally:
        os.close(descriptor)
