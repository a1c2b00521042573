from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from vidfill.errors import BadInput
from vidfill.sampling.metrics.clip import Judges, describe_clip, load_judges, score_clip
from vidfill.sampling.metrics.frechet import frechet_distance
from vidfill.sampling.metrics.i3d import I3d
from vidfill.sampling.metrics.lpips import Lpips
from vidfill.sampling.metrics.pixels import composite
from vidfill.sampling.sweep.measures import MEASURES

CPU = torch.device("cpu")
RANDOM = np.random.default_rng(0)
TRUTH = RANDOM.integers(0, 256, (10, 66, 70, 3), dtype=np.uint8)
MASK = np.zeros(TRUTH.shape[:3], np.uint8)
MASK[:, 16:48, 16:32] = 1
RESULT = composite(TRUTH, RANDOM.integers(0, 256, TRUTH.shape, dtype=np.uint8), MASK)


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Judges:
    """Networks of random weights, by way of their files."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    lpips = Lpips()
    for tensor in (lpips.shift, lpips.scale, *lpips.lin):
        nn.init.ones_(tensor)
    save_file(lpips.state_dict(), folder / "lpips.safetensors")
    save_file(I3d().state_dict(), folder / "i3d.safetensors")
    return load_judges(f"{folder}/lpips.safetensors", f"{folder}/i3d.safetensors", CPU)


def test_without_networks_their_columns_are_absent() -> None:
    judges = load_judges("", "", CPU)
    assert judges == Judges()
    scores = score_clip(RESULT, TRUTH, MASK, judges)
    assert "psnr" in scores and "lpips" not in scores
    assert np.isfinite(list(scores.values())).all()
    assert describe_clip(RESULT, judges) == {}


def test_with_lpips_its_column_is_there_and_no_other_changes(judges: Judges) -> None:
    scores = score_clip(RESULT, TRUTH, MASK, judges)
    assert scores.pop("lpips") > 0
    assert scores == score_clip(RESULT, TRUTH, MASK, Judges())


def test_every_score_of_a_clip_is_a_measure_of_a_completion(judges: Judges) -> None:
    columns = {measure.column for measure in MEASURES if measure.of == "completion"}
    costs_and_counts = {"nfe", "seconds_per_clip", "clips"}
    assert set(score_clip(RESULT, TRUTH, MASK, judges)) == columns - costs_and_counts


def test_the_truth_has_no_error_but_its_own_along_its_motion(judges: Judges) -> None:
    scores = score_clip(TRUTH, TRUTH, MASK, judges)
    perfect = {"psnr": 100, "psnr_hole": 100, "ssim": 1, "ssim_65": 1}
    errors = [name for name in scores if name not in perfect and name != "warping_error"]
    assert {name: scores[name] for name in perfect} == pytest.approx(perfect)
    assert {name: scores[name] for name in errors} == dict.fromkeys(errors, 0)


@pytest.mark.slow
def test_i3d_describes_a_clip_for_both_distances(judges: Judges) -> None:
    ours, truth = describe_clip(RESULT, judges), describe_clip(TRUTH, judges)
    assert {name: features.shape for name, features in ours.items()} == {
        "fvd": (400,),
        "vfid": (1024,),
    }
    for name in ours:
        pair = np.stack([ours[name], truth[name]])
        assert frechet_distance(pair, pair) == pytest.approx(0, abs=1e-6)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.safetensors"):
        load_judges(f"{tmp_path}/none.safetensors", "", CPU)
