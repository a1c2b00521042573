"""A sweep on several processes, and what is left of it when they are killed."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from vidfill.sampling.sweep.run import sweep
from vidfill.sampling.sweep.settings import SweepConfig
from vidfill.seeding import derive_seed

pytestmark = pytest.mark.slow

# What a process runs: forked from a server that has imported everything, and computed nothing.
PROCESS = """
import os, sys
os.environ.update(environment)
descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(descriptor, 2)
import torch
torch.set_num_threads(1)
from vidfill.sampling.sweep.run import main
sys.exit(main(arguments))
"""
MIXED = "ddim:2 ddpm:8+resample(n=1) ddim:8+jump(length=2,times=3) dpmpp:5 heun:3 ddim:6+inject"


def start(config: SweepConfig, size: int) -> list[BaseProcess]:
    """Processes that meet as a launcher's do; what they say goes to a file beside the results."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vidfill.sampling.sweep.run"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(size):
        meeting = {"WORLD_SIZE": size, "RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        names = {
            "environment": {k: str(v) for k, v in meeting.items()} | {"MASTER_PORT": str(port)},
            "arguments": arguments_for(config),
            "said": str(said_of(config)),
        }
        processes.append(context.Process(target=exec, args=(PROCESS, names)))
        processes[-1].start()
    return processes


def arguments_for(config: SweepConfig) -> list[str]:
    changed = ("schedules", "examples", "completions", "batch_size", "keep", "device")
    options = [word for name in changed for word in (f"--{name}", str(getattr(config, name)))]
    return [str(config.model), config.shards, str(config.out), *options]


def said_of(config: SweepConfig) -> Path:
    return config.out.with_name(f"{config.out.name}.said")


def end(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.fixture
def mixed(config: SweepConfig) -> SweepConfig:
    return mix(config)


def mix(config: SweepConfig) -> SweepConfig:
    return dataclasses.replace(config, schedules=MIXED, examples=2, completions=2, batch_size=0)


@pytest.fixture(scope="module")
def alone(shared_config: SweepConfig) -> Path:
    """What one process finds."""
    config = mix(shared_config)
    out = config.out.with_name("alone")
    sweep(dataclasses.replace(config, out=out))
    return out


def read_rows(path: Path) -> dict[tuple[str, ...], dict[str, float]]:
    """By what they are of, without the times."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    names = [name for name in ("schedule", "clip", "completion") if name in lines[0]]
    return {
        tuple(line[name] for name in names): {
            column: float(text)
            for column, text in line.items()
            if column not in (*names, "seconds_per_clip")
        }
        for line in lines
    }


def assert_same_results(ours: Path, theirs: Path) -> None:
    """To float32 rounding."""
    for name in ("clips.csv", "results.csv"):
        found, wanted = read_rows(ours / name), read_rows(theirs / name)
        assert found.keys() == wanted.keys()
        for key, values in wanted.items():
            assert found[key] == pytest.approx(values, rel=1e-3, nan_ok=True), key


def read_files(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_two_processes_find_what_one_finds(mixed: SweepConfig, alone: Path) -> None:
    assert end(start(mixed, 2)) == [0, 0], said_of(mixed).read_text()
    assert_same_results(mixed.out, alone)
    ours, theirs = (
        {name for name in read_files(out) if not name.startswith("tensorboard")}
        for out in (mixed.out, alone)
    )
    assert ours == theirs
    about = json.loads((mixed.out / "sweep.json").read_text())
    assert about["processes"] == 2
    assert "error" not in said_of(mixed).read_text()


def test_killed_at_random_moments_it_continues_on_another_number_of_processes(
    mixed: SweepConfig, alone: Path
) -> None:
    everything = len(read_rows(alone / "clips.csv"))
    done: set[str] = set()
    for run, size in enumerate((2, 3, 1)):
        processes = start(mixed, size)
        wanted = len(done) + 1 + derive_seed("kill", run) % (everything // 4)
        while len(found := rows_so_far(mixed.out)) < wanted:
            assert all(process.is_alive() for process in processes), said_of(mixed).read_text()
            time.sleep(0.005)
        assert done <= found
        for process in processes:
            process.kill()
        assert end(processes) == [-signal.SIGKILL] * size
        done = rows_so_far(mixed.out)
        assert not (mixed.out / "results.csv").exists()
    assert end(start(mixed, 2)) == [0, 0], said_of(mixed).read_text()
    assert done <= rows_so_far(mixed.out)
    assert_same_results(mixed.out, alone)


def rows_so_far(out: Path) -> set[str]:
    """The whole rows of all processes, as they were written."""
    lines: list[str] = []
    for path in out.glob("clips*.csv"):
        with contextlib.suppress(FileNotFoundError):  # its rows have just been gathered
            lines += path.read_text().splitlines(keepends=True)
    return {line for line in lines if line.endswith("\n") and not line.startswith("schedule,")}


def test_the_launcher_of_the_documentation_runs_a_sweep(config: SweepConfig) -> None:
    node = Path(__file__).parents[3] / "launch" / "node.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(node)]
    launch += ["--num_processes", "2", "--main_process_port", "0", "-m", "vidfill.sampling.sweep"]
    done = subprocess.run(
        [sys.executable, *launch, *arguments_for(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((config.out / "sweep.json").read_text())["processes"] == 2
    assert done.stdout.count("autoencoder") == 1  # the first process shows the table, alone


def test_a_mistake_on_two_processes_is_said_once_and_ends_both(config: SweepConfig) -> None:
    wrong = dataclasses.replace(config, schedules="ddim:41")
    assert end(start(wrong, 2)) == [2, 2]
    assert said_of(wrong).read_text().count("give at most 40") == 1
    assert not wrong.out.exists()
