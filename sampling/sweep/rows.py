"""What a sweep has finished, kept so that it is never done twice."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from ...errors import BadInput
from ...files import aside, write_atomically

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
                raise BadInput(
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
        write_atomically(self._path, json.dumps(content, indent=2).encode())


def csv_line(values: Sequence[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue().encode()


Row = dict[str, str]

TEXTS = ("schedule", "clip", "masks", "reference", "measure", "verdict")
COUNTS = ("completion", "nfe", "clips")


def write_table(folder: Path, name: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Write NAME.parquet, then NAME.csv: the same values, each file whole or not at all."""
    with aside(folder / f"{name}.parquet") as partial:
        parquet.write_table(as_arrow(columns, rows), partial)
    write_atomically(folder / f"{name}.csv", as_csv(columns, rows))


def as_csv(columns: Sequence[str], rows: Sequence[Row]) -> bytes:
    """A header, then a line for each row."""
    content = io.StringIO()
    writer = csv.DictWriter(content, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return content.getvalue().encode()


def as_arrow(columns: Sequence[str], rows: Sequence[Row]) -> pa.Table:
    """The same, `TEXTS` as strings, `COUNTS` as int64 and all else as float64; "" is null."""
    arrays = []
    for column in columns:
        texts = [row[column] or None for row in rows]
        if column in TEXTS:
            arrays.append(pa.array(texts, pa.string()))
        elif column in COUNTS:
            arrays.append(pa.array([text and int(text) for text in texts], pa.int64()))
        else:
            arrays.append(pa.array([text and float(text) for text in texts], pa.float64()))
    return pa.Table.from_arrays(arrays, names=list(columns))
