"""kill -9 and a full disk happen to real runs, started by the command that a person types."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from vidfill.modeling.run_folder import newest_first, verify
from vidfill.train.loop import main

pytestmark = pytest.mark.slow

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


def start(
    shards: Path, out: Path, launcher: list[str], *options: str
) -> subprocess.CompletedProcess[str]:
    """The run's command, to its end."""
    return subprocess.run(
        [sys.executable, *launcher, "-m", "vidfill.train", str(shards), str(out), *TINY, *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def begin(shards: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """The run's command, once it is about to take its first step."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vidfill.train", str(shards), str(out), *TINY, *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    for line in process.stderr:
        if "on 1 process(es)" in line:
            return process
    raise AssertionError(f"the run ended with {process.wait()}")


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


def test_a_folder_has_one_run_at_a_time_and_who_waits_takes_over(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a run that is halted, one of two processes gives up; another outwaits its end."""
    run = tmp_path / "run"
    with begin(shards, run, "--steps", "1000000") as lives:

        def end() -> None:
            lives.send_signal(signal.SIGTERM)
            lives.send_signal(signal.SIGCONT)

        timer = threading.Timer(5, end)
        try:
            lives.send_signal(signal.SIGSTOP)
            gives_up = start(shards, run, LAUNCHER, "--timeout", "0.5")  # minutes
            timer.start()
            assert main([str(shards), str(run), *TINY]) == 0
            _, last_words = lives.communicate(timeout=100)
        finally:
            timer.cancel()
            lives.kill()
    refusal = f"vidfill train: error: another job writes into {run}: let it end first"
    assert gives_up.returncode != 0
    assert [line for line in gives_up.stderr.splitlines() if "error:" in line] == [refusal]
    (saved,) = re.findall(r"stopped by SIGTERM after step (\d+)", last_words)
    said = capsys.readouterr().err
    assert f"another job writes into {run}: waiting 120 s for it" in said
    assert f"step {saved} of 12" in said
    assert not (run / "job.lock").exists()


def test_a_full_disk_under_one_process_ends_all_alike(shards: Path, disk: Path) -> None:
    stop_for_lack_of_room(shards, disk / "run", LAUNCHER)
