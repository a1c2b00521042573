"""Kill a training run again and again, and compare its result with that of an undisturbed run.

Each life of the run ends with `kill -9` of all its processes at a random moment: while it starts,
while it trains, or while it writes a checkpoint. The next life is the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from vidfill import seeding
from vidfill.data.encode.run import encode
from vidfill.data.encode.settings import EncodeConfig
from vidfill.data.synth.run import SynthConfig, synth
from vidfill.files import PARTIAL
from vidfill.modeling.run_folder import name_of, newest_first, newest_whole

from .machine import describe

EXAMPLES = """examples:
  python -m benchmarks.soak
      20 kills of one process, four minutes of processor time
  python -m benchmarks.soak --kills 10 --processes 2 --zero_stage 3
      the same under DeepSpeed
"""

NODE = Path(__file__).parents[1] / "launch" / "node.yaml"
EVERY = 2  # steps between checkpoints
TINY = [
    *("--batch_size", "2", "--checkpoint_every", str(EVERY), "--log_every", "1"),
    *("--model.block_out_channels", "[16,32]", "--model.head_channels", "8"),
    *("--model.norm_groups", "8", "--optimizer.warmup", "2"),
    *("--preview.every", "0", "--evaluation.every", "0"),
]
PATIENCE = 300.0  # seconds that a life may take to reach a moment
WRITE = 0.05  # seconds that writing a checkpoint takes, roughly
MOMENTS = ("writing", "training", "writing", "starting")


@dataclasses.dataclass(frozen=True)
class Kill:
    """The end of a life, and the start of the next."""

    moment: str
    """The kind of moment: one of MOMENTS."""
    seconds: float
    """How long the life lasted."""
    written: int
    """The step whose checkpoint was being written; 0 if none was."""
    whole: int
    """The step of the newest whole checkpoint; 0 if there was none."""
    continued: int
    """The step at which the next life started."""

    @property
    def kept(self) -> bool:
        """Whether no more was lost than the steps since the last checkpoint."""
        return self.continued == self.whole and self.written - self.whole <= EVERY


class Life:
    """One start of the run."""

    def __init__(self, command: list[str], out: Path) -> None:
        self.out = out
        self._log = out.with_suffix(".log")
        with self._log.open("wb") as log:
            # A process group of its own, so that a kill reaches the launcher and all its children.
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=_environment()
            )
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def first_step(self) -> int | None:
        """The step at which it started, once it trains."""
        found = re.search(r"step (\d+) of \d+; watch it", self.said())
        return int(found[1]) if found else None

    def wait_until(self, happened: Callable[[], object]) -> bool:
        """Wait; whether it happened before the life ended by itself."""
        while not happened():
            if self._process.poll() is not None:
                self.end()
                return False
            if self.seconds > PATIENCE:
                self.kill()
                raise RuntimeError(f"nothing happened in {PATIENCE} s:\n{self.said()}")
            time.sleep(0.001)
        return True

    def wait(self, seconds: float) -> bool:
        """Wait; whether that time passed before the life ended by itself."""
        until = self.seconds + seconds
        return self.wait_until(lambda: self.seconds > until)

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def end(self) -> None:
        """Wait until the run ends by itself."""
        if self._process.wait(PATIENCE):
            raise RuntimeError(self.said())


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def soak(options: argparse.Namespace, folder: Path) -> tuple[list[Kill], bool]:
    """The kills, and whether the run ended bit-identical to the undisturbed one."""
    shards = options.shards or str(_make_shards(folder))
    alone = Life(_command(options, shards, folder / "alone"), folder / "alone")
    alone.wait_until(lambda: alone.first_step() is not None)
    starting = alone.seconds
    alone.end()

    draw = random.Random(seeding.derive_seed(options.seed, "soak"))
    killed = folder / "killed"
    ends: list[Kill] = []
    life = Life(_command(options, shards, killed), killed)
    while len(ends) < options.kills:
        moment = MOMENTS[len(ends) % len(MOMENTS)]
        if not _wait_for(life, moment, draw, starting, options.steps // (options.kills + 1)):
            break  # the run finished first
        seconds = life.seconds
        life.kill()
        written, whole = _being_written(killed), _newest_whole(killed)
        life = Life(_command(options, shards, killed), killed)
        life.wait_until(lambda life=life: life.first_step() is not None)
        ends.append(Kill(moment, seconds, written, whole, life.first_step() or 0))
        print(_row(ends[-1]), flush=True)
    life.end()
    return ends, _weights(killed, options.steps) == _weights(folder / "alone", options.steps)


def _wait_for(life: Life, moment: str, draw: random.Random, starting: float, steps: int) -> bool:
    """Wait for a moment of that kind; False if the life ended by itself before it.

    Args:
        life: The current life.
        moment: One of MOMENTS.
        draw: Decides when.
        starting: Seconds that a start takes.
        steps: The most steps to wait before looking for the moment.
    """
    if moment == "starting":
        return life.wait(draw.uniform(0, starting))
    if not life.wait_until(lambda: life.first_step() is not None):
        return False
    enough = (life.first_step() or 0) + draw.randint(0, steps)
    if not life.wait_until(lambda: _begun(life.out) >= enough):
        return False
    if moment == "writing":
        before = _begun(life.out)
        if not life.wait_until(lambda: _being_written(life.out) > before):
            return False
    return life.wait(draw.uniform(0, WRITE))


def _begun(out: Path) -> int:
    """The step of the newest checkpoint, whole or not; 0 if there is none."""
    newest = newest_first(out / "checkpoints")[:1]
    return max(_being_written(out), *(_step_of(path) for path in newest), 0)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _being_written(out: Path) -> int:
    """The step of the checkpoint that is being written; 0 if none is."""
    aside = (out / "checkpoints").glob(f"{PARTIAL}step-*")
    return max((_step_of(path) for path in aside), default=0)


def _newest_whole(out: Path) -> int:
    if not newest_first(out / "checkpoints"):
        return 0
    path, facts = newest_whole(out / "checkpoints")
    assert path == newest_first(out / "checkpoints")[0], "a kill has damaged a checkpoint"
    return facts["counters"]["step"]


def _weights(out: Path, step: int) -> dict[str, bytes]:
    """The bytes of all weights, moments and averages of the last checkpoint."""
    checkpoint = out / "checkpoints" / name_of(step)
    files = sorted(checkpoint.rglob("*.safetensors"))
    assert files, f"{checkpoint} holds nothing"
    return {str(file.relative_to(checkpoint)): file.read_bytes() for file in files}


def _command(options: argparse.Namespace, shards: str, out: Path) -> list[str]:
    train = [shards, str(out), "--steps", str(options.steps), *TINY]
    train += ["--zero_stage", str(options.zero_stage)]
    if options.processes == 1:
        return [sys.executable, "-m", "vidfill.train", *train]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(NODE)]
    processes = ["--num_processes", str(options.processes), "--main_process_port", "0"]
    return [*launcher, *processes, "-m", "vidfill.train", *train]


def _make_shards(folder: Path) -> Path:
    synth(SynthConfig(folder / "videos", clips=4, validation=1, size=32, frames=20))
    encode(EncodeConfig(folder / "videos", folder / "shards", autoencoder="shipped"))
    return folder / "shards"


HEADER = (
    "| moment | seconds of the life | being written | newest whole | continued from |\n"
    "| --- | --- | --- | --- | --- |"
)


def _row(kill: Kill) -> str:
    step = f"step {kill.written}" if kill.written else ""
    return (
        f"| {kill.moment} | {kill.seconds:.1f} | {step} | step {kill.whole} | "
        f"step {kill.continued} |"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the status is 1 if a run lost more than allowed, or ended differently."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400, help="of the whole run")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--zero_stage", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--shards", help="train on these (default: a few synthetic ones)")
    options = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    print(f"`python -m benchmarks.soak {shlex.join(words)}`".replace(" `", "`"))
    print(f"{describe(torch.device('cpu'))}\n")
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        kills, same = soak(options, Path(folder))
    lost = [kill for kill in kills if not kill.kept]
    print(
        f"\n{len(kills)} kills, {sum(kill.written > 0 for kill in kills)} of them while a "
        f"checkpoint was being written; {len(lost)} lost more than the steps since the last "
        f"checkpoint; the weights, moments and averages at the end are "
        f"{'bit-identical to' if same else 'NOT those of'} an undisturbed run's."
    )
    return 0 if same and not lost and len(kills) == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
