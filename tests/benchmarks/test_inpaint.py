from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux to read a peak of memory")
def test_a_longer_video_takes_no_more_memory() -> None:
    command = [sys.executable, "-m", "benchmarks.inpaint", "--frames", "60", "240", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    short, long = json.loads(done.stdout)
    assert (short["frames"], long["frames"]) == (60, 240)
    assert long["peak_bytes"] < 1.05 * short["peak_bytes"]
    assert 0 < long["network_share"] < 1
