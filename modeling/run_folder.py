"""A run's checkpoints on disk: which exist, and whether they are intact.

checkpoints/latest                     the name of the newest one, written last
checkpoints/step-00001000/model/       the first average of the weights, as `Denoiser.load` reads it
checkpoints/step-00001000/average-1/   the second one, and so on, as many as the run keeps
checkpoints/step-00001000/weights.safetensors, exp_avg.safetensors, exp_avg_sq.safetensors
checkpoints/step-00001000/state.json   the run's counters, and the hash of each file
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, NotRequired

from annotated_types import Len
from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict

from ..errors import BadInput, describe, say
from ..files import INSIDE, hash_file, in_threads
from ..records import Malformed, parse_strictly, read_small

MODEL = "model"  # the folder of the average that is evaluated, shown and loaded
CHECKPOINTS = "checkpoints"  # the folder of a run that holds them
LATEST = "latest"
STATE = "state.json"
HASH_THREADS = 8  # one thread hashes 1 to 2 GB/s

_NAME = re.compile(r"step-\d{8,}")


class Damaged(BadInput):
    """A checkpoint whose files are not what was written."""


HistoryEvent = TypedDict(
    "HistoryEvent",
    {
        "step": int,  # the first one that it holds for
        "changed": dict[str, Annotated[list[Any], Len(2, 2)]],  # what options were and are
        "from": NotRequired[str],  # the model that the run began with
        "weights": NotRequired[str],  # their SHA-256
    },
)


class CheckpointRecord(BaseModel):
    """What state.json holds: the run's own facts, and what shows that the files are intact."""

    model_config = ConfigDict(strict=True, extra="allow")

    files: dict[Annotated[str, INSIDE], str]
    """The SHA-256 of each file, by its path in the checkpoint."""
    digest: str
    """The SHA-256 of all the rest of this record."""
    options: dict[str, Any] = {}
    """Those of the last step; version 0.1 did not record them."""
    history: list[HistoryEvent] = []
    """What the run began with, and what changed."""


def name_of(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08}"


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, intact or not; folders with other names are left out."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def seal(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Write `facts`, and the hash of each file in `checkpoint`, into its state.json."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    hashes = {str(file.relative_to(checkpoint)): hash_file(file) for file in files}
    sealed = {**facts, "files": hashes}
    (checkpoint / STATE).write_text(json.dumps({**sealed, "digest": _digest(sealed)}, indent=2))


def verify(checkpoint: Path, part: str = "") -> dict[str, Any]:
    """What state.json says, after comparing the files, or those in the folder `part`, with it.

    Raises:
        Damaged: It names the file.
    """
    sealed = read_state(checkpoint)
    names = [name for name in sealed["files"] if not part or name.startswith(f"{part}/")]
    files = [checkpoint / name for name in names]
    try:
        found = list(in_threads(hash_file, files, HASH_THREADS, HASH_THREADS))
    except OSError as error:
        raise Damaged(f"{checkpoint} is damaged: {error}") from error
    for name, digest in zip(names, found, strict=True):
        if digest != sealed["files"][name]:
            raise Damaged(f"{checkpoint / name} is damaged: its hash differs from {STATE}'s")
    return sealed


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `seal` wrote; it is checked against its own digest, and no other file is read.

    Raises:
        Damaged: It has changed since, or is missing.
    """
    file = checkpoint / STATE
    try:
        record = parse_strictly(CheckpointRecord, read_small(file))
    except (OSError, Malformed) as error:
        raise Damaged(f"{checkpoint} is damaged: {STATE}: {describe(error)}") from error
    facts = record.model_dump(exclude={"digest"}, exclude_unset=True)
    if record.digest != _digest(facts):
        raise Damaged(f"{file} is damaged: it differs from its own digest")
    return facts


def _digest(sealed: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def newest_whole(folder: Path, part: str = "", first: str = "") -> tuple[Path, dict[str, Any]]:
    """The newest intact checkpoint, and what its state.json says; `part` is as in `verify`.

    A damaged one is reported on stderr, and the one before it is tried. The one named `first` is
    tried first, if it exists. A run may be writing and removing checkpoints in the folder.

    Raises:
        Damaged: All of them are damaged.
    """
    # Sorting is stable: the others stay newest first.
    for path in sorted(newest_first(folder), key=lambda path: path.name != first):
        try:
            return path, verify(path, part)
        except Damaged as damage:
            if not path.exists():  # the run has removed it after writing a newer one
                return newest_whole(folder, part)
            say(f"vidfill: {damage}; trying the one before")
    raise Damaged(f"every checkpoint in {folder} is damaged: remove it to start again")
