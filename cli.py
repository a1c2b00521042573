"""`vidfill <verb>`: finds the verb's job and hands over the rest of the command line."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from . import interrupts
from .errors import mute, suggest

VERBS = {
    "synth": "make collision videos to try everything on",
    "encode": "videos -> shards of latents",
    "verify": "are shards what was written? mends them too",
    "doctor": "what would go wrong with a training run",
    "train": "shards -> a model",
    "launch": "writes and submits the scripts of a cluster's job",
    "export": "a run -> a model's folder to give away",
    "schedule": "what a schedule does and costs, before it runs",
    "sweep": "a model + held-out shards -> schedules compared",
    "inpaint": "a video + a mask -> the video with its holes filled",
    "report": "a sweep -> a page and figures",
    "demo": "all of it, on synthetic videos, in minutes",
}
# The module of each verb's job.
JOBS = {
    "synth": "data.synth.run",
    "encode": "data.encode.run",
    "verify": "data.verify.run",
    "doctor": "train.preflight.doctor",
    "train": "train.loop",
    "launch": "launch.launch",
    "export": "train.export",
    "schedule": "sampling.schedules.show",
    "sweep": "sampling.sweep.run",
    "inpaint": "sampling.inpaint.run",
    "report": "sampling.report.run",
    "demo": "demo",
}
# Where --help finds the options and examples of the verbs whose jobs take seconds to import.
HELP = {
    "encode": ("data.encode.settings", "EncodeConfig", "EXAMPLES"),
    "verify": ("data.verify.settings", "VerifyConfig", "EXAMPLES"),
    "doctor": ("train.config", "TrainConfig", "DOCTOR_EXAMPLES"),
    "train": ("train.config", "TrainConfig", "EXAMPLES"),
    "export": ("train.config", "ExportConfig", "EXPORT_EXAMPLES"),
    "sweep": ("sampling.sweep.settings", "SweepConfig", "EXAMPLES"),
    "inpaint": ("sampling.inpaint.settings", "InpaintConfig", "EXAMPLES"),
    "report": ("sampling.report.settings", "ReportConfig", "EXAMPLES"),
}
ASKS = ("-h", "--help", "--help_all")

USAGE = "usage: vidfill VERB …\n\n{verbs}\n\n`vidfill VERB --help` shows a verb's options.\n"


def run(*words: str) -> NoReturn:
    """What a process does that is vidfill: run a verb of the command line behind `words`."""
    interrupts.leave_at_once()
    status = main([*words, *sys.argv[1:]])
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # as of `vidfill … | head`
        mute(sys.stdout)
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack letters: "?" is shown
            stream.reconfigure(errors="replace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[0:1] == ["help"] and len(arguments) > 1:
        arguments = [arguments[1], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        lines = [f"  {verb:8} {summary}" for verb, summary in VERBS.items()]
        print(USAGE.format(verbs="\n".join(lines)))
        return 0
    if arguments[0] == "--version":
        from . import __version__

        print(f"vidfill {__version__}")
        return 0
    return _run(arguments[0], arguments[1:])


def _run(verb: str, rest: list[str]) -> int:
    if verb not in VERBS:
        print(f"vidfill: error: no verb {verb!r}; {suggest(verb, VERBS)}", file=sys.stderr)
        return 2
    asks = [word for word in rest if word in ASKS]
    if asks and verb in HELP:
        name, config_class, examples = HELP[verb]
        from . import jobs

        found = vars(_import(name))
        jobs.parse(found[config_class], asks[:1], verb=verb, examples=found[examples])
    return _import(JOBS[verb]).main(rest)


def _import(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", package=__package__)


if __name__ == "__main__":
    run()
