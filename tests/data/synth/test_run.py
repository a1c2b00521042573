import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from vidfill.data.encode.sources import find_sources
from vidfill.data.synth.raycast import CAMERA, look, place, render
from vidfill.data.synth.run import FPS, SynthConfig, main, render_video, scene_of, synth, video_path
from vidfill.data.synth.scene import MASSES, STAGE, Body, Scene, collide, draw_scene, simulate
from vidfill.data.videos import read_video
from vidfill.errors import BadInput

SMALL = {"clips": 3, "validation": 2, "size": 32, "frames": 8}


def small(out: Path, **changes: int) -> SynthConfig:
    return SynthConfig(out, **(SMALL | changes))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    config = small(tmp_path_factory.mktemp("synth") / "videos")
    return config, synth(config)


def scenes(count: int, frames: int = 24) -> list[Scene]:
    return [draw_scene(np.random.default_rng(seed), frames, float(FPS)) for seed in range(count)]


def test_a_collision_keeps_momentum_and_kinetic_energy():
    rng = np.random.default_rng(0)
    for _ in range(50):
        positions, before = rng.normal(size=(2, 2)), rng.normal(size=(2, 2))
        masses = rng.uniform(0.5, 2, size=2)
        after = collide(positions, before, masses, 0, 1)
        assert np.allclose(masses @ after, masses @ before)
        assert np.isclose(masses @ (after**2).sum(1), masses @ (before**2).sum(1))


def test_equal_bodies_that_meet_head_on_swap_their_velocities():
    positions = np.array([[0.0, 0.0], [3.0, 0.0]])
    velocities = np.array([[2.0, 0.0], [0.0, 0.0]])
    seen, paths, collisions = simulate(
        positions, velocities, np.array([0.5, 0.5]), np.ones(2), np.array([0.0, 1.0, 2.0])
    )
    assert [collision.time for collision in collisions] == [1.0]  # 2 units of gap at speed 2
    assert np.allclose(seen[-1], [[2, 0], [5, 0]])
    assert np.allclose(paths[-1], [2, 2])


def test_a_scene_keeps_its_energy_and_momentum_over_all_of_its_collisions():
    rng = np.random.default_rng(3)
    angle = np.arange(5) / 5 * 2 * np.pi
    positions = 3 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    velocities = -positions + rng.normal(size=(5, 2)) / 10
    masses = rng.uniform(1, 2, size=5)
    times = np.linspace(0, 6, 61)
    seen, _, collisions = simulate(positions, velocities, np.full(5, 0.4), masses, times)
    last = (seen[-1] - seen[-2]) / (times[-1] - times[-2])
    assert len(collisions) > 3
    assert collisions[-1].time < times[-2]
    assert np.allclose(masses @ last, masses @ velocities)
    assert np.isclose(masses @ (last**2).sum(1), masses @ (velocities**2).sum(1))


def test_bodies_never_interpenetrate():
    for scene in scenes(15, frames=60):
        radii = np.array([body.radius for body in scene.bodies])
        offsets = scene.positions[:, :, None] - scene.positions[:, None]
        gaps = np.linalg.norm(offsets, axis=-1) - radii[:, None] - radii
        gaps[:, np.eye(len(radii), dtype=bool)] = 0
        assert gaps.min() > -1e-9


def test_clips_have_two_to_five_bodies_collisions_and_large_motion():
    drawn = scenes(60)
    assert {len(scene.bodies) for scene in drawn} <= {2, 3, 4, 5}
    colliding = [bool(scene.collisions) for scene in drawn]
    assert np.mean(colliding) > 0.9
    moved = [
        np.linalg.norm(scene.positions[-1] - scene.positions[0], axis=1).max() for scene in drawn
    ]
    assert np.median(moved) > (STAGE[0][1] - STAGE[0][0]) / 2


def test_some_bodies_come_in_from_outside_the_view():
    entering = [
        (abs(scene.positions[0, :, 0]) > 4) & (abs(scene.positions[-1, :, 0]) < 2)
        for scene in scenes(60)
    ]
    assert np.concatenate(entering).any()


def still(*bodies: tuple[Body, tuple[float, float]], angle: float = 0.3) -> Scene:
    positions = np.array([[at for _, at in bodies]], dtype=float)
    return Scene(tuple(b for b, _ in bodies), positions, np.full((1, len(bodies)), angle), ())


