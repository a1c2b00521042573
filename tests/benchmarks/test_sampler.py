from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALLEST = ["--rounds", "1", "--clips", "2", "--capacity", "3", "--frames", "2", "--latent", "2"]
DOCUMENTED = re.findall(
    r"^ {4}python -m benchmarks\.sampler(.*)$",
    (ROOT / "docs" / "benchmarks.md").read_text(),
    flags=re.MULTILINE,
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.sampler", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("options", DOCUMENTED)
def test_every_way_does_the_same_evaluations_and_stands_beside_the_limit(options: str) -> None:
    done = run(*shlex.split(options), *SMALLEST)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "|" in line]
    rows = {cells[0]: cells[1:] for cells in lines[2:]}
    assert {name: row[:2] for name, row in rows.items()} == {
        "vidfill, all schedules in one batch": ["180", "60"],
        "diffusers, schedule by schedule": ["180", "90"],
        "diffusers, clip by clip": ["180", "180"],
        "network alone": ["180", "60"],
    }
    assert rows["network alone"][-1] == "1.00 (1.00–1.00)"
    for said in ("diffusers 0.", "torch 2.", "thread(s)", " ".join(SMALLEST)):
        assert said in done.stdout


def test_a_wrong_size_is_refused_in_one_line() -> None:
    done = run("--width", "24")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "block_out_channels has 24" in done.stderr
