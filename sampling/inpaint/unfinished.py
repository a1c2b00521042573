"""The windows that are done, kept beside the output until all are."""

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

from ...errors import BadInput
from ...files import write_atomically
from .boxes import Box, Hole, Pixels
from .video import Picture
from .windows import Stretch


class Kept(NamedTuple):
    """What a window filled."""

    pixels: UInt8[np.ndarray, "samples pixels 3"]
    """In its holes, frame by frame, row by row."""
    seams: Float[np.ndarray, "samples 2"]
    """A `Seam` of each sample."""
    box: Box | None
    """What the network saw last."""


class Span(NamedTuple):
    """The frames that a window filled."""

    first: int
    end: int
    file: Path


@dataclass(frozen=True)
class Work:
    """A folder with what is filled: a file a window, named for its frames."""

    folder: Path

    def spans(self) -> list[Span]:
        """What is there, in order."""
        found = (re.fullmatch(r"(\d+)-(\d+)\.npz", path.name) for path in self.folder.iterdir())
        return sorted(Span(int(m[1]), int(m[2]), self.folder / m[0]) for m in found if m)

    def add(self, stretch: Stretch) -> None:
        """Keep what a window filled."""
        inside = [mask == 1 for mask in stretch.masks]
        pixels = [
            np.concatenate([frame[hole] for frame, hole in zip(frames, inside, strict=True)])
            for frames in stretch.frames
        ]
        content = io.BytesIO()
        np.savez_compressed(content, pixels=pixels, seams=stretch.seams, box=stretch.box or ())
        name = f"{stretch.first:09}-{stretch.end:09}.npz"
        write_atomically(self.folder / name, content.getvalue())

    def read(self, span: Span) -> Kept:
        """What a window filled.

        Raises:
            BadInput: the file is damaged.
        """
        try:
            with np.load(io.BytesIO(span.file.read_bytes()), allow_pickle=False) as kept:
                box = Box(*kept["box"].tolist()) if kept["box"].size else None
                return Kept(kept["pixels"], kept["seams"], box)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise self._damaged(span) from error

    def restore(
        self, pairs: Iterable[tuple[Picture, Hole]], spans: Iterable[Span]
    ) -> Iterator[tuple[Picture, Hole, list[Pixels]]]:
        """Each picture with its mask and, of each sample, its filled frame.

        Raises:
            BadInput: the masks are not those of what was filled.
        """
        source = iter(pairs)
        for span in spans:
            pixels, used = self.read(span).pixels, 0
            for picture, mask in itertools.islice(source, span.end - span.first):
                hole = mask == 1
                until = used + int(hole.sum())
                if until > pixels.shape[1]:
                    break
                filled = [picture.rgb.copy() for _ in pixels]
                for frame, values in zip(filled, pixels, strict=True):
                    frame[hole] = values[used:until]
                used = until
                yield picture, mask, filled
            if used != pixels.shape[1]:
                raise self._damaged(span)

    def _damaged(self, span: Span) -> BadInput:
        return BadInput(
            f"{span.file} is damaged, or video or masks are not what they were: remove "
            f"{self.folder} to begin again"
        )
