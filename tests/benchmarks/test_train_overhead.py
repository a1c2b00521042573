"""The training loop's benchmark at its smallest: its parts add up, on one process and on two."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import train_overhead

ROOT = Path(__file__).parents[2]
SMALLEST = shlex.split("--rounds 1 --steps 10 --processes 2 --latent 4")
NETWORK = shlex.split(
    "--model.block_out_channels [16,32] --model.head_channels 8 --model.norm_groups 8 "
    "--batch_size 2"
)
DOCUMENTED = re.findall(
    r"^ {4}python -m benchmarks\.train_overhead([^\n]*?)(?: -- .*)?$",
    (ROOT / "docs" / "benchmarks.md").read_text(),
    flags=re.MULTILINE,
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.train_overhead", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.slow
def test_a_step_is_the_bare_loops_and_its_parts(tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    words = [*shlex.split(" ".join(DOCUMENTED)), *SMALLEST, "--json", str(written), "--", *NETWORK]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    found = json.loads(written.read_text())
    runs = found["runs"]
    assert set(runs) == {"1", "2"}
    for row in runs.values():
        assert row["overhead"][0] == pytest.approx(row["vidfill"][0] / row["bare"][0] - 1)
        assert 0 < row["data_wait"][0] < 1
        assert row["checkpoint_stall"][0] > 0
    ours, bare = runs["1"]["vidfill"][0], runs["1"]["bare"][0]
    parts = {name: part["seconds"][0] for name, part in found["parts"].items()}
    beyond, together = parts.popitem()[1], parts.popitem()[1]
    assert {"data", "draws", "averages", "logging", "checkpoint"} < parts.keys()
    assert min(parts.values()) > 0
    assert together == pytest.approx(sum(parts.values()))
    assert together < ours
    assert bare + together + beyond == pytest.approx(ours)
    efficiency = found["efficiency"]
    assert efficiency["bare"][0] == pytest.approx(bare / runs["2"]["bare"][0])
    assert efficiency["ratio"][0] == pytest.approx(efficiency["vidfill"][0] / efficiency["bare"][0])
    for said in ("| averages |", "plain DDP", "2 clip(s) per process", "torch 2.", *SMALLEST):
        assert said in done.stdout


def test_missing_shards_are_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_overhead.main(["--shards", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "none" in said
