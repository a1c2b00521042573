from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vidfill.data import masks
from vidfill.data.masks import FAMILIES, OWN, Mix, draw_mask
from vidfill.errors import BadInput
from vidfill.modeling.autoencoder import latent_mask

GRIDS = ("stationary", "variable")
WHOLE_FRAMES = ("prediction", "infilling")
LEAVE_FRAMES = (*WHOLE_FRAMES, "continuation")
WITHIN_FRAMES = tuple(name for name in FAMILIES if name not in LEAVE_FRAMES)
STILL = ("stationary", "border")
# The least and the largest share of each frame that a family hides.
SHARES = {"box": (1 / 16, 1 / 4), "strokes": (1 / 8, 1 / 2), "border": (7 / 16, 3 / 4)}

families = st.sampled_from(sorted(FAMILIES))
sides = st.integers(4, 48)
seeds = st.integers(0, 2**31)
weights = st.floats(0, exclude_min=True, allow_infinity=False)
mixes = st.dictionaries(st.sampled_from((*FAMILIES, OWN)), weights, min_size=1).map(Mix)
few_examples = settings(deadline=None, max_examples=25)


def digest(mask: np.ndarray) -> str:
    return hashlib.sha256(mask.tobytes()).hexdigest()[:16]


@few_examples
@given(families, st.integers(2, 30), sides, sides, seeds)
@example("infilling", 2, 4, 4, 0)
def test_a_mask_is_of_zeros_and_ones_and_never_all_of_either(
    family: str, frames: int, height: int, width: int, seed: int
) -> None:
    mask = draw_mask(family, frames, height, width, (seed, "clip"))
    assert mask.shape == (frames, height, width)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1}


@few_examples
@given(families, st.integers(2, 8), sides, sides, seeds)
def test_a_mask_is_a_pure_function_of_its_arguments(
    family: str, frames: int, height: int, width: int, seed: int
) -> None:
    first, again = (draw_mask(family, frames, height, width, (seed, "clip")) for _ in range(2))
    assert first.tobytes() == again.tobytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_other_seeds_and_other_clips_draw_other_masks(family: str) -> None:
    drawn = {digest(draw_mask(family, 100, 32, 32, (0, f"clip {k}"))) for k in range(40)}
    assert len(drawn) > 15  # whole frames have 25 and 625 masks of this clip
    seeded = {digest(draw_mask(family, 100, 32, 32, (seed, "clip 0"))) for seed in range(40)}
    assert len(seeded) > 15


@pytest.mark.parametrize(
    ("family", "pinned"),
    [
        ("stationary", ["95453f6be316db4d", "f9b52d6c34009242", "3050e10473ea7fce"]),
        ("variable", ["5018ad7a951f8871", "8cb88c62b04d052a", "186a4ecd585a030b"]),
        ("box", ["f9384179c0c71371", "10743404dfe19a98", "1524f749594b0082"]),
        ("strokes", ["d1f5c7d4bd0c596f", "df3ae5cc7b2bed4d", "89f71e1233ad3fc7"]),
        ("border", ["6534ae468e600f8f", "97e15cb7ee0975d3", "ece97c873a5e9876"]),
        ("prediction", ["478eb6f3076e1269", "9a59ce54c997a3e8", "41d1ff500139516b"]),
        ("infilling", ["b482c264f3a316cc", "43430d16d2b8b29b", "41d1ff500139516b"]),
        ("continuation", ["335f6408dab2e116", "3ec0da973cc8f5cb", "6131508b1c65b64e"]),
    ],
)
def test_every_machine_and_version_draws_these_masks(family: str, pinned: list[str]) -> None:
    drawn = [
        draw_mask(family, 20, 128, 128, (0, "clip")),
        draw_mask(family, 3, 8, 8, (7, "a", "b")),
        draw_mask(family, 2, 7, 10, (1, "odd")),
    ]
    assert [digest(mask) for mask in drawn] == pinned


