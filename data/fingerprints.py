"""What tells one video, or one video's masks, from others of the same name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import Fingerprint, fingerprint
from .videos import list_images


def fingerprint_videos(*paths: Path, known: Any = None, whole: bool = True) -> Fingerprint:
    """The fingerprint of files and of folders of images, which may be moved together.

    `known` and `whole` are as in `files.fingerprint`; what is no file is left out.
    """
    files = {
        f"{number}/{file.name if path.is_dir() else path.suffix}": file
        for number, path in enumerate(paths)
        for file in (list_images(path) if path.is_dir() else [path])
        if file.is_file()
    }
    return fingerprint(files, known, whole)
