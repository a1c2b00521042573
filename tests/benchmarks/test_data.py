from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import data

ROOT = Path(__file__).parents[2]
Measured = tuple[str, dict[str, Any]]  # what is printed, and the figures
SMALLEST = shlex.split(
    "--examples 256 --shards 16 --latent 4 --rounds 1 --seconds 0.01 --rate 200 --minutes 0.02 "
    "--clips 1"
)
DOCUMENTED = re.findall(
    r"^ {4}python -m benchmarks\.data(.*)$",
    (ROOT / "docs" / "benchmarks.md").read_text(),
    flags=re.MULTILINE,
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.data", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """What the smallest setting prints, and its figures."""
    file = tmp_path_factory.mktemp("benchmark") / "figures.json"
    done = run("--json", str(file), *SMALLEST)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


@pytest.mark.slow
def test_every_reader_is_compared_with_webdataset_and_the_limit(
    measured: tuple[str, dict[str, Any]],
) -> None:
    printed, figures = measured
    rates = figures["examples_per_second"]
    expected = {
        "vidfill",
        "webdataset",
        "webdataset, our decoder",
        "copy limit",
        "copy limit, remapped",
    }
    if importlib.util.find_spec("litdata"):
        expected |= {"litdata", "litdata, one flat tensor"}
    assert expected <= rates.keys()
    assert all(rate > 0 for rate in rates.values())
    ratio = rates["vidfill"] / rates["webdataset"]
    assert figures["ratio_to_webdataset"] == pytest.approx(ratio)
    assert figures["readers"]["copy limit"]["of_limit"] == [1, 1, 1]
    for said in (*expected, "torch 2.", "webdataset 1.", "core(s)", " ".join(SMALLEST)):
        assert said in printed


@pytest.mark.slow
def test_a_batch_mixes_more_shards_than_webdatasets_buffer(
    measured: tuple[str, dict[str, Any]],
) -> None:
    _, figures = measured
    rows = {(row["order"], row["examples"]): row for row in figures["shuffle"]}
    assert rows["uniform", 10**6]["distance"] < 0.01
    assert rows["vidfill", 10**4]["distance"] < 0.05
    for examples in (10**4, 10**6):
        ours, theirs = rows["vidfill", examples], rows["webdataset", examples]
        assert ours["distance"] < theirs["distance"]
        assert ours["least"] > theirs["least"]
        assert ours["shards_in_batch"] > theirs["shards_in_batch"]


@pytest.mark.slow
def test_the_slow_server_and_encode_are_measured(measured: Measured) -> None:
    _, figures = measured
    server = figures["server"]
    assert 0 <= server["waited"] < server["elapsed"]
    sent = 200 * server["dataset_megabytes"] / (3 * 256)  # MB that 200 examples are
    assert server["server_megabytes_per_second"] == pytest.approx(2 * sent)
    assert [row["precision"] for row in figures["encode"]] == ["float32", "bfloat16"]
    for row in figures["encode"]:
        assert row["clips_per_second"] > 0
        assert row["busy"].keys() == {"decode", "masks", "autoencoder", "write"}


@pytest.mark.slow
@pytest.mark.parametrize("options", DOCUMENTED)
def test_documented_command_prints_its_tables(options: str) -> None:
    done = run(*shlex.split(options), *SMALLEST, "--parts", "shuffle")
    assert done.returncode == 0, done.stderr
    assert "| 10,000 | 20 | vidfill |" in done.stdout


@pytest.mark.slow
def test_figures_alone_are_json() -> None:
    done = run("--parts", "shuffle", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() == {"shuffle", "environment", "command"}


def test_a_shuffle_in_small_mixes_as_a_uniform_permutation_does() -> None:
    judged = data.judge(data.our_order(10**4, 20), 10**4)
    assert judged.distance < 0.05
    assert judged.shards_in_batch > 16
    unshuffled = data.judge(data.divide(np.arange(10**4), 500), 10**4)
    assert unshuffled.distance > 0.99
    assert (unshuffled.least, unshuffled.median) == (1, 1)
