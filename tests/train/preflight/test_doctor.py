"""The doctor finds what goes wrong, says how to mend it, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from vidfill.errors import BadInput
from vidfill.train.config import DataConfig, TrainConfig
from vidfill.train.preflight.doctor import (
    Diagnosis,
    check_gpus,
    check_launcher,
    check_versions,
    doctor,
    main,
    merge,
)

ROOT = Path(__file__).parents[3]
TINY = [
    *("--batch_size", "3", "--model.block_out_channels", "[16,32]", "--model.head_channels", "8"),
    *("--model.norm_groups", "8"),
]


def levels(findings: list[Diagnosis]) -> set[str]:
    return {finding.level for finding in findings}


def test_a_run_that_would_train_is_found_good_and_not_begun(
    tiny_config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor(tiny_config)
    said = capsys.readouterr().out
    for check in ("versions", "launcher", "processes", "run's folder", "shards", "attention"):
        assert check in said
    assert "one step" in said
    assert "bad" not in said
    assert not tiny_config.out.exists()
    assert not list(tiny_config.out.parent.glob(".partial-*"))


def test_a_network_that_cannot_be_made_is_bad(
    tiny_config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = dataclasses.replace(tiny_config.model, head_channels=24)
    with pytest.raises(BadInput, match="1 of 10 checks are bad"):
        doctor(dataclasses.replace(tiny_config, model=odd))
    assert "no multiple of" in capsys.readouterr().out


def test_missing_and_damaged_shards_are_bad(
    tiny_config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadInput, match="checks are bad"):
        doctor(dataclasses.replace(tiny_config, shards=str(tmp_path / "nothing")))
    shards = shutil.copytree(tiny_config.shards, tmp_path / "shards")
    (tar,) = (shards / "train").glob("*.tar")
    tar.write_bytes(tar.read_bytes()[:-2000])
    with pytest.raises(BadInput, match="checks are bad"):
        doctor(dataclasses.replace(tiny_config, shards=str(shards), data=DataConfig()))
    assert "shard-000000.tar" in "".join(capsys.readouterr().out.split())


def test_the_command_line_is_that_of_train(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(shards), str(tmp_path / "run"), *TINY]) == 0
    assert main([str(tmp_path / "nothing"), str(tmp_path / "run"), *TINY]) == 2
    assert "checks are bad" in capsys.readouterr().err


def test_a_step_that_would_take_a_processor_long_is_not_taken(
    tiny_config: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidfill.train.preflight.doctor.STEP_LIMIT", 1e-9)
    monkeypatch.setattr("vidfill.train.preflight.doctor._take_step", None)
    doctor(tiny_config)
    said, progress = capsys.readouterr()
    assert re.search(r"one step +look +not tried: it takes about .* here", said)
    assert re.search(r"GPUs +look +there is none here", said)
    assert "timing the network on one clip" in progress


def test_tasks_of_srun_without_a_launcher_are_bad() -> None:
    (finding,) = check_launcher({"SLURM_STEP_NUM_TASKS": "8"})
    assert finding.level == "bad"
    assert "each trains alone" in finding.said


def test_deepspeeds_launcher_of_several_nodes_is_bad_unless_it_is_the_standard_one() -> None:
    nodes = {"WORLD_SIZE": "16", "SLURM_NNODES": "2", "ACCELERATE_USE_DEEPSPEED": "true"}
    assert "bad" in levels(list(check_launcher(nodes)))
    standard = nodes | {"ACCELERATE_DEEPSPEED_MULTINODE_LAUNCHER": "standard"}
    assert "bad" not in levels(list(check_launcher(standard)))


@pytest.mark.parametrize(("processes", "gpus", "bad"), [(8, 8, 0), (8, 2, 1), (2, 0, 0)])
def test_processes_that_share_gpus_are_bad(processes: int, gpus: int, bad: int) -> None:
    """Without GPUs they may be as many as one likes."""
    (finding,) = check_gpus({"LOCAL_WORLD_SIZE": str(processes)}, gpus)
    assert finding.level == ("bad" if bad else "good" if gpus else "warning")
    assert gpus or "there is none here" in finding.said


def test_a_launcher_that_dies_of_slurms_warning_is_warned_of() -> None:
    job = {"WORLD_SIZE": "16", "SLURM_JOB_ID": "1"}
    assert "warning" in levels(list(check_launcher(job)))
    mended = job | {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGUSR1"}
    assert levels(list(check_launcher(mended))) == {"good"}
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as `vidfill launch` has it inherited
    try:
        assert levels(list(check_launcher(job))) == {"good"}
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    ("requirement", "level"),
    [
        ("numpy>=1", "good"),
        ("numpy>=1000", "bad"),
        ("no-such-package>=1", "bad"),
        ('xformers>=0.0.30; extra == "cuda"', "good"),
    ],
)
def test_versions_are_compared_with_what_the_package_asks_for(requirement: str, level: str) -> None:
    (finding,) = check_versions([requirement])
    assert finding.level == level


def test_what_only_some_processes_found_names_them() -> None:
    good, bad = Diagnosis("disk", "good", "much"), Diagnosis("disk", "bad", "none", "make room")
    other = good._replace(said="plenty")
    assert merge([(0, good), (1, other)]) == [good]
    merged = merge([(0, good), (1, bad), (2, good)])
    assert {finding.said for finding in merged} == {"process 0, 2: much", "process 1: none"}


@pytest.mark.slow
def test_two_processes_are_found_to_add_up(shards: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(ROOT / "launch" / "node.yaml")),
            *("--num_processes", "2", "--main_process_port", "0"),
            *("-m", "vidfill.train.preflight", str(shards), str(tmp_path / "run"), *TINY),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 add up" in done.stdout
    assert "bad" not in done.stdout


# Starts the doctor in a folder of the process's own, as on nodes that share none.
NODE = """
import os, sys
os.chdir(f"node-{os.environ['RANK']}")
from vidfill.train.preflight.doctor import main
sys.exit(main())
"""


@pytest.mark.slow
def test_folders_that_one_of_two_nodes_does_not_see_are_bad(shards: Path, tmp_path: Path) -> None:
    """What each finds is said of it, and the step is for none, or one would wait for ever."""
    for node in ("node-0", "node-1"):
        (tmp_path / node).mkdir()
    (tmp_path / "node-0" / "shards").symlink_to(shards)
    (tmp_path / "node.py").write_text(NODE)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"),
            *("2", "node.py", "shards", "run", *TINY),
        ],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode != 0
    for row in (
        r"run's folder +good +process 0: ",
        r"run's folder +bad +process 1: ",
        r"shards and network +bad +process 1: shards holds no",
        r"one step +look +process 0: not tried",
    ):
        assert re.search(row, done.stdout), done.stdout
    assert "error: 2 of 13 checks are bad: see above" in done.stderr
    assert not list(tmp_path.glob("node-*/.partial-*"))
