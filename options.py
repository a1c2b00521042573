"""Types for the fields of a configuration that say which numbers they take, and their check."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval

from .errors import BadInputEverywhere

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
