"""Scenes of coloured shapes, 64 x 64 pixels: what they are made of, how one is chosen and rendered."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

SIDE = 64  # pixels; a multiple of 16, the patch of the small models
COLOURS = {
    "red": (220, 30, 30),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 40),
    "green": (30, 160, 60),
    "blue": (30, 70, 220),
    "purple": (130, 40, 170),
    "pink": (250, 130, 190),
    "brown": (125, 75, 35),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
GROUNDS = {"white": (250, 250, 250), "grey": (150, 150, 150), "black": (15, 15, 15), "beige": (235, 220, 180)}
PATTERNS = ("plain", "striped", "dotted", "checked")

# Pixels: half the width of a single shape, and the way from the middle of the picture to it or to the first of two.
SIZES = {"small": 9, "large": 16}
CENTRES = {"left": (-13, 0), "right": (13, 0), "upper": (0, -13), "lower": (0, 13), "middle": (0, 0)}
SIDES = {"left of": (-15, 0), "right of": (15, 0), "above": (0, -15), "below": (0, 15)}
LINES = {"row": (1, 0), "column": (0, 1)}
POSITIONS = {"single": tuple(CENTRES), "two": tuple(SIDES), "several": tuple(LINES)}
_RADIUS_OF_TWO, _RADIUS_OF_SEVERAL = 12, 7


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What one picture shows.

    `kind` is "single" (with a `size`), "two" (the main shape stands `position` the other one) or "several" (`count` equal
    shapes in a row or column); `jitter` moves all shapes by that many pixels.
    """

    kind: str
    colour: str
    shape: str
    position: str
    pattern: str
    ground: str
    jitter: tuple[int, int]
    size: str = ""
    count: int = 1
    other_colour: str = ""
    other_shape: str = ""


def random_scene(rng: Random, *, kind: str | None = None) -> Scene:
    """A scene whose attributes are uniform and independent of each other, so that none can be told from another."""
    kind = kind or rng.choices(("single", "two", "several"), (6, 3, 1))[0]
    scene = Scene(
        kind=kind,
        colour=rng.choice(tuple(COLOURS)),
        shape=rng.choice(SHAPES),
        position=rng.choice(POSITIONS[kind]),
        pattern=rng.choice(PATTERNS),
        ground=rng.choice(tuple(GROUNDS)),
        jitter=(rng.randrange(-2, 3), rng.randrange(-2, 3)),
    )
    if kind == "single":
        return replace(scene, size=rng.choice(tuple(SIZES)))
    if kind == "two":
        return replace(scene, other_colour=rng.choice(tuple(COLOURS)), other_shape=rng.choice(SHAPES))
    return replace(scene, count=rng.choice((2, 3, 4)))


def content(scene: Scene) -> tuple[object, ...]:
    """What the picture shows, whatever is named first: equal for "red left of blue" and "blue right of red"."""
    return scene.pattern, scene.ground, tuple(sorted(_shapes(scene)))


def render(scene: Scene) -> bytes:
    """The scene as a PNG file of SIDE x SIDE pixels."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), GROUNDS[scene.ground])
    draw = ImageDraw.Draw(image)
    _draw_pattern(draw, scene)
    for x, y, radius, colour, shape in _shapes(scene):
        _draw_shape(draw, x, y, radius, COLOURS[colour], shape)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _shapes(scene: Scene) -> list[tuple[int, int, int, str, str]]:
    """(x, y, radius, colour, shape) of each shape, in pixels."""
    middle_x, middle_y = SIDE // 2 + scene.jitter[0], SIDE // 2 + scene.jitter[1]
    main = (scene.colour, scene.shape)
    if scene.kind == "single":
        x, y = CENTRES[scene.position]
        return [(middle_x + x, middle_y + y, SIZES[scene.size], *main)]
    if scene.kind == "two":
        x, y = SIDES[scene.position]
        first, second = (middle_x + x, middle_y + y), (middle_x - x, middle_y - y)
        return [(*first, _RADIUS_OF_TWO, *main), (*second, _RADIUS_OF_TWO, scene.other_colour, scene.other_shape)]
    (x, y), step = LINES[scene.position], SIDE // scene.count
    ways = [step // 2 + step * number - SIDE // 2 for number in range(scene.count)]
    return [(middle_x + x * way, middle_y + y * way, _RADIUS_OF_SEVERAL, *main) for way in ways]


def _draw_pattern(draw: ImageDraw, scene: Scene) -> None:
    ground = GROUNDS[scene.ground]
    tone = tuple(value + (40 if max(ground) < 100 else -50) for value in ground)
    if scene.pattern == "striped":
        for x in range(0, SIDE, 8):
            draw.rectangle((x, 0, x + 3, SIDE), fill=tone)
    elif scene.pattern == "dotted":
        for x in range(4, SIDE, 8):
            for y in range(4, SIDE, 8):
                draw.ellipse((x - 1, y - 1, x + 1, y + 1), fill=tone)
    elif scene.pattern == "checked":
        for x in range(0, SIDE, 8):
            for y in range(x % 16, SIDE, 16):
                draw.rectangle((x, y, x + 7, y + 7), fill=tone)


def _draw_shape(draw: ImageDraw, x: int, y: int, radius: int, colour: tuple[int, int, int], shape: str) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=radius // 3)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon(((x, y - radius), (x - radius, y + radius), (x + radius, y + radius)), fill=colour)
    else:
        arm = radius // 3
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
