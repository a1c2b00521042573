"""What every job shares: its command line, its output folder, its progress, its errors."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

if TYPE_CHECKING:
    import torch

Config = TypeVar("Config")
Item = TypeVar("Item")
Result = TypeVar("Result")

PARTIAL = ".partial-"  # begins the name of what is not yet whole
LOG_EVERY = 10.0  # seconds between progress lines where there is no terminal


class BadInput(Exception):
    """One clear line for the user: the field, the value and the remedy."""


class BadInputEverywhere(BadInput):
    """Raised by every process alike: the first one says it."""


def main(
    config_class: type[Config],
    job: Callable[[Config], object],
    argv: Sequence[str] | None,
    *,
    verb: str,
    examples: str,
) -> int:
    """Parse `argv` into `config_class`, run `job`, and return the exit status.

    0 is success; 2 is bad input, or a file that the system refuses, said in one line; 130 is an
    interrupt.
    """
    config = parse(config_class, argv, verb=verb, examples=examples)
    try:
        job(config)
    except (BadInput, OSError) as error:
        _say_error(verb, error)
        return 2
    except KeyboardInterrupt:
        print(f"vidfill {verb}: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def _say_error(verb: str, error: BadInput | OSError) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if rank and isinstance(error, BadInputEverywhere):
        return
    process = f"[rank {rank}] " if rank else ""
    print(f"{process}vidfill {verb}: error: {describe(error)}", file=sys.stderr)


def describe(error: Exception) -> str:
    """What is said of an error that ends a job: the text of a BadInput, a line of any other."""
    if isinstance(error, BadInput):
        return str(error)
    # A full disk comes without the file's name, and a library's own OSError without either.
    known = [error.filename, error.strerror] if isinstance(error, OSError) else []
    said = ": ".join(str(part) for part in known if part)
    return said or str(error).partition("\n")[0] or type(error).__name__


def parse(
    config_class: type[Config], argv: Sequence[str] | None, *, verb: str, examples: str
) -> Config:
    """The command line of a job, read off its configuration.

    Required fields are positional, the others options (dotted where nested); the class's docstring
    describes the job and each field's docstring is its help. `--config FILE.yaml` and
    `--print_config` come with every job.
    """
    import argparse

    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=f"vidfill {verb}",
        description=config_class.__doc__,
        epilog=examples,
        formatter_class=_HelpFormatter(),
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="A YAML file of the options below.")
    parser.add_class_arguments(config_class, as_group=False, as_positional=True)
    words = sys.argv[1:] if argv is None else argv
    try:
        namespace = parser.parse_args(_complete_switches(words, _find_switches(config_class)))
    except argparse.ArgumentError as error:
        options = [option.lstrip("-") for option in parser._option_string_actions]
        said = _explain(str(error), options)
        _say_error(verb, BadInputEverywhere(f"{said} (`vidfill {verb} --help` lists all)"))
        sys.exit(2)
    fields = parser.instantiate(namespace)
    return config_class(
        **{field.name: fields[field.name] for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    )


def _explain(message: str, options: Sequence[str]) -> str:
    """The parser's message in one line, with the option that may have been meant."""
    said = re.sub(
        r"Expected a typing\.Literal\[(.*?)\]\.", lambda m: f"give one of {m[1]}.", message
    )
    said = re.sub(r"Expected a <class '(\w+)'>\.", r"give a value of type \1.", said)
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|ption '([\w.]+)'", message)
    if unknown:
        group = re.search(r"Group '([\w.]+)'", message)
        wrong = unknown[1] or (f"{group[1]}.{unknown[2]}" if group else unknown[2])
        near = difflib.get_close_matches(wrong, options, n=1)
        near = near or [option for option in options if option.endswith(f".{wrong}")]
        said += f": did you mean {near[0]}?" if near else ""
    return " ".join(said.split())


