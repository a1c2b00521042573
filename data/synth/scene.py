"""Random collision scenes: bodies gliding over a floor plane, without friction, elastically.

A body is a disc on the floor as far as motion is concerned. Between collisions it moves in a
straight line, so the simulation steps from one collision to the next and is exact: there is no
time step, and energy and momentum are kept to rounding.

Lengths are in scene units (a body is about 0.8 wide, the view about 6), times in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

Shape = Literal["sphere", "cube", "cylinder"]
Material = Literal["rubber", "metal"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
MATERIALS: tuple[Material, ...] = get_args(Material)
MASSES: dict[Material, float] = {"rubber": 1.0, "metal": 1.6}

# The eight colours of CLEVR (Johnson et al. 2017), 8-bit sRGB.
COLOURS = {
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}

RADII = (0.38, 0.47)  # of a body's disc
SPEEDS = (1.8, 3.0)  # of the bodies that move at the start
ARRIVALS = (0.2, 0.65)  # when a moving body meets its target, as a fraction of the clip
STAGE = ((-2.0, 2.0), (-1.7, 1.9))  # x and y within which bodies rest: well inside the view
CLEARANCE = 0.12  # between bodies at the start
SHORTEST = 1.0  # seconds; a shorter clip shows bodies on their way to each other
TRIES = 100


@dataclass(frozen=True)
class Body:
    """What a body is; where it is is in `Scene`."""

    shape: Shape
    material: Material
    colour: str
    radius: float  # of its disc on the floor; a cube's corners are on that disc
    twist: float  # radians that it turns for each unit of its path


@dataclass(frozen=True)
class Collision:
    """Two bodies touched."""

    time: float
    place: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """Bodies and where they are in every frame."""

    bodies: tuple[Body, ...]
    positions: Float[np.ndarray, "frames bodies 2"]
    angles: Float[np.ndarray, "frames bodies"]  # about the vertical, in radians
    collisions: tuple[Collision, ...]


@dataclass(frozen=True)
class _Start:
    body: Body
    place: Float[np.ndarray, "2"]
    velocity: Float[np.ndarray, "2"]


def draw_scene(rng: np.random.Generator, frames: int, fps: float) -> Scene:
    """Draw a scene of 2 to 5 bodies that collide in view, if the clip is long enough for that.

    A clip of 4 seconds or more has more bodies, which come in later.
    """
    times = np.arange(frames) / fps
    for _ in range(TRIES):
        starts = _draw_starts(rng, float(times[-1]))
        bodies = tuple(start.body for start in starts)
        positions, paths, collisions = simulate(
            np.stack([start.place for start in starts]),
            np.stack([start.velocity for start in starts]),
            np.array([body.radius for body in bodies]),
            np.array([MASSES[body.material] for body in bodies]),
            times,
        )
        angles = rng.uniform(0, 2 * np.pi, len(bodies))
        angles = angles + paths * np.array([body.twist for body in bodies])
        low, high = np.transpose(STAGE)
        if any(((low <= hit.place) & (hit.place <= high)).all() for hit in collisions):
            break
    return Scene(bodies, positions, angles, collisions)


def _draw_starts(rng: np.random.Generator, duration: float) -> list[_Start]:
    resting: list[_Start] = []
    for _ in range(rng.integers(1, 4)):
        resting += _first_free(resting, (_draw_resting(rng) for _ in range(TRIES)))
    moving: list[_Start] = []
    for _ in range(rng.integers(1, 3) + int(duration // 4)):
        aimed = (_draw_moving(rng, resting, duration) for _ in range(TRIES))
        moving += _first_free(resting + moving, aimed)
    return resting + moving


def _first_free(others: Sequence[_Start], candidates: Iterable[_Start]) -> list[_Start]:
    """The first candidate that keeps its distance from the others; none where it is too crowded."""
    for candidate in candidates:
        apart = (
            np.linalg.norm(candidate.place - other.place)
            - candidate.body.radius
            - other.body.radius
            for other in others
        )
        if all(gap > CLEARANCE for gap in apart):
            return [candidate]
    return []


def _draw_body(rng: np.random.Generator) -> Body:
    return Body(
        shape=SHAPES[rng.integers(len(SHAPES))],
        material=MATERIALS[rng.integers(len(MATERIALS))],
        colour=tuple(COLOURS)[rng.integers(len(COLOURS))],
        radius=float(rng.uniform(*RADII)),
        twist=float(rng.uniform(-0.9, 0.9)),
    )


def _draw_resting(rng: np.random.Generator) -> _Start:
    place = np.array([rng.uniform(*span) for span in STAGE])
    return _Start(_draw_body(rng), place, np.zeros(2))


def _draw_moving(rng: np.random.Generator, targets: Sequence[_Start], duration: float) -> _Start:
    """A body on its way to one of `targets`, not quite head-on, often from outside the view."""
    body, target = _draw_body(rng), targets[int(rng.integers(len(targets)))]
    touching = body.radius + target.body.radius
    heading, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*SPEEDS)
    along = np.array([np.cos(heading), np.sin(heading)])
    across = np.array([-along[1], along[0]])
    wait = rng.uniform(*ARRIVALS) * max(duration, SHORTEST)
    start = target.place - (speed * wait + touching) * along
    return _Start(body, start + rng.uniform(-0.6, 0.6) * touching * across, speed * along)


def simulate(
    positions: Float[np.ndarray, "bodies 2"],
    velocities: Float[np.ndarray, "bodies 2"],
    radii: Float[np.ndarray, "bodies"],
    masses: Float[np.ndarray, "bodies"],
    times: Float[np.ndarray, "frames"],
) -> tuple[
    Float[np.ndarray, "frames bodies 2"],
    Float[np.ndarray, "frames bodies"],
    tuple[Collision, ...],
]:
    """Positions and lengths of path at `times` (rising, from 0), and the collisions until then."""
    now, paths = 0.0, np.zeros(len(radii))
    seen, travelled, collisions = [], [], []
    for time in times:
        while (hit := next_collision(positions, velocities, radii, time - now)) is not None:
            wait, (i, j) = hit
            now = now + wait
            positions = positions + wait * velocities
            paths = paths + wait * np.linalg.norm(velocities, axis=1)
            velocities = collide(positions, velocities, masses, i, j)
            x, y = (radii[j] * positions[i] + radii[i] * positions[j]) / (radii[i] + radii[j])
            collisions.append(Collision(float(now), (float(x), float(y))))
        positions = positions + (time - now) * velocities
        paths = paths + (time - now) * np.linalg.norm(velocities, axis=1)
        now = time
        seen.append(positions)
        travelled.append(paths)
    return np.stack(seen), np.stack(travelled), tuple(collisions)


def next_collision(
    positions: Float[np.ndarray, "bodies 2"],
    velocities: Float[np.ndarray, "bodies 2"],
    radii: Float[np.ndarray, "bodies"],
    within: float,
) -> tuple[float, tuple[int, int]] | None:
    """The time until the next two discs touch, and which two; None if none do in time."""
    touches = []
    for i, j in combinations(range(len(radii)), 2):
        offset, velocity = positions[j] - positions[i], velocities[j] - velocities[i]
        touches.append((_time_to_touch(offset, velocity, radii[i] + radii[j]), (i, j)))
    first = min(touches, default=None)
    return first if first and first[0] <= within else None


def _time_to_touch(
    offset: Float[np.ndarray, "2"], velocity: Float[np.ndarray, "2"], distance: float
) -> float:
    """The first root of |offset + t velocity| = distance; infinite if they never meet."""
    approach = float(offset @ velocity)
    speed_squared = float(velocity @ velocity)
    inside = approach**2 - speed_squared * (float(offset @ offset) - distance**2)
    if approach >= 0 or inside <= 0:
        return np.inf
    return max(0.0, (-approach - inside**0.5) / speed_squared)


def collide(
    positions: Float[np.ndarray, "bodies 2"],
    velocities: Float[np.ndarray, "bodies 2"],
    masses: Float[np.ndarray, "bodies"],
    i: int,
    j: int,
) -> Float[np.ndarray, "bodies 2"]:
    """The velocities after bodies i and j, which touch, push each other off elastically."""
    normal = positions[j] - positions[i]
    normal = normal / np.linalg.norm(normal)
    closing = (velocities[i] - velocities[j]) @ normal
    impulse = 2 * closing / (1 / masses[i] + 1 / masses[j]) * normal
    after = velocities.copy()
    after[i] -= impulse / masses[i]
    after[j] += impulse / masses[j]
    return after
