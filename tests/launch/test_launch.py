"""What starts a job says what was asked for, whatever the words, and the examples start."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from vidfill.launch.launch import main

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sbatch"))
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--config_file")
TRAIN = "train shards run --config train.yaml"

Folder = Callable[..., Path]


@pytest.fixture
def here(make_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_folder("here")
    monkeypatch.chdir(folder)
    return folder


def made_by(script: Path) -> list[str]:
    """The command in a script's head, without its `vidfill launch`."""
    head = re.search(r"# Made by: (.*?)\n#SBATCH", script.read_text(), re.DOTALL)
    assert head
    program, verb, *words = shlex.split(head[1].replace("\n# ", "\n"))
    assert (program, verb) == ("vidfill", "launch")
    return words


def launch(*words: str) -> str:
    """The script that `vidfill launch` writes."""
    assert main([*words, "--out", "job"]) == 0
    return Path("job.sbatch").read_text()


def asks(script: str) -> dict[str, str]:
    """What a script asks Slurm for."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_is_what_the_command_in_its_head_writes(script: Path, here: Path) -> None:
    assert main([*made_by(script), "--out", str(here / script.stem)]) == 0
    names = {file.name for file in LAUNCH.glob(f"{script.stem}.*")}
    assert names == {file.name for file in here.glob(f"{script.stem}.*")}
    for name in names:
        assert (here / name).read_text() == (LAUNCH / name).read_text()


def test_there_is_an_example_of_each_size_and_one_for_zero() -> None:
    assert [script.stem for script in SCRIPTS] == ["cpu", "gpu", "node", "nodes"]
    assert [file.stem for file in LAUNCH.glob("*.json")] == ["node"]


@pytest.mark.parametrize(
    ("example", "machines", "processes"),
    [("cpu", 1, 2), ("gpu", 1, 1), ("node", 1, 8), ("nodes", 4, 32)],
)
def test_accelerate_reads_its_configurations(example: str, machines: int, processes: int) -> None:
    config = load_config_from_file(str(LAUNCH / f"{example}.yaml"))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert config.mixed_precision == "no"


@pytest.mark.parametrize(
    "script", [*SCRIPTS, Path(__file__).with_name("one_machine_slurm.sh")], ids=lambda s: s.stem
)
def test_the_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def start(example: str, *options: str) -> subprocess.Popen[str]:
    command = [*ACCELERATE, str(LAUNCH / f"{example}.yaml"), *options, "-m", "vidfill.train"]
    return subprocess.Popen(
        [*command, *shlex.split(TRAIN)[1:], "--steps", "1"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("example", "processes"), [("cpu", 2), ("gpu", 1)])
def test_accelerate_starts_the_examples(example: str, processes: int, here: Path) -> None:
    with start(example, "--main_process_port", "0") as started:
        _, said = started.communicate()
    assert started.returncode == 0, said
    assert f"on {processes} process(es), step 0 of 1" in said


@pytest.mark.slow
def test_accelerate_starts_the_example_of_several_machines(here: Path) -> None:
    common = ("--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1")
    first, second = (
        start("nodes", *common, "--main_process_port", "29641", "--machine_rank", rank)
        for rank in ("0", "1")
    )
    with first, second:
        said = [process.communicate()[1] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert "on 2 process(es), step 0 of 1" in said[0]


@pytest.mark.parametrize(
    "word",
    ["two words", "it's", '"quoted"', "$(date)", "`date`", "; date", "a\\b", "<<setup>>", "*"],
)
def test_no_word_of_a_job_is_read_by_a_shell(word: str, here: Path) -> None:
    script = launch(shlex.join(["train", "shards", word, "--config", "train.yaml"]))
    (line,) = re.findall(r"^task=.*$", script, re.MULTILINE)
    said = subprocess.run(
        ["bash", "-c", f'{line}; printf "%s\\n" "${{task[@]}}" "$marker"'],
        capture_output=True,
        text=True,
        check=True,
    )
    written = ["vidfill.train", "shards", word, "--config", "train.yaml", f"{word}/stopped.json"]
    assert said.stdout.splitlines() == written
    assert made_by(Path("job.sbatch")) == [
        shlex.join(["train", "shards", word, "--config", "train.yaml"])
    ]


def test_a_script_asks_for_what_was_asked(here: Path) -> None:
    script = launch(
        *(TRAIN, "--nodes", "3", "--gpus_per_node", "4", "--processes_per_node", "2"),
        *(
            "--cpus_per_process",
            "6",
            "--time",
            "2-12:00:00",
            "--warning",
            "90",
            "--name",
            "clevrer",
        ),
        *("--partition", "a100,h100", "--account", "lab", "--options", "--mem=0 --comment='a b'"),
        *("--setup", "module load cuda\nsource env/bin/activate"),
        *("--container", "apptainer exec --nv 'my image.sif'"),
    )
    asked = asks(script)
    assert (
        asked.items()
        >= {
            "nodes": "3",
            "ntasks-per-node": "1",
            "gpus-per-node": "4",
            "cpus-per-task": "12",
            "time": "2-12:00:00",
            "signal": "B:USR1@90",
            "job-name": "clevrer",
            "partition": "a100,h100",
            "account": "lab",
            "requeue": "",
            "open-mode": "append",
        }.items()
    )
    assert "#SBATCH --mem=0 '--comment=a b'\n" in script
    assert "\nmodule load cuda\nsource env/bin/activate\n" in script
    assert "exec apptainer exec --nv 'my image.sif' python -m vidfill.launch.start" in script
    assert "PROCESSES_PER_NODE:-2}" in script
    subprocess.run(["bash", "-n", "job.sbatch"], check=True)


@pytest.mark.slow
def test_several_lines_are_the_tasks_of_an_array(here: Path) -> None:
    script = launch("encode a shards-a\n  encode b 'shards b' --size 64\n")
    assert asks(script).items() >= {"array": "0-1", "output": "%x-%A_%a.log"}.items()
    choice = script[script.index("case ") : script.index("esac") + 4]
    for number, out in enumerate(["shards-a", "shards b"]):
        said = subprocess.run(
            ["bash", "-c", f'SLURM_ARRAY_TASK_ID={number}; {choice}; echo "${{task[2]}}"'],
            capture_output=True,
            text=True,
            check=True,
        )
        assert said.stdout == f"{out}\n"


def test_all_is_shown_unless_it_is_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{TRAIN} --zero_stage 3", "--gpus_per_node", "2"]) == 0
    shown = capsys.readouterr().out
    assert sorted(file.name for file in here.iterdir()) == ["shards", "train.yaml"]
    assert main([f"{TRAIN} --zero_stage 3", "--gpus_per_node", "2", "--out", "job"]) == 0
    said = capsys.readouterr().out
    for suffix in (".sbatch", ".yaml", ".json"):
        assert f"job{suffix}: " in said
        assert Path(f"job{suffix}").read_text() in shown
    assert '"stage": 3' in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["  "], "job is empty"),
        (["trian shards run"], "did you mean train?"),
        (["verify shards"], "give one of train, doctor, encode, sweep"),
        (["train shards 'run"], "no closing quotation"),
        (["train shards run --steps 0"], "steps is 0"),
        pytest.param(["encode a b --frames none"], "frames", marks=pytest.mark.slow),
        pytest.param(
            ["encode a b\ntrain shards run"], "one after the other", marks=pytest.mark.slow
        ),
        (["train shards run\ntrain shards run --seed 1"], "two runs in one folder"),
        ([TRAIN, "--nodes", "0"], "nodes is 0"),
        ([TRAIN, "--time", "90"], "time is '90'"),
        ([TRAIN, "--time", "0:05:00", "--warning", "300"], "give a shorter warning"),
        ([TRAIN, "--account", "a\n#SBATCH --mail-user=x"], "account is"),
        ([TRAIN, "--options", "mem=0"], "options is"),
        ([TRAIN, "--container", "apptainer 'exec"], "container is"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    words: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--out", "job"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("vidfill launch: error: ")
    assert message in said
    assert not list(here.glob("job*"))


def test_an_option_that_training_does_not_have_is_refused_before_the_job_waits(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([f"{TRAIN} --precison bfloat16", "--submit"])
    assert end.value.code == 2
    assert "--precison" in capsys.readouterr().err


def test_where_there_is_no_slurm_a_job_is_not_submitted(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(here))
    assert main([TRAIN, "--submit"]) == 2
    assert "there is no sbatch here" in capsys.readouterr().err
