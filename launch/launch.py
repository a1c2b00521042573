"""`vidfill launch`: what starts a job on a cluster, shown, written or submitted."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .. import jobs, options
from ..errors import BadInput, say, suggest
from ..files import write_atomically
from ..options import NonNegativeInt, PositiveInt
from ..train.config import MARKER, TrainConfig, check, find_recipe
from ..train.deepspeed import deepspeed_config

EXAMPLES = """\
examples:
  vidfill launch "train shards run --config base" --nodes 4 --gpus_per_node 8
      shows what would start it; --submit submits it
  vidfill launch "train shards run" --gpus_per_node 8 --out node
      writes node.sbatch, and node.yaml: accelerate launch --config_file node.yaml -m vidfill.train
      and its kin then run on the 8 GPUs of this machine
  vidfill launch "encode videos shards" --config cluster.yaml --nodes 2 --submit
      on the cluster that a file of yours describes by the options above
  vidfill launch "$(cat sweeps.txt)" --time 2:00:00 --submit
      an array job, with a task for each line of the file, such as
      sweep run shards sweeps/ddim --schedules ddim:50
"""

MODULES = {
    "train": "vidfill.train",
    "doctor": "vidfill.train.preflight",
    "encode": "vidfill.data.encode",
    "sweep": "vidfill.sampling.sweep",
}
NAME = r"[\w.,-]+"
TITLES = {
    ".sbatch": "for Slurm: --submit submits it",
    ".yaml": "for `accelerate launch` without Slurm",
    ".json": "what the run gives DeepSpeed; no launcher needs it",
}
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)")


@dataclass(frozen=True)
class LaunchConfig:
    """Show what starts a job on a cluster: a script for Slurm, and files to start it without Slurm.

    The script needs no other file. When Slurm warns that the time is nearly over, it lets a
    training run save and puts the job back into the queue; it also does the latter when a node is
    lost. After any other failure it ends.
    """

    job: str
    """A command without its `vidfill`: doctor, train, encode or sweep with their options. Several
    lines are the tasks of one array job."""
    nodes: PositiveInt = 1
    """Nodes of each task."""
    gpus_per_node: NonNegativeInt = 1
    """GPUs to ask for; 0 trains on the CPU."""
    processes_per_node: NonNegativeInt = 0
    """Processes; 0 is one a GPU, or one where there is none."""
    cpus_per_process: PositiveInt = 8
    """Cores of each process."""
    time: str = "24:00:00"
    """The time limit, [DAYS-]HOURS:MINUTES:SECONDS; a training run that needs longer continues in
    the next job."""
    warning: PositiveInt = 300
    """Seconds before the time limit at which the job ends its step and saves."""
    name: str = "vidfill"
    """The job's name, with which its log's name begins."""
    partition: str = ""
    """Slurm's partition; empty is its default."""
    account: str = ""
    """Slurm's account; empty is your default."""
    options: str = ""
    """Further options of sbatch, as in "--mem=0 --constraint=h100"."""
    setup: str = ""
    """Lines of shell before the job, as in "module load cuda"; they run on the first node."""
    container: str = ""
    """A prefix of the command on each node, as in "apptainer exec --nv image.sif"."""
    out: Path | None = None
    """Also write OUT.sbatch, OUT.yaml for Accelerate and, under ZeRO, OUT.json for DeepSpeed."""
    submit: bool = False
    """Submit it instead of showing it."""

    @property
    def per_node(self) -> int:
        """Processes of a node."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def processes(self) -> int:
        """Processes of a task."""
        return self.nodes * self.per_node


class LaunchedCommand(NamedTuple):
    """One command of a job: a task of its array."""

    verb: str
    words: list[str]
    training: TrainConfig | None  # of `vidfill train`

    @property
    def command(self) -> list[str]:
        """What follows `python -m`."""
        return [MODULES[self.verb], *self.words]

    @property
    def marker(self) -> str:
        """The file by which the task's script starts it again; empty where it leaves none."""
        return str(self.training.out / MARKER) if self.training else ""


def launch(config: LaunchConfig) -> None:
    """Show what starts the job; write and submit it where asked.

    Raises:
        BadInput: a setting or a command is wrong, or Slurm refuses the job.
    """
    _check_settings(config)
    tasks = read_tasks(config)
    files = {".sbatch": write_script(config, tasks), ".yaml": write_accelerate(config, tasks[0])}
    training = tasks[0].training
    if training and training.zero_stage:
        ours = deepspeed_config(training, config.processes)
        files[".json"] = json.dumps(ours, indent=2) + "\n"
    if config.out:
        for suffix, text in files.items():
            write_atomically(Path(f"{config.out}{suffix}"), text.encode())
            say(f"{config.out}{suffix}: {TITLES[suffix]}", file=sys.stdout)
    if config.submit:
        say(_submit(files[".sbatch"]), file=sys.stdout)
    elif not config.out:
        for suffix, text in files.items():
            sys.stdout.write(f"──── {TITLES[suffix]}\n\n{text}\n")


