"""A job: its command line, its configuration, the output folder that it claims."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel

from . import __version__, options
from .errors import BadInput, BadInputEverywhere, describe, is_out_of_memory, say, say_error
from .files import (
    LOCK,
    PARTIAL,
    Fingerprint,
    fresh_partial_of,
    hold,
    is_same,
    remove,
    write_atomically,
    write_new,
)
from .interrupts import Interrupt, interruptible, status_of
from .records import Malformed, parse_json, read_small

Config = TypeVar("Config")

MARK = "job.json"
OLDEST = "0.1"  # the version that did not record itself
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set these
NAMED = 5  # of what differs, at most


class JobRecord(BaseModel):
    """What job.json says of the job that claimed a folder."""

    verb: str
    config: dict[str, Any]
    version: str = OLDEST  # of vidfill, when the folder was last written to
    stands_on: dict[str, Any] | None = None  # 0.1 did not say


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
    interrupt, as other signals that end the job are 128 and their number.
    """
    for name in LAUNCHERS:  # a batch script's template leaves them empty, which is not set
        if os.environ.get(name) == "":
            del os.environ[name]
    config = parse(config_class, argv, verb=verb, examples=examples)
    with interruptible() as interrupt:
        try:
            job(config)
        except (Exception, KeyboardInterrupt) as error:
            return _end(verb, error, interrupt)
    return 0


def _end(verb: str, error: Exception | KeyboardInterrupt, interrupt: Interrupt) -> int:
    """Say why a job ended, and return the exit status; what nobody foresaw is raised again."""
    if interrupt.number or isinstance(error, KeyboardInterrupt):
        say(f"vidfill {verb}: {interrupt.describe()}; the same command continues")
        return status_of(interrupt.number or signal.SIGINT)
    if is_out_of_memory(error):
        said = f"there is not enough memory ({describe(error):.200}): ask for less at once"
        error = BadInput(said)
    if not isinstance(error, BadInput | OSError):
        raise error
    _say_error(verb, error)
    return 2


def _say_error(verb: str, error: BadInput | OSError) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if not rank or not isinstance(error, BadInputEverywhere):
        say_error(verb, error)


