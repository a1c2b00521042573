"""Analytic ray casting of collision scenes: shading, soft shadows, mirror-like metal.

Vectors have their three components on the first axis, and a body is intersected only inside the
rectangle of the picture that it, or its shadow, can reach. Light is linear until the last step.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from einops import reduce
from jaxtyping import Float, UInt8

from .scene import COLOURS, Body, Scene

SUPERSAMPLING = 2  # rays along each side of a pixel

CAMERA = np.array([0.0, -7.6, 4.6], np.float32)
LOOK_AT = np.array([0.0, -0.15, 0.0], np.float32)
HALF_VIEW = 0.335  # tangent of half the field of view

LAMP = np.array([5.2, -2.6, 6.2], np.float32)
LAMP_RADIUS = 1.1  # its size softens the shadows
LAMP_SAMPLES = 8
FILL = np.array([-0.75, -0.35, 0.56], np.float32)  # direction towards a second, shadowless light
FLOOR_ALBEDO = 0.40
EPSILON = 1e-3

# "#": an origin or a light that all rays share has axes of length 1.
Vectors = Float[np.ndarray, "3 *#rays"]
Scalars = Float[np.ndarray, "*#rays"]


@dataclass(frozen=True)
class Placed:
    """A body at its place in one frame."""

    body: Body
    centre: Float[np.ndarray, "3"]
    half_height: float
    cosine: float  # of its angle about the vertical
    sine: float


@dataclass(frozen=True)
class CameraRays:
    """The fixed camera's rays, and the floor that they meet."""

    axes: Float[np.ndarray, "3 3"]  # rows: right, up, forward
    directions: Float[np.ndarray, "3 height width"]
    distance: Float[np.ndarray, "height width"]  # along each ray, to the floor
    floor: Float[np.ndarray, "3 height width"]  # the points there


def render(scene: Scene, size: int) -> UInt8[np.ndarray, "frames size size 3"]:
    """Draw every frame of a scene, `size` pixels wide and high, as 8-bit sRGB."""
    rays = look(size * SUPERSAMPLING)
    frames = range(len(scene.positions))
    return np.stack([_to_pixels(_draw_frame(rays, place(scene, frame))) for frame in frames])


