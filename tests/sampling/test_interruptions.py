"""Jobs interrupted at any moment, the first second included; docs/faults.md has the counts.

VIDFILL_INTERRUPTED=200 python -m pytest tests/sampling/test_interruptions.py -m slow -s
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

TRIES = int(os.environ.get("VIDFILL_INTERRUPTED", "5"))
GRACE = 30.0  # seconds for what a job started to end

Words = Callable[[str, int, Path], list[str]]

SIGNALS = [signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]
MODULES = {
    "synth": ["vidfill", "synth"],
    "encode": ["vidfill.data.encode"],
    "verify": ["vidfill", "verify"],
    "train": ["vidfill.train"],
    "sweep": ["vidfill.sampling.sweep"],
    "inpaint": ["vidfill", "inpaint"],
}
MADE = (".png", ".tar", ".mp4", ".safetensors")  # without a place, a time or a duration


def read(out: Path) -> dict[str, bytes]:
    """What a job made, but for its records and what was left of an end by force."""
    files = [path for path in out.rglob("*") if path.suffix in MADE]
    whole = [path for path in files if ".partial-" not in str(path.relative_to(out))]
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(whole)}


def start(command: list[str], scratch: Path) -> subprocess.Popen[str]:
    """In a session of its own, as a terminal or a batch system starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def others_of(session: int) -> list[str]:
    """What is left of a session."""
    left = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                left.append((path.parent / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return left


def interrupt(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    """As a terminal does it, to all processes at once, or as `kill` does, to one."""
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    said, _ = process.communicate(timeout=120)
    ends = time.monotonic() + GRACE
    while (left := others_of(process.pid)) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not left, (number, left)
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_an_interrupted_job_says_so_in_a_line_and_goes_on_to_what_it_makes_alone(
    words_of: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for sent in SIGNALS[:-1]:  # else what is ignored here, as in the background, is ignored there
        signal.signal(sent, signal.SIG_DFL if sent != signal.SIGINT else signal.default_int_handler)
    alone: dict[str, tuple[float, dict[str, bytes]]] = {}
    ended: Counter[str] = Counter()
    scratch = tmp_path / "tmp"
    scratch.mkdir()

    def command(kind: str, out: Path) -> list[str]:
        return [*MODULES[kind], *words_of(kind, 0, out)]

    for number in range(TRIES):
        draw = random.Random(number)
        kind, sent = [*MODULES][number % len(MODULES)], draw.choice(SIGNALS)
        if kind not in alone:
            began = time.monotonic()
            process = start(command(kind, tmp_path / kind), scratch)
            said, _ = process.communicate()
            assert process.returncode == 0, said
            alone[kind] = time.monotonic() - began, read(tmp_path / kind)
            shutil.rmtree(scratch)
            scratch.mkdir()
        seconds, made = alone[kind]
        out = tmp_path / f"{kind}-{number}"
        delay = draw.choice([draw.uniform(0.05, 1), draw.uniform(0, seconds)])
        process = start(command(kind, out), scratch)
        time.sleep(delay)
        status, said = interrupt(process, sent)
        about = f"{kind} after {delay:.2f} s by {sent.name}: {status}\n{said}"
        if "<frozen site>" in said:  # Python itself was still starting, and says so its own way
            ended[f"{kind}, {sent.name} before its first line"] += 1
            continue
        assert status in (0, -sent, 128 + sent), about
        for trace in ("Traceback", "Exception ignored", "Fatal", "leaked"):
            # Python's own tracker says what a killed process has left, and removes it.
            assert trace not in said or (trace, sent) == ("leaked", signal.SIGKILL), about
        if sent != signal.SIGKILL and status != -sent:
            assert not list(scratch.iterdir()), about
        if read(out) != made or status != 0:
            again = start(command(kind, out), scratch)
            said, _ = again.communicate()
            is_finished = kind == "inpaint" and "exists" in said  # the signal came too late
            assert again.returncode == 0 or is_finished, f"{about}\nand again:\n{said}"
        assert read(out) == made, about
        ended[f"{kind}, {'finished' if status == 0 else sent.name}"] += 1
        shutil.rmtree(out, ignore_errors=True)
    with capsys.disabled():
        print("", *(f"{count} x {what}" for what, count in sorted(ended.items())), sep="\n")


@pytest.mark.slow
def test_a_job_goes_on_where_nobody_reads_what_it_says(words_of: Words, tmp_path: Path) -> None:
    out = tmp_path / "out.mkv"
    process = start(["vidfill", "inpaint", *words_of("inpaint", 0, out)], tmp_path)
    assert process.stdout
    process.stdout.close()
    assert process.wait() == 0
    assert out.exists()