def _find_switches(config_class: type, prefix: str = "--") -> set[str]:
    """The options that are true or false."""
    found: set[str] = set()
    for name, kind in get_type_hints(config_class).items():
        if kind is bool:
            found.add(prefix + name)
        elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
            found |= _find_switches(kind, f"{prefix}{name}.")
    return found


def _complete_switches(words: Sequence[str], switches: Collection[str]) -> list[str]:
    """`--plan` is `--plan true`: the parser wants a value."""
    completed = []
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        completed.append(word)
        if word in switches and following.lower() not in ("true", "false", "yes", "no"):
            completed.append("true")
    return completed


def _HelpFormatter() -> type:
    import argparse

    import jsonargparse

    class HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Keeps the line breaks of the description and the examples."""

    return HelpFormatter


def claim(out: Path, verb: str, config: Any, may_change: Collection[str] = ()) -> None:
    """Take `out` for this job: make it, or find that the same command began there before.

    The configuration's own field `out` is not compared: a folder that was moved continues.

    Args:
        out: The output folder.
        verb: The job's verb.
        config: The job's configuration; recorded in `out/job.json`.
        may_change: Dotted fields that a continued job may give anew.

    Raises:
        BadInput: `out` holds anything else; nothing in it is touched.
    """
    mark = out / "job.json"
    job = {"verb": verb, "config": _record(config)}
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file; name a folder")
    before = _read_job(mark) if mark.is_file() else None
    if before:
        _refuse_another_job(out, before, job, {"out", *may_change})
    elif out.is_dir() and any(not path.name.startswith(PARTIAL) for path in out.iterdir()):
        raise BadInput(f"{out} exists and is not empty: choose another folder or remove it")
    if before != job:
        write_atomically(mark, json.dumps(job, indent=2).encode())


def locate(root: str) -> str:
    """What a record says of a place: a URL without its secrets, a folder by its whole path."""
    return hide_secrets(root) if "://" in root else str(Path(root).resolve())


def hide_secrets(text: str) -> str:
    """`text` without the user names, passwords and queries of the URLs in it."""
    return re.sub(r"\?[^\s'\")]*", "", re.sub(r"://[^/\s]*@", "://", text))


def _record(config: Any) -> dict[str, Any]:
    """A configuration as JSON has it; a path reads the same from wherever it was given."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=lambda p: str(p.resolve())))


