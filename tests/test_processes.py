from __future__ import annotations

import itertools
import multiprocessing
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from vidfill.errors import BadInput, BadInputEverywhere
from vidfill.processes import Crew, choose_device, wait_until_visible

Work = Callable[[Crew], Any]

# What a process of the crew runs: forked from a server that has already imported everything.
PROCESS = """
import os
import sys
import time
os.environ.update(environment)
sys.stderr = open(said, "a", buffering=1)
from vidfill.errors import BadInput, say_error
from vidfill.processes import Crew

try:
    with Crew.join("test") as crew:
        exec(work)
except BadInput as error:
    say_error("test", error)
    sys.exit(2)
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(work: str, size: int, said: Path) -> list[BaseProcess]:
    """Processes that meet as a launcher's do, each running the source `work`.

    What they say goes to the file `said`.
    """
    context = multiprocessing.get_context("forkserver")
    # One server forks for all tests: it imports what any of them needs.
    context.set_forkserver_preload(["vidfill.data.encode.run"])
    meeting = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    given = [
        {"environment": {**meeting, "RANK": str(rank)}, "work": work, "said": str(said)}
        for rank in range(size)
    ]
    processes = [context.Process(target=exec, args=(PROCESS, names)) for names in given]
    for process in processes:
        process.start()
    return processes


def end(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def together(*works: Work) -> list[Future[Any]]:
    """Each piece of work in a thread, as one process of a crew."""
    store = distributed.HashStore()

    def run(rank: int, work: Work) -> Any:
        with Crew("test", store, rank, len(works), hosts=rank == 0) as crew:
            return work(crew)

    with ThreadPoolExecutor(len(works)) as threads:
        return [threads.submit(run, rank, work) for rank, work in enumerate(works)]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_each_item_of_a_queue_goes_to_one_process(size: int) -> None:
    works: list[Work] = [lambda crew: list(crew.take("a", range(200)))] * size
    taken = [future.result() for future in together(*works)]
    assert sorted(itertools.chain(*taken)) == list(range(200))
    assert all(numbers == sorted(numbers) for numbers in taken)


def test_queues_and_counters_of_other_names_are_others() -> None:
    with Crew.join("job") as crew:
        assert [*crew.take("a", "xy"), *crew.take("b", "z"), *crew.take("a", "xy")] == [*"xyz"]
        assert [crew.add("a", 5), crew.add("a", -2), crew.add("b", 0)] == [5, 3, 0]


def test_the_first_process_finishes_last_and_a_counter_is_then_the_sum_over_all() -> None:
    def work(crew: Crew) -> int:
        time.sleep(crew.rank / 10)
        for number in range(100):
            crew.add("sum", number)
        crew.finish()
        return crew.add("sum", 0)

    assert together(work, work, work)[0].result() == 3 * 4950


def test_all_share_what_the_first_process_makes_and_it_makes_it_once() -> None:
    calls: list[int] = []

    def make() -> dict[str, str]:
        time.sleep(0.2)
        calls.append(1)
        return {"text": "é\udce9" * 100_000}  # a file's name need not be UTF-8

    shared = together(*[lambda crew: crew.share("value", make)] * 3)
    assert [future.result() for future in shared] == [{"text": "é\udce9" * 100_000}] * 3
    assert calls == [1]


def test_the_first_process_shows_what_all_have_done(capsys: pytest.CaptureFixture[str]) -> None:
    def work(crew: Crew) -> None:
        with crew.tally("test", 13, "clips", done=1) as tally:
            for _ in crew.take("clips", range(12)):
                time.sleep(0.01)
                tally.add()
            tally.tell()
            crew.finish(tally.tell)

    for future in together(work, work, work):
        future.result()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("test: 13/13 clips")
    assert "clips/s)" in last


def test_what_another_process_wrote_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = iter(["a", "a", ""])
    wait_until_visible(lambda: next(missing))
    monkeypatch.setattr("vidfill.processes.VISIBLE", 0.0)
    with pytest.raises(BadInput, match="a is missing: give a folder that all nodes share"):
        wait_until_visible(lambda: "a is missing")


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_bad_input_of_one_process_ends_all_and_is_said_once(
    failing: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(crew: Crew) -> None:
        if crew.rank == failing:
            raise BadInput("size is 0: give 1 or more")
        crew.share("never", crew.finish)

    errors = [future.exception() for future in together(work, work, work)]
    assert [error.code for error in errors if isinstance(error, SystemExit)] == [2, 2, 2]
    assert capsys.readouterr().err == "vidfill test: error: size is 0: give 1 or more\n"


def test_of_two_failures_one_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def work(crew: Crew) -> None:
        # Not to be left to the first process, which may be the second to fail.
        raise BadInputEverywhere(f"number {crew.rank} is wrong")

    errors = [future.exception() for future in together(work, work)]
    assert all(isinstance(error, SystemExit) for error in errors)
    assert capsys.readouterr().err.count("is wrong") == 1


def test_a_fault_of_the_program_keeps_its_trace_and_ends_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(crew: Crew) -> None:
        if crew.rank == 1:
            raise KeyError("lost")
        crew.finish()

    first, second = (future.exception() for future in together(work, work))
    assert isinstance(first, SystemExit)
    assert isinstance(second, KeyError)
    assert not capsys.readouterr().err


def test_bad_input_of_a_process_alone_is_left_as_it_is() -> None:
    with pytest.raises(OSError, match="No space left"), Crew.join("job"):
        raise OSError(28, "No space left on device")


@pytest.mark.slow
def test_processes_meet_and_the_first_does_not_leave_before_the_last(tmp_path: Path) -> None:
    late = "time.sleep(crew.rank / 2); crew.add('a')"
    assert end(start(late, 3, tmp_path / "said")) == [0, 0, 0]
    assert (tmp_path / "said").read_text() == ""


@pytest.mark.slow
def test_processes_say_a_failure_once(tmp_path: Path) -> None:
    work = """
if crew.rank == 2:
    raise BadInput("v3.mp4 cannot be read: replace it")
while True:
    crew.check()
    time.sleep(0.01)
"""
    assert end(start(work, 3, tmp_path / "said")) == [2, 2, 2]
    said = (tmp_path / "said").read_text()
    assert said == "[rank 2] vidfill test: error: v3.mp4 cannot be read: replace it\n"


@pytest.mark.slow
def test_a_process_whose_store_is_killed_ends_in_one_line(tmp_path: Path) -> None:
    work = """
crew.add("met")
print("met", file=sys.stderr)
while True:
    crew.check()
"""
    processes = start(work, 2, tmp_path / "said")
    while not (tmp_path / "said").exists() or (tmp_path / "said").read_text() != "met\nmet\n":
        time.sleep(0.01)
    processes[0].kill()
    assert end(processes) == [-9, 2]
    (said,) = (tmp_path / "said").read_text().splitlines()[2:]
    assert said.startswith("[rank 1] vidfill test: error: the first process, or its launcher, is")
    assert "the same command continues" in said


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK expected.*accelerate launch"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR expected"),
    ],
)
def test_an_environment_that_is_no_launchers_is_refused(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=message):
        Crew.join("job")


def test_a_named_device_is_what_is_used() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(BadInput, match="device is 'nonsense'"):
        choose_device("nonsense")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_of_a_node_has_a_gpu_of_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = torch.cuda.device_count()
    for local_rank in range(count + 1):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert choose_device(name) == torch.device("cuda", local_rank % count)


def test_many_tasks_of_srun_without_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(BadInput, match="srun started 4 tasks"):
        Crew.join("test")