@pytest.mark.parametrize("material", MASSES)
@pytest.mark.parametrize("shape", ["sphere", "cube", "cylinder"])
def test_a_body_is_seen_in_its_colour_where_it_stands(shape, material):
    body = Body(shape, material, "red", 0.45, 0.0)
    for at in ((0.0, 0.0), (-1.5, 1.0), (1.5, -1.0)):
        scene = still((body, at))
        rays, centre = look(64), place(scene, 0)[0].centre
        off_ray = np.cross(centre - CAMERA, rays.directions, axisb=0)
        row, column = np.unravel_index((off_ray**2).sum(-1).argmin(), (64, 64))
        red, green, blue = render(scene, 64)[0, row, column].astype(int)
        assert red > 1.5 * max(green, blue)


def test_a_body_casts_a_shadow_and_leaves_the_far_floor_alone():
    empty = still((Body("sphere", "rubber", "red", 0.4, 0.0), (50.0, 0.0)))
    sphere = still((Body("sphere", "rubber", "red", 0.4, 0.0), (0.0, 0.0)))
    floor, seen = render(empty, 64)[0].astype(int), render(sphere, 64)[0].astype(int)
    gray = np.ptp(seen, axis=-1) < 12
    assert (gray & (seen.mean(-1) < 0.75 * floor.mean(-1))).sum() > 10
    assert np.array_equal(seen[-8:], floor[-8:])


def test_the_nearer_body_hides_the_farther_one():
    near = (Body("cube", "rubber", "yellow", 0.6, 0.0), (0.0, -1.0))
    far = (Body("sphere", "rubber", "blue", 0.3, 0.0), (0.0, 0.0))

    def is_blue(scene: Scene) -> int:
        picture = render(scene, 64)[0].astype(int)
        return int((picture[..., 2] > picture[..., 0] + 30).sum())

    assert is_blue(still(far, near)) == is_blue(still(near, far)) < 0.5 * is_blue(still(far))


def test_the_same_scene_is_seen_at_every_size():
    scene = scene_of(small(Path("unused")), 0)
    half = render(scene, 64).reshape(8, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    assert np.abs(half - render(scene, 32)).mean() < 1.5


def test_the_layout_is_clevrers(written):
    config, paths = written
    names = [str(path.relative_to(config.out)) for path in paths]
    assert names == [
        "video_train/video_00000-01000/video_00000.mp4",
        "video_train/video_00000-01000/video_00001.mp4",
        "video_train/video_00000-01000/video_00002.mp4",
        "video_validation/video_10000-11000/video_10000.mp4",
        "video_validation/video_10000-11000/video_10001.mp4",
    ]
    splits = Counter(source.split for source in find_sources(config.out))
    assert splits == {"train": 3, "validation": 2}
    assert video_path(Path("o"), 1234) == Path("o/video_train/video_01000-02000/video_01234.mp4")


def test_a_decoded_video_is_close_to_what_was_rendered(written):
    config, paths = written
    frames, fps = read_video(paths[0])
    rendered = render(scene_of(config, 0), config.size)
    assert fps == FPS
    assert frames.shape == rendered.shape == (8, 32, 32, 3)
    error = frames.astype(float) - rendered
    assert np.abs(error.mean(axis=(0, 1, 2))).max() < 3  # FFmpeg's colour conversion rounds down
    assert 10 * np.log10(255**2 / (error**2).mean()) > 28  # what is lost is the chroma's detail


def test_the_seed_and_the_number_decide_a_video_to_the_byte(written, tmp_path):
    _, paths = written
    again, other = small(tmp_path / "again"), small(tmp_path / "other", seed=1)
    for changed in (again, other):
        render_video(changed, 0)
    first = paths[0].read_bytes()
    assert video_path(again.out, 0).read_bytes() == first
    assert video_path(other.out, 0).read_bytes() != first
    assert len({path.read_bytes() for path in paths}) == len(paths)


def test_the_same_command_restores_a_lost_video_and_leaves_the_rest(written):
    config, paths = written
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    lost = paths[-1]
    lost.unlink()
    assert synth(config) == paths
    assert lost.read_bytes() == before[lost][0]
    for path in paths[:-1]:
        assert (path.read_bytes(), path.stat().st_mtime_ns) == before[path]


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main([str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine.txt"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("clips", 0), ("clips", 10_001), ("validation", -1), ("size", 33), ("size", 8), ("frames", 1)],
)
def test_values_out_of_range_are_named_before_anything_is_written(tmp_path, field, value):
    with pytest.raises(BadInput, match=f"{field} is {value}"):
        synth(small(tmp_path / "out", **{field: value}))
    assert not (tmp_path / "out").exists()
