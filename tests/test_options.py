"""A configuration holds only what the types of its fields allow, wherever it was made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from annotated_types import Len
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vidfill.errors import BadInputEverywhere
from vidfill.options import (
    FiniteFloat,
    Minutes,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    check,
)


@dataclass(frozen=True)
class Part:
    warmup: NonNegativeInt = 0
    sizes: Annotated[tuple[PositiveInt, ...], Len(1, 2)] = (1,)


@dataclass(frozen=True)
class Options:
    out: Path = Path("out")
    steps: PositiveInt = 1
    stride: PositiveInt | None = None
    rate: PositiveFloat = 1.0
    decay: NonNegativeFloat = 0.0
    location: FiniteFloat = 0.0
    timeout: Minutes = 1.0
    seed: Seed = 0
    how: Literal["mean", "moments"] = "mean"
    part: Part = field(default_factory=Part)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps is 0: give 1 or more"),
        ({"steps": 2.5}, "steps is 2.5: give a valid integer"),
        ({"stride": 0}, "stride is 0: give 1 or more"),
        ({"rate": 0.0}, "rate is 0.0: give more than 0"),
        ({"rate": math.inf}, "rate is inf: give a finite number"),
        ({"rate": math.nan}, "rate is nan: give a finite number"),
        ({"decay": -1.0}, "decay is -1.0: give 0 or more"),
        ({"location": -math.inf}, "location is -inf: give a finite number"),
        ({"timeout": 1e300}, r"timeout is 1e\+300: give 525600"),
        ({"timeout": math.nan}, "timeout is nan: give"),
        ({"seed": 2**64}, "seed is 18446744073709551616: give 18446744073709551615 or less"),
        ({"how": "mode"}, "how is 'mode': give one of 'mean' or 'moments'"),
        ({"part": Part(warmup=-5)}, "part.warmup is -5: give 0 or more"),
        ({"part": Part(sizes=())}, r"part.sizes is \(\): give 1 or more"),
        ({"part": Part(sizes=(1, 0))}, "part.sizes.1 is 0: give 1 or more"),
        ({"part": Part(sizes=(1, 1, 1))}, "part.sizes is .*: give 2 of them"),
    ],
)
def test_the_field_the_value_and_the_remedy_are_named(wrong: dict[str, Any], said: str) -> None:
    check(Options())
    with pytest.raises(BadInputEverywhere, match=f"^test.{said}"):
        check(Options(**wrong), prefix="test.")


@given(st.integers(-(2**65), 2**65))
@example(-(2**63))
@example(-(2**63) - 1)
@example(2**64 - 1)
@example(2**64)
@settings(max_examples=20)
def test_a_seed_is_accepted_where_torch_takes_it(seed: int) -> None:
    try:
        torch.Generator().manual_seed(seed)
    except (RuntimeError, OverflowError, ValueError):
        with pytest.raises(BadInputEverywhere):
            check(Options(seed=seed))
    else:
        check(Options(seed=seed))
