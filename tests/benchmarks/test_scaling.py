"""The table of docs/scaling.md is the one that its command prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import scaling

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_documented_table_is_the_printed_one(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main([])
    printed = capsys.readouterr().out
    assert printed
    assert printed in (ROOT / "docs" / "scaling.md").read_text()
