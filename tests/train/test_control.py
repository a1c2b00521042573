"""All processes of a run end before the same step, whoever was told to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from vidfill.errors import BadInputEverywhere
from vidfill.train.config import MARKER
from vidfill.train.control import SIGNALS, Control, StoppedBySignal

# Steps of 10 ms in which no process finishes before all have come to it, as in training; process 1
# is told to end when it has begun its fourth step, in the way that the first argument names.
WORKER = """
import os, signal, sys, time
from pathlib import Path
import torch
from torch import distributed
from vidfill.jobs import BadInput, BadInputEverywhere
from vidfill.train.control import Control

distributed.init_process_group("gloo")
rank = distributed.get_rank()
failure = None
with Control(Path(sys.argv[2]), rank, 2) as control:
    for step in range(1000):
        try:
            reason = control.stop(step, failure)
        except BadInputEverywhere as error:
            print(rank, step, error, flush=True)
            break
        if reason:
            control.leave_marker(step, reason)
            print(rank, step, reason.name, flush=True)
            break
        if rank == 1 and step == 3:
            if sys.argv[1] == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
            else:
                failure = BadInput("the disk is full")
        time.sleep(0.01 * (1 + rank))
        distributed.all_reduce(torch.ones(1))
distributed.destroy_process_group()
"""


def run_two(tmp_path: Path, way: str) -> list[str]:
    """Start the worker twice; return the lines that both printed."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"),
            *("2", str(script), way, str(tmp_path)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return sorted(done.stdout.splitlines())


@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_before_the_same_step(tmp_path: Path) -> None:
    assert run_two(tmp_path, "signal") == ["0 5 SIGUSR1", "1 5 SIGUSR1"]
    marker = json.loads((tmp_path / MARKER).read_text())
    assert (marker["step"], marker["reason"]) == (5, "SIGUSR1")


@pytest.mark.slow
def test_a_failure_of_one_process_is_raised_by_both_before_the_same_step(tmp_path: Path) -> None:
    assert run_two(tmp_path, "failure") == ["0 5 the disk is full", "1 5 the disk is full"]
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_alone_a_signal_ends_the_run_before_the_next_step(
    number: signal.Signals, tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    with Control(tmp_path, rank=0, size=1) as control:
        assert control.stop(7) is None
        os.kill(os.getpid(), number)
        assert control.stop(8) == number
        control.leave_marker(8, number)
    assert signal.getsignal(number) == before
    assert json.loads((tmp_path / MARKER).read_text())["step"] == 8


def test_a_hang_up_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with Control(tmp_path, rank=0, size=1) as control:
        os.kill(os.getpid(), signal.SIGHUP)
        assert control.stop(1) is None
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_a_second_interrupt_does_not_wait_for_the_step(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Control(tmp_path, rank=0, size=1):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_the_marker_of_the_last_life_is_gone_once_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text("{}")
    with Control(tmp_path, rank=0, size=1) as control:
        assert control.stop(0) is None
    assert not (tmp_path / MARKER).exists()


def test_alone_a_failure_is_raised_at_once(tmp_path: Path) -> None:
    with Control(tmp_path, rank=0, size=1) as control, pytest.raises(BadInputEverywhere) as raised:
        control.stop(3, OSError(28, "No space left on device", "/runs/weights"))
    assert str(raised.value) == "/runs/weights: No space left on device"


def test_the_exit_status_is_the_shells_for_a_signal() -> None:
    assert StoppedBySignal(signal.SIGTERM).code == 143
