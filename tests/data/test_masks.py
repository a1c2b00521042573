from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vidfill.data import masks
from vidfill.jobs import BadInput

PROTOCOLS = ("stationary", "variable")


@given(
    protocol=st.sampled_from(PROTOCOLS),
    height=st.integers(1, 12).map(lambda n: 4 * n),
    width=st.integers(1, 12).map(lambda n: 4 * n),
    seed=st.integers(0, 2**31),
)
def test_a_quarter_of_every_frame_is_hidden(
    protocol: masks.Protocol, height: int, width: int, seed: int
) -> None:
    mask = masks.draw_mask(protocol, 3, height, width, (seed, "clip"))
    assert mask.shape == (3, height, width)
    assert mask.dtype == np.uint8
    assert (4 * mask.astype(int).sum(axis=(1, 2)) == height * width).all()


def test_masks_are_whole_cells_of_the_grid() -> None:
    mask = masks.draw_mask("variable", 20, 32, 64, (0, "clip"))
    cells = mask.reshape(20, 4, 8, 4, 16)
    assert (cells.min(axis=(2, 4)) == cells.max(axis=(2, 4))).all()


def test_stationary_masks_stay_and_variable_masks_move() -> None:
    stationary = masks.draw_mask("stationary", 20, 16, 16, (0, "clip"))
    variable = masks.draw_mask("variable", 20, 16, 16, (0, "clip"))
    assert (stationary == stationary[0]).all()
    assert len(np.unique(variable.reshape(20, -1), axis=0)) > 10


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_mask_is_a_pure_function_of_seed_and_key(protocol: masks.Protocol) -> None:
    def draw(seed: int, key: str) -> bytes:
        return masks.draw_mask(protocol, 20, 16, 16, (seed, key)).tobytes()

    assert draw(0, "clip") == draw(0, "clip")
    assert len({draw(0, "clip"), draw(1, "clip"), draw(0, "another")}) == 3


def test_every_cell_is_hidden_equally_often() -> None:
    mask = masks.draw_mask("variable", 2000, 4, 4, (0, "clip"))
    # Standard deviation of a share: sqrt(0.25 * 0.75 / 2000) = 0.0097.
    assert np.abs(mask.mean(axis=0) - 0.25).max() < 0.05


def test_latent_mask_is_the_hidden_share_of_each_area() -> None:
    mask = masks.draw_mask("variable", 3, 32, 48, (0, "clip"))
    shares = masks.latent_mask(mask, 8, 6)
    assert shares.shape == (3, 1, 8, 6)
    expected = mask.reshape(3, 8, 4, 6, 8).mean(axis=(2, 4))
    np.testing.assert_allclose(shares[:, 0].numpy(), expected, atol=1e-6)


def test_filling_changes_the_hole_only_and_never_looks_inside() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    mask = masks.draw_mask("variable", 3, 16, 16, (0, "clip"))
    other = np.where(mask[..., None] == 1, 255 - frames, frames)
    filled = masks.fill_hole(frames, mask)
    np.testing.assert_array_equal(filled, masks.fill_hole(other, mask))
    np.testing.assert_array_equal(filled[mask == 0], frames[mask == 0])


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
