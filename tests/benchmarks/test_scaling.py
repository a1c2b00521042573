"""The table of docs/scaling.md is what its command prints: one column, since each takes a while."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import scaling

ROOT = Path(__file__).parents[2]


def column_of(table: str, name: str) -> list[tuple[str, str]]:
    """The rows of a Markdown table in one column, with their names."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    header = next(row for row in rows if name in row)
    place = header.index(name) - len(header)
    return [(row[0], row[place]) for row in rows if len(row) == len(header) + 1]


@pytest.mark.slow
def test_the_documented_table_is_the_printed_one(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main(["--nodes", "16"])
    printed = column_of(capsys.readouterr().out, "16 nodes")
    assert len(printed) > 10
    documented = column_of((ROOT / "docs" / "scaling.md").read_text(), "16 nodes")
    assert set(printed) <= set(documented)
