"""What a sweep has finished, kept so that it is never done twice."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .. import jobs
from .columns import Row, write_table

Key = tuple[str, str, int]  # schedule or baseline, clip, completion


class Ledger:
    """clips.csv: a row for each finished completion of a clip under a schedule.

    While a sweep runs, each of its processes writes its rows to a part of its own,
    clips-PROCESS.csv, flushed row by row; `gather` puts them all into clips.csv and clips.parquet.
    """

    def __init__(self, out: Path, columns: Sequence[str], process: int = 0) -> None:
        self.rows: dict[Key, Row] = {}
        self._out = out
        self._columns = columns
        self._part = out / f"clips-{process}.csv"

    def read(self) -> None:
        """Learn of the rows of all processes, also of those that a kill cut short."""
        whole_table = self._out / "clips.csv"
        for path in (whole_table, *self._parts()):
            content = path.read_text() if path.is_file() else ""
            whole = content[: content.rfind("\n") + 1]  # the last row may be cut off
            for row in csv.DictReader(io.StringIO(whole), self._columns):
                if path != whole_table or row["schedule"] != "schedule":
                    self.rows[_key(row)] = row

    def gather(self) -> None:
        """Write what was read, and remove the parts; no other process may be at work."""
        rows = [row for _, row in sorted(self.rows.items())]
        write_table(self._out, "clips", self._columns, rows)
        for part in self._parts():
            part.unlink()

    def add(self, row: Row) -> None:
        with self._part.open("ab") as file:
            file.write(csv_line([row[column] for column in self._columns]))
            file.flush()
            os.fsync(file.fileno())
        self.rows[_key(row)] = row

    def _parts(self) -> list[Path]:
        return sorted(self._out.glob("clips-*.csv"))


def _key(row: Row) -> Key:
    return row["schedule"], row["clip"], int(row["completion"])


class Account:
    """run.json: what a sweep began with, the batch it found, and the seconds spent so far."""

    def __init__(
        self, out: Path, inputs: Mapping[str, str], find_capacity: Callable[[], int]
    ) -> None:
        """Continue the account of earlier runs, or begin it.

        Raises:
            BadInput: the model, the shards or a network has changed since.
        """
        self._path = out / "run.json"
        self._inputs = dict(inputs)
        before = json.loads(self._path.read_text()) if self._path.is_file() else {}
        for name, was in before.get("inputs", {}).items():
            if was != self._inputs.get(name):
                raise jobs.BadInput(
                    f"the {name} has changed since the sweep in {out} began: "
                    "choose another folder for the results"
                )
        self.capacity: int = before.get("capacity") or find_capacity()
        self._spent: float = before.get("seconds", 0.0)
        self._began = time.monotonic()
        self.save()

    @property
    def seconds(self) -> float:
        """Wall seconds of all runs of this command, up to when each was last saved."""
        return self._spent + time.monotonic() - self._began

    def save(self) -> None:
        content = {"inputs": self._inputs, "capacity": self.capacity, "seconds": self.seconds}
        jobs.write_atomically(self._path, json.dumps(content, indent=2).encode())


def csv_line(values: Sequence[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue().encode()
