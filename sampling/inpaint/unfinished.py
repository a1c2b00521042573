"""The windows that are done, kept beside the output until all of them are."""

from __future__ import annotations

import io
import itertools
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from ...data.videos import Mask, Pixels
from ...errors import BadInput
from ...files import write_atomically
from .boxes import Box
from .video import Picture
from .windows import FilledWindow


class WindowFile(NamedTuple):
    """A file with the frames that a window filled, and their numbers."""

    first: int
    end: int
    path: Path


class StoredWindow(NamedTuple):
    """What such a file holds."""

    pixels: UInt8[np.ndarray, "samples pixels 3"]
    """Those in the window's holes, frame by frame, row by row."""
    border_steps: Float[np.ndarray, "samples 2"]
    """The `BorderSteps` of each sample."""
    box: Box | None
    """What the network saw last."""


@dataclass(frozen=True)
class UnfinishedWork:
    """A folder with what is filled: a file for each window, named after its frames."""

    folder: Path

    def files(self) -> list[WindowFile]:
        """All of them, in order."""
        names = (re.fullmatch(r"(\d+)-(\d+)\.npz", path.name) for path in self.folder.iterdir())
        return sorted(WindowFile(int(m[1]), int(m[2]), self.folder / m[0]) for m in names if m)

    def add(self, window: FilledWindow) -> None:
        """Store what a window filled."""
        inside = [mask == 1 for mask in window.masks]
        pixels = [
            np.concatenate([frame[hole] for frame, hole in zip(frames, inside, strict=True)])
            for frames in window.frames
        ]
        content = io.BytesIO()
        np.savez_compressed(
            content, pixels=pixels, seams=np.array(window.border_steps), box=window.box or ()
        )
        name = f"{window.first:09}-{window.end:09}.npz"
        write_atomically(self.folder / name, content.getvalue())

    def read(self, file: WindowFile) -> StoredWindow:
        """What a window filled.

        Raises:
            BadInput: The file is damaged.
        """
        try:
            with np.load(io.BytesIO(file.path.read_bytes()), allow_pickle=False) as stored:
                box = Box(*stored["box"].tolist()) if stored["box"].size else None
                return StoredWindow(stored["pixels"], stored["seams"], box)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise self._damaged(file) from error

    def restore(
        self, pairs: Iterable[tuple[Picture, Mask]], files: Iterable[WindowFile]
    ) -> Iterator[tuple[Picture, Mask, list[Pixels]]]:
        """Each picture with its mask and, for each sample, its filled frame.

        Raises:
            BadInput: The masks are not those of what was filled.
        """
        source = iter(pairs)
        for file in files:
            pixels, used = self.read(file).pixels, 0
            for picture, mask in itertools.islice(source, file.end - file.first):
                inside = mask == 1
                until = used + int(inside.sum())
                if until > pixels.shape[1]:
                    break
                filled = [picture.rgb.copy() for _ in pixels]
                for frame, values in zip(filled, pixels, strict=True):
                    frame[inside] = values[used:until]
                used = until
                yield picture, mask, filled
            if used != pixels.shape[1]:
                raise self._damaged(file)

    def _damaged(self, file: WindowFile) -> BadInput:
        return BadInput(
            f"{file.path} is damaged, or the video or the masks have changed: remove "
            f"{self.folder} to begin again"
        )