def parse(
    config_class: type[Config], argv: Sequence[str] | None, *, verb: str, examples: str = ""
) -> Config:
    """The command line of a job, read off its configuration.

    Required fields are positional, the others options (dotted where nested); the class's docstring
    describes the job and each field's docstring is its help. `--config FILE.yaml` and
    `--print_config` come with every job.
    """
    import argparse

    import jsonargparse

    words = list(sys.argv[1:] if argv is None else argv)
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=f"vidfill {verb}",
        description=inspect.cleandoc(config_class.__doc__ or ""),
        epilog=examples,
        formatter_class=options.make_formatter(),
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="A YAML file of the options.")
    parser.add_class_arguments(config_class, as_group=False, as_positional=True)
    for action in parser._actions:
        if action.dest.endswith("_"):  # `from` cannot be a field's name
            option = f"--{action.dest.rstrip('_')}"
            action.option_strings = [option]
            parser._option_string_actions[option] = action
    options.arrange_help(parser, config_class, words)
    groups = _find_fields(config_class, is_group=True)
    try:
        options.refuse_hidden_files(words, groups)
        namespace = parser.parse_args(_complete_switches(words, _find_fields(config_class)))
    except (argparse.ArgumentError, Malformed) as error:
        known = [option.lstrip("-") for option in parser._option_string_actions]
        said = _explain(str(error), known)
        _say_error(verb, BadInputEverywhere(f"{said} (`vidfill {verb} --help` lists all)"))
        sys.exit(2)
    fields = parser.instantiate(namespace)
    return config_class(
        **{field.name: fields[field.name] for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    )


def words_of(config: Any, leave_out: Collection[str] = ()) -> list[str]:
    """The words that `parse` reads as this configuration, which has no parts."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in leave_out and value != field.default:
            is_text = isinstance(value, str | Path)
            option = [] if field.default is dataclasses.MISSING else [f"--{field.name}"]
            words += [*option, str(value) if is_text else json.dumps(value, separators=(",", ":"))]
    return words


def _explain(message: str, options: Sequence[str]) -> str:
    """The parser's message in one line, with the option that may have been meant."""
    said = re.sub(
        r"Expected a typing\.Literal\[(.*?)\]\.", lambda m: f"give one of {m[1]}.", message
    )
    said = re.sub(r"Expected a <class '(\w+)'>\.", r"give a value of type \1.", said)
    if more := re.search(r"unrecognized arguments: ([^-\s]\S*)", message):
        first = next(
            option for option in options if option not in ("h", "help", "config", "print_config")
        )
        return f"{more[1]} is one word too many: name its option, as in --{first} {more[1]}"
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|ption '([\w.]+)'", message)
    if unknown:
        group = re.search(r"Group '([\w.]+)'", message)
        wrong = unknown[1] or (f"{group[1]}.{unknown[2]}" if group else unknown[2])
        near = difflib.get_close_matches(wrong, options, n=1)
        near = near or [option for option in options if option.endswith(f".{wrong}")]
        said += f": did you mean {near[0]}?" if near else ""
    return " ".join(said.split())


def _find_fields(config_class: type, prefix: str = "--", is_group: bool = False) -> set[str]:
    """The options that are true or false, or those that are groups of options."""
    found: set[str] = set()
    for name, kind in get_type_hints(config_class).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            found |= {prefix + name} if is_group else set()
            found |= _find_fields(kind, f"{prefix}{name}.", is_group)
        elif kind is bool and not is_group:
            found.add(prefix + name)
    return found


def _complete_switches(words: Sequence[str], switches: Collection[str]) -> list[str]:
    """`--plan` is `--plan true`: the parser wants a value."""
    completed = []
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        completed.append(word)
        if word in switches and following.lower() not in ("true", "false", "yes", "no"):
            completed.append("true")
    return completed


@contextlib.contextmanager
def claim(
    out: Path,
    verb: str,
    config: Any,
    *,
    stands_on: Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    may_change: Collection[str] = (),
    patience: float = 0.0,
    temporary: bool = False,
    renew: Callable[[JobRecord], JobRecord] = lambda before: before,
) -> Iterator[Callable[[], None]]:
    """Take `out` for this job, and be the only one at work there for as long as this lasts.

    The folder is new, empty, or begun by the same command before. `out/job.json` records the
    configuration and what else determines the job's result: `stands_on` gives, by the name that a
    message would use, anything that JSON holds and that changes when the thing does, such as a
    hash of its content or a `Fingerprint`; or a function gives it, of what was recorded before, and
    is called once the folder is held. The dotted fields and groups of fields in `may_change` may
    change when a job continues; so may `out` itself, if its folder was moved.

    `patience` is as for `hold`. A folder that is `temporary` is gone once the job has ended well.
    `renew` puts the record of version 0.1 into the words of today.

    Gives a function that raises BadInput if the folder is no longer this job's; at the end it is
    called once more.

    Raises:
        BadInput: another job is at work there, or `out` holds anything else; nothing in it is
            touched.
    """
    named, out = out, out.resolve()
    # A path reads the same from wherever it was given.
    job = JobRecord(verb=verb, version=__version__, config=record_of(config))
    check = functools.partial(_check_place, out, verb, config, {"out", *may_change}, renew)
    check()  # before a lock is put there
    with hold(out, patience):
        before = check()
        known = (before.stands_on if before else None) or {}
        job.stands_on = _plain(dict((stands_on(known) if callable(stands_on) else stands_on) or {}))
        if before:
            _refuse_another_base(out, before, job)
        if before != job:
            _write_record(out, job, before)
        mark = out / MARK
        mine = mark.read_bytes()

        def confirm() -> None:
            if not mark.is_file() or mark.read_bytes() != mine:
                raise BadInput(
                    f"{out} was removed or taken by another job while this one ran: "
                    "give the same command again"
                )

        yield confirm
        confirm()
        if temporary:
            _remove_work(out)
            if named.is_symlink():
                named.unlink()


def _remove_work(folder: Path) -> None:
    """Remove a folder at once, so that no part of it is taken for work to go on with."""
    gone = fresh_partial_of(folder)
    folder.rename(gone)
    remove(gone)


def _write_record(out: Path, job: JobRecord, before: JobRecord | None) -> None:
    content = json.dumps(job.model_dump(), indent=2).encode()
    if before:
        if gone := sorted(flatten(before.config).keys() - flatten(job.config).keys()):
            say(f"vidfill {job.verb}: options that are no more: {', '.join(gone)}")
        write_atomically(out / MARK, content)
    elif not write_new(out / MARK, content):
        raise BadInput(f"another job has just begun in {out}: let it end first")


def record_of(config: Any) -> dict[str, Any]:
    """A configuration as records have it."""
    return _plain(dataclasses.asdict(config))


def changed_options(before: Mapping[str, Any], config: Any) -> dict[str, list[Any]]:
    """What each option, by its dotted name, was and is, where it differs from a record's.

    An option that did not exist when that was written had what is now its default.
    """
    was = {**flatten(_defaults(type(config))), **flatten(before)}
    return {
        name: [was.get(name), value]
        for name, value in sorted(flatten(record_of(config)).items())
        if was.get(name) != value
    }


def _plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON returns it."""
    return json.loads(json.dumps(tree, default=lambda path: str(path.resolve())))


def _check_place(
    out: Path,
    verb: str,
    config: Any,
    may_change: Collection[str],
    renew: Callable[[JobRecord], JobRecord],
) -> JobRecord | None:
    """Refuse a place where a job can neither begin nor continue; return the record there."""
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file; name a folder")
    before = read_job(out)
    if before:
        if before.verb == verb and before.version == OLDEST:
            with _reading(out / MARK):
                before = renew(before)
        _refuse_another_job(out, before, verb, config, may_change)
    elif out.is_dir() and any(
        path.name != LOCK and not path.name.startswith(PARTIAL) for path in out.iterdir()
    ):
        raise BadInput(f"{out} exists and is not empty: choose another folder or remove it")
    return before


def read_job(folder: Path) -> JobRecord | None:
    """The job that claimed a folder, if one did.

    Raises:
        BadInput: Its record is malformed.
    """
    mark = folder / MARK
    with _reading(mark):
        return parse_json(JobRecord, read_small(mark)) if mark.is_file() else None


@contextlib.contextmanager
def _reading(mark: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError):
        raise BadInput(
            f"{mark} was not written by vidfill: choose another folder or remove it"
        ) from None


def _refuse_another_job(
    out: Path, before: JobRecord, verb: str, config: Any, may_change: Collection[str]
) -> None:
    if before.verb != verb:
        raise BadInput(
            f"{out} was written by `vidfill {before.verb}`: choose another folder or remove it"
        )
    groups = tuple(f"{group}." for group in may_change)
    changed = [
        f"{name} was {was!r}, now {value!r}"
        for name, (was, value) in changed_options(before.config, config).items()
        if name not in may_change and not name.startswith(groups)
    ]
    if changed:
        raise BadInput(
            f"{out} was begun with another configuration ({', '.join(changed)}): "
            "choose another folder, or give the same options to continue"
        )


def _refuse_another_base(out: Path, before: JobRecord, now: JobRecord) -> None:
    """Refuse to continue on something else; an older version may have recorded less of it."""
    was, wanted = flatten(before.stands_on or {}), flatten(now.stands_on or {})
    compared = set(was)
    if before.stands_on and before.version == now.version:
        compared |= set(wanted)
    other = sorted(key for key in compared if not _agree(was.get(key), wanted.get(key)))
    if other:
        named = f"{', '.join(other[:NAMED])}{' …' * (len(other) > NAMED)}"
        raise BadInput(
            f"{out} was begun with something else that has the same name ({named}): "
            "choose another folder, or put back what was there to continue"
        )


def _agree(was: Any, now: Any) -> bool:
    match was, now:
        case [int(), str(), str()], [int(), str(), str()]:
            return is_same(Fingerprint(*was), Fingerprint(*now))
    return was == now


def _defaults(config_class: type) -> dict[str, Any]:
    """The defaults of a configuration's fields, as JSON has them."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
            found[field.name] = (
                dataclasses.asdict(default) if dataclasses.is_dataclass(default) else default  # type: ignore[arg-type]
            )
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
    return _plain(found)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree's values by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key.rstrip("_")] = value
    return flat


def refuse_launcher(verb: str) -> None:
    """Raise BadInput where a launcher started several processes of a job that uses one."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise BadInputEverywhere(
            f"WORLD_SIZE is {processes}; {verb} runs in one process: start it without a launcher"
        )
