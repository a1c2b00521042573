"""kill -9 and a full disk happen to real runs, started by the command that a person types."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from vidfill.modeling.checkpoint import newest_first, verify

ROOT = Path(__file__).parents[2]
TINY = [
    *("--steps", "12", "--batch_size", "2", "--checkpoint_every", "4", "--keep_checkpoints", "1"),
    *("--model.block_out_channels", "[16,32]", "--model.head_channels", "8"),
    *("--model.norm_groups", "8", "--preview.every", "0", "--evaluation.every", "0"),
]
LAUNCHER = [
    *("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "node.yaml")),
    *("--num_processes", "2", "--main_process_port", "0"),
]


def start(shards: Path, out: Path, launcher: list[str]) -> subprocess.CompletedProcess[str]:
    """The run's command, to its end."""
    return subprocess.run(
        [sys.executable, *launcher, "-m", "vidfill.train", str(shards), str(out), *TINY],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def weights(run: Path) -> dict[str, bytes]:
    """The bytes of all weights, moments and averages of the only checkpoint."""
    (checkpoint,) = newest_first(run / "checkpoints")
    verify(checkpoint)
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {str(file.relative_to(checkpoint)): file.read_bytes() for file in files}


def test_a_run_killed_at_three_moments_loses_little_and_ends_with_the_same_bits(
    shards: Path,
) -> None:
    """kill -9 at drawn moments, twice while a checkpoint is written; `make soak` does it longer."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.soak", "--kills", "3", "--steps", "48"),
            *("--shards", str(shards)),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^\| (?:writing|training) \|", done.stdout, re.MULTILINE)) == 3
    assert "bit-identical" in done.stdout


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for one checkpoint of 3 MB and the events, but not for two."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def stop_for_lack_of_room(shards: Path, run: Path, launcher: list[str]) -> str:
    """Train until the disk is full, and then with more room; what the run said the first time."""
    stopped = start(shards, run, launcher)
    assert stopped.returncode != 0
    said = [line for line in stopped.stderr.splitlines() if "vidfill train: error" in line]
    assert len(said) == 1
    assert "the checkpoint of step 8 cannot be written" in said[0]
    assert "No space left on device" in said[0]
    assert [path.name for path in newest_first(run / "checkpoints")] == ["step-00000004"]
    verify(run / "checkpoints" / "step-00000004")
    assert not list((run / "checkpoints").glob(".*"))

    subprocess.run(["mount", "-o", "remount,size=64m", str(run.parent)], check=True)
    goes_on = start(shards, run, launcher)
    assert goes_on.returncode == 0, goes_on.stderr
    assert "step 4 of 12" in goes_on.stderr
    return stopped.stderr


def test_a_full_disk_ends_the_run_with_one_line_and_with_room_it_goes_on_to_the_same_bits(
    shards: Path, disk: Path, tmp_path: Path
) -> None:
    said = stop_for_lack_of_room(shards, disk / "run", [])
    assert "Traceback" not in said
    assert start(shards, tmp_path / "alone", []).returncode == 0
    assert weights(disk / "run") == weights(tmp_path / "alone")


def test_a_full_disk_under_one_process_ends_all_alike(shards: Path, disk: Path) -> None:
    stop_for_lack_of_room(shards, disk / "run", LAUNCHER)
