"""A report's page: HTML that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from ..sweep.baselines import BASELINES
from ..sweep.measures import best_of, front_of
from ..sweep.results import Sweep
from .drawings import Drawing
from .markup import render
from .players import make_player
from .tables import (
    answer,
    find_contenders,
    rounded,
    tabulate_answer,
    tabulate_comparison,
    tabulate_results,
)


def render_page(sweep: Sweep, drawings: Sequence[Drawing], pictures: Sequence[bytes]) -> str:
    """The page's HTML, with every picture inside it."""
    (fill,) = (row for row in sweep.baselines if row.name == "fill")
    leader = best_of(sweep.schedules, sweep.lead)
    contenders = find_contenders(sweep)
    titles = {measure.column: measure.title for measure in sweep.measures}
    return render(
        "page.html.j2",
        sweep=sweep,
        gain=sweep.best["psnr_hole"] - fill["psnr_hole"],
        leader=leader,
        leader_value=rounded(leader, sweep.lead) if leader else "",
        front=front_of(sweep.schedules, "nfe", sweep.lead),
        results=tabulate_results(sweep),
        verdicts=tabulate_answer(sweep, contenders) if contenders else None,
        answer=answer(sweep, contenders),
        comparison=tabulate_comparison(sweep),
        figures=[
            (drawing, base64.b64encode(picture).decode())
            for drawing, picture in zip(drawings, pictures, strict=True)
        ],
        examples=[make_player(sweep, example) for example in sweep.about.kept],
        left_out=[
            f"{count} examples of {titles.get(column, column)}"
            for column, count in sweep.about.without_value.items()
        ],
        meanings={measure.title: measure.meaning for measure in sweep.measures},
        baselines=BASELINES,
    )