@contextlib.contextmanager
def hold(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Be the one job that writes into a folder, for as long as this lasts.

    It holds the lock of a file there, for network file systems lock no folders, and nothing that is
    not open for writing. Those that cannot lock hold nobody up.

    Args:
        folder: It exists.
        patience: Seconds to wait for the other job's end; a lost node's lock outlives it.

    Raises:
        BadInput: another job is at work there.
    """
    path, ends = folder / "job.lock", time.monotonic() + patience
    held = _lock(path)
    if held is None and patience > 0:
        print(f"another job writes into {folder}: waiting {patience:g} s for it", file=sys.stderr)
    while held is None:
        if time.monotonic() >= ends:
            raise BadInput(f"another job writes into {folder}: let it end first")
        time.sleep(min(1.0, patience))
        held = _lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(held)


def _lock(path: Path) -> int | None:
    """The descriptor of a file that nobody else has locked; None where somebody has."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        return descriptor
    try:
        is_there = os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        is_there = False
    if is_there:
        return descriptor
    os.close(descriptor)  # of a file that its last holder has just removed
    return _lock(path)


def _read_job(mark: Path) -> dict[str, Any]:
    try:
        job = json.loads(mark.read_bytes())
    except ValueError:
        job = None
    if not (
        isinstance(job, dict)
        and isinstance(job.get("verb"), str)
        and isinstance(job.get("config"), dict)
    ):
        raise BadInput(f"{mark} was not written by vidfill: choose another folder or remove it")
    return job


def _refuse_another_job(
    out: Path, before: dict[str, Any], now: dict[str, Any], may_change: Collection[str]
) -> None:
    if before["verb"] != now["verb"]:
        raise BadInput(
            f"{out} was written by `vidfill {before['verb']}`: choose another folder or remove it"
        )
    was, wanted = _flatten(before["config"]), _flatten(now["config"])
    fixed = (was.keys() | wanted.keys()) - set(may_change)
    changed = sorted(key for key in fixed if was.get(key) != wanted.get(key))
    if changed:
        listed = ", ".join(f"{k} was {was.get(k)!r}, now {wanted.get(k)!r}" for k in changed)
        raise BadInput(
            f"{out} was begun with another configuration ({listed}): "
            "choose another folder, or give the same options to continue"
        )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def choose_device(device: str) -> torch.device:
    """The device that a name stands for: "auto" is a GPU if there is one, else the CPU.

    Raises:
        BadInput: the device does not work here.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise BadInput(f"device is {device!r}, which does not work: {first_line}") from None


def refuse_launcher(verb: str) -> None:
    """Raise BadInput where a launcher started several processes of a job that uses one."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise BadInput(
            f"WORLD_SIZE is {processes}; {verb} runs in one process: start it without a launcher"
        )


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees all of it or none."""
    with aside(path) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A place to write a file or a folder that appears at `path`, flushed, when all went well."""
    partial = path.with_name(PARTIAL + path.name)
    _remove(partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        for file in sorted(partial.rglob("*")) if partial.is_dir() else []:
            _flush(file)
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    except BaseException:
        _remove(partial)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], threads: int, at_once: int
) -> Generator[Result, None, None]:
    """`map`, by threads that stop at once when the caller does.

    Args:
        function: What each item goes through.
        items: Of any number.
        threads: That share them.
        at_once: Items under way, and results waiting, at most.
    """
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(threads)
    try:
        for first in range(0, len(items), at_once):
            yield from pool.map(function, items[first : first + at_once])
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def progress(description: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """Show how far a job is and the time left: a bar on a terminal, else a line now and then."""
    from rich.console import Console

    console = Console(stderr=True)
    shown: Progress = _Bar(console) if console.is_terminal else _Lines()
    with shown.start(description, total, unit, done):
        yield shown


class Progress:
    """What a job calls while it works; this one is silent."""

    def start(
        self, description: str, total: int, unit: str, done: int
    ) -> contextlib.AbstractContextManager[Any]:
        """Begin to show; what is returned ends it."""
        return contextlib.nullcontext()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units as done; `note` is shown beside them (a loss, a file)."""


class _Bar(Progress):
    def __init__(self, console: Any) -> None:
        from rich import progress as bars

        self._bars = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[unit]}"),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[note]}"),
            console=console,
        )

    def start(
        self, description: str, total: int, unit: str, done: int
    ) -> contextlib.AbstractContextManager[Any]:
        self._task = self._bars.add_task(
            description, total=total, completed=done, unit=unit, note=""
        )
        return self._bars

    def advance(self, count: int = 1, note: str = "") -> None:
        self._bars.update(self._task, advance=count, note=note)


class _Lines(Progress):
    def start(
        self, description: str, total: int, unit: str, done: int
    ) -> contextlib.AbstractContextManager[Any]:
        self._description, self._total, self._unit = description, total, unit
        self._first = self._done = done
        self._began = time.monotonic()
        self._said = -LOG_EVERY
        return contextlib.nullcontext()

    def advance(self, count: int = 1, note: str = "") -> None:
        self._done += count
        now = time.monotonic()
        if now - self._said < LOG_EVERY and self._done < self._total:
            return
        self._said = now
        elapsed = now - self._began
        rate = (self._done - self._first) / max(elapsed, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        print(
            f"{self._description}: {self._done}/{self._total} {self._unit}, "
            f"{_clock(elapsed)} elapsed, {_clock(left)} left {note}".rstrip(),
            file=sys.stderr,
            flush=True,
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
