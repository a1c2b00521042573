"""Encoding on several processes, killed or not, is encoding on one."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from vidfill.data import videos
from vidfill.data.shards.reading import ShardedDataset
from vidfill.data.storage.names import shard_name
from vidfill.seeding import derive_seed

ROOT = Path(__file__).parents[3]
FRAMES, SIDE = 4, 32
KILLS = 20

# What a process runs: forked from a server that has imported everything, and computed nothing.
PROCESS = """
import os, sys
os.environ.update(environment)
descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(descriptor, 2)
import torch
torch.set_num_threads(1)
from vidfill.data.encode.run import main
sys.exit(main(arguments))
"""

pytestmark = pytest.mark.slow

Start = Callable[..., list[BaseProcess]]


def draw(*parts: str | int) -> float:
    return derive_seed(*parts) / 2**63


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, autoencoder: str) -> Path:
    """Videos of one to three clips, and a tiny random autoencoder."""
    root = tmp_path_factory.mktemp("encode")
    for split, count in (("train", 24), ("val", 6)):
        for number in range(count):
            frames = FRAMES * (1 + number % 3)
            blocks = np.random.default_rng(number).integers(0, 256, (frames, 4, 4, 3), np.uint8)
            pixels = blocks.repeat(SIDE // 4, axis=1).repeat(SIDE // 4, axis=2)
            videos.write_video(root / "videos" / split / f"{split}{number:02}.mp4", pixels, 12.5)
    shutil.copytree(autoencoder, root / "autoencoder")
    return root


def arguments_for(folder: Path, out: Path, *more: str, videos: Path | None = None) -> list[str]:
    settings = {
        "autoencoder": folder / "autoencoder",
        "frames": FRAMES,
        "masks": "stationary variable infilling",
        "masks_per_clip": 2,
        "shard_megabytes": 0.06,
        "pixels": "none",
        "batch_size": 10,
        "device": "cpu",
    }
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [str(videos or folder / "videos"), str(out), *options, *more]


def start(arguments: list[str], size: int, said: Path) -> list[BaseProcess]:
    """Processes that meet as a launcher's do; what they say goes to the file `said`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vidfill.data.encode.run"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(size):
        names = {
            "environment": {**meeting, "RANK": str(rank)},
            "arguments": arguments,
            "said": str(said),
        }
        processes.append(context.Process(target=exec, args=(PROCESS, names)))
        processes[-1].start()
    return processes