# What is asked for


def _check_settings(config: LaunchConfig) -> None:
    options.check(config)
    for field in ("name", "partition", "account"):
        text = getattr(config, field)
        if text and not re.fullmatch(NAME, text):
            raise BadInput(
                f"{field} is {text!r}: give letters, digits and . , _ - as Slurm has them"
            )
    if config.warning >= seconds_of(config.time):
        raise BadInput(
            f"warning is {config.warning} seconds and time {config.time}: give a shorter warning"
        )


def seconds_of(time: str) -> int:
    """The seconds of a Slurm time limit; BadInput if it is not one."""
    found = TIME.fullmatch(time)
    if not found:
        raise BadInput(
            f"time is {time!r}: give [DAYS-]HOURS:MINUTES:SECONDS, as in 24:00:00 or 3-00:00:00"
        )
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def read_tasks(config: LaunchConfig) -> list[LaunchedCommand]:
    """The commands of a job, one a line, each accepted by its verb.

    Raises:
        BadInput: naming what is wrong with the first bad one.
    """
    tasks = [_read_task(line.strip()) for line in config.job.splitlines() if line.strip()]
    if not tasks:
        raise BadInput('job is empty: give a command, as in "train shards run"')
    verbs = sorted({task.verb for task in tasks})
    if len(verbs) > 1:
        raise BadInput(f"job has {' and '.join(verbs)}: launch them one after the other")
    outs = [task.marker for task in tasks if task.marker]
    if len(set(outs)) < len(outs):
        raise BadInput("job has two runs in one folder: give each task its own")
    return tasks


