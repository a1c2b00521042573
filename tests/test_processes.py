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
from vidfill.processes import Crew, choose_device

Work = Callable[[Crew], Any]

# What a process of the crew runs: forked from a server that has imported everything.
PROCESS = """
import os
import sys
os.environ.update(environment)
sys.stderr = open(said, "a", buffering=1)
from vidfill import jobs
from vidfill.errors import BadInput
from vidfill.processes import Crew

def job(config):
    with Crew.join("test") as crew:
        exec(work)

try:
    job(None)
except (BadInput, OSError) as error:
    jobs._say_error("test", error)
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
    """Each piece of work in a thread of its own, as one process of a crew."""
    store = distributed.HashStore()

    def run(rank: int, work: Work) -> Any:
        with Crew(store, rank, len(works), hosts=rank == 0) as crew:
            return work(crew)

    with ThreadPoolExecutor(len(works)) as threads:
        return [threads.submit(run, rank, work) for rank, work in enumerate(works)]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def take_below(crew: Crew, end: int) -> list[int]:
    return list(itertools.takewhile(lambda number: number < end, iter(lambda: crew.take("a"), -1)))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_each_number_of_a_queue_goes_to_one_process(size: int) -> None:
    taken = [future.result() for future in together(*[lambda crew: take_below(crew, 200)] * size)]
    assert sorted(itertools.chain(*taken)) == list(range(200))
    assert all(numbers == sorted(numbers) for numbers in taken)


def test_queues_and_counters_of_other_names_are_others() -> None:
    with Crew.join("job") as crew:
        assert [crew.take("a"), crew.take("a"), crew.take("b")] == [0, 1, 0]
        assert [crew.add("a", 5), crew.add("a", -2), crew.add("b", 0)] == [5, 3, 0]


def test_a_counter_is_the_sum_over_all_processes() -> None:
    def work(crew: Crew) -> int:
        for number in range(100):
            crew.add("sum", number)
        crew.add("done")
        crew.wait_for("done", crew.size)
        return crew.add("sum", 0)

    assert [future.result() for future in together(work, work, work)] == [3 * 4950] * 3


def test_all_share_what_the_first_process_makes_and_it_makes_it_once() -> None:
    calls: list[int] = []

    def make() -> str:
        time.sleep(0.2)
        calls.append(1)
        return "é" * 100_000

    shared = together(*[lambda crew: crew.share("text", make)] * 3)
    assert [future.result() for future in shared] == ["é" * 100_000] * 3
    assert calls == [1]


def test_waiting_shows_how_far_the_others_are() -> None:
    seen: list[int] = []

    def first(crew: Crew) -> None:
        crew.wait_for("done", 3, lambda: seen.append(crew.add("done", 0)))

    def second(crew: Crew) -> None:
        for _ in range(3):
            time.sleep(0.1)
            crew.add("done")

    for future in together(first, second):
        future.result()
    assert seen == sorted(seen)
    assert len(set(seen)) > 1


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_bad_input_of_one_process_ends_all_with_its_message(failing: int) -> None:
    def work(crew: Crew) -> None:
        if crew.rank == failing:
            raise BadInput("size is 0: give 1 or more")
        crew.share("never", lambda: crew.wait_for("never", 1) or "")

    errors = [future.exception() for future in together(work, work, work)]
    assert {str(error) for error in errors} == {"size is 0: give 1 or more"}
    assert all(isinstance(error, BadInput) for error in errors)
    # Who is not the first process leaves it to that one to say it.
    assert all(isinstance(error, BadInputEverywhere) for error in errors[1:])


def test_a_failure_may_name_a_file_that_is_no_utf8() -> None:
    def work(crew: Crew) -> None:
        if crew.rank == 1:
            raise BadInput("caf\udce9.mp4 cannot be read")
        crew.wait_for("never", 1)

    first, _ = (future.exception() for future in together(work, work))
    assert str(first) == "caf\\udce9.mp4 cannot be read"


def test_of_two_failures_one_is_said() -> None:
    def work(crew: Crew) -> None:
        raise BadInput(f"number {crew.rank} is wrong")

    errors = [future.exception() for future in together(work, work)]
    assert len({str(error) for error in errors}) == 1
    assert isinstance(errors[1], BadInputEverywhere)


def test_a_fault_of_the_program_keeps_its_trace_and_ends_the_others_in_one_line() -> None:
    def work(crew: Crew) -> None:
        if crew.rank == 1:
            raise KeyError("lost")
        crew.wait_for("never", 1)

    first, second = (future.exception() for future in together(work, work))
    assert isinstance(second, KeyError)
    assert str(first) == "process 1 ended with KeyError: 'lost'"


def test_bad_input_of_a_process_alone_is_left_as_it_is() -> None:
    with pytest.raises(OSError, match="No space left") as caught, Crew.join("job"):
        raise OSError(28, "No space left on device")
    assert not isinstance(caught.value, BadInput)


def test_processes_meet_and_the_first_does_not_leave_before_the_last(tmp_path: Path) -> None:
    late = "import time; time.sleep(crew.rank / 2); crew.take('a')"
    assert end(start(late, 3, tmp_path / "said")) == [0, 0, 0]
    assert (tmp_path / "said").read_text() == ""


def test_processes_say_a_failure_once(tmp_path: Path) -> None:
    work = """
if crew.rank == 2:
    raise BadInput("v3.mp4 cannot be read: replace it")
crew.wait_for("never", 1)
"""
    assert end(start(work, 3, tmp_path / "said")) == [2, 2, 2]
    said = (tmp_path / "said").read_text()
    assert said == "vidfill test: error: v3.mp4 cannot be read: replace it\n"


def test_a_process_whose_store_is_killed_ends_in_one_line(tmp_path: Path) -> None:
    work = "crew.add('met'); print('met', file=sys.stderr); crew.wait_for('never', 1)"
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
