from __future__ import annotations

import itertools
from decimal import Decimal

import pytest
from diffusers import DDIMScheduler, RePaintScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from vidfill.errors import BadInput
from vidfill.sampling.schedules.language import MOVE_PRESETS, MOVES, SWITCHES, parse
from vidfill.sampling.schedules.options import Options
from vidfill.sampling.schedules.program import CLEAN, Kind, compile_schedule, spaced_timesteps
from vidfill.sampling.schedules.solvers import SOLVERS

T = 1000

examples = settings(max_examples=20, deadline=None)


def share(draw: st.DrawFn, least: int = 0, most: int = 1000) -> str:
    """A number from 0 to 1 as it is written: 0.25, never 0.250 or .25."""
    return f"{Decimal(draw(st.integers(least, most))) / 1000:f}"


def bracketed(options: dict[str, str]) -> str:
    return f"({','.join(f'{key}={value}' for key, value in options.items())})" if options else ""


@st.composite
def canonical_solvers(draw: st.DrawFn) -> tuple[str, int]:
    steps = draw(st.integers(2, 60))
    name = draw(st.sampled_from(list(SOLVERS)))
    options = {}
    if name == "ddpm" and draw(st.booleans()):
        options["variance"] = "large"
    if name == "ddim" and draw(st.booleans()):
        options["eta"] = share(draw, least=1)
    if draw(st.booleans()):
        options["spacing"] = "leading"
    return f"{name}:{steps}{bracketed(options)}", steps


@st.composite
def canonical_texts(draw: st.DrawFn) -> str:
    """Schedules with any solver and moves, in canonical form, that 60 and more timesteps allow."""
    solver, steps = draw(canonical_solvers())
    pieces = [solver]
    below = [{}, {"below": share(draw, most=999)}]
    if draw(st.booleans()):
        pieces.append(f"resample({bracketed({'n': str(draw(st.integers(0, 10)))})[1:-1]})")
    for name in draw(st.sampled_from([[], ["jump"], ["travel"], ["travel", "jump"]])):
        length = str(draw(st.integers(1, steps - 1)))
        options = {"length": length, "times": str(draw(st.integers(1, 10)))}
        pieces.append(name + bracketed(options | draw(st.sampled_from(below))))
    for _ in range(draw(st.integers(0, 2))):
        options = {"low": share(draw, most=400), "high": share(draw, least=600)}
        options |= {"times": str(draw(st.integers(1, 3))), "steps": str(draw(st.integers(1, 5)))}
        pieces.append("restart" + bracketed(options))
    pieces += [switch for switch in SWITCHES if draw(st.booleans())]
    return "+".join(pieces)


def texts_of(declared: Options) -> st.SearchStrategy[str]:
    """Brackets with any of the options, right or wrong."""
    values = ["0", "1", "4", "0.5", "1.5", "-1", "large", "leading", "", "x", "1e3"]
    entries = st.tuples(st.sampled_from([*declared, "n", ""]), st.sampled_from(values))
    lists = st.lists(entries.map("=".join), max_size=4).map(",".join)
    return st.one_of(st.just(""), lists.map("({})".format))


OPTIONS = {name: solver.options for name, solver in SOLVERS.items()} | MOVES
names = [*OPTIONS, *MOVE_PRESETS, "dim", "", "+", "(", ":5"]
jumbles = st.lists(
    st.sampled_from(names).flatmap(lambda name: texts_of(OPTIONS.get(name, {})).map(name.__add__)),
    max_size=4,
).map("+".join)


@examples
@given(canonical_texts())
def test_canonical_text_survives_reading_and_writing(text: str) -> None:
    assert str(parse(text)) == text


