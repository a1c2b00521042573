"""The windows that are done, kept beside the output until all of them are."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ...data.videos import Mask, Pixels
from ...errors import BadInput, say
from ...files import partial_of, write_atomically
from ...records import Malformed, parse_json, read_archived, read_small
from .boxes import Box
from .video import Picture
from .windows import FilledWindow

PROMISED = "outputs.json"  # in the folder, once the outputs are written but for their names


class WindowFile(NamedTuple):
    """A file with the frames that a window filled, and their numbers."""

    first: int
    end: int
    path: Path


@dataclass(frozen=True)
class UnfinishedWork:
    """A folder with what is filled: a file for each window, named after its frames.

    It holds `pixels`, for each sample those in the window's holes, frame by frame, row by row;
    `seams`, the `BorderSteps` of each sample; and `box`, what the network saw last.
    """

    folder: Path
    samples: int

    def files(self) -> list[WindowFile]:
        """Those that follow one another from the first frame on."""
        whole: list[WindowFile] = []
        for file in self._all():
            if file.first != (whole[-1].end if whole else 0):
                break
            whole.append(file)
        return whole

    def drop_rest(self) -> None:
        """Remove what lies behind a lost window: it was made from that one, which is made again."""
        files = self.files()
        if rest := self._all()[len(files) :]:
            say(
                f"vidfill inpaint: {self.folder} has lost the window that begins with frame "
                f"{files[-1].end if files else 0}: it and all after it are filled again",
            )
            for file in rest:
                file.path.unlink()

    def _all(self) -> list[WindowFile]:
        names = (re.fullmatch(r"(\d+)-(\d+)\.npz", path.name) for path in self.folder.iterdir())
        return sorted(WindowFile(int(m[1]), int(m[2]), self.folder / m[0]) for m in names if m)

    def list_whole(self, frames: int) -> list[WindowFile]:
        """The files of all windows of a video of so many frames.

        Raises:
            BadInput: One is lost.
        """
        files = self.files()
        if (files[-1].end if files else 0) != frames:
            raise BadInput(
                f"{self.folder} has lost windows while this job ran: give the same command again"
            )
        return files

    def promise(self, outs: Iterable[Path]) -> None:
        """Record the outputs that are about to take their places, by the places' contents."""
        kept = {str(out.name): partial_of(out).stat().st_ino for out in outs}
        write_atomically(self.folder / PROMISED, json.dumps(kept).encode())

    def made(self, out: Path) -> bool:
        """Whether an output is there that this work has made, whole."""
        record = self.folder / PROMISED
        promised: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            promised = parse_json(dict[str, int], read_small(record))
        return out.exists() and promised.get(out.name) == out.stat().st_ino

    def add(self, window: FilledWindow) -> None:
        """Store what a window filled."""
        inside = [mask == 1 for mask in window.masks]
        pixels = [
            np.concatenate([frame[hole] for frame, hole in zip(frames, inside, strict=True)])
            for frames in window.frames
        ]
        content = io.BytesIO()
        np.savez_compressed(
            content,
            pixels=pixels,
            seams=np.array(window.border_steps, dtype=np.float64),
            box=np.array(window.box or (), dtype=np.int64),
        )
        name = f"{window.first:09}-{window.end:09}.npz"
        write_atomically(self.folder / name, content.getvalue())

    def read_steps(self, file: WindowFile) -> Float[np.ndarray, "samples 2"]:
        """The `BorderSteps` of each sample of a window.

        Raises:
            BadInput: The file is damaged.
        """
        return self._read(file, "seams", np.float64, (self.samples, 2))

    def read_box(self, file: WindowFile) -> Box | None:
        """What the network saw last; raises as `read_steps` does."""
        box = self._read(file, "box", np.int64, (None,), len(Box._fields))
        return Box(*box.tolist()) if box.size else None

    def restore(
        self, pairs: Iterable[tuple[Picture, Mask]], files: Iterable[WindowFile]
    ) -> Iterator[tuple[Picture, Mask, list[Pixels]]]:
        """Each picture with its mask and, for each sample, its filled frame.

        Raises:
            BadInput: A file is damaged, or the masks are not those of what was filled.
        """
        source = iter(pairs)
        for file in files:
            window = list(itertools.islice(source, file.end - file.first))
            holes = [mask == 1 for _, mask in window]
            ends = np.cumsum([0, *(int(hole.sum()) for hole in holes)])
            pixels = self._read(file, "pixels", np.uint8, (self.samples, int(ends[-1]), 3))
            for (picture, mask), hole, (begin, end) in zip(
                window, holes, itertools.pairwise(ends), strict=True
            ):
                filled = [picture.rgb.copy() for _ in pixels]
                for frame, values in zip(filled, pixels, strict=True):
                    frame[hole] = values[begin:end]
                yield picture, mask, filled

    def _read(
        self,
        file: WindowFile,
        name: str,
        dtype: type[np.generic],
        shape: tuple[int | None, ...],
        most: int | None = None,
    ) -> np.ndarray:
        try:
            return read_archived(file.path.read_bytes(), name, dtype, shape, most)
        except Malformed as error:
            raise self._damaged(file) from error

    def _damaged(self, file: WindowFile) -> BadInput:
        return BadInput(
            f"{file.path} is damaged, or the video or the masks have changed: remove "
            f"{self.folder} to begin again"
        )
