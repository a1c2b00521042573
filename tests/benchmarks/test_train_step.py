"""The step's benchmark at its smallest: its parts add up, and its limits are what it says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks import train_step
from benchmarks.train_step import Setting, count_products, forward, roofline, start_training

ROOT = Path(__file__).parents[2]
SMALLEST = ["--rounds", "2", "--frames", "2", "--latent", "8", "--threads", "1"]
DOCUMENTED = re.findall(
    r"^ {4}python -m benchmarks\.train_step(.*)$",
    (ROOT / "docs" / "benchmarks.md").read_text(),
    flags=re.MULTILINE,
)
PEERS = {"UNet3DConditionModel", "UNetSpatioTemporalConditionModel"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.train_step", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [options for options in DOCUMENTED if "cuda" not in options] or [""]
)
def test_the_parts_of_a_step_add_up_and_are_compared_with_the_limit(options: str, tmp_path) -> None:
    written = tmp_path / "figures.json"
    networks = ["--networks", "tiny", *sorted(PEERS)]
    done = run(*shlex.split(options), *SMALLEST, *networks, "--json", str(written))
    assert done.returncode == 0, done.stderr
    found = json.loads(written.read_text())
    assert set(found["networks"]) == {"tiny", *PEERS}
    rate = found["matrix_rate"]
    for row in found["networks"].values():
        seconds = row["seconds"]
        parts = [seconds[part] for part in ("forward", "backward", "optimizer")]
        # Of two rounds the median is the mean, and that of a sum the sum of those of its parts.
        assert sum(part[0] for part in parts) == pytest.approx(seconds["step"][0], rel=1e-6)
        for median, least, most in [*parts, seconds["step"], row["of_limit"]]:
            assert 0 < least <= median <= most
        least_share = row["operations"] / rate[2] / seconds["step"][2]
        assert least_share <= row["of_limit"][0] <= row["of_roofline"][0]
        assert row["peak_bytes"] > 3 * 4 * row["parameters"]  # with gradients and moments
    assert set(found["ratios"]["tiny"]) == PEERS
    for said in ("tiny | 1.97 M", "peak memory", "torch 2.", " ".join(SMALLEST)):
        assert said in done.stdout


def test_operations_are_those_that_torch_counts_given_a_formula_for_the_cpus_attention() -> None:
    setting = Setting(torch.device("cpu"), "float32", False, 1, False, 1, 3, 8)
    training = start_training("tiny", setting)
    products = count_products(training, setting)
    formulas = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
            lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
        ),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    forward(training, setting, training.network)  # attention tests its backend when it first runs
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        forward(training, setting, training.network).backward()
    assert counter.get_flop_counts()["Global"].keys() >= formulas.keys()
    assert counter.get_total_flops() == sum(products.operations)
    assert roofline(products, 1.0, 1e30) == sum(products.operations)
    assert roofline(products, 1e30, 1.0) == sum(products.moved)


def test_a_wrong_size_or_device_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_step.main(["--rounds", "0"])
    assert "rounds is 0: give 1 or more" in capsys.readouterr().err
    assert train_step.main(["--device", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "device is 'nowhere'" in said