@examples
@given(jumbles | jumbles.map("ddim:5+{}".format) | st.text(max_size=30))
def test_any_text_is_read_into_canonical_form_or_refused_with_a_caret(text: str) -> None:
    try:
        schedule = parse(text)
    except BadInput as error:
        assert "^" in str(error).split("\n")[-1]
    else:
        assert parse(str(schedule)) == schedule
        assert str(parse(str(schedule))) == str(schedule)


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("ddpm:50(variance=small)", "ddpm:50"),
        ("ddim:050+resample(n=04)", "ddim:50+resample(n=4)"),
        ("ddim:50(eta=0.0,spacing=trailing)", "ddim:50"),
        ("ddim:50+jump(times=2,below=0.50,length=5)", "ddim:50+jump(length=5,times=2,below=0.5)"),
        ("ddim:50+resample(n=4,below=1.000)", "ddim:50+resample(n=4)"),
        ("ddim:50+inject()", None),
        ("ddim:50+ablate_clamp+inject+resample(n=1)", "ddim:50+resample(n=1)+inject+ablate_clamp"),
        ("ddpm:50+paper(n=4)", "ddpm:50+resample(n=4)"),
        ("ddpm:50+ramvid(R=5,below=0.5)", "ddpm:50+resample(n=4,below=0.5)"),
        ("ddpm:50+repaint(length=5,times=2)", "ddpm:50+jump(length=5,times=2)"),
        ("ddpm:50+ddnm(length=5,times=2)", "ddpm:50+travel(length=5,times=2)"),
    ],
)
def test_ways_to_write_one_schedule_share_a_canonical_form(
    written: str, canonical: str | None
) -> None:
    if canonical is None:
        with pytest.raises(BadInput, match="leave the brackets out"):
            parse(written)
        return
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
        ("ddim:50+resample", "resample", "write resample(n=…,below=…), where n is a whole number"),
        ("ddim:50+resample(n=-1)", "-1", "n must be a whole number, 0 or more"),
        ("ddim:50+resample(n=1234567)", "1234567", "at most six digits"),
        ("ddim:50+resample(n=4,m=1)", "m=1", "below is a number from 0 to 1 (1 if left out)"),
        ("ddim:50+resample(n=4,n=5)", "n=5", "give n once"),
        ("ddim:50+resample(n=4,below=1.1)", "1.1", "below must be a number from 0 to 1"),
        ("ddim:50+resample(n=4", "(n=4", "close the bracket"),
        ("ddim:50+resample(n=4)!", "!", "remove this"),
        ("ddim:50+resample:2(n=4)", ":2", "takes no steps"),
        ("ddim:50+resample(n=4)+resample(n=4)", "resample", "give resample once"),
        ("ddim:50+resample(n=4)+ramvid(R=5)", "ramvid", "give resample once"),
        ("ddim:50+inject+inject", "inject", "give inject once"),
        ("ddim:50+jump(length=5)", "jump(length=5)", "times is a whole number, 1 or more"),
        ("ddim:50+ramvid(R=0)", "0", "R must be a whole number, 1 or more"),
        ("dpmpp:50(eta=1)", "eta=1", "write dpmpp:50(spacing=…)"),
        ("ddpm:50(variance=big)", "big", "variance must be small or large"),
        ("ddim:1001", "1001", "give at most 1000"),
        ("ddim:50(eta=1)+jump(length=50,times=2)", "50", "give less than 50"),
        ("ddim:50+restart(low=0.4,high=0.3,times=1,steps=1)", "0.3", "begin at 0.4: give more"),
        ("ddim:50+restart(low=0,high=0.01,times=1,steps=11)", "11", "give at most 10"),
    ],
)
def test_a_mistake_is_pointed_at_with_a_remedy(text: str, underlined: str, remedy: str) -> None:
    with pytest.raises(BadInput) as caught:
        compile_schedule(parse(text), T)
    _, shown, below = str(caught.value).split("\n")
    assert shown == f"  {text}"
    carets, said = below[2:].lstrip(" ").split(" ", 1)
    at = below.index("^") - 2
    assert (text[at : at + len(carets)] if underlined else "", set(carets)) == (underlined, {"^"})
    assert remedy in said


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("ddim:50+resample(n=4)+resample(n=4)", "resample"),
        ("ddim:50+restart(low=0.4,high=0.4,times=1,steps=1)", "0.4"),
        ("ddim:50+jump(length=50,times=50)", "50,"),
    ],
)
def test_of_two_alike_the_wrong_one_is_pointed_at(text: str, repeated: str) -> None:
    with pytest.raises(BadInput) as caught:
        compile_schedule(parse(text), T)
    assert str(caught.value).split("\n")[2].index("^") - 2 == text.rindex(repeated)


def test_a_schedule_without_end_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(BadInput, match="has over 1,000,000 moves: go up less often"):
        compile_schedule(parse("ddpm:1000+resample(n=999999)"))


# What a schedule costs. The numbers are the papers', or counted from their published schedules.


