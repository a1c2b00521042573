"""Types for the fields of a configuration that say which numbers they take, and their check."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval

from .errors import BadInputEverywhere, describe
from .records import Malformed, read_small

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

PositiveInt = Annotated[int, Interval(ge=1, le=2**53)]
NonNegativeInt = Annotated[int, Interval(ge=0, le=2**53)]
PositiveFloat = Annotated[float, Interval(gt=0, lt=math.inf)]
NonNegativeFloat = Annotated[float, Interval(ge=0, lt=math.inf)]
FiniteFloat = Annotated[float, Interval(gt=-math.inf, lt=math.inf)]
Seed = Annotated[int, Interval(ge=-(2**63), le=2**64 - 1)]  # what torch.manual_seed takes
Minutes = Annotated[float, Interval(gt=0, le=525_600)]  # up to a year

# By pydantic's names of errors. Its own message stands for the others.
REMEDIES = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "literal_error": "one of {expected}",
    "too_short": "{min_length} or more of them",
    "too_long": "{max_length} of them",
}


def check(config: Any, prefix: str = "") -> None:
    """Refuse a dataclass, at any depth, with a value that the type of its field does not allow.

    A command line and a configuration made in Python are held to the same types.

    Raises:
        BadInputEverywhere: It names the first such field, after `prefix`, its value and the remedy.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(type(config)).validate_python(dataclasses.asdict(config))
    except ValidationError as error:
        raise BadInputEverywhere(prefix + _explain(error.errors()[0])) from None


def _explain(error: ErrorDetails) -> str:
    field = ".".join(str(part) for part in error["loc"])
    context = error.get("ctx", {})
    if math.inf in (context.get("lt"), -context.get("gt", 0)):
        remedy = "a finite number"
    else:
        said = error["msg"].partition("should be ")[2] or error["msg"]
        bounds = {k: f"{v:g}" if isinstance(v, float) else v for k, v in context.items()}
        remedy = REMEDIES.get(error["type"], said).format(**bounds)
    return f"{field} is {error['input']!r}: give {remedy}"


def refuse_hidden_files(words: Sequence[str], groups: Collection[str]) -> None:
    """Refuse what would make the parser read a file that is no configuration, and show of it.

    That is a text where a group of options stands, and a configuration that names another.

    Raises:
        Malformed: Naming the option.
    """
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        option, is_joined, value = word.partition("=")
        value = value if is_joined else following
        if option == "--config":
            _check_tree(_read_yaml(Path(value)), {group.removeprefix("--") for group in groups})
        elif option in groups and not value.startswith("{"):
            raise Malformed(f"{option} is a group of options: give them, as in {option}.NAME VALUE")


def _check_tree(tree: object, groups: Collection[str], prefix: str = "") -> None:
    if not isinstance(tree, dict):
        raise Malformed(f"{prefix.rstrip('.') or 'the file'} is no group of options: name each")
    for name, value in tree.items():
        if name == "config":
            raise Malformed("a configuration file cannot name another: give its options")
        if f"{prefix}{name}" in groups:
            _check_tree(value, groups, f"{prefix}{name}.")


def _read_yaml(path: Path) -> object:
    """A configuration file, in which nothing stands for something else."""
    import yaml

    try:
        text = read_small(path).decode()
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise Malformed("it has an alias (*NAME): write out what it stands for")
        return yaml.safe_load(text) or {}
    except OSError as error:
        raise Malformed(f"--config {path}: {error.strerror}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        said = getattr(error, "problem", None) or describe(error)
        raise Malformed(f"--config {path}: {said}") from None


def make_formatter() -> Any:
    """How help is laid out: as it was written, with the defaults that say something."""
    import argparse

    import jsonargparse

    own = (jsonargparse.ActionConfigFile, argparse._HelpAction)

    class Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str:
            default = action.default
            says = default is not None and default is not False and default != ""
            says = says and default != argparse.SUPPRESS and not isinstance(action, own)
            shown = " (default: %(default)s)" if says and action.option_strings else ""
            return f"{action.help}{shown}"

        def _metavar_formatter(self, action: argparse.Action, default: str) -> Any:
            if action.choices is None and str(action.metavar) == "{true,false}":
                return lambda size: ("",) * size  # a switch needs no value
            return super()._metavar_formatter(action, default)

    return Formatter


def arrange_help(parser: Any, config_class: Any, words: Sequence[str]) -> None:
    """Let `--help` show the class's ESSENTIAL options, and `--help_all` every one.

    The class names the essential options by their dotted names; without them all are.
    """
    import argparse

    own = [action for action in parser._actions if action.option_strings]
    own = [action for action in own if action.dest not in ("help", "config", "print_config")]
    essential = getattr(config_class, "ESSENTIAL", [action.dest for action in own])
    more = [action for action in own if action.dest not in essential]
    positional = [a.dest.upper() for a in parser._actions if not a.option_strings]
    parser.usage = " ".join([parser.prog, *positional, "[--OPTION VALUE …]"])
    for action in parser._actions:
        if action.dest.endswith("_") or not action.option_strings:
            action.metavar = action.dest.rstrip("_").upper()
    if not more:
        return
    more += [action for action in parser._actions if action.dest == "print_config"]
    parser.add_argument("--help_all", action="help", help=f"Show {len(more)} more options.")
    if "--help_all" in words:
        return
    for action in more:
        action.help = argparse.SUPPRESS
    for group in parser._action_groups:
        if all(action.help == argparse.SUPPRESS for action in group._group_actions):
            group.description = None  # which would be shown alone
