"""Scenes of coloured shapes, 64 x 64 pixels: what they are made of, how one is drawn at random and rendered."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from random import Random

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
RADIUS = {"small": 9, "large": 16}  # half the width of a single shape, in pixels
CENTRES = {"left": (19, 32), "right": (45, 32), "upper": (32, 19), "lower": (32, 45), "middle": (32, 32)}
SIDES = {
    "left of": (-15, 0),
    "right of": (15, 0),
    "above": (0, -15),
    "below": (0, 15),
}  # of the first of two, to the middle
LINES = {"row": (1, 0), "column": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One picture. `kind` "single": `size` and `place` of CENTRES; "two": `place` of SIDES, the main shape's side of the
    other; "several": `count` equal shapes along `place` of LINES. `jitter`: pixels that everything is moved by (x, y)."""

    kind: str
    colour: str
    shape: str
    place: str
    pattern: str
    ground: str
    jitter: tuple[int, int]
    size: str = "middle"
    count: int = 1
    other_colour: str = ""
    other_shape: str = ""


def random_scene(rng: Random, *, kind: str | None = None) -> Scene:
    """Every attribute uniform and independent of the others, so that none can be told from another."""
    kind = kind or rng.choices(("single", "two", "several"), (6, 3, 1))[0]
    scene = Scene(
        kind=kind,
        colour=rng.choice(list(COLOURS)),
        shape=rng.choice(SHAPES),
        place=rng.choice(list({"single": CENTRES, "two": SIDES, "several": LINES}[kind])),
        pattern=rng.choice(PATTERNS),
        ground=rng.choice(list(GROUNDS)),
        jitter=(rng.randrange(-2, 3), rng.randrange(-2, 3)),
    )
    if kind == "single":
        return replace(scene, size=rng.choice(list(RADIUS)))
    if kind == "two":
        return replace(scene, other_colour=rng.choice(list(COLOURS)), other_shape=rng.choice(SHAPES))
    return replace(scene, count=rng.choice((2, 3, 4)))


def render(scene: Scene) -> bytes:
    """The scene as a PNG file."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), GROUNDS[scene.ground])
    draw = ImageDraw.Draw(image)
    _draw_pattern(draw, scene)
    dx, dy = scene.jitter
    for x, y, radius, colour, shape in _objects(scene):
        _draw_shape(draw, x + dx, y + dy, radius, COLOURS[colour], shape)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=6)
    return file.getvalue()


def _objects(scene: Scene) -> list[tuple[int, int, int, str, str]]:
    """(x, y, radius, colour, shape) of everything in front of the background, in pixels."""
    middle = SIDE // 2
    if scene.kind == "single":
        return [(*CENTRES[scene.place], RADIUS[scene.size], scene.colour, scene.shape)]
    if scene.kind == "two":
        x, y = SIDES[scene.place]
        return [
            (middle + x, middle + y, 12, scene.colour, scene.shape),
            (middle - x, middle - y, 12, scene.other_colour, scene.other_shape),
        ]
    (x, y), step = LINES[scene.place], SIDE // scene.count
    offsets = [step * (i + 0.5) - middle for i in range(scene.count)]
    return [(round(middle + o * x), round(middle + o * y), 7, scene.colour, scene.shape) for o in offsets]


def _draw_pattern(draw, scene: Scene) -> None:
    tone = tuple(value + (40 if value < 100 else -50) for value in GROUNDS[scene.ground])
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


def _draw_shape(draw, x: int, y: int, radius: int, colour: tuple[int, int, int], shape: str) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=max(3, radius // 3))
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon(((x, y - radius), (x - radius, y + radius), (x + radius, y + radius)), fill=colour)
    else:
        arm = radius // 3
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
