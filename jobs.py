"""A job: its command line, its configuration, the output folder that it claims."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ValidationError

from .errors import BadInput, BadInputEverywhere, say_error
from .files import PARTIAL, write_atomically

Config = TypeVar("Config")


class JobRecord(BaseModel):
    """What job.json says of the job that claimed a folder."""

    verb: str
    config: dict[str, Any]


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

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=f"vidfill {verb}",
        description=config_class.__doc__,
        epilog=examples,
        formatter_class=type(  # it keeps the line breaks of the description and the examples
            "HelpFormatter",
            (jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter),
            {},
        ),
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


def claim(out: Path, verb: str, config: Any, may_change: Collection[str] = ()) -> None:
    """Take `out` for this job: make it, or find that the same command began there before.

    `out/job.json` records the configuration. The dotted fields and groups of fields in `may_change`
    may change when a job continues; so may `out` itself, if its folder was moved.

    Raises:
        BadInput: `out` holds anything else; nothing in it is touched.
    """
    # A path reads the same from wherever it was given.
    record = json.dumps(dataclasses.asdict(config), default=lambda path: str(path.resolve()))
    job = JobRecord(verb=verb, config=json.loads(record))
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file; name a folder")
    before = read_job(out)
    if before:
        _refuse_another_job(out, before, job, {"out", *may_change})
    elif out.is_dir() and any(not path.name.startswith(PARTIAL) for path in out.iterdir()):
        raise BadInput(f"{out} exists and is not empty: choose another folder or remove it")
    if before != job:
        write_atomically(out / "job.json", json.dumps(job.model_dump(), indent=2).encode())


def read_job(folder: Path) -> JobRecord | None:
    """The job that claimed a folder, if one did.

    Raises:
        BadInput: Its record is malformed.
    """
    mark = folder / "job.json"
    try:
        return JobRecord.model_validate_json(mark.read_bytes()) if mark.is_file() else None
    except ValidationError:
        raise BadInput(
            f"{mark} was not written by vidfill: choose another folder or remove it"
        ) from None


def _refuse_another_job(
    out: Path, before: JobRecord, now: JobRecord, may_change: Collection[str]
) -> None:
    if before.verb != now.verb:
        raise BadInput(
            f"{out} was written by `vidfill {before.verb}`: choose another folder or remove it"
        )
    was, wanted = _flatten(before.config), _flatten(now.config)
    changed = sorted(
        key
        for key in was.keys() | wanted.keys()
        if was.get(key) != wanted.get(key)
        and key not in may_change
        and not key.startswith(tuple(f"{group}." for group in may_change))
    )
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


def refuse_launcher(verb: str) -> None:
    """Raise BadInput where a launcher started several processes of a job that uses one."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise BadInputEverywhere(
            f"WORLD_SIZE is {processes}; {verb} runs in one process: start it without a launcher"
        )
