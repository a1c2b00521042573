"""A finished sweep as TensorBoard shows it: quality by NFE, HParams, and the clips' frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard.summary import hparams

from ...files import aside
from ..schedules.language import parse
from .measures import Row
from .results import Sweep


def write_board(sweep: Sweep) -> None:
    """Write OUT/tensorboard, unless it is there.

    The runs schedules/NAME have each schedule's and baseline's values, hyperparameters, and the
    frames of the clips that were kept, side by side; the runs by_nfe/KIND join the schedules of one
    solver and the same moves. The step of a value is its NFE.
    """
    out = sweep.folder / "tensorboard"
    if out.exists():
        return
    with aside(out) as partial:
        for row in (*sweep.baselines, *sweep.schedules):
            _write_schedule(sweep, row, partial / "schedules" / sweep.slug(row.name))
        for kind, rows in _kinds(sweep.schedules).items():
            writer = FileWriter(str(partial / "by_nfe" / kind))
            for row in rows:
                _write_values(sweep, row, writer)
            writer.close()
        for folder in ("truth", "masked"):
            writer = FileWriter(str(partial / "clips" / folder))
            _write_strips(sweep, folder, 0, writer)
            writer.close()


def _write_schedule(sweep: Sweep, row: Row, folder: Path) -> None:
    writer = FileWriter(str(folder))
    columns = {measure.column: None for measure in sweep.measures}
    for summary in hparams(_hyperparameters(sweep, row), columns)[:2]:
        writer.add_summary(summary)
    _write_values(sweep, row, writer)
    _write_strips(sweep, sweep.slug(row.name), int(row["nfe"]), writer)
    writer.close()


def _hyperparameters(sweep: Sweep, row: Row) -> dict[str, str | int]:
    if row in sweep.baselines:
        return {"schedule": row.name, "solver": "", "steps": 0, "moves": ""}
    schedule = parse(row.name)
    solver = schedule.solver.name + schedule.solver.written_options()
    moves = "+".join(map(str, schedule.moves))
    return {"schedule": row.name, "solver": solver, "steps": schedule.steps, "moves": moves}


def _kinds(rows: Sequence[Row]) -> dict[str, list[Row]]:
    kinds: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["nfe"]):
        schedule = parse(row.name)
        solver = schedule.solver.name + schedule.solver.written_options()
        names = [solver, *(move.name for move in schedule.moves)]
        kinds.setdefault("+".join(names), []).append(row)
    return kinds


def _write_values(sweep: Sweep, row: Row, writer: FileWriter) -> None:
    summary = Summary()
    for measure in sweep.measures:
        if not math.isnan(value := row[measure.column]):
            summary.value.add(tag=measure.column, simple_value=value)
    writer.add_summary(summary, int(row["nfe"]))


def _write_strips(sweep: Sweep, folder: str, step: int, writer: FileWriter) -> None:
    size = sweep.about["clip"]
    for clip in sweep.kept:
        image = Summary.Image(
            width=size["frames"] * size["width"],
            height=size["height"],
            colorspace=3,
            encoded_image_string=sweep.strip(folder, clip).read_bytes(),
        )
        writer.add_summary(Summary(value=[Summary.Value(tag=clip, image=image)]), step)