def look(side: int) -> CameraRays:
    """The camera's rays through a grid of side × side points."""
    forward = (LOOK_AT - CAMERA) / np.linalg.norm(LOOK_AT - CAMERA)
    right = np.array([forward[1], -forward[0], 0]) / np.hypot(forward[0], forward[1])
    axes = np.stack([right, np.cross(right, forward), forward]).astype(np.float32)
    steps = ((np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1) * HALF_VIEW
    across, down = np.broadcast_arrays(steps[None, :], steps[:, None])
    directions = _unit(_combine(axes.T, np.stack([across, -down, np.ones_like(across)])))
    distance = -CAMERA[2] / directions[2]
    floor = _column(CAMERA, 2) + distance * directions
    return CameraRays(axes, directions, distance, floor)


def place(scene: Scene, frame: int) -> list[Placed]:
    """The bodies of one frame, standing on the floor."""
    placed = []
    for index, body in enumerate(scene.bodies):
        half = body.radius / 2**0.5 if body.shape == "cube" else body.radius
        centre = np.array([*scene.positions[frame, index], half], np.float32)
        angle = scene.angles[frame, index]
        placed.append(Placed(body, centre, half, float(np.cos(angle)), float(np.sin(angle))))
    return placed


def _draw_frame(rays: CameraRays, bodies: list[Placed]) -> Float[np.ndarray, "3 height width"]:
    picture = _shade_floor(rays, bodies)
    nearest = rays.distance.copy()
    for index, body in enumerate(bodies):
        box = _screen_box(rays, *_extent(body))
        directions = rays.directions[:, *box]
        near, far = _span(body, _column(CAMERA, 2), directions)
        hit = (near < far) & (near < nearest[box]) & (near > 0)
        if hit.any():
            nearest[box][hit] = near[hit]
            others = bodies[:index] + bodies[index + 1 :]
            picture[:, *box][:, hit] = _shade_body(body, others, directions[:, hit], near[hit])
    return picture


def _span(placed: Placed, origin: Vectors, direction: Vectors) -> tuple[Scalars, Scalars]:
    """Where rays enter and leave a body; they miss it where enter >= leave."""
    o = _to_local(placed, origin - _column(placed.centre, origin.ndim - 1))
    d = _to_local(placed, direction)
    if placed.body.shape == "sphere":
        return _round_span(o, d, placed.body.radius)
    if placed.body.shape == "cube":
        spans = [_slab_span(o[axis], d[axis], placed.half_height) for axis in range(3)]
    else:
        spans = [
            _round_span(o[:2], d[:2], placed.body.radius),
            _slab_span(o[2], d[2], placed.half_height),
        ]
    nears, fars = zip(*spans, strict=True)
    return functools.reduce(np.maximum, nears), functools.reduce(np.minimum, fars)


def _round_span(
    o: Float[np.ndarray, "axes *#rays"], d: Float[np.ndarray, "axes *#rays"], radius: float
) -> tuple[Scalars, Scalars]:
    """The span inside a ball (three axes) or an endless upright cylinder (two)."""
    a = np.maximum(_dot(d, d), 1e-9)
    b = _dot(o, d) / a
    inside = b * b - (_dot(o, o) - radius**2) / a
    root = np.sqrt(np.maximum(inside, 0))
    return -b - root, np.where(inside > 0, root - b, -np.inf)


def _slab_span(o: Scalars, d: Scalars, half: float) -> tuple[Scalars, Scalars]:
    inverse = 1 / np.where(np.abs(d) < 1e-9, np.float32(1e-9), d)
    middle, reach = -o * inverse, half * np.abs(inverse)
    return middle - reach, middle + reach


def _shade_floor(rays: CameraRays, bodies: list[Placed]) -> Float[np.ndarray, "3 height width"]:
    lit, open_sky = np.ones_like(rays.distance), np.ones_like(rays.distance)
    for body in bodies:
        box = _screen_box(rays, *_shadow_extent(body))
        points = rays.floor[:, *box]
        lit[box] *= _lamp_visible(points, [body])
        open_sky[box] *= _sky_visible(points, body)
    x, y, _ = rays.floor
    sky = 1 / (1 + np.maximum(y + 2, 0) ** 2 / 500)
    lamp = 0.72 / (1 + ((x - 2.2) ** 2 + (y + 3.0) ** 2) / 48)
    # The room's light is a little warm, as CLEVR's is.
    tint = _column(np.array([1.0, 0.995, 0.975], np.float32), 2)
    return FLOOR_ALBEDO * tint * (0.34 * open_sky * sky + lamp * lit)


def _sky_visible(points: Vectors, placed: Placed) -> Scalars:
    """What of the sky a ball of the body's size leaves free above points of the floor."""
    offset = _column(placed.centre, points.ndim - 1) - points
    squared = np.maximum(_dot(offset, offset), placed.half_height**2)
    return 1 - 0.9 * placed.half_height * placed.body.radius**2 / squared**1.5


def _lamp_visible(points: Vectors, occluders: list[Placed]) -> Scalars:
    """The part of the lamp's disc that points see past the occluders."""
    visible = np.zeros(points.shape[1:], np.float32)
    for sample in _lamp_points():
        towards = _column(sample, points.ndim - 1) - points
        free = np.ones(points.shape[1:], bool)
        for body in occluders:
            near, far = _span(body, points, towards)
            free &= (near >= far) | (far < EPSILON)
        visible += free
    return visible / LAMP_SAMPLES


def _lamp_points() -> Float[np.ndarray, "samples 3"]:
    """Points of the lamp's disc, on a golden-angle spiral, which fills it evenly."""
    index = np.arange(LAMP_SAMPLES)
    radius, angle = LAMP_RADIUS * np.sqrt((index + 0.5) / LAMP_SAMPLES), 2.39996 * index
    disc = np.stack([radius * np.cos(angle), radius * np.sin(angle), 0 * angle], axis=1)
    return (LAMP + disc).astype(np.float32)


def _shade_body(
    placed: Placed,
    others: list[Placed],
    direction: Vectors,
    distance: Scalars,
) -> Vectors:
    """Rubber is lit evenly; metal is a tinted mirror of a dim room with a bright floor."""
    body = placed.body
    points = _column(CAMERA, 1) + distance * direction
    normal = _normal(placed, points)
    near = [
        other
        for other in others
        if np.hypot(*(other.centre - placed.centre)[:2]) < 4 * other.body.radius
    ]
    lit = _lamp_visible(points + EPSILON * normal, near) if near else np.ones_like(distance)
    to_lamp = _unit(_column(LAMP, 1) - points)
    facing = np.maximum(_dot(normal, to_lamp), 0)
    mirrored = direction - 2 * _dot(direction, normal) * normal
    gleam = np.maximum(_dot(mirrored, to_lamp), 0)
    albedo = _column((np.array(COLOURS[body.colour], np.float32) / 255) ** 2.2, 1)
    fill = _column(FILL, 1)
    if body.material == "rubber":
        contact = np.clip(0.45 + points[2], 0, 1)
        diffuse = 0.66 * lit * facing
        diffuse += contact * (0.24 + 0.12 * normal[2]) + 0.16 * np.maximum(_dot(normal, fill), 0)
        return (0.90 * albedo + 0.03) * diffuse + 0.08 * lit * gleam**10
    contact = np.clip(0.35 + 1.2 * points[2], 0, 1)
    horizon = np.clip(mirrored[2] * 4 + 0.5, 0, 1)
    room = (1 - horizon) * 0.75 * contact + horizon * (0.10 + 0.5 * np.maximum(mirrored[2], 0) ** 2)
    highlight = 1.6 * lit * gleam**36
    highlight += 0.9 * np.maximum(_dot(mirrored, fill), 0) ** 40
    return albedo * (room + 0.16 * lit * facing) + (0.5 + 0.5 * albedo) * highlight


def _normal(placed: Placed, points: Vectors) -> Vectors:
    outward = points - _column(placed.centre, 1)
    if placed.body.shape == "sphere":
        return outward / placed.body.radius
    if placed.body.shape == "cylinder":
        lid = np.abs(outward[2]) > placed.half_height - EPSILON
        side = outward * _column(np.array([1, 1, 0], np.float32), 1) / placed.body.radius
        return np.where(lid, np.sign(outward) * _column(np.array([0, 0, 1], np.float32), 1), side)
    local = _to_local(placed, outward)
    face = np.abs(local) >= np.abs(local).max(axis=0)
    x, y, z = np.where(face, np.sign(local), 0).astype(np.float32)
    c, s = placed.cosine, placed.sine
    return _unit(np.stack([c * x - s * y, s * x + c * y, z]))


def _to_local(placed: Placed, vectors: Vectors) -> Vectors:
    """Turn vectors into a cube's own axes; the other bodies are round."""
    if placed.body.shape != "cube":
        return vectors
    c, s = placed.cosine, placed.sine
    x, y, z = vectors
    return np.stack([c * x + s * y, c * y - s * x, z])


def _extent(placed: Placed) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    reach = np.array([placed.body.radius, placed.body.radius, placed.half_height], np.float32)
    return placed.centre - reach, placed.centre + reach


def _shadow_extent(placed: Placed) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """The part of the floor that a body darkens: its shadows and its surroundings."""
    low, high = _extent(placed)
    top = high[2]
    corners = np.array([[x, y] for x in (low[0], high[0]) for y in (low[1], high[1])])
    lamps = _lamp_points()
    scale = top / (lamps[:, 2] - top)
    cast = corners[:, None] + (corners[:, None] - lamps[None, :, :2]) * scale[:, None]
    margin = 4 * placed.body.radius
    low_xy = np.minimum(cast.min((0, 1)), placed.centre[:2] - margin)
    high_xy = np.maximum(cast.max((0, 1)), placed.centre[:2] + margin)
    return np.array([*low_xy, 0], np.float32), np.array([*high_xy, 0], np.float32)


def _screen_box(
    rays: CameraRays, low: Float[np.ndarray, "3"], high: Float[np.ndarray, "3"]
) -> tuple[slice, slice]:
    """The rows and columns of the picture that a box in space can reach; none if out of view."""
    corners = np.stack(np.meshgrid(*np.stack([low, high], axis=1), indexing="ij")).reshape(3, 8)
    across, up, depth = _combine(rays.axes, corners - _column(CAMERA, 1))
    if depth.min() < 1:  # beside or behind the camera, which looks over it
        return slice(0), slice(0)
    side = len(rays.distance)
    columns = (across / depth / HALF_VIEW + 1) / 2 * side
    rows = (1 - up / depth / HALF_VIEW) / 2 * side
    ends = [np.floor([rows.min(), columns.min()]), np.ceil([rows.max(), columns.max()])]
    (top, left), (bottom, right) = np.clip(ends, 0, side).astype(int)
    return slice(top, bottom), slice(left, right)


def _to_pixels(picture: Float[np.ndarray, "3 height width"]) -> UInt8[np.ndarray, "size size 3"]:
    mean = reduce(
        np.clip(picture, 0, 1),
        "channels (height up) (width across) -> height width channels",
        "mean",
        up=SUPERSAMPLING,
        across=SUPERSAMPLING,
    )
    return np.round(255 * mean ** (1 / 2.2)).astype(np.uint8)


def _dot(a: Float[np.ndarray, "axes *#rays"], b: Float[np.ndarray, "axes *#rays"]) -> Scalars:
    total = a[0] * b[0]
    for one, other in zip(a[1:], b[1:], strict=True):
        total = total + one * other
    return total


def _unit(vectors: Vectors) -> Vectors:
    return vectors / np.sqrt(_dot(vectors, vectors))


def _combine(matrix: Float[np.ndarray, "3 3"], vectors: Vectors) -> Vectors:
    """A matrix product in a fixed order of additions, so that it is the same everywhere."""
    return np.stack([_dot(_column(row, vectors.ndim - 1), vectors) for row in matrix])


def _column(vector: Float[np.ndarray, "3"], axes: int) -> np.ndarray:
    return vector.reshape(3, *([1] * axes))
