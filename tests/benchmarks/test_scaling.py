"""The table of docs/scaling.md is the one that its command prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_documented_table_is_the_printed_one() -> None:
    command = [sys.executable, "-m", "benchmarks.scaling"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout
    assert done.stdout in (ROOT / "docs" / "scaling.md").read_text()
