"""Jobs under a real Slurm of two nodes: what is disturbed ends like what was not.

The nodes must share pytest's temporary folder (else give `--basetemp`), and be on one machine where
a test kills one; `one_machine_slurm.sh` beside this file sets such a Slurm up.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vidfill.launch.launch import main
from vidfill.train.loop import main as train

LAUNCH = Path(__file__).parents[2] / "launch"
TRAIN = "train shards run --config train.yaml"
# What the environment says: one process a node, on the CPU, of what runs the tests.
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PROCESSES_PER_NODE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}
SLURMD = Path("/var/tmp/one-machine-slurm/slurmd-n2.pid")  # of one_machine_slurm.sh
OF_A_NODE = ("--gpus-per-node", "1", "--cpus-per-task", "1")

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(900)]
Folder = Callable[..., Path]
Losses = Callable[[Path], list[float]]


def ask(*command: str) -> str:
    """What a command of Slurm's prints; nothing of a job that Slurm has forgotten."""
    ends = time.monotonic() + 30
    while time.monotonic() < ends:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 or "Invalid job id" in done.stderr:
            break
        time.sleep(1)  # a busy Slurm did not answer, which says nothing of the job
    return done.stdout.strip()


class Job:
    """A job in a folder of its own."""

    def __init__(self, folder: Path, number: str) -> None:
        self.folder, self.number = folder, number
        self.run = folder / "run"

    @property
    def log(self) -> str:
        return "".join(file.read_text() for file in sorted(self.folder.glob("*.log")))

    @property
    def state(self) -> str:
        """Slurm's word for it, such as RUNNING."""
        found = re.search(r"JobState=(\w+)", ask("scontrol", "show", "job", self.number))
        return found[1] if found else ""

    @property
    def minutes(self) -> int:
        """How long it has run, rounded down."""
        return int(ask("squeue", "-ho", "%M", "-j", self.number).partition(":")[0])

    @property
    def is_over(self) -> bool:
        return not ask("squeue", "--noheader", "--jobs", self.number)

    @property
    def saved(self) -> int:
        """The newest checkpoint's step."""
        return max((int(path.name[5:]) for path in self.run.glob("checkpoints/step-*")), default=0)

    def wait_for(self, what: Callable[[], object], seconds: float = 600) -> None:
        ends = time.monotonic() + seconds
        while not what():
            assert not self.is_over or what(), self.log
            assert time.monotonic() < ends, self.log
            time.sleep(0.1)

    def end(self) -> str:
        """Wait for the end; return Slurm's word for it."""
        self.wait_for(lambda: self.is_over)
        return self.state

    def starts(self) -> list[int]:
        """The step at which each start began."""
        return [int(step) for step in re.findall(r"on \d process\(es\), step (\d+) of", self.log)]

    def processes(self, node: int, *further: str) -> list[int]:
        """What it runs on a node that is a part of this machine, by its environment."""
        named = (f"SLURM_JOB_ID={self.number}", f"SLURM_NODEID={node}", *further)
        wanted = {text.encode() for text in named}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it is gone
                if wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                    found.append(int(folder.name))
        return found

    def hold(self) -> list[int]:
        """Stop the second process, for which the first then waits; return it."""
        held = self.processes(1, "RANK=1")
        assert held, self.log
        for process in held:
            os.kill(process, signal.SIGSTOP)
        return held


@pytest.fixture(scope="session")
def slurm() -> None:
    """Skip where no Slurm answers; it is asked once, since one that is down answers late."""
    if shutil.which("sinfo") is None or not ask("sinfo", "--noheader"):
        pytest.skip("no Slurm runs here (`sinfo` shows none): see one_machine_slurm.sh")


@pytest.fixture
def submit(slurm: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Job]]:
    """Submit an example from a folder, or take up the job of a number; cancelled at the end."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    submitted = []

    def run(folder: Path, what: str, *options: str) -> Job:
        if not what.isdigit():
            command = ["sbatch", "--parsable", *OF_A_NODE, *options, f"{LAUNCH / what}.sbatch"]
            what = subprocess.run(
                command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True
            ).stdout.strip()
        submitted.append(Job(folder, what))
        return submitted[-1]

    yield run
    for job in submitted:
        ask("scancel", job.number)


Submit = Callable[..., Job]


def alone(folder: Path, *options: str) -> Path:
    """The same run in one process, beside the job's."""
    with contextlib.chdir(folder):
        assert train(["shards", "alone", "--config", "train.yaml", *options]) == 0
    return folder / "alone"


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def test_requeued_and_at_its_time_limit_a_job_of_two_nodes_goes_on_as_if_nothing_had_been(
    submit: Submit, make_folder: Folder, losses: Losses
) -> None:
    job = submit(make_folder("a run"), "nodes", "--nodes", "2", "--signal", "B:USR1@240")
    job.wait_for(lambda: job.saved)
    job.hold()  # so that it does not end meanwhile; Slurm lets it go on
    ask("scontrol", "requeue", job.number)
    job.wait_for(lambda: len(job.starts()) == 2 and job.saved > job.starts()[1])
    held = job.hold()
    ask("scontrol", "update", f"JobId={job.number}", f"TimeLimit={job.minutes + 2}")
    job.wait_for(lambda: "time is nearly over" in job.log)  # within half a minute
    for process in held:
        os.kill(process, signal.SIGCONT)
    job.wait_for(lambda: len(job.starts()) >= 3)
    assert "ended in time and goes back into the queue" in job.log
    assert job.end() == "COMPLETED", job.log
    assert not (job.run / "stopped.json").exists()
    starts = job.starts()  # more where a busy machine meets the limit again
    assert starts == sorted(set(starts)) and starts[-1] < 40, job.log
    expected = losses(alone(job.folder))
    assert losses(job.run) == pytest.approx(expected, rel=1e-4)
    assert len(expected) == 40


