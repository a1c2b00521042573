"""A run's checkpoints on disk: which there are, and whether one is what was written.

checkpoints/latest                     the newest one's name, written last
checkpoints/step-00001000/model/       the first average of the weights, as `Denoiser.load` reads it
checkpoints/step-00001000/average-1/   the second, likewise; as many as the run keeps
checkpoints/step-00001000/weights.safetensors, exp_avg.safetensors, exp_avg_sq.safetensors
checkpoints/step-00001000/state.json   the run's counters, and the hash of each file
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..files import hash_file, in_threads

MODEL = "model"  # in a checkpoint: what is evaluated, shown and loaded
LATEST = "latest"
STATE = "state.json"
THREADS = 8  # that hash files; one takes in 1 to 2 GB/s

_NAME = re.compile(r"step-(\d{8,})")


class Damaged(BadInput):
    """A checkpoint whose files are not what was written."""


def name_of(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08}"


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not; of other names, such as copies, none."""
    steps = {path: _NAME.fullmatch(path.name) for path in folder.glob("step-*")}
    found = {path: int(name[1]) for path, name in steps.items() if name}
    return sorted(found, key=found.__getitem__, reverse=True)


def seal(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Write `facts`, and the hash of each file in `checkpoint`, into its state.json."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    hashes = {str(file.relative_to(checkpoint)): hash_file(file) for file in files}
    sealed = {**facts, "files": hashes}
    (checkpoint / STATE).write_text(json.dumps({**sealed, "digest": _digest(sealed)}, indent=2))


def verify(checkpoint: Path, part: str = "") -> dict[str, Any]:
    """What state.json says, once the files have the hashes that it names.

    Args:
        checkpoint: Its folder.
        part: A folder in it: only the files there are read.

    Raises:
        Damaged: naming the file.
    """
    sealed = read_state(checkpoint)
    names = [name for name in sealed["files"] if not part or name.startswith(f"{part}/")]
    files = [checkpoint / name for name in names]
    try:
        found = list(in_threads(hash_file, files, THREADS, THREADS))
    except OSError as error:
        raise Damaged(f"{checkpoint} is damaged: {error}") from error
    for name, digest in zip(names, found, strict=True):
        if digest != sealed["files"][name]:
            raise Damaged(f"{checkpoint / name} is damaged: its hash differs from {STATE}'s")
    return sealed


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `seal` wrote, its own digest compared, the other files not looked at.

    Raises:
        Damaged: it says something else now, or is not there.
    """
    file = checkpoint / STATE
    try:
        sealed = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise Damaged(f"{checkpoint} is damaged: {STATE}: {error}") from error
    if not isinstance(sealed, dict) or sealed.pop("digest", None) != _digest(sealed):
        raise Damaged(f"{file} is damaged: it differs from its own digest")
    return sealed


def _digest(sealed: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def newest_whole(folder: Path, part: str = "", first: str = "") -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that verifies, and what its state.json says.

    A damaged one is named on stderr and the one before is tried.

    Args:
        folder: Holds at least one; a run may write and remove there meanwhile.
        part: As of `verify`.
        first: The name of the one to try before all others, where it is there.

    Raises:
        Damaged: All are.
    """
    # Python sorts stably: the others stay newest first.
    for path in sorted(newest_first(folder), key=lambda path: path.name != first):
        try:
            return path, verify(path, part)
        except Damaged as damage:
            if not path.exists():  # the run has removed it, after it wrote a newer one
                return newest_whole(folder, part)
            print(f"vidfill: {damage}; trying the one before", file=sys.stderr)
    raise Damaged(f"every checkpoint in {folder} is damaged: remove it to start again")