@pytest.mark.parametrize(
    ("text", "nfe", "up_moves"),
    [
        ("ddpm:1000+paper(n=0)", 1000, 0),
        ("ddpm:1000+paper(n=4)", 5000, 4000),
        ("ddpm:1000+paper(n=6)", 7000, 6000),
        ("ddpm:1000+paper(n=10)", 11000, 10000),
        ("ddpm:1000(variance=large)+ramvid(R=5)", 5000, 4000),
        ("ddpm:250+repaint(length=10,times=10)", 2410, 2160),
        ("ddpm:100+repaint(length=10,times=10)", 910, 810),
        ("ddpm:250+repaint(length=10,times=5)", 1210, 960),
        ("ddpm:250+repaint(length=1,times=10)", 2491, 2241),
        ("ddpm:1000+repaint(length=10,times=10)", 9910, 8910),
        ("ddim:250+jump(length=10,times=10)+inject", 2410, 2160),
        # RePaint's start_resampling=100, the 101st of its 250 levels
        ("ddpm:250(spacing=leading)+repaint(length=10,times=10,below=0.404)", 1150, 900),
        ("ddpm:250+repaint(length=10,times=10,below=0.404)", 1150, 900),
        ("ddim:100+ddnm(length=10,times=3)", 280, 18),
        ("dpmpp:20+restart(low=0.2,high=0.4,times=2,steps=5)", 30, 2),
        ("ddim:50+resample(n=4,below=0.5)", 150, 100),
        ("heun:18", 35, 0),
        ("heun:18+resample(n=1)", 35 + 35, 18),
    ],
)
def test_network_evaluations_are_those_of_the_papers(text: str, nfe: int, up_moves: int) -> None:
    program = compile_schedule(parse(text))
    assert (program.nfe, program.count(Kind.UP)) == (nfe, up_moves)


