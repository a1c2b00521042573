"""`vidfill <verb>`: finds the verb's job and hands over the rest of the command line."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import interrupts
from .errors import mute, suggest

VERBS = {
    "synth": ("data.synth.run", "make collision videos to try everything on"),
    "encode": ("data.encode.run", "videos -> shards of latents"),
    "verify": ("data.verify.run", "are shards what was written? mends them too"),
    "doctor": ("train.preflight.doctor", "what would go wrong with a training run"),
    "train": ("train.loop", "shards -> a model"),
    "launch": ("launch.launch", "writes and submits the scripts of a cluster's job"),
    "export": ("train.export", "a run -> a model's folder to give away"),
    "schedule": ("sampling.schedules.show", "what a schedule does and costs, before it runs"),
    "sweep": ("sampling.sweep.run", "a model + held-out shards -> schedules compared"),
    "inpaint": ("sampling.inpaint.run", "a video + a mask -> the video with its holes filled"),
    "report": ("sampling.report.run", "a sweep -> a page and figures"),
    "demo": ("demo", "all of it, on synthetic videos, in minutes"),
}

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
        lines = [f"  {verb:8} {summary}" for verb, (_, summary) in VERBS.items()]
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
    module = importlib.import_module(f".{VERBS[verb][0]}", package=__package__)
    return module.main(rest)


if __name__ == "__main__":
    run()
