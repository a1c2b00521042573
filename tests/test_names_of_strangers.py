"""A name that a record gives leads nowhere: each record × each way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError
from vidfill.data.encode.plan import ShardPlan, read_splits
from vidfill.data.encode.sources import _read_names
from vidfill.errors import BadInput
from vidfill.modeling.autoencoder import WeightFiles
from vidfill.modeling.run_folder import CheckpointRecord
from vidfill.sampling.sweep.results import SweepRecord

SWEEP = Path(__file__).parent / "sampling" / "sweep" / "sweep_of_0.1" / "sweep.json"
NAMES = ["../mine/train", "/etc/passwd", "..", "a/../../b", "", "a\0b"]


def plan(label: str = "a.mp4", split: str = "train", masks: str | None = None) -> str:
    row = [label, "a", split, masks, False, 9, [8, 16, 24, "25"], ""]
    return json.dumps({"sources": [row], "shards": {split: [[[0, 0, None]]]}})


def read_plan(text: str) -> ShardPlan:
    return ShardPlan.from_json(text, Path("v"), None, 4, 4)


def sweep(**fields: object) -> SweepRecord:
    return SweepRecord.model_validate_json(json.dumps(json.loads(SWEEP.read_text()) | fields))


RECORDS: dict[str, Callable[[str], object]] = {
    "a video of plan.json": lambda name: read_plan(plan(label=name)),
    "a split of plan.json": lambda name: read_plan(plan(split=name)),
    "masks of plan.json": lambda name: read_plan(plan(masks=name)),
    "a file of a checkpoint": lambda name: CheckpointRecord(files={name: ""}, digest=""),
    "a file of a model's weights": lambda name: WeightFiles(weight_map={"w": name}),
    "an example of sweep.json": lambda name: sweep(kept=[name]),
    "a baseline of sweep.json": lambda name: sweep(baselines=[name]),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("read", RECORDS.values(), ids=RECORDS)
def test_a_name_that_leads_out_is_refused(read: Callable[[str], object], name: str) -> None:
    read("inside")
    with pytest.raises((ValueError, ValidationError), match=r"leads|field"):
        read(name)


@pytest.mark.parametrize("name", [name for name in NAMES if name.strip()])
def test_a_list_of_videos_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "train.txt").write_text(f"bear\n{name}\n")
    with pytest.raises(BadInput, match="leads"):
        _read_names(tmp_path / "train.txt")


def test_a_plans_splits_are_read_as_the_plan_is(tmp_path: Path) -> None:
    assert read_splits(tmp_path / "plan.json") == []
    (tmp_path / "plan.json").write_text(plan())
    assert read_splits(tmp_path / "plan.json") == ["train"]
    (tmp_path / "plan.json").write_text(plan(split="../mine/train"))
    with pytest.raises(ValueError, match="leads out"):
        read_splits(tmp_path / "plan.json")
