"""`profile`: what torch's profiler sees of some steps, for Perfetto or chrome://tracing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import BadInputEverywhere
from ...files import aside

if TYPE_CHECKING:
    import torch


def profiled_steps(text: str) -> range:
    """ "100:105" → the steps that follow 100, 101 … 104 finished ones; "" → none.

    Raises:
        BadInputEverywhere: `text` is neither.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise BadInputEverywhere(
            f"profile is {text!r}: give the first step and the one to end before, as 100:105"
        )
    return range(int(found[1]), int(found[2]))


class Profile:
    """Profiles `steps`, and writes their trace into `folder` when the last has ended.

    A step is counted by the finished ones before it.
    """

    def __init__(self, steps: range, folder: Path) -> None:
        self._steps = steps
        self._folder = folder
        self._running: torch.profiler.profile | None = None
        self._first = 0

    def step(self, finished: int) -> None:
        """Begin or end profiling after `finished` steps; called before the first step too."""
        if self._running is None and finished in self._steps:
            import torch

            self._first = finished
            self._running = torch.profiler.profile()
            self._running.start()
        elif self._running is not None and finished not in self._steps:
            self.end(finished)

    def end(self, finished: int) -> None:
        """Write what was profiled so far, if anything."""
        if self._running is None:
            return
        self._running.stop()
        path = self._folder / f"steps-{self._first}-{finished}.json.gz"
        with aside(path) as partial:
            self._running.export_chrome_trace(str(partial))
        self._running = None
