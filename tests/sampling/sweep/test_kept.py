from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from vidfill.errors import BadInput
from vidfill.sampling.sweep.kept import (
    SweepFolder,
    diversity,
    read_spread,
    read_strip,
    slug,
    spread_of,
    write_spread,
    write_strip,
)

SHAPE = (3, 8, 6)  # frames, height, width


def draw(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *SHAPE, 3), dtype=np.uint8)


def test_a_strip_is_read_back_as_it_was_and_one_of_another_size_is_refused(
    tmp_path: Path,
) -> None:
    (frames,) = draw(1)
    write_strip(tmp_path / "a.png", frames)
    assert (read_strip(tmp_path / "a.png", *SHAPE) == frames).all()
    with pytest.raises(BadInput, match="is no strip of 24x8 pixels: run the sweep again"):
        read_strip(tmp_path / "a.png", 4, 8, 6)


def test_spread_is_the_deviation_of_a_grey_pixel_and_in_the_root_mean_square_of_colours() -> None:
    completions = draw(5)
    grey = np.repeat(completions[..., :1], 3, axis=-1)
    wanted = completions.astype(float).std(axis=0, ddof=1)
    np.testing.assert_allclose(spread_of(grey), wanted[..., 0])
    np.testing.assert_allclose(spread_of(completions), np.sqrt((wanted**2).mean(axis=-1)))
    two = np.stack([completions[0], completions[0] ^ 255])
    assert (spread_of(np.stack([two[0]] * 3)) == 0).all()
    gap = np.abs(two[0].astype(float) - two[1])
    np.testing.assert_allclose(spread_of(two) ** 2, (gap**2 / 2).mean(axis=-1))


def test_diversity_does_not_depend_on_the_number_of_completions_but_by_chance() -> None:
    random = np.random.default_rng(0)
    mask = np.ones((4, 32, 32), np.uint8)
    drawn = np.clip(random.normal(128, 20, (16, *mask.shape, 3)), 0, 255).astype(np.uint8)
    found = [diversity(spread_of(drawn[:count]), mask) for count in (2, 4, 16)]
    # 12,288 values of each completion: standard errors of 0.6 % and less; whole units add 0.04.
    assert found == pytest.approx([20] * 3, rel=0.02)


def test_diversity_looks_into_the_hole_alone() -> None:
    mask = np.zeros(SHAPE, np.uint8)
    assert np.isnan(diversity(np.ones(SHAPE), mask))
    mask[:, 2:4, 1:3] = 1
    spread = np.where(mask == 1, 3.0, 9.0)
    assert diversity(spread, mask) == 3


def test_of_a_completion_the_hole_is_kept_and_a_map_to_a_part_of_a_unit(tmp_path: Path) -> None:
    mask = np.random.default_rng(1).integers(0, 2, SHAPE, dtype=np.uint8)
    completions = draw(3)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, frames in zip(paths, completions, strict=True):
        write_strip(path, frames * mask[..., None])
    kept = np.stack([read_strip(path, *SHAPE) for path in paths])
    assert (kept == completions * mask[..., None]).all()
    spread = spread_of(kept)
    np.testing.assert_allclose(spread[mask == 1], spread_of(completions)[mask == 1])
    assert (spread[mask == 0] == 0).all()
    write_spread(tmp_path / "map.png", spread)
    again = read_spread(tmp_path / "map.png", *SHAPE)
    assert (np.abs(again - spread) <= 0.5 / 256).all()
    with pytest.raises(BadInput, match="is no map of 12x8 pixels: run the sweep again"):
        read_spread(tmp_path / "map.png", 2, 8, 6)


def test_features_are_read_back_a_row_for_each_example(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    vectors = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    for example, vector in zip("abc", vectors, strict=True):
        folder.write_features("ddim-2", example, {"fvd": vector, "vfid": 2 * vector})
    assert (folder.read_features("fvd", "ddim-2", "abc") == vectors).all()
    assert (folder.read_features("vfid", "ddim-2", "b") == 2 * vectors[1:2]).all()


def test_slugs_are_safe_names_of_files() -> None:
    assert slug("ddpm:50(variance=large)+resample(n=4)") == "ddpm-50-variance-large-resample-n-4"
