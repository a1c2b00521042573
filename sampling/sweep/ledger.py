"""What a sweep has done so far, kept so that nothing is done twice."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ...errors import BadInput, describe
from ...files import write_atomically
from ...options import PositiveInt
from ...records import Malformed, parse_strictly, parse_table, read_small
from .kept import CompletionKey
from .results import CompletionRow, as_csv, write_table


class Ledger:
    """clips.csv: a row for each finished completion.

    While a sweep runs, each of its processes writes its rows to a file of its own,
    clips-PROCESS.csv, flushed row by row; `gather` puts them all into clips.csv and clips.parquet.
    """

    def __init__(self, out: Path, columns: Sequence[str], process: int = 0) -> None:
        self.rows: dict[CompletionKey, CompletionRow] = {}
        self._out = out
        self._columns = columns
        self._part = out / f"clips-{process}.csv"

    def read(self) -> None:
        """Read the rows of all processes; a row that a kill cut short does not count."""
        table = self._out / "clips.csv"
        for path in [table] * table.is_file() + self._parts():
            try:
                content = path.read_text()
                lines = content[: content.rfind("\n") + 1].splitlines()[path == table :]
                for _, row in parse_table(lines, self._columns, CompletionRow):
                    self.rows[row.key] = row
            except ValueError as error:
                raise _damaged(path, error) from None

    def gather(self) -> None:
        """Write what was read as one table and remove the parts, while no other process works."""
        rows = [row.texts() for _, row in sorted(self.rows.items())]
        write_table(self._out, "clips", self._columns, rows)
        for part in self._parts():
            part.unlink()

    def add(self, row: CompletionRow) -> None:
        with self._part.open("ab") as file:
            file.write(as_csv(self._columns, [row.texts()], header=False))
            file.flush()
            os.fsync(file.fileno())
        # With the digits that the file has: a sweep that is continued must come to the same.
        self.rows[row.key] = CompletionRow.model_validate(row.texts())

    def _parts(self) -> list[Path]:
        return sorted(self._out.glob("clips-*.csv"))


def _damaged(path: Path, error: Exception) -> BadInput:
    return BadInput(f"{path} is damaged: {describe(error)}: sweep into a new folder")


class RunRecord(BaseModel):
    """run.json."""

    model_config = ConfigDict(strict=True)

    inputs: dict[str, str] = {}
    """Version 0.1's hashes of what must not change; now job.json has them."""
    capacity: PositiveInt
    """Trajectories that a process's network evaluates at once, at most."""
    seconds: float
    """Wall time of all runs of the command."""


class RunLog:
    """Keeps run.json over all runs of a sweep's command."""

    def __init__(self, out: Path, find_capacity: Callable[[], int]) -> None:
        """Go on with the record of earlier runs, or begin one."""
        self._path = out / "run.json"
        if self._path.is_file():
            try:
                self._record = parse_strictly(RunRecord, read_small(self._path))
            except Malformed as error:
                raise _damaged(self._path, error) from None
        else:
            self._record = RunRecord(capacity=find_capacity(), seconds=0.0)
        self.capacity = self._record.capacity
        self._began = time.monotonic() - self._record.seconds
        self.save()

    @property
    def seconds(self) -> float:
        """Wall seconds of all runs, each up to when it was last saved."""
        return time.monotonic() - self._began

    def save(self) -> None:
        self._record.seconds = self.seconds
        write_atomically(self._path, self._record.model_dump_json(indent=2).encode())
