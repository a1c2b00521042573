from __future__ import annotations

import itertools

import pytest
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from vidfill.jobs import BadInput
from vidfill.sampling.schedules import (
    CLEAN,
    Kind,
    compile_schedule,
    parse,
    spaced_timesteps,
)

canonical_texts = st.builds(
    lambda solver, steps, move: solver.format(steps) + move,
    st.sampled_from(["ddpm:{}", "ddpm:{}(variance=large)", "ddim:{}"]),
    st.integers(1, 60),
    st.sampled_from(["", "+resample(n=0)", "+resample(n=4)", "+resample(n=10)"]),
)


@given(canonical_texts)
def test_canonical_text_survives_reading_and_writing(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("written", "canonical"),
    [("ddpm:50(variance=small)", "ddpm:50"), ("ddim:050+resample(n=04)", "ddim:50+resample(n=4)")],
)
def test_ways_to_write_one_schedule_share_a_canonical_form(written: str, canonical: str) -> None:
    assert parse(written) == parse(canonical)
    assert str(parse(written)) == canonical


@pytest.mark.parametrize(
    ("text", "underlined", "remedy"),
    [
        ("ddin:50", "ddin", "did you mean ddim?"),
        ("", "", "begin with SOLVER:STEPS"),
        ("resample(n=4)", "resample", "begin with SOLVER:STEPS"),
        ("ddim", "", "as in ddim:50"),
        ("ddim:0", "0", "1 or more"),
        ("ddim:fast", "fast", "1 or more"),
        ("ddim:50+", "", "write MOVE(key=value)"),
        ("ddim:50+resampel(n=4)", "resampel", "did you mean resample?"),
        ("ddim:50+resample", "resample", "write resample(n=…)"),
        ("ddim:50+resample(n=-1)", "-1", "n must be a whole number, 0 or more"),
        ("ddim:50+resample(n=4,m=1)", "m=1", "write resample(n=…)"),
        ("ddim:50+resample(n=4,n=5)", "n=5", "give n once"),
        ("ddim:50+resample(n=4", "(n=4", "close the bracket"),
        ("ddim:50+resample(n=4)!", "!", "remove this"),
        ("ddim:50+resample:2(n=4)", ":2", "takes no steps"),
        ("ddim:50+resample(n=4)+resample(n=4)", "resample", "give resample once"),
        ("ddim:50(eta=1)", "eta=1", "ddim has no options"),
        ("ddpm:50(variance=big)", "big", "variance must be small or large"),
    ],
)
def test_a_mistake_is_pointed_at_with_a_remedy(text: str, underlined: str, remedy: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse(text)
    _, shown, below = str(caught.value).split("\n")
    assert shown == f"  {text}"
    carets, said = below[2:].lstrip(" ").split(" ", 1)
    at = below.index("^") - 2
    assert (text[at : at + len(carets)], set(carets)) == (underlined, {"^"})
    assert remedy in said


def test_a_repeated_move_is_pointed_at_where_it_is_repeated() -> None:
    text = "ddim:50+resample(n=4)+resample(n=4)"
    with pytest.raises(BadInput) as caught:
        parse(text)
    assert str(caught.value).split("\n")[2].index("^") - 2 == text.rindex("resample")


def test_more_steps_than_timesteps_are_refused() -> None:
    with pytest.raises(BadInput, match="give at most 1000"):
        compile_schedule(parse("ddim:1001"), timesteps=1000)


@pytest.mark.parametrize(("n", "nfe"), [(0, 1000), (4, 5000), (6, 7000), (10, 11000)])
def test_network_evaluations_are_the_papers(n: int, nfe: int) -> None:
    assert compile_schedule(parse(f"ddpm:1000+resample(n={n})")).nfe == nfe


@given(canonical_texts, st.integers(60, 1000))
def test_a_program_walks_from_pure_noise_to_clean_in_touching_moves(text: str, T: int) -> None:
    program = compile_schedule(parse(text), timesteps=T)
    assert program.moves[0].source == T - 1
    assert program.moves[-1].target == CLEAN
    assert all(a.target == b.source for a, b in itertools.pairwise(program.moves))
    for move in program.moves:
        assert (move.source > move.target) is (move.kind is Kind.DOWN)
    assert sum(move.kind is Kind.DOWN for move in program.moves) == program.nfe


def test_resampling_noises_and_denoises_again_at_every_level_and_the_last() -> None:
    moves = compile_schedule(parse("ddim:2+resample(n=2)"), timesteps=4).moves
    walked = [(move.kind.value, move.source, move.target) for move in moves]
    high = [("down", 3, 1), ("up", 1, 3), ("down", 3, 1), ("up", 1, 3), ("down", 3, 1)]
    last = [("down", 1, -1), ("up", -1, 1), ("down", 1, -1), ("up", -1, 1), ("down", 1, -1)]
    assert walked == high + last


@given(st.integers(1, 1000), st.integers(0, 999))
def test_levels_fall_strictly_from_the_top_and_full_steps_visit_all(T: int, fewer: int) -> None:
    steps = max(1, T - fewer)
    levels = spaced_timesteps(steps, T)
    assert levels[0] == T - 1
    assert len(levels) == steps
    assert all(a > b for a, b in itertools.pairwise([*levels, CLEAN]))
    assert spaced_timesteps(T, T) == list(range(T - 1, -1, -1))


# Of 1000 timesteps. Left out are counts at which diffusers' floats go astray: 61, and where a level
# lies half-way between two timesteps.
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 20, 30, 50, 64, 100, 250, 333, 500, 1000])
def test_spacing_is_diffusers_trailing(steps: int) -> None:
    theirs = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    assert spaced_timesteps(steps, 1000) == theirs.timesteps.tolist()