@examples
@given(st.integers(2, 60), st.integers(1, 60), st.integers(1, 12))
def test_jumps_cost_what_repaints_formula_says(steps: int, length: int, times: int) -> None:
    if length >= steps:
        return
    program = compile_schedule(parse(f"ddpm:{steps}+jump(length={length},times={times})"))
    assert program.nfe == steps + -((length - steps) // length) * (times - 1) * length


@pytest.mark.parametrize("intervals", [[(3, 2)], [(4, 1), (4, 5), (6, 6)]])
def test_heun_restarts_cost_what_the_restart_papers_formula_says(
    intervals: list[tuple[int, int]],
) -> None:
    # 2N − 1 + Σ 2K(N_i − 1), where its N_i count levels, one more than the steps between them.
    moves = [f"+restart(low=0.1,high=0.5,times={k},steps={n - 1})" for n, k in intervals]
    program = compile_schedule(parse("heun:36" + "".join(moves)))
    assert program.nfe == 2 * 36 - 1 + sum(2 * k * (n - 1) for n, k in intervals)


@examples
@given(canonical_texts(), st.integers(60, 1000))
def test_a_move_costs_the_same_whatever_else_the_schedule_does(text: str, timesteps: int) -> None:
    def cost(moves: list[str]) -> int:
        return compile_schedule(parse("+".join([solver, *moves])), timesteps).nfe

    solver, *moves = text.split("+")
    plain = cost([])
    assert cost(moves) == plain + sum(cost([move]) - plain for move in moves)


# What a program does.


@examples
@given(canonical_texts(), st.integers(60, 1000))
def test_a_program_walks_from_its_top_to_clean_in_touching_moves(text: str, timesteps: int) -> None:
    schedule = parse(text)
    program = compile_schedule(schedule, timesteps)
    spacing = schedule.solver.get("spacing", str)
    levels = [*spaced_timesteps(schedule.steps, timesteps, spacing), CLEAN]
    assert program.transitions[0].source == levels[0]
    assert spacing == "leading" or levels[0] == timesteps - 1
    walk = [move for move in program.transitions if move.kind is not Kind.INJECT]
    assert walk[-1].target == CLEAN
    assert set(program.levels) >= set(levels)
    assert all(a.target == b.source for a, b in itertools.pairwise(program.transitions))
    assert all((move.source > move.target) is (move.kind is Kind.DOWN) for move in walk)
    assert all(CLEAN <= level < timesteps for level in program.levels)


@examples
@given(canonical_texts())
def test_known_latents_follow_every_down_and_what_rises_from_a_clean_estimate(text: str) -> None:
    moves = compile_schedule(parse(text)).transitions
    injected = [before for before, move in itertools.pairwise(moves) if move.kind is Kind.INJECT]
    wanted = [move for move in moves if move.kind is Kind.DOWN or move.afresh]
    assert injected == (wanted if "inject" in text else [])
    assert all(move.source == move.target for move in moves if move.kind is Kind.INJECT)


@examples
@given(canonical_texts())
def test_second_order_needs_a_state_with_noise_and_of_multisteps_a_history(text: str) -> None:
    solver = text.split(":")[0]
    walk = [
        move for move in compile_schedule(parse(text)).transitions if move.kind is not Kind.INJECT
    ]
    for before, move in itertools.pairwise([None, *walk]):
        after_down = before is not None and before.kind is Kind.DOWN
        second = {"dpmpp": after_down, "heun": True}.get(solver, False) and move.target != CLEAN
        if move.kind is Kind.DOWN:
            assert move.order == 1 + second
            assert move.evaluations == (2 if second and solver == "heun" else 1)


@pytest.mark.parametrize("below", ["0", "0.25", "0.5"])
def test_no_detour_rises_above_below(below: str) -> None:
    for move in ("resample(n=3", "jump(length=3,times=2", "travel(length=3,times=2"):
        program = compile_schedule(parse(f"ddim:50+{move},below={below})"))
        ups = [each.target for each in program.transitions if each.kind is Kind.UP]
        assert all(target + 1 <= Decimal(below) * T for target in ups)
        assert bool(ups) is (below != "0")


def test_resampling_noises_and_denoises_again_at_every_level_and_the_last() -> None:
    moves = compile_schedule(parse("ddim:2+resample(n=2)"), timesteps=4).transitions
    walked = [(move.kind.value, move.source, move.target) for move in moves]
    high = [("down", 3, 1), ("up", 1, 3), ("down", 3, 1), ("up", 1, 3), ("down", 3, 1)]
    last = [("down", 1, -1), ("up", -1, 1), ("down", 1, -1), ("up", -1, 1), ("down", 1, -1)]
    assert walked == high + last


@pytest.mark.parametrize(
    ("steps", "length", "times"),
    [(250, 10, 10), (100, 10, 10), (250, 10, 5), (250, 1, 10), (250, 20, 3), (1000, 10, 10)],
)
def test_the_levels_of_jumps_are_diffusers_repaints(steps: int, length: int, times: int) -> None:
    theirs = RePaintScheduler()
    theirs.set_timesteps(steps, jump_length=length, jump_n_sample=times)
    move = f"repaint(length={length},times={times})"
    program = compile_schedule(parse(f"ddpm:{steps}(spacing=leading)+{move}"))
    assert program.levels == [*theirs.timesteps.tolist(), CLEAN]  # theirs leave the end out


def test_time_travel_goes_where_jumps_go_but_up_at_once() -> None:
    jump, travel = (
        compile_schedule(parse(f"ddim:100+{move}(length=10,times=3)"))
        for move in ("jump", "travel")
    )

    def downs(levels: list[int]) -> list[tuple[int, int]]:
        return [(a, b) for a, b in itertools.pairwise(levels) if a > b]

    assert downs(jump.levels) == downs(travel.levels)
    assert all(m.afresh is (m.kind is Kind.UP) for m in travel.transitions)
    assert not any(m.afresh for m in jump.transitions)


def test_restarts_begin_at_the_nearest_level_and_step_down_evenly() -> None:
    program = compile_schedule(parse("dpmpp:20+restart(low=0.2,high=0.4,times=2,steps=4)"))
    at = program.levels.index(199)
    once = [399, 349, 299, 249, 199]
    assert program.levels[at : at + 12] == [199, *once, *once, 149]


@examples
@given(st.integers(1, 1000), st.integers(0, 999), st.sampled_from(["trailing", "leading"]))
def test_levels_fall_strictly_and_full_steps_visit_all(
    timesteps: int, fewer: int, spacing: str
) -> None:
    steps = max(1, timesteps - fewer)
    levels = spaced_timesteps(steps, timesteps, spacing)
    assert levels[0] == timesteps - 1 if spacing == "trailing" else levels[-1] == 0
    assert len(levels) == steps
    assert all(a > b for a, b in itertools.pairwise([*levels, CLEAN]))
    everything = list(range(timesteps - 1, -1, -1))
    assert spaced_timesteps(timesteps, timesteps, spacing) == everything


# Of 1000 timesteps. Left out are counts at which diffusers' floats go astray: 61, and where a level
# lies half-way between two timesteps.
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 20, 30, 50, 64, 100, 250, 333, 500, 1000])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_spacing_is_diffusers(steps: int, spacing: str) -> None:
    theirs = DDIMScheduler(num_train_timesteps=1000, timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    assert spaced_timesteps(steps, 1000, spacing) == theirs.timesteps.tolist()