def test_the_papers_masks_are_these() -> None:
    stationary = draw_mask("stationary", 1, 4, 4, (0, "clip"))
    assert stationary.tolist() == [[[0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]]
    variable = draw_mask("variable", 2, 4, 4, (0, "clip"))
    assert variable.tolist() == [
        [[1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]],
    ]


@few_examples
@given(st.sampled_from(WITHIN_FRAMES), st.integers(1, 20), st.integers(1, 20), sides, seeds)
def test_a_longer_clip_begins_with_the_shorter_ones_holes(
    family: str, frames: int, more: int, side: int, seed: int
) -> None:
    shorter = draw_mask(family, frames, side, side, (seed, "clip"))
    longer = draw_mask(family, frames + more, side, side, (seed, "clip"))
    np.testing.assert_array_equal(longer[:frames], shorter)


@few_examples
@given(st.sampled_from(GRIDS), st.integers(1, 12), st.integers(1, 12), seeds)
def test_the_papers_masks_hide_4_whole_cells_of_every_frame(
    family: str, tall: int, wide: int, seed: int
) -> None:
    mask = draw_mask(family, 3, 4 * tall, 4 * wide, (seed, "clip"))
    cells = mask.reshape(3, 4, tall, 4, wide)
    assert (cells.min(axis=(2, 4)) == cells.max(axis=(2, 4))).all()
    assert (cells[:, :, 0, :, 0].sum(axis=(1, 2)) == 4).all()


@few_examples
@given(st.sampled_from(sorted(SHARES)), st.integers(1, 20), sides, sides, seeds)
@example("strokes", 3, 4, 2000, 0)
@example("strokes", 3, 240, 432, 0)
def test_every_frame_hides_a_share_within_the_familys_range(
    family: str, frames: int, height: int, width: int, seed: int
) -> None:
    least, most = SHARES[family]
    shares = draw_mask(family, frames, height, width, (seed, "clip")).mean(axis=(1, 2))
    assert (shares >= least).all()
    assert (shares <= most).all()


@pytest.mark.parametrize("family", SHARES)
def test_a_familys_holes_differ_in_size_within_its_range(family: str) -> None:
    least, most = SHARES[family]
    shares = [draw_mask(family, 1, 64, 64, (seed,)).mean() for seed in range(200)]
    assert np.ptp(shares) > 0.55 * (most - least)
    assert least <= min(shares) <= max(shares) <= most


def test_variable_masks_change_and_hide_every_cell_equally_often() -> None:
    mask = draw_mask("variable", 2000, 4, 4, (0, "clip"))
    assert len(np.unique(mask[:20].reshape(20, -1), axis=0)) > 10
    # Standard deviation of a share: sqrt(0.25 * 0.75 / 2000) = 0.0097.
    assert np.abs(mask.mean(axis=0) - 0.25).max() < 0.05


@few_examples
@given(st.sampled_from(STILL), st.integers(2, 20), sides, sides, seeds)
def test_still_masks_stay(family: str, frames: int, height: int, width: int, seed: int) -> None:
    mask = draw_mask(family, frames, height, width, (seed, "clip"))
    assert (mask == mask[0]).all()


def extent(mask: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each frame: the first hidden row (axis 1) or column (axis 2), and the number of them."""
    hidden = mask.any(axis=3 - axis)
    return hidden.argmax(axis=1), hidden.sum(axis=1)


@few_examples
@given(st.integers(1, 60), sides, sides, seeds)
def test_a_box_is_one_rectangle_of_one_size_inside_every_frame(
    frames: int, height: int, width: int, seed: int
) -> None:
    mask = draw_mask("box", frames, height, width, (seed, "clip"))
    (top, tall), (left, wide) = extent(mask, 1), extent(mask, 2)
    assert len(set(tall)) == len(set(wide)) == 1
    assert height / 4 <= tall[0] <= height / 2
    assert width / 4 <= wide[0] <= width / 2
    for frame, first_row, first_column in zip(mask, top, left, strict=True):
        assert frame[first_row : first_row + tall[0], first_column : first_column + wide[0]].all()
    assert (mask.sum(axis=(1, 2)) == tall[0] * wide[0]).all()


@few_examples
@given(st.integers(8, 200), seeds, st.sampled_from([1, 2]))
def test_a_box_moves_at_a_constant_speed_and_turns_at_the_borders_alone(
    side: int, seed: int, axis: int
) -> None:
    mask = draw_mask("box", 200, side, side, (seed, "clip"))
    first, size = extent(mask, axis)
    room, fastest = side - size[0], side / 16
    away = np.minimum(first, room - first) > fastest + 1  # no border within a step
    runs = np.split(np.arange(200), np.flatnonzero(np.diff(away)) + 1)
    speeds = []
    for leg in (first[run] for run in runs if away[run[0]] and len(run) > 3):
        # A straight line, both it and its ends rounded to whole pixels.
        speed = (leg[-1] - leg[0]) / (len(leg) - 1)
        assert np.abs(leg[0] + speed * np.arange(len(leg)) - leg).max() <= 1
        speeds.append((abs(speed), 1 / (len(leg) - 1)))
    for speed, error in speeds:
        assert side / 64 - error <= speed <= fastest + error
        assert abs(speed - speeds[0][0]) <= error + speeds[0][1] + 1e-9
    assert np.ptp(first) >= room - fastest - 1  # from border to border


@few_examples
@given(st.integers(2, 40), sides, sides, seeds)
def test_strokes_keep_their_shape_and_drift_slowly_and_steadily(
    frames: int, height: int, width: int, seed: int
) -> None:
    mask = draw_mask("strokes", frames, height, width, (seed, "clip"))
    reach = math.ceil(math.isqrt(height * width) / 64)
    shifts = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
    for before, after in itertools.pairwise(mask):
        assert any((np.roll(before, shift, (0, 1)) == after).all() for shift in shifts)


def test_strokes_drift_in_every_direction() -> None:
    still = 0
    for seed in range(20):
        first, *_, last = draw_mask("strokes", 20, 64, 64, (seed,))
        still += (first == last).all()
    assert still < 2


def test_a_strokes_vertices_round_alike_everywhere() -> None:
    # Mathematical libraries differ by about 1e-16 of a sine: 1e-12 of the longest line.
    angles = np.radians(np.arange(360) + 0.5)
    for components in (np.sin(angles), np.cos(angles)):
        ends = np.outer(np.arange(1, 4000), components)
        assert np.abs(ends - np.floor(ends) - 0.5).min() > 1e-9


@few_examples
@given(
    down=st.integers(-20, 20),
    right=st.integers(-20, 20),
    brush=st.integers(1, 9),
    flip=st.booleans(),
)
def test_a_line_is_what_lies_within_half_a_brush_of_it(
    down: int, right: int, brush: int, flip: bool
) -> None:
    rows, columns = masks._line(down, right, brush)
    drawn = set(zip(rows.tolist(), columns.tolist(), strict=True))
    expected = set()
    for row in range(-32, 33):
        for column in range(-32, 33):
            squared = max(down**2 + right**2, 1)
            along = min(max((row * down + column * right) / squared, 0), 1)
            distance = math.hypot(row - along * down, column - along * right)
            if distance < brush / 2 - 1e-9:
                expected.add((row, column))
    assert drawn == expected


@few_examples
@given(sides, sides, seeds)
def test_a_border_leaves_a_window_of_half_to_three_quarters_of_each_side(
    height: int, width: int, seed: int
) -> None:
    window = 1 - draw_mask("border", 1, height, width, (seed, "clip"))
    for axis, side in ((1, height), (2, width)):
        [first], [size] = extent(window, axis)
        assert side / 2 <= size <= 3 * side / 4
        after = side - size - first
        assert min(first, after) >= (side - size) // 4
    assert window.sum() == extent(window, 1)[1][0] * extent(window, 2)[1][0]


@few_examples
@given(st.sampled_from(WHOLE_FRAMES), st.integers(2, 60), seeds)
def test_whole_frames_are_hidden_or_visible(family: str, frames: int, seed: int) -> None:
    mask = draw_mask(family, frames, 4, 5, (seed, "clip"))
    hidden = mask[:, 0, 0]
    assert (mask == hidden[:, None, None]).all()
    begin, number = int(hidden.argmax()), int(hidden.sum())
    assert hidden[begin : begin + number].all()  # in one run
    most = max(1, frames // 4)
    assert 1 <= begin <= most
    if family == "prediction":
        assert hidden[-1] == 1
    else:
        assert min(1, frames - 2) <= frames - begin - number <= most


@few_examples
@given(st.integers(2, 60), seeds)
def test_a_continuation_shows_its_first_frames_and_is_stationary_from_then_on(
    frames: int, seed: int
) -> None:
    mask = draw_mask("continuation", frames, 8, 12, (seed, "clip"))
    hidden = mask.any(axis=(1, 2))
    begin = int(hidden.argmax())
    assert 1 <= begin <= max(1, frames // 2)
    still = draw_mask("stationary", frames, 8, 12, (seed, "clip"))
    np.testing.assert_array_equal(mask[begin:], still[begin:])
    assert not mask[:begin].any()


@pytest.mark.parametrize("family", LEAVE_FRAMES)
def test_families_that_leave_frames_refuse_a_single_frame(family: str) -> None:
    with pytest.raises(BadInput, match=f"frames is 1; {family} .*choose at least 2"):
        draw_mask(family, 1, 8, 8, (0,))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 8, 3), (0, 8, 8)])
def test_a_clip_too_small_for_a_mask_is_refused(family: str, shape: tuple[int, int, int]) -> None:
    with pytest.raises(BadInput, match="too small for a mask: choose at least 1 frame of 4x4"):
        draw_mask(family, *shape, (0,))


@pytest.mark.parametrize("family", [OWN, "both"])
def test_what_is_not_drawn_is_a_bug_of_ours(family: str) -> None:
    with pytest.raises(ValueError, match="is not drawn"):
        draw_mask(family, 2, 8, 8, (0,))


def test_the_help_describes_each_family_in_one_line() -> None:
    lines = masks.describe_families().splitlines()
    assert [line.split()[0] for line in lines] == [*FAMILIES, OWN]
    assert all(line.endswith(".") and len(line) <= 100 for line in lines)


def test_a_mix_is_names_with_weights() -> None:
    parsed = Mix.parse(" box:0.5,stationary:2\n variable ")
    assert parsed == Mix({"stationary": 2.0, "variable": 1.0, "box": 0.5})
    assert str(parsed) == "stationary:2 variable box:0.5"
    assert list(Mix.parse("own,box:1e-3").weights) == ["own", "box"]


@few_examples
@given(mixes)
def test_a_mix_survives_its_text(mix: Mix) -> None:
    assert Mix.parse(str(mix)) == mix
    assert str(Mix.parse(str(mix))) == str(mix)
    turned = Mix(dict(reversed(mix.weights.items())))
    assert str(turned) == str(mix)
    assert turned.choose(7, (0, "clip")) == mix.choose(7, (0, "clip"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "stationry",
            r"'stationry' is no family .*nearest is stationary.*among stationary, .*, own",
        ),
        ("boxes:2 variable", "'boxes' is no family .*nearest is box"),
        ("both", "'both' is no family"),
        (":2", "'' is no family"),
        ("", "is empty: choose among stationary"),
        (" , ", "is empty"),
        ("box variable box:2", "names box twice: name it once"),
        ("box:", "'box:': give FAMILY or FAMILY:WEIGHT"),
        ("box:much", "'box:much': give FAMILY"),
        ("box:1:2", "'box:1:2': give FAMILY"),
        ("box:0", "weight of box in the mix of masks is 0.0: choose a finite one above 0"),
        ("box:-1", "is -1.0: choose"),
        ("box:nan", "is nan: choose"),
        ("box:inf", "is inf: choose"),
        ("box:1e999", "is inf: choose"),
    ],
)
def test_what_is_no_mix_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(BadInput, match=said) as refusal:
        Mix.parse(text)
    assert "\n" not in str(refusal.value)


@few_examples
@given(mixes, st.integers(0, 40), seeds)
def test_a_clips_masks_meet_the_weights_within_one(mix: Mix, count: int, seed: int) -> None:
    chosen = mix.choose(count, (seed, "clip"))
    assert len(chosen) == count
    assert chosen == mix.choose(count, (seed, "clip"))
    largest = max(mix.weights.values())  # the sum of the weights themselves may overflow
    total = math.fsum(weight / largest for weight in mix.weights.values())
    for name, weight in mix.weights.items():
        assert abs(chosen.count(name) - count * (weight / largest / total)) < 1 + 1e-9


@few_examples
@given(seeds)
def test_as_many_masks_as_families_of_one_weight_give_each_once(seed: int) -> None:
    assert sorted(Mix.parse("stationary variable").choose(2, (seed,))) == sorted(GRIDS)
    every = Mix(dict.fromkeys((*FAMILIES, OWN), 0.1))
    assert sorted(every.choose(9, (seed,))) == sorted((*FAMILIES, OWN))


@pytest.mark.parametrize("count", [1, 3])
def test_a_familys_share_of_all_clips_is_its_weights(count: int) -> None:
    mix, clips = Mix.parse("stationary:2 box:0.5 own:1.5"), 4000
    chosen = [name for clip in range(clips) for name in mix.choose(count, (0, clip))]
    for name, share in (("stationary", 0.5), ("box", 0.125), ("own", 0.375)):
        # Standard deviation: at most sqrt(0.5 * 0.5 / 4000) = 0.008 of a mask of each clip.
        assert abs(chosen.count(name) / clips - count * share) < 0.04


def test_every_machine_and_version_chooses_these_families() -> None:
    mix = Mix.parse("stationary:2 variable box:0.5")
    assert [mix.choose(2, (0, f"clip {k}")) for k in range(4)] == [
        ["variable", "stationary"],
        ["stationary", "variable"],
        ["variable", "stationary"],
        ["variable", "stationary"],
    ]


def test_latent_mask_is_the_hidden_share_of_each_area() -> None:
    mask = draw_mask("strokes", 3, 32, 48, (0, "clip"))
    shares = latent_mask(mask, 8, 6)
    assert shares.shape == (3, 1, 8, 6)
    expected = mask.reshape(3, 8, 4, 6, 8).mean(axis=(2, 4))
    np.testing.assert_allclose(shares[:, 0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_filling_changes_the_hole_only_and_never_looks_inside(family: str) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    mask = draw_mask(family, 3, 16, 16, (0, "clip"))
    other = np.where(mask[..., None] == 1, 255 - frames, frames)
    filled = masks.fill_hole(frames, mask)
    np.testing.assert_array_equal(filled, masks.fill_hole(other, mask))
    np.testing.assert_array_equal(filled[mask == 0], frames[mask == 0])


@few_examples
@given(seeds, st.integers(1, 12), st.sampled_from([2, 4, 256]))
def test_the_fill_is_numpys_median_of_the_visible_pixels(
    seed: int, pixels: int, values: int
) -> None:
    draw = np.random.default_rng(seed)
    frames = draw.integers(0, values, (2, 1, pixels, 3), dtype=np.uint8)
    mask = draw.integers(0, 2, (2, 1, pixels), dtype=np.uint8)
    mask[0, 0, 0] = 0
    middles = np.median(frames[mask == 0], axis=0).tolist()
    assert masks.visible_median(frames, mask) == tuple(round(middle) for middle in middles)


@pytest.mark.parametrize(
    ("values", "median"), [([0, 1], 0), ([1, 2], 2), ([2, 3], 2), ([254, 255], 254), ([7], 7)]
)
def test_a_median_between_two_values_is_rounded_to_the_even_one(
    values: list[int], median: int
) -> None:
    frames = np.repeat(np.array(values, dtype=np.uint8)[None, None, :, None], 3, axis=3)
    mask = np.zeros(frames.shape[:3], dtype=np.uint8)
    assert masks.visible_median(frames, mask) == (median,) * 3


def test_the_fill_is_the_median_of_visible_pixels_or_the_colour_given() -> None:
    frames = np.full((2, 8, 8, 3), (10, 20, 30), dtype=np.uint8)
    mask = np.zeros((2, 8, 8), dtype=np.uint8)
    mask[:, :4] = 1
    frames[mask == 1] = 200
    assert masks.visible_median(frames, mask) == (10, 20, 30)
    assert (masks.fill_hole(frames, mask)[mask == 1] == (10, 20, 30)).all()
    assert (masks.fill_hole(frames, mask, (1, 2, 3))[mask == 1] == (1, 2, 3)).all()


def test_a_clip_without_visible_pixels_needs_a_colour() -> None:
    frames, mask = np.zeros((1, 4, 4, 3), np.uint8), np.ones((1, 4, 4), np.uint8)
    with pytest.raises(BadInput, match="give a fill colour"):
        masks.fill_hole(frames, mask)
    assert (masks.fill_hole(frames, mask, (9, 9, 9)) == 9).all()
