"""Two jobs at once in one place; docs/faults.md has the command for more of them than CI runs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PAIRS = int(os.environ.get("VIDFILL_PAIRS", "5"))

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

    def __init__(self, root: Path, model: Path, process: subprocess.Popen[str]) -> None:
        self.root, self.model, self._process = root, model, process
        for name in "ab":
            (root / "videos" / name).mkdir(parents=True)
            values = np.random.default_rng(ord(name)).integers(0, 256, (6, 16, 16, 3), np.uint8)
            for index, frame in enumerate(values):
                Image.fromarray(frame).save(root / "videos" / name / f"{index}.png")
        self._alone: dict[tuple[str, int], dict[str, bytes]] = {}
        assert self.run(["encode"], [0], root / "shards") == [0]

    def words(self, kind: str, seed: int, out: Path) -> list[str]:
        """What follows the verb."""
        videos, shards = str(self.root / "videos"), str(self.root / "shards")
        vae, model = str(self.model.parent / "autoencoder"), str(self.model)
        words = {
            "synth": f"{out} --clips 2 --validation 1 --size 16 --frames 3",
            "encode": f"{videos} {out} --autoencoder {vae} --frames 3 --pixels all "
            "--shard_megabytes 0.03 --device cpu",
            "inpaint": f"{videos}/a --mask 4,4,8,8 --out {out} --model {model} --schedule ddim:2 "
            "--device cpu",
            "sweep": f"{model} {shards} {out} --schedules ddim:1 --examples 2 --split train "
            "--batch_size 1 --device cpu",
            "recipe": f"{videos} {out} --sizes [16] --frames_per_video 2 --width 8 --steps 3 "
            "--encoder_blocks [0,1,1,1] --decoder_blocks [1,1,1,0] --batch 2 --device cpu",
        }
        return [*words[kind].split(), "--seed", str(seed)]

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
def place(tmp_path_factory: pytest.TempPathFactory, model_on_disk: Path) -> Iterator[Place]:
    command = [sys.executable, "-c", FORK]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes) as process:  # type: ignore[call-overload]
        yield Place(tmp_path_factory.mktemp("pairs"), model_on_disk, process)
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
