from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux to read a peak of memory")
def test_the_reference_holds_its_scores_and_the_fused_backend_does_not() -> None:
    """2048 tokens of 4 heads: scores of 64 MiB, held at least twice on the way back."""
    command = [sys.executable, "-m", "benchmarks.attention_memory", "--tokens", "2048"]
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["score_bytes"] == 64 * 2**20
    fused, reference = (found["backends"][name] for name in ("sdpa", "reference"))
    assert reference["training"] > 2 * found["score_bytes"]
    assert 0 < fused["training"] < found["score_bytes"] / 2
    assert found["backends"]["xformers"] is None  # the tests' machines have no GPU