def _read_task(line: str) -> LaunchedCommand:
    words = _split("job", line)
    verb = words.pop(0) if words else ""
    if verb not in MODULES:
        raise BadInput(f"job begins with {verb!r}: {suggest(verb, MODULES)}")
    if verb in ("train", "doctor"):
        training = jobs.parse(TrainConfig, find_recipe(words), verb=verb)
        check(training)
        return LaunchedCommand(verb, words, training if verb == "train" else None)
    # The verb itself parses its command line: this folder imports neither data nor sampling.
    command = [sys.executable, "-m", "vidfill.cli", verb, *words, "--print_config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadInput(done.stderr.strip().rpartition("error: ")[2])
    return LaunchedCommand(verb, words, None)


def _split(field: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BadInput(f"{field} is {text!r}: {str(error).lower()}") from None


# The script


def write_script(config: LaunchConfig, tasks: Sequence[LaunchedCommand]) -> str:
    """The batch script of a job."""
    trains = tasks[0].training is not None
    container = " ".join(shlex.quote(word) for word in _split("container", config.container))
    words = jobs.words_of(config, leave_out=("out", "submit"))
    parts = {
        "made by": shlex.join(["vidfill", "launch", *words]).replace("\n", "\n# "),
        "options": "\n".join(f"#SBATCH {option}" for option in _options(config, len(tasks))),
        "setup": f"{config.setup.strip()}\n" if config.setup.strip() else "",
        "task": _choose_task(tasks),
        "per node": str(config.per_node),
        "container": container and f"{container} ",
        "warning": str(config.warning),
        "signal": "USR1" if trains else "TERM",
        "ended in time": '[ -e "$marker" ]' if trains else '[ -n "$warned" ] && [ "$status" != 0 ]',
    }
    # In one pass, so that nothing in the user's own text is replaced.
    return re.sub("<<([a-z ]+)>>", lambda found: parts[found[1]], TEMPLATE)


def _options(config: LaunchConfig, tasks: int) -> list[str]:
    """What follows #SBATCH, line by line."""
    options = {
        "job-name": config.name,
        "array": f"0-{tasks - 1}" if tasks > 1 else "",
        "partition": config.partition,
        "account": config.account,
        "nodes": str(config.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(config.gpus_per_node or ""),
        "cpus-per-task": str(config.per_node * config.cpus_per_process),
        "time": config.time,
        "signal": f"B:USR1@{config.warning}",
        "output": "%x-%A_%a.log" if tasks > 1 else "%x-%j.log",
        "open-mode": "append",
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value] + ["--requeue"]
    further = _split("options", config.options)
    if further:
        if not further[0].startswith("-") or any("\n" in word for word in further):
            raise BadInput(f'options is {config.options!r}: give sbatch\'s, as in "--mem=0"')
        lines.append(shlex.join(further))
    return lines


def _choose_task(tasks: Sequence[LaunchedCommand]) -> str:
    """The lines that set `task` and `marker`."""
    chosen = [
        f"task=({shlex.join(task.command)}) marker={shlex.quote(task.marker)}" for task in tasks
    ]
    if len(tasks) == 1:
        return chosen[0]
    cases = "".join(f"    {number}) {words} ;;\n" for number, words in enumerate(chosen))
    return f"case $SLURM_ARRAY_TASK_ID in\n{cases}esac"


def _submit(script: str) -> str:
    """Submit the script to Slurm; return its answer."""
    try:
        done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BadInput(
            "submit is true, and there is no sbatch here: submit on a node that has Slurm"
        ) from None
    if done.returncode:
        raise BadInput(f"Slurm refused the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


TEMPLATE = r"""#!/bin/bash
# Made by: <<made by>>
<<options>>

set -e
<<setup>>set -uo pipefail

<<task>>

# The environment may ask for another number of processes, or another way to the first node.
export PROCESSES=$((SLURM_NNODES * ${PROCESSES_PER_NODE:-<<per node>>}))
export MAIN_ADDRESS=${MAIN_ADDRESS:-$(hostname)}
export MAIN_PORT=${MAIN_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
# Seconds that the launcher gives its processes to save in after a SIGTERM.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=<<warning>>

on_node() {
    # A killed process can leave a lock in a cache, on which all later ones would wait: each start
    # of the job has empty caches of its own, where nobody else can put code.
    local caches=${TMPDIR:-/tmp}/vidfill-$(id -un)-$SLURM_JOB_ID-$SLURM_NODEID
    rm -rf "$caches"
    mkdir -m 700 "$caches" || exit
    export TORCH_EXTENSIONS_DIR=$caches/extensions TORCHINDUCTOR_CACHE_DIR=$caches/inductor
    export TRITON_CACHE_DIR=$caches/triton
    trap '' USR1 # the launcher would die of it; the training processes catch it
    if [ "$PROCESSES" = 1 ]; then exec <<container>>python -m "$@"; fi
    exec <<container>>python -m vidfill.launch.start \
        --multi_gpu --mixed_precision no --dynamo_backend no \
        --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
        --num_processes "$PROCESSES" \
        --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" -m "$@"
}
export -f on_node

rm -f "$marker"
# srun does not take --cpus-per-task over from sbatch, and would bind all to one core.
srun --cpus-per-task "$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=1 \
    bash -c 'on_node "$@"' vidfill "${task[@]}" &
step=$!
warned='' cancelled=''
trap 'warned=1; echo "vidfill: the time is nearly over"; kill -<<signal>> "$step" || true' USR1
trap 'cancelled=1' TERM
status=0
while kill -0 "$step" 2> /dev/null; do wait "$step" || true; done # a signal interrupts a wait
wait "$step" || status=$?

if [ -n "$cancelled" ]; then exit 143; fi # by somebody, or by Slurm, which then starts it again
if <<ended in time>>; then
    reason="ended in time"
elif [ "$status" != 0 ] && ! timeout 60 srun --overlap --ntasks-per-node 1 true; then
    reason="lost a node"
else
    exit "$status"
fi
echo "vidfill: job $SLURM_JOB_ID $reason and goes back into the queue"
scontrol requeue "$SLURM_JOB_ID"
"""


# The other files


def write_accelerate(config: LaunchConfig, task: LaunchedCommand) -> str:
    """What `accelerate launch` reads where there is no Slurm."""
    several = "MULTI_GPU" if config.processes > 1 else '"NO"'
    how = "accelerate launch --config_file FILE"
    if config.nodes > 1:
        how += " --machine_rank R --main_process_ip HOST --main_process_port 29500"
        how = f"on each machine, R from 0 on and HOST the first one: {how}"
    command = shlex.join(task.command).replace("\n", "\n# ")
    return f"""\
# {how} -m {command}
compute_environment: LOCAL_MACHINE
distributed_type: {several}
num_machines: {config.nodes}
machine_rank: 0
num_processes: {config.processes}
mixed_precision: "no"  # precision is vidfill's own option
dynamo_backend: "no"  # so is compile
use_cpu: false
rdzv_backend: static
same_network: true
main_training_function: main
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `vidfill launch`."""
    return jobs.main(LaunchConfig, launch, argv, verb="launch", examples=EXAMPLES)