@pytest.fixture
def lose_second_node(submit: Submit) -> Iterator[Callable[..., None]]:
    """Kill what runs on the second node of a job; it comes back when it is called for, or ends."""
    if not SLURMD.exists():
        pytest.skip("the nodes are not those of one_machine_slurm.sh, which may be killed")

    def lose(job: Job, at_once: bool) -> None:
        lost = job.processes(1)
        guards = {parent(task) for task in lost} - set(lost)  # Slurm's, which tell of an end
        for process in (int(SLURMD.read_text()), *(guards if at_once else ()), *lost):
            os.kill(process, signal.SIGKILL)

    yield lose
    bring_back()


def bring_back() -> None:
    if not Path("/proc", SLURMD.read_text().strip()).exists():
        subprocess.run(["slurmd", "-N", "n2"], check=True)


def test_a_job_that_loses_a_node_ends_soon_and_goes_on_when_there_is_another(
    submit: Submit,
    lose_second_node: Callable[..., None],
    make_folder: Folder,
    losses: Losses,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """First a node that is shut down, then one that loses its power."""
    folder = make_folder("run")
    monkeypatch.chdir(folder)
    assert main([TRAIN, "--nodes", "2", "--cpus_per_process", "1", "--submit"]) == 0
    job = submit(folder, capsys.readouterr().out.split()[-1])
    job.wait_for(lambda: job.saved)
    job.hold()
    lose_second_node(job, at_once=False)
    job.wait_for(lambda: "lost a node and goes back into the queue" in job.log, 60)
    bring_back()
    job.wait_for(lambda: len(job.starts()) == 2 and job.saved > job.starts()[1])
    job.hold()
    lose_second_node(job, at_once=True)
    job.wait_for(lambda: "DUE TO NODE FAILURE" in job.log, 120)  # SlurmdTimeout, and the load
    bring_back()
    assert job.end() == "COMPLETED", job.log
    # A Slurm that could not tell the lost node to end the step tries that again after a minute, and
    # may so disturb the next start once more.
    starts = job.starts()
    assert len(starts) >= 3, job.log
    assert starts == sorted(starts) and starts[1] > 0, job.log
    assert losses(job.run) == pytest.approx(losses(alone(folder)), rel=1e-4)


def test_the_examples_start_and_zero_2_on_two_nodes_trains_like_one_process(
    submit: Submit, make_folder: Folder, losses: Losses, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = submit(make_folder("node", steps=3), "node", "--nodes", "2")
    gpu = submit(make_folder("gpu", steps=3), "gpu")
    monkeypatch.delenv("PROCESSES_PER_NODE")
    cpu = submit(make_folder("cpu", steps=3), "cpu", *OF_A_NODE[2:])
    expected = losses(alone(node.folder, "--batch_size", "64"))
    for job, processes in ((node, 2), (gpu, 1), (cpu, 2)):
        assert job.end() == "COMPLETED", job.log
        assert f"on {processes} process(es), step 0 of 3" in job.log
    assert losses(node.run) == pytest.approx(expected, rel=1e-4)
    assert losses(cpu.run) == pytest.approx(losses(gpu.run), rel=1e-4)


def test_a_job_that_fails_ends_and_only_a_failure_that_a_signal_made_is_mended(
    submit: Submit, make_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process leaves at its start, beside what an earlier end had left."""
    folder = make_folder("run")
    (folder / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1':\n    os._exit(3)\n"
    )
    (folder / "run").mkdir()
    (folder / "run" / "stopped.json").write_text("{}")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    job = submit(folder, "nodes", "--nodes", "2")
    assert job.end() == "FAILED", job.log
    assert "exitcode  : 3" in job.log
    assert "queue" not in job.log
    assert not job.saved


def test_a_cancelled_job_saves_and_does_not_come_back(submit: Submit, make_folder: Folder) -> None:
    job = submit(make_folder("run", steps=10**6), "nodes", "--nodes", "2")
    job.wait_for(lambda: job.saved)
    ask("scancel", job.number)
    assert job.end() == "CANCELLED", job.log
    assert "ended by SIGTERM" in job.log
    assert "Traceback" not in job.log, job.log
    marker = json.loads((job.run / "stopped.json").read_text())
    assert marker["step"] == job.saved
    assert "queue" not in job.log


def test_an_array_encodes_folders_side_by_side(
    submit: Submit,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = f"{shards.parent / 'videos'} {{}} --autoencoder {shards.parent / 'autoencoder'}"
    lines = "\n".join(f"encode {given.format(out)}" for out in ("a", "b"))
    assert main([lines, "--cpus_per_process", "1", "--submit"]) == 0
    job = submit(tmp_path, capsys.readouterr().out.split()[-1])
    assert job.end() == "COMPLETED", job.log
    for out in ("a", "b"):
        for file in ("plan.json", "train/manifest.json"):
            assert (tmp_path / out / file).read_bytes() == (shards / file).read_bytes()