def end(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def succeed(arguments: list[str], size: int, said: Path) -> None:
    assert end(start(arguments, size, said)) == [0] * size, said.read_text()


def read_bytes(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def read_shards(out: Path) -> dict[str, bytes]:
    """Everything but job.json, which names the folders."""
    return {name: content for name, content in read_bytes(out).items() if name != "job.json"}


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, bytes]:
    """What one process, undisturbed, writes."""
    out = folder / "alone"
    succeed(arguments_for(folder, out), 1, folder / "said")
    written = read_shards(out)
    assert len([name for name in written if name.endswith(".tar")]) >= 12
    assert {"plan.json", "train/manifest.json", "validation/skipped.jsonl"} <= written.keys()
    return written


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(
    folder: Path, alone: dict[str, bytes], tmp_path: Path, size: int
) -> None:
    arguments = arguments_for(folder, tmp_path / "out")
    succeed(arguments, size, tmp_path / "said")
    assert read_shards(tmp_path / "out") == alone
    said = (tmp_path / "said").read_text()
    assert f"on {size} process(es)" in said.splitlines()[-1]
    clips = len(ShardedDataset(tmp_path / "out", "train")) // 2
    clips += len(ShardedDataset(tmp_path / "out", "validation")) // 2
    assert f"encode: {clips}/{clips} clips" in said


def test_the_documented_launcher_writes_the_same_bytes(
    folder: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch/node.yaml")]
    launch += ["--num_processes", "2", "--main_process_port", "0", "-m", "vidfill.data.encode"]
    done = subprocess.run(
        [sys.executable, *launch, *arguments_for(folder, tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert read_shards(tmp_path / "out") == alone
    assert "on 2 process(es)" in done.stderr


def test_killed_at_random_moments_and_resumed_it_ends_with_the_undisturbed_bytes(
    folder: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    arguments = arguments_for(folder, tmp_path / "out")
    began = time.monotonic()
    succeed(arguments, 2, tmp_path / "said")
    undisturbed = time.monotonic() - began
    shutil.rmtree(tmp_path / "out")
    seen, runs = [], 0
    while len(seen) < KILLS:
        processes = start(arguments, 2, tmp_path / "said")
        wait_for(processes, undisturbed * draw("kill", runs) if runs else 0)  # first at once
        runs += 1
        for process in processes:
            process.kill()
        statuses = end(processes)
        if -9 in statuses:
            seen.append(describe(tmp_path / "out"))
        else:
            assert statuses == [0, 0], (tmp_path / "said").read_text()
            assert read_shards(tmp_path / "out") == alone
            shutil.rmtree(tmp_path / "out")
    succeed(arguments, 2, tmp_path / "said")
    assert read_shards(tmp_path / "out") == alone
    # Kills hit before the plan, between many different shards, and in the middle of one.
    assert len({finished for finished, _ in seen}) >= 4, seen
    assert {partial for _, partial in seen} == {True, False}, seen


def wait_for(processes: list[BaseProcess], seconds: float) -> None:
    ends = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, ends - time.monotonic()))


def describe(out: Path) -> tuple[int, bool]:
    """How many shards are finished, and whether something is half written."""
    finished = len(list(out.rglob("shard-*.index.json")))
    return finished, any(path.name.startswith(".partial-") for path in out.rglob("*"))


@pytest.mark.parametrize("killed", [0, 1])
def test_one_killed_process_leaves_a_job_that_the_same_command_ends(
    folder: Path, alone: dict[str, bytes], tmp_path: Path, killed: int
) -> None:
    arguments = arguments_for(folder, tmp_path / "out")
    processes = start(arguments, 2, tmp_path / "said")
    while not list((tmp_path / "out").rglob("shard-*.index.json")):
        time.sleep(0.01)
    processes[killed].kill()
    if killed == 1:
        # The first waits for what the other had begun, or for its leave; a launcher ends it.
        processes[1].join()
        processes[0].join(1.0)
        processes[0].terminate()
    # Without the first there is no queue: the other ends by itself, in one line.
    assert end(processes) == ([143, -9] if killed else [-9, 2])
    assert killed or "the same command continues" in (tmp_path / "said").read_text()
    succeed(arguments, 2, tmp_path / "said")
    assert read_shards(tmp_path / "out") == alone


def test_a_job_goes_on_with_another_number_of_processes(
    folder: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = arguments_for(folder, out)
    for size in (3, 1, 2):
        succeed(arguments, size, tmp_path / "said")
        assert read_shards(out) == alone
        for number in range(size, 9, 2):
            (out / "train" / shard_name(number)).unlink()
    succeed(arguments, 2, tmp_path / "said")
    assert read_shards(out) == alone


def test_skipped_videos_are_counted_over_all_processes(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    spoiled = Path(shutil.copytree(folder / "videos", tmp_path / "videos"))
    names = ["train/train05.mp4", "train/train17.mp4", "val/val03.mp4"]
    for name in names:
        damage(spoiled / name)
    out, said = tmp_path / "out", tmp_path / "said"
    arguments = arguments_for(folder, out, videos=spoiled)
    assert end(start([*arguments, "--max_skipped", "2"], 2, said)) == [2, 2]
    (line,) = [line for line in said.read_text().splitlines() if "error" in line]
    assert "vidfill encode: error: " in line
    assert line.endswith("3 unusable, --max_skipped is 2): replace it, or give --max_skipped 3")
    assert any(name in line for name in names)
    assert not list(out.rglob("manifest.json"))
    assert not list(out.rglob(".partial-*"))
    succeed([*arguments, "--max_skipped", "3"], 2, said)
    listed = [
        json.loads(line)["source"]
        for split in ("train", "validation")
        for line in (out / split / "skipped.jsonl").read_text().splitlines()
    ]
    assert listed == names
    assert f"3 video(s) gave no clip, as {'skipped.jsonl'} tells" in said.read_text()
    again = arguments_for(folder, tmp_path / "again", "--max_skipped", "3", videos=spoiled)
    succeed(again, 1, said)
    assert read_shards(tmp_path / "again") == read_shards(out)


def test_a_wrong_setting_is_said_once_by_all_processes(folder: Path, tmp_path: Path) -> None:
    arguments = arguments_for(folder, tmp_path / "out", "--fill", "red")
    assert end(start(arguments, 3, tmp_path / "said")) == [2, 2, 2]
    said = (tmp_path / "said").read_text()
    assert said.count("\n") == 1
    assert "vidfill encode: error: fill is 'red': give \"median\" or R,G,B, each 0 to 255" in said
