"""What a sweep has finished, kept so that it is never done twice."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import jobs
from .results import MEASURES

COLUMNS = ("schedule", "clip", *(m.column for m in MEASURES if m.column != "clips"))

Row = dict[str, str]


class Ledger:
    """clips.csv: a row for each finished clip and schedule, flushed as it is written.

    Beside it run.json keeps what the sweep began with and the seconds spent so far.
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, str]) -> None:
        """Read what earlier runs of the same command finished.

        Raises:
            BadInput: the model, the shards or the autoencoder have changed since.
        """
        self.path = out / "clips.csv"
        self._run = out / "run.json"
        self._fingerprint = dict(fingerprint)
        self._spent = self._resume(out)
        self._began = time.monotonic()
        self.rows = self._read_rows()

    def _resume(self, out: Path) -> float:
        if not self._run.is_file():
            self._save(0.0)
            return 0.0
        run = json.loads(self._run.read_text())
        for name, before in run["inputs"].items():
            if before != self._fingerprint[name]:
                raise jobs.BadInput(
                    f"the {name} has changed since the sweep in {out} began: "
                    "choose another folder for the results"
                )
        return float(run["seconds"])

    def _save(self, seconds: float) -> None:
        content = {"inputs": self._fingerprint, "seconds": seconds}
        jobs.write_atomically(self._run, json.dumps(content, indent=2).encode())

    def _read_rows(self) -> dict[tuple[str, str], Row]:
        if not self.path.is_file():
            jobs.write_atomically(self.path, csv_line(COLUMNS))
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:  # the end of a row that a kill cut off
            jobs.write_atomically(self.path, whole)
        rows = list(csv.DictReader(io.StringIO(whole.decode())))
        return {(row["schedule"], row["clip"]): row for row in rows}

    def __contains__(self, name_and_clip: tuple[str, str]) -> bool:
        return name_and_clip in self.rows

    @property
    def seconds(self) -> float:
        """Wall seconds of all runs of this command, up to each run's last row."""
        return self._spent + time.monotonic() - self._began

    def add(self, row: Row) -> None:
        with self.path.open("ab") as file:
            file.write(csv_line([row[column] for column in COLUMNS]))
            file.flush()
            os.fsync(file.fileno())
        self.rows[row["schedule"], row["clip"]] = row
        self._save(self.seconds)


def csv_line(values: Sequence[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue().encode()
