"""The launcher in a node's script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SLEEPER = """
import signal, sys, time
def save(number, frame):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_launcher_that_a_signal_ends_says_so_in_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    words = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    words += ["--mixed_precision", "no"]
    command = [sys.executable, "-m", "vidfill.launch.start", *words, "--dynamo_backend", "no"]
    with subprocess.Popen(
        [*command, "--main_process_port", "0", "-m", "sleeper"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as launcher:
        assert launcher.stdout
        ready = 0
        while ready < 2:
            line = launcher.stdout.readline()
            assert line, "the launcher ended"
            ready += line == "ready\n"
        launcher.send_signal(signal.SIGTERM)
        said = launcher.stdout.read()
    assert launcher.returncode == 143
    assert said.count("saved") == 2
    assert "Traceback" not in said
    assert said.splitlines()[-1].endswith("were ended by SIGTERM")
