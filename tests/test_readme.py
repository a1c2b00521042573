"""The commands of README.md run in their order, in an empty folder, on a machine without a GPU."""

from __future__ import annotations

import re
import shlex
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest
from vidfill import cli

ROOT = Path(__file__).parents[1]

# A block that is not run here, by its first command, and what it needs.
ELSEWHERE = {
    "pip install -c constraints.txt -e .": "a package registry",
    "make dist": "Docker or Apptainer",
    'vidfill launch "train large/shards large/run" --gpus_per_node 8 --out node': "a node of GPUs",
    'vidfill launch "train large/shards base --config base" --nodes 4 --gpus_per_node 8': "Slurm",
    "vidfill train large/shards base --config base --plan --plan_gpus 32": "the cluster's shards",
    "vidfill encode CLEVRER paper/shards --size 256": "CLEVRER, and GPUs for days",
}
PROGRAMS = ("make", "vidfill", ".venv/bin/vidfill", "pip", "accelerate")
# What follows a command of the README here, so that it takes seconds.
SMALLER = {
    "demo": "--clips 2 --validation 1 --steps 2 --schedules ddim:2",
    "synth": "--clips 2 --validation 1",
    "train": "--steps 2 --batch_size 1",
    "sweep": "--examples 1 --keep 1 --batch_size 1",
    "inpaint": "--schedule ddim:2",
}


def blocks() -> list[str]:
    """The indented blocks of the page, without their comments at the ends of lines."""
    found = re.findall(r"\n\n((?: {4}.*\n|\n(?= {4}))+)", (ROOT / "README.md").read_text())
    return [re.sub(r" +# .*", "", textwrap.dedent(block)) for block in found]


def command_blocks() -> list[list[str]]:
    """The commands of each block that has any, a continued line joined."""
    lines = [block.replace("\\\n", " ").splitlines() for block in blocks()]
    lines = [[" ".join(line.split()) for line in block if line] for block in lines]
    return [block for block in lines if block[0].split()[0] in PROGRAMS]


def test_every_command_block_runs_here_or_says_what_it_needs() -> None:
    first = [block[0] for block in command_blocks()]
    assert len(set(first)) == len(first)
    assert set(ELSEWHERE) < set(first), "ELSEWHERE names blocks that the page no longer has"


def test_a_mask_of_the_page_lies_within_the_videos_that_stand_for_the_readers_own() -> None:
    masks = re.findall(r"--mask ([\d,]+)", (ROOT / "README.md").read_text())
    for left, top, width, height in (map(int, mask.split(",")) for mask in masks):
        assert left + width <= 128 and top + height <= 128


@pytest.mark.slow
def test_the_commands_run_from_start_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = ["--clips", "1", "--validation", "0", "--size", "128", "--frames", "20"]
    assert cli.main(["synth", "own", *own]) == 0
    for name in ("VIDEO", "holiday.mp4"):
        shutil.copy(next(Path("own").rglob("*.mp4")), name)
    for block in command_blocks():
        if block[0] not in ELSEWHERE:
            for command in block:
                run(command)
    assert Path("sweep/report/index.html").is_file()
    (python,) = (block for block in blocks() if block.startswith("from vidfill"))
    mask = np.zeros((20, 128, 128), np.uint8)
    mask[:, 30:78, 40:104] = 1
    names = {"video": np.zeros((20, 128, 128, 3), np.uint8), "mask": mask}
    exec(python.replace("ddpm:10", "ddpm:2"), names)
    assert len(names["frames"]) == 20


def run(command: str) -> None:
    """Run a command of the page, as a smaller one of the same verb."""
    words = shlex.split(command)
    if words[0] == "make":
        made = re.search(rf"^{words[1]}:.*\n\t(.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert made, command
        words = shlex.split(made[1])
    if Path(words[0]).name == "vidfill":  # else these very tests
        small = [re.sub(r"\b(ddim|ddpm):\d+", r"\1:2", word) for word in words[1:]]
        assert cli.main([*small, *SMALLER.get(words[1], "").split()]) == 0, command
