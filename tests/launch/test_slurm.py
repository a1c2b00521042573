"""A training job under Slurm is the same run as in one process.

Those marked `slurm` submit real jobs of two nodes, which must share pytest's temporary folder (else
give `--basetemp`); `one_machine_slurm.sh` beside this file sets such a Slurm up.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from vidfill.train.loop import main

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPT = LAUNCH / "train.sbatch"
TINY = [
    *("--steps", "6", "--batch_size", "2", "--log_every", "1", "--checkpoint_every", "3"),
    *("--model.block_out_channels", "[16,32]", "--model.head_channels", "8"),
    *("--model.norm_groups", "8", "--preview.every", "0", "--optimizer.warmup", "2"),
]
# One process a node, on the CPU, of the environment that runs the tests.
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PROCESSES_PER_NODE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}

# A job starts in up to a minute, and DeepSpeed compiles an extension.
PATIENT = pytest.mark.timeout(900)
Submit = Callable[..., tuple[int, str]]
Losses = Callable[[Path], list[float]]


def sinfo(column: str) -> str:
    """What Slurm says of its nodes; empty where none runs."""
    if shutil.which("sinfo") is None:
        return ""
    command = ["sinfo", "--noheader", "--format", column]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


@pytest.fixture
def submit(tmp_path: Path) -> Submit:
    """Submit a job of two nodes, wait for it, and return its exit status and its log."""
    if not sinfo("%D"):
        pytest.skip("no Slurm runs here (`sinfo` shows none): see one_machine_slurm.sh")

    def run(
        *arguments: str, options: tuple[str, ...] = (), environment: dict[str, str] = ENVIRONMENT
    ) -> tuple[int, str]:
        log = tmp_path / "job.log"
        log.unlink(missing_ok=True)
        done = subprocess.run(
            [
                *("sbatch", "--wait", "--nodes", "2", "--time", "10", "--output", str(log)),
                *(*options, str(SCRIPT), *arguments),
            ],
            env=environment,
            cwd=tmp_path,
            check=False,
        )
        return done.returncode, log.read_text()

    return run


@pytest.mark.slurm
@PATIENT
def test_two_nodes_train_like_one_process_and_the_job_submitted_again_continues(
    submit: Submit, shards: Path, tmp_path: Path, losses: Losses
) -> None:
    assert main([str(shards), str(tmp_path / "one"), *TINY]) == 0
    two = tmp_path / "two nodes, [a run]"
    status, log = submit(str(shards), str(two), *TINY, "--steps", "3")
    assert status == 0, log
    assert "on 2 process(es), step 0 of 3" in log
    status, log = submit(str(shards), str(two), *TINY)
    assert status == 0, log
    assert "on 2 process(es), step 3 of 6" in log
    assert losses(two) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.slurm
@PATIENT
def test_zero_2_on_two_nodes_trains_like_one_process(
    submit: Submit, shards: Path, tmp_path: Path, losses: Losses
) -> None:
    assert main([str(shards), str(tmp_path / "one"), *TINY]) == 0
    status, log = submit(str(shards), str(tmp_path / "zero"), *TINY, "--zero_stage", "2")
    assert status == 0, log
    assert "on 2 process(es)" in log
    assert losses(tmp_path / "zero") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.slurm
@PATIENT
def test_every_gpu_has_a_process(submit: Submit, shards: Path, tmp_path: Path) -> None:
    if "gpu" not in sinfo("%G"):
        pytest.skip("this Slurm does not count GPUs")
    counted = {key: value for key, value in ENVIRONMENT.items() if key != "PROCESSES_PER_NODE"}
    arguments = [str(shards), str(tmp_path / "run"), *TINY, "--steps", "1"]
    status, log = submit(*arguments, options=("--gpus-per-node", "1"), environment=counted)
    assert status == 0, log
    assert "on 2 process(es)" in log


@pytest.mark.slurm
@PATIENT
def test_one_process_that_fails_ends_the_job(submit: Submit, shards: Path, tmp_path: Path) -> None:
    """The second process leaves at its start, while the first one waits for it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1':\n    os._exit(3)\n"
    )
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    status, log = submit(str(shards), str(tmp_path / "run"), *TINY, environment=environment)
    assert status != 0
    assert "exitcode  : 3" in log
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_a_job_without_gpus_and_without_a_number_of_processes_is_refused() -> None:
    environment = {"PATH": os.environ["PATH"], "SLURM_NNODES": "2", "SLURM_JOB_ID": "1"}
    done = subprocess.run(
        ["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "give sbatch --gpus-per-node, or set PROCESSES_PER_NODE" in done.stderr


@pytest.mark.parametrize("script", [SCRIPT, Path(__file__).with_name("one_machine_slurm.sh")])
def test_the_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_accelerate_reads_its_configuration() -> None:
    config = load_config_from_file(str(LAUNCH / "node.yaml"))
    assert config.distributed_type == "MULTI_GPU"
    assert config.num_machines == 1
    assert config.mixed_precision == "no"
