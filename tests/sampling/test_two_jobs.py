"""Two jobs at once in one place; docs/faults.md has the command for more of them than CI runs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PAIRS = int(os.environ.get("VIDFILL_PAIRS", "5"))

Words = Callable[[str, int, Path], list[str]]  # of the fixture `words_of`

KINDS = {
    "synth": "data.synth.run",
    "encode": "data.encode.run",
    "inpaint": "sampling.inpaint.run",
    "sweep": "sampling.sweep.run",
    "recipe": "train.autoencoder",
}
# It has everything imported, and becomes each of the jobs that a line names: module, words, delay
# in seconds, log.
FORK = f"""
import importlib, json, os, sys, time
mains = {{name: importlib.import_module("vidfill." + name).main for name in {[*KINDS.values()]}}}
for line in sys.stdin:
    children = []
    for module, words, delay, log in json.loads(line):
        if not (child := os.fork()):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            time.sleep(delay)
            status = 1
            try:
                status = mains[module](words)
            finally:
                sys.stdout.flush()
                os._exit(status)
        children.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(ended), flush=True)
"""


class Place:
    """Where pairs of jobs run, and what each job makes alone."""

    def __init__(self, root: Path, words: Words, process: subprocess.Popen[str]) -> None:
        self.root, self.words, self._process = root, words, process
        self._alone: dict[tuple[str, int], dict[str, bytes]] = {}

    def run(
        self, kinds: list[str], seeds: list[int], out: Path, delays: tuple[float, ...] = (0.0, 0.0)
    ) -> list[int]:
        """The exit statuses of jobs at once; none has a traceback."""
        logs = [str(self.root / f"{number}.log") for number in range(len(kinds))]
        jobs = [
            (KINDS[kind], self.words(kind, seed, out), delay, log)
            for kind, seed, delay, log in zip(kinds, seeds, delays, logs, strict=False)
        ]
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        statuses = json.loads(self._process.stdout.readline())
        for status, log in zip(statuses, logs, strict=False):
            said = Path(log).read_text()
            assert status in (0, 2), said
            assert "Traceback" not in said
            assert status == 0 or ": error: " in said.splitlines()[-1]
        return statuses

    def alone(self, kind: str, seed: int) -> dict[str, bytes]:
        if (kind, seed) not in self._alone:
            out = self.root / f"{kind} alone {seed}".replace(" ", "-")
            assert self.run([kind], [seed], out) == [0]
            self._alone[kind, seed] = read(out)
            assert self._alone[kind, seed]
        return self._alone[kind, seed]


def read(out: Path) -> dict[str, bytes]:
    """All that a job made, but for records with a place, a time or a duration."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    kept = [path for path in files if path.suffix in (".png", ".tar", ".mp4", ".safetensors")]
    return {str(path.relative_to(out)): path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, words_of: Words) -> Iterator[Place]:
    command = [sys.executable, "-c", FORK]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes) as process:  # type: ignore[call-overload]
        yield Place(tmp_path_factory.mktemp("pairs"), words_of, process)
        process.stdin.close()


@pytest.mark.slow
def test_of_two_jobs_in_one_place_one_works_and_the_place_is_what_it_makes_alone(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: Counter[str] = Counter()
    for number in range(PAIRS):
        draw = random.Random(number)
        kind = [*KINDS][number % len(KINDS)]
        seeds = [1, draw.choice([1, 2])]
        out = place.root / f"pair{number}"
        delays = (0.0, draw.choice([0.0, draw.uniform(0, 0.3), draw.uniform(0, 2)]))
        statuses = place.run([kind, kind], seeds, out, delays)
        assert 0 in statuses
        finished = {seed for seed, status in zip(seeds, statuses, strict=True) if status == 0}
        assert len(finished) == 1, (kind, seeds, delays)
        assert read(out) == place.alone(kind, finished.pop()), (kind, seeds, delays)
        equal = "equal" if seeds[0] == seeds[1] else "different"
        ended[f"{kind}, {equal} commands: {statuses.count(2)} refused"] += 1
    with capsys.disabled():
        if len(KINDS) < PAIRS:
            print(*(f"{count} x {what}" for what, count in sorted(ended.items())), sep="\n")
