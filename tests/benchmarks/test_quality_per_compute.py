"""The quality benchmark at its smallest, and what it reads off hand-made curves."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks import quality_per_compute
from benchmarks.quality_per_compute import PEERS, compare, mean_curve, time_to_reach

ROOT = Path(__file__).parents[2]
OURS = "vidfill small"
NETWORKS = [OURS, "UNet3DConditionModel", "UNetSpatioTemporalConditionModel"]
# In bfloat16 the CPU's convolution from 2×2 to 1×1 places, of which these clips have one, gives
# gradients that are not finite.
SMALLEST = shlex.split(
    "--budget 0.6 --tuning 0.05 --batch 1 --clips 1 --points 3 --rates 1e-4 3e-4 "
    "--precision float32"
)
DOCUMENTED = re.findall(
    r"^ {4}(?:OMP_NUM_THREADS=1 )?python -m benchmarks\.quality_per_compute SHARDS OUT(.*)$",
    (ROOT / "docs" / "benchmarks.md").read_text(),
    flags=re.MULTILINE,
)


class Measured(NamedTuple):
    """A whole run at the smallest setting."""

    arguments: list[str]
    out: Path
    printed: str


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.quality_per_compute", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def measured(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    out = tmp_path_factory.mktemp("quality") / "out"
    arguments = [str(shards), str(out), *shlex.split(DOCUMENTED[0]), *SMALLEST]
    done = run(*arguments, "--seeds", "0")
    assert done.returncode == 0, done.stderr
    return Measured(arguments, out, done.stdout)


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_every_network_has_a_curve_over_its_own_training_time(measured: Measured) -> None:
    found = read(measured.out)
    assert [each["network"] for each in found["runs"]] == NETWORKS
    assert [each["rate"] for each in found["tuning_runs"]] == [1e-4] * 3 + [3e-4] * 3
    for each in found["runs"]:
        seconds, steps, losses = zip(*each["points"], strict=True)
        assert (seconds[0], steps[0]) == (0, 0)
        assert seconds == tuple(sorted(seconds)) and seconds[-1] >= 0.6
        assert steps == tuple(sorted(steps)) and steps[-1] > 0
        assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.slow
def test_networks_are_of_one_size_and_train_at_the_best_rate_of_the_grid(
    measured: Measured,
) -> None:
    found = read(measured.out)
    for name in NETWORKS:
        figures = found["networks"][name]
        assert figures["parameters"] == pytest.approx(10e6, rel=0.07)
        tried = {
            each["points"][-1][2]: each["rate"]
            for each in found["tuning_runs"]
            if each["network"] == name
        }
        assert figures["tuned_rate"] == tried[min(tried)]
        assert f"| {name} | {figures['parameters'] / 1e6:.2f} M |" in measured.printed
    assert set(found["reached"]) == set(NETWORKS[1:])
    for peer, figures in found["reached"].items():
        assert figures["loss"] == found["networks"][peer]["losses"][0]
        assert figures["share_by_seed"] == [figures["share"]]
        assert peer in measured.printed
    assert (measured.out / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_that_diverged_is_repeated_at_the_next_lower_rate_and_kept(
    measured: Measured,
) -> None:
    file = measured.out / "rounds" / "seed-0.json"
    runs = json.loads(file.read_text())
    held, diverged, at_lowest = runs
    for each, rate in zip(runs, (3e-4, 3e-4, 1e-4), strict=True):
        each["rate"] = rate
        lowest = min(loss for _, _, loss in each["points"][:-1])
        each["points"][-1][2] = lowest * (1.24 if each is held else 1.26)
    file.write_text(json.dumps(runs))
    done = run(*measured.arguments, "--seeds", "0")
    assert done.returncode == 0, done.stderr
    found = read(measured.out)
    again = found["runs"][1]
    assert found["diverged_runs"] == [diverged]
    assert found["runs"] == [held, again, at_lowest]
    assert (again["network"], again["rate"], again["seed"]) == (NETWORKS[1], 1e-4, 0)
    assert again["points"][0] == diverged["points"][0] and again["points"][-1][0] >= 0.6
    assert found["networks"][NETWORKS[1]]["losses"] == [again["points"][-1][2]]
    assert re.findall(r"(\w+) diverged at the rate (\S+) with seed 0.*, (.*)", done.stdout) == [
        (NETWORKS[1], "0.0003", "and was repeated at a lower one"),
        (NETWORKS[2], "0.0001", "the lowest of the grid"),
    ]


@pytest.mark.slow
def test_a_further_seed_runs_alone_and_finished_runs_stay(measured: Measured) -> None:
    before = read(measured.out)
    done = run(*measured.arguments, "--seeds", "0", "1")
    assert done.returncode == 0, done.stderr
    after = read(measured.out)
    assert after["tuning_runs"] == before["tuning_runs"]
    assert after["runs"][:3] == before["runs"]
    assert after["diverged_runs"] == before["diverged_runs"]
    assert [each["seed"] for each in after["runs"]] == [0, 0, 0, 1, 1, 1]
    assert [len(after["networks"][name]["losses"]) for name in NETWORKS] == [2, 2, 2]


@pytest.mark.slow
def test_another_setting_in_the_same_folder_is_refused_in_one_line(measured: Measured) -> None:
    done = run(*measured.arguments, "--seeds", "0", "--budget", "0.7")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "budget was 0.6, now 0.7" in done.stderr


def test_times_are_read_off_the_lines_between_points() -> None:
    curve = [(0.0, 0, 1.0), (10.0, 5, 0.6), (20.0, 10, 0.7), (30.0, 15, 0.4)]
    times = [time_to_reach(curve, loss) for loss in (1.0, 0.8, 0.6, 0.5, 0.4)]
    # At 0.6 the first time counts, though the loss is higher again later.
    assert times == pytest.approx([0, 5, 10, 20 + 10 * 2 / 3, 30])
    assert time_to_reach(curve, 0.39) is None
    better = {"points": [(0.0, 0, 0.5), (12.0, 7, 0.35)]}
    assert mean_curve([{"points": curve[:2]}, better]) == [(0.0, 0, 0.75), (11.0, 6, 0.475)]


def test_the_network_that_learns_faster_reaches_the_others_final_loss() -> None:
    slow = [(0.0, 0, 1.0), (30.0, 3, 0.75)]
    fast = [(0.0, 0, 1.0), (32.0, 9, 0.5)]
    for found in compare({OURS: fast, **dict.fromkeys(PEERS, slow)}, 30.0).values():
        assert found == {"loss": 0.75, "seconds": 16, "share": 16 / 30, "share_of_peer": None}
    for found in compare({OURS: slow, **dict.fromkeys(PEERS, fast)}, 30.0).values():
        assert found == {"loss": 0.5, "seconds": None, "share": None, "share_of_peer": 16 / 30}


@pytest.mark.slow
def test_the_plan_trains_and_writes_nothing(shards: Path, tmp_path: Path) -> None:
    done = run(str(shards), str(tmp_path / "out"), *SMALLEST, "--plan")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("s per step") == 3 and "minutes in all" in done.stdout
    assert not (tmp_path / "out").exists()


def test_processor_time_of_many_threads_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        quality_per_compute.main(["shards", "out", "--processor-time", "--threads", "2"])
    assert end.value.code == 2
    assert "give those, or leave it out" in capsys.readouterr().err
