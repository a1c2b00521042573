"""However many processes train, and whatever ZeRO shares out among them, they train alike.

The processes are real, and talk over gloo. One start makes many runs (worker.py).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vidfill.train.preflight.plan import traffic

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
]  # the first test waits for the runs of all

WORKER = Path(__file__).with_name("worker.py")
STAGES = (0, 1, 2, 3)
# Five clips are three and two of two processes: the second has a pad, and halves are unequal.
TINY = [
    *("--batch_size", "5", "--optimizer.learning_rate", "2e-3", "--optimizer.warmup", "2"),
    *("--model.block_out_channels", "[16]", "--model.head_channels", "8"),
    *("--model.norm_groups", "8", "--optimizer.clip", "0.5", "--optimizer.ema_decays", "[0.3,0.2]"),
]
POISON = {"2": "latents", "4": "loss", "5": "gradient"}
ALLOW = ["--max_skipped", "2"]
# float16's own runs: a scale that is too high at first, and one that has done well for long.
TOO_HIGH = {"scale": 2.0**22}
RIPE = {"scale": 4.0, "scale_age": 1999}


class Result(NamedTuple):
    """What a run left."""

    said: dict[str, Any]
    tensors: dict[str, Tensor]
    not_finite: list[dict[str, Any]]


class Runs:
    """The runs of one start, by name."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.shards = folder, shards
        self.wanted: list[dict[str, Any]] = []
        (folder / "out").mkdir()

    def add(self, name: str, steps: int, *options: str, **others: Any) -> None:
        """Wish for a run."""
        argv = [str(self.shards), str(self.folder / name), "--steps", str(steps), *TINY, *options]
        self.wanted.append({"name": name, "argv": argv, **others})

    def start(self, processes: int) -> None:
        """Make the runs."""
        (self.folder / "runs.json").write_text(json.dumps(self.wanted))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command = [*launcher, str(processes)] if processes > 1 else []
        subprocess.run(
            [sys.executable, *command, str(WORKER), str(self.folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
            timeout=600,
        )

    def __getitem__(self, name: str) -> Result:
        path = self.folder / "out" / name
        listed = self.folder / name / "not-finite.jsonl"
        lines = listed.read_text().splitlines() if listed.is_file() else []
        return Result(
            json.loads(path.with_suffix(".json").read_text()),
            load_file(path.with_suffix(".safetensors")),
            sorted(map(json.loads, lines), key=lambda line: (line["step"], line["rank"])),
        )


@pytest.fixture(scope="module")
def one(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What one process does, without DeepSpeed and without accumulation."""
    runs = Runs(tmp_path_factory.mktemp("one"), shards)
    runs.add("poisoned", 6, *ALLOW, poison=POISON)
    for precision in ("bfloat16", "float16"):
        runs.add(precision, 3, "--precision", precision)
    runs.start(processes=1)
    return runs


@pytest.fixture(scope="module")
def two(shards: Path, one: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The same and more on two processes, in every ZeRO stage."""
    runs = Runs(tmp_path_factory.mktemp("two"), shards)
    save_random(one, runs)
    half = ["--precision", "float16"]
    for stage in STAGES:
        zero = ["--zero_stage", str(stage)]
        halves = [*zero, "--gradient_accumulation", "2", *ALLOW]
        runs.add(f"poisoned {stage}", 6, *halves, poison=POISON, count=1)
        runs.add(f"random {stage}", 0, *zero, **{"from": "random"})
        runs.add(f"too high {stage}", 3, *zero, *half, set=TOO_HIGH)
    for stage in (0, 3):
        zero = ["--zero_stage", str(stage)]
        runs.add(f"ripe {stage}", 2, *zero, *half, *ALLOW, set=RIPE, poison={"0": "gradient"})
        runs.add(f"bfloat16 {stage}", 3, *zero, "--precision", "bfloat16")
    runs.add("whole", 10, *ALLOW, poison={"2": "latents"})
    runs.add("part 6", 6, *ALLOW, poison={"2": "latents"})
    runs.add("part 10", 10, *ALLOW, **{"from": "part 6"})
    for step, stage in enumerate((1, 2, 3, 0), start=7):
        before = "part 6" if step == 7 else f"moved {step - 1}"
        runs.add(f"moved {step}", step, "--zero_stage", str(stage), *ALLOW, **{"from": before})
    runs.start(processes=2)
    return runs


def save_random(one: Runs, runs: Runs) -> None:
    """Make up a state that looks like one of `one`'s."""
    source = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(tensor.shape, generator=source)
        for name, tensor in one["poisoned"].tensors.items()
    }
    save_file(tensors, runs.folder / "out" / "random.safetensors")
    shutil.copy(one.folder / "out" / "poisoned.json", runs.folder / "out" / "random.json")


def assert_alike(first: Result, second: Result, tolerance: float) -> None:
    """Losses and norms where they are finite, and all tensors."""
    for measured in ("losses", "norms"):
        ours, theirs = (finite(result.said[measured]) for result in (first, second))
        assert ours == pytest.approx(theirs, rel=tolerance, nan_ok=True)
    assert_alike_tensors(first, second, tolerance)


def assert_alike_tensors(first: Result, second: Result, tolerance: float) -> None:
    """Relative to the norm of each."""
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        expected = second.tensors[name]
        assert (tensor - expected).norm() <= tolerance * expected.norm(), name


def finite(values: list[float]) -> list[float]:
    """What is not finite is alike."""
    return [value if math.isfinite(value) else math.nan for value in values]


def assert_same_bits(first: Result, second: Result) -> None:
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_like_one(stage: int, one: Runs, two: Runs) -> None:
    """In halves of their shares, past steps that are not finite, and with gradients clipped.

    Seen: losses and norms within 3e-7, tensors within 3e-5 (biases, which Adam moves by their
    gradient's sign where it is small).
    """
    result = two[f"poisoned {stage}"]
    assert max(filter(math.isfinite, result.said["norms"])) > 0.5, "nothing is clipped"
    assert_alike(result, one["poisoned"], 1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_not_finite_reaches_nothing_and_is_written_down(
    stage: int, one: Runs, two: Runs
) -> None:
    """NaN in a clip, an infinite loss with a finite gradient, a gradient that is NaN alone."""
    result = two[f"poisoned {stage}"]
    assert all(tensor.isfinite().all() for tensor in result.tensors.values())
    # The sixth step was left out too, and was one too many.
    assert list(map(math.isfinite, result.said["norms"])) == [True, True, False, True, False]
    assert (result.said["counters"]["step"], result.said["counters"]["skipped"]) == (6, 3)
    assert "the gradient of step 6 is not finite, and max_skipped is 2" in result.said["refusal"]
    listed = [
        (line["step"], line["rank"], line["not_finite"], len(line["clips"]))
        for line in result.not_finite
    ]
    # The second process holds two clips of the five. Of a gradient nobody knows whose it is.
    assert listed[:2] == [(3, 1, "loss", 1), (5, 1, "loss", 2)]
    assert listed[2:] == [(6, 0, "gradient", 3), (6, 1, "gradient", 2)]
    together = sorted(result.not_finite[2]["clips"] + result.not_finite[3]["clips"])
    assert together == sorted(one["poisoned"].not_finite[2]["clips"])


def test_every_process_holds_the_same_state(two: Runs) -> None:
    for run in two.wanted:
        assert len(set(two[run["name"]].said["digests"])) == 1, run["name"]


@pytest.mark.parametrize("name", ["poisoned", "too high"])
@pytest.mark.parametrize("stage", STAGES)
def test_averages_equal_exact_ones(name: str, stage: int, two: Runs) -> None:
    """In halves, past skipped steps and second tries. Seen: 6e-8, the last bit of a weight."""
    said = two[f"{name} {stage}"].said
    assert max(said["error_of_average_0"], said["error_of_average_1"]) < 3e-7


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_written_is_read(stage: int, two: Runs) -> None:
    written, read = load_file(two.folder / "out" / "random.safetensors"), two[f"random {stage}"]
    for name, tensor in read.tensors.items():
        kind, _, parameter = name.partition("/")
        source = f"average_1/{parameter}" if kind == "network" else name
        assert torch.equal(tensor, written[source]), name


def test_a_run_continues_with_the_same_bits(two: Runs) -> None:
    assert_same_bits(two["part 10"], two["whole"])
    assert two["part 10"].said["losses"] == two["whole"].said["losses"][6:]


def test_a_state_moves_through_all_stages_and_goes_on(two: Runs) -> None:
    """Plain → ZeRO-1 → 2 → 3 → plain, a step in each. Seen: losses within 3e-7."""
    whole = two["whole"]
    losses = [loss for step in (7, 8, 9, 10) for loss in two[f"moved {step}"].said["losses"]]
    assert losses == pytest.approx(whole.said["losses"][6:], rel=1e-4)
    assert_alike_tensors(two["moved 10"], whole, 1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_scale_that_is_too_high_costs_float16_no_batch(stage: int, one: Runs, two: Runs) -> None:
    """Seen: losses within 2e-6 of those at another scale, norms within 6e-5."""
    result = two[f"too high {stage}"].said
    assert result["counters"]["skipped"] == 0
    assert result["scales"][0] < TOO_HIGH["scale"]
    assert result["counters"]["scale_age"] == 3
    for measured in ("losses", "norms"):
        assert result[measured] == pytest.approx(one["float16"].said[measured], rel=1e-3)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_bad_gradient_leaves_the_scale_and_two_thousand_updates_double_it(
    stage: int, two: Runs
) -> None:
    result = two[f"ripe {stage}"].said
    assert result["scales"] == [4.0, 8.0]
    assert not math.isfinite(result["norms"][0])
    assert (result["counters"]["skipped"], result["counters"]["scale_age"]) == (1, 0)


@pytest.mark.parametrize("stage", [0, 3])
def test_bfloat16_is_used_and_is_the_same_on_two_processes(
    stage: int, one: Runs, two: Runs
) -> None:
    """Seen: norms within 2e-4; those of float32 are within 3e-4."""
    result = two[f"bfloat16 {stage}"].said
    assert result["losses"] == pytest.approx(one["bfloat16"].said["losses"], rel=1e-4)
    assert result["norms"] == pytest.approx(one["bfloat16"].said["norms"], rel=1e-3)
    assert result["norms"][0] != pytest.approx(one["poisoned"].said["norms"][0], rel=1e-5)


def test_a_good_step_shares_nothing_but_its_gradient(two: Runs) -> None:
    assert [name for name, _ in two["poisoned 0"].said["exchanged"]] == ["gloo:all_reduce"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_plan_counts_what_a_step_in_halves_exchanges(stage: int, two: Runs) -> None:
    """Of two processes an exchange moves half of all weights through each.

    Seen: equal but for one number, which is the gradient's norm.
    """
    said = two[f"poisoned {stage}"].said["exchanged"]
    weights = [t for name, t in two["poisoned 0"].tensors.items() if name.startswith("weights/")]
    reduced = sum(size for name, size in said if name == "gloo:all_reduce")
    gathered = sum(size for name, size in said if name == "gloo:all_gather")
    # Over gloo torch reduces to shares, which is one exchange, by reducing to all.
    exchanges = reduced * (1 if stage == 3 else 2) / 2 + gathered
    planned = traffic([weight.nbytes for weight in weights], stage, parts=2, gpus=2)
    assert 4 * exchanges == pytest.approx(planned, rel=1e-4)


def test_three_processes_continue_with_the_same_bits(shards: Path, tmp_path: Path) -> None:
    """The order in which three are added depends on how the gradient is cut for the network."""
    runs = Runs(tmp_path, shards)
    runs.add("whole", 3)
    runs.add("part 1", 1)
    runs.add("part 3", 3, **{"from": "part 1"})
    runs.start(processes=3)
    assert_same_bits(runs["part 3"], runs["whole"])
