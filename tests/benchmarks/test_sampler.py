"""The sampler's benchmark at its smallest: its counts are known, and its ratios add up."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sampler

ROOT = Path(__file__).parents[2]
SMALLEST = shlex.split(
    "--rounds 1 --clips 2 --capacity 3 --batch 2 --frames 2 --latent 2 "
    "--schedules 'ddpm:2+resample(n=2) ddim:5 dpmpp:4'"
)
OURS, THEIRS = "vidfill, all schedules in one batch", "diffusers, schedule by schedule"
DOCUMENTED = re.findall(
    r"^ {4}(?:OMP_NUM_THREADS=1 )?python -m benchmarks\.sampler(.*)$",
    (ROOT / "docs" / "benchmarks.md").read_text(),
    flags=re.MULTILINE,
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.sampler", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("options", DOCUMENTED)
def test_both_ways_do_the_same_evaluations_and_their_ratios_add_up(options: str) -> None:
    done = run(*shlex.split(options), *SMALLEST)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "|" in line]
    rows = {cells[0]: cells[1:] for cells in lines}
    # 6 + 5 + 4 evaluations for each of 2 clips; 3 slots are all full in every call.
    assert rows[OURS][:3] == ["30", "10", "3.0"]
    assert rows[THEIRS][:3] == ["30", "15", "2.0"]
    assert "the limit is 10.0 full calls, the longest trajectory 6" in done.stdout
    of_limit = {way: median(rows[way][4]) for way in (OURS, THEIRS)}
    of_calls = {way: median(rows[way][5]) for way in (OURS, THEIRS)}
    for way in (OURS, THEIRS):
        beside = median(rows[way][6]) / 100
        assert of_limit[way] == pytest.approx(of_calls[way] * (1 + beside), rel=0.005)
    heads = [cells[0] for cells in lines]
    whole, calls, beside = map(median, lines[heads.index("diffusers' time / ours") + 2])
    assert whole == pytest.approx(of_limit[THEIRS] / of_limit[OURS], rel=0.005)
    assert calls == pytest.approx(of_calls[THEIRS] / of_calls[OURS], rel=0.005)
    assert whole == pytest.approx(calls * beside, rel=0.005)
    assert rows["clips per call"] == ["1", "2", "3"]
    assert rows["time per clip / in a full call"][-1] == "1.00 (1.00–1.00)"
    for said in ("diffusers 0.", "torch 2.", "thread(s)", shlex.join(SMALLEST)):
        assert said in done.stdout


def median(cell: str) -> float:
    return float(re.split(r"[ %]", cell)[0])


def test_one_long_trajectory_is_a_limit_that_more_slots_do_not_lower() -> None:
    words = shlex.split("--clips 1 --capacity 4 --schedules 'ddim:5 ddim:2 dpmpp:4'")
    workload = sampler.make_workload(sampler.parse_options([*SMALLEST, *words]))
    assert max(workload.nfes) == workload.calls_at_least == 5


def test_a_schedule_that_diffusers_cannot_follow_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sampler.main(["--schedules", "ddim:50 ddim:30"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "schedules has ddim:30;" in said
