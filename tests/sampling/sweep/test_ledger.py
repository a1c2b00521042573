from __future__ import annotations

import time
from pathlib import Path

from vidfill.sampling.sweep.ledger import Ledger, RunLog
from vidfill.sampling.sweep.results import CompletionRow

COLUMNS = ["schedule", "clip", "completion", "nfe", "psnr"]


def row(example: str, completion: int, psnr: float = 1.0) -> CompletionRow:
    own = {"clip": example, "completion": completion, "psnr": psnr}
    return CompletionRow.model_validate({"schedule": "ddim:2", "nfe": 2, **own})


def test_seconds_add_up_over_the_runs_of_a_sweep_and_the_batch_stays(tmp_path: Path) -> None:
    first = RunLog(tmp_path, lambda: 7)
    time.sleep(0.02)
    first.save()
    again = RunLog(tmp_path, lambda: 9)
    assert again.seconds > 0.02
    assert again.capacity == 7


def test_a_ledger_reads_the_rows_of_all_processes_but_no_part_of_one(tmp_path: Path) -> None:
    rows = [row("a", 0), row("a", 1), row("b", 0)]
    for process, one in enumerate(rows[:2]):
        Ledger(tmp_path, COLUMNS, process).add(one)
    with (tmp_path / "clips-1.csv").open("ab") as file:
        file.write(b"ddim:2,torn")
    ledger = Ledger(tmp_path, COLUMNS)
    ledger.read()
    ledger.gather()
    ledger.add(rows[2])
    again = Ledger(tmp_path, COLUMNS)
    again.read()
    assert list(again.rows.values()) == rows
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["clips-0.csv", "clips.csv", "clips.parquet"]


def test_a_row_just_added_equals_the_row_that_is_read(tmp_path: Path) -> None:
    ledger, again = Ledger(tmp_path, COLUMNS), Ledger(tmp_path, COLUMNS)
    ledger.add(row("a", 0, psnr=1 / 3))
    again.read()
    assert again.rows == ledger.rows
