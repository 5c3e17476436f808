"""The world of the embedded model: one shape on a plain background, and the words for it.

Images are drawn at four times their size and shrunk, so edges are smooth. Everything random comes from the
generator that is passed in.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIZE = 64  # pixels, square
_SCALE = 4  # drawn this much larger
_CANVAS = SIZE * _SCALE

Color = tuple[int, int, int]

COLORS: dict[str, Color] = {
    "red": (214, 40, 40),
    "green": (45, 160, 70),
    "blue": (45, 80, 210),
    "yellow": (245, 210, 50),
    "purple": (140, 60, 180),
    "orange": (240, 130, 30),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
POSITIONS = {"center": (0.5, 0.5), "left": (0.28, 0.5), "right": (0.72, 0.5), "top": (0.5, 0.28), "bottom": (0.5, 0.72)}
RADII = {"small": 0.18, "large": 0.27}  # share of the image's side


@dataclass(frozen=True)
class Scene:
    """The content of an image, in words of the tables above."""

    shape: str
    color: str
    background: str
    position: str
    size: str

    @property
    def place(self) -> str:
        if self.position == "center":
            return "in the center"
        return f"{'on' if self.position in ('left', 'right') else 'at'} the {self.position}"

    def full_caption(self) -> str:
        return f"a {self.size} {self.color} {self.shape} {self.place}, {self.background} background"


def random_scene(rng: random.Random) -> Scene:
    color = rng.choice(list(COLORS))
    return Scene(
        shape=rng.choice(SHAPES),
        color=color,
        background=rng.choice([c for c in COLORS if c != color]),
        position=rng.choice(list(POSITIONS)),
        size=rng.choice(list(RADII)),
    )


def random_caption(scene: Scene, rng: random.Random) -> str:
    """One of several ways to say it, some of which leave things out."""
    draw = rng.random()
    if draw < 0.5:
        return scene.full_caption()
    if draw < 0.75:
        return f"a {scene.color} {scene.shape} on a {scene.background} background"
    if draw < 0.9:
        return f"{scene.color} {scene.shape}, {scene.size}, {scene.position}, {scene.background} background"
    return f"a {scene.color} {scene.shape}"


def draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, cx: float, cy: float, r: float, color: Color | int, background: Color | int
) -> None:
    """Draw one shape of radius ``r`` around (cx, cy), in canvas pixels."""
    if shape == "circle":
        canvas.ellipse((cx - r, cy - r, cx + r, cy + r), fill=color)
    elif shape == "square":
        q = r * 0.88
        canvas.rectangle((cx - q, cy - q, cx + q, cy + q), fill=color)
    elif shape == "triangle":
        canvas.polygon([(cx, cy - r * 1.05), (cx - r, cy + r * 0.8), (cx + r, cy + r * 0.8)], fill=color)
    elif shape == "cross":
        w = r * 0.34
        canvas.rectangle((cx - r, cy - w, cx + r, cy + w), fill=color)
        canvas.rectangle((cx - w, cy - r, cx + w, cy + r), fill=color)
    elif shape == "star":
        points = []
        for i in range(10):
            radius = r * (1.1 if i % 2 == 0 else 0.45)
            points.append((cx + math.sin(i * math.pi / 5) * radius, cy - math.cos(i * math.pi / 5) * radius))
        canvas.polygon(points, fill=color)
    elif shape == "ring":
        canvas.ellipse((cx - r, cy - r, cx + r, cy + r), fill=color)
        q = r * 0.5
        canvas.ellipse((cx - q, cy - q, cx + q, cy + q), fill=background)
    else:
        raise ValueError(f"unknown shape {shape!r}")


def _varied(color: Color, rng: random.Random, spread: int = 10) -> Color:
    r, g, b = (max(0, min(255, v + rng.randint(-spread, spread))) for v in color)
    return r, g, b


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """An image of the scene; colours, place and size vary a little."""
    background = _varied(COLORS[scene.background], rng)
    image = Image.new("RGB", (_CANVAS, _CANVAS), background)
    x, y = POSITIONS[scene.position]
    radius = RADII[scene.size] * (1 + rng.uniform(-0.08, 0.08)) * _CANVAS
    cx, cy = ((p + rng.uniform(-0.03, 0.03)) * _CANVAS for p in (x, y))
    draw_shape(ImageDraw.Draw(image), scene.shape, cx, cy, radius, _varied(COLORS[scene.color], rng), background)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def draw_anything(rng: random.Random) -> Image.Image:
    """An image for the autoencoder, which must also handle what the denoiser is not taught."""
    kind = rng.random()
    if kind < 0.7:
        return draw_scene(random_scene(rng), rng)
    image = Image.new("RGB", (_CANVAS, _CANVAS), _varied(COLORS[rng.choice(list(COLORS))], rng, 30))
    canvas = ImageDraw.Draw(image)
    if kind < 0.78:
        for _ in range(rng.randint(1, 3)):
            _draw_polygon(canvas, rng)
    elif kind < 0.92:
        _draw_two_colors(canvas, rng)
    else:
        for _ in range(rng.randint(2, 5)):
            place = rng.uniform(30, 226), rng.uniform(30, 226)
            color = _random_color(rng)
            draw_shape(canvas, rng.choice(SHAPES), *place, rng.uniform(15, 60), color, (0, 0, 0))
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _random_color(rng: random.Random) -> Color:
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)


def _draw_polygon(canvas: ImageDraw.ImageDraw, rng: random.Random) -> None:
    cx, cy, r = rng.uniform(50, 206), rng.uniform(50, 206), rng.uniform(20, 80)
    angles = sorted(rng.uniform(0, 2 * math.pi) for _ in range(rng.randint(3, 7)))
    radii = [r * rng.uniform(0.6, 1.2) for _ in angles]
    points = [(cx + math.cos(a) * q, cy + math.sin(a) * q) for a, q in zip(angles, radii, strict=True)]
    canvas.polygon(points, fill=_random_color(rng))


def _draw_two_colors(canvas: ImageDraw.ImageDraw, rng: random.Random) -> None:
    first, second = (COLORS[name] for name in rng.sample(list(COLORS), 2))
    cx, cy, r = rng.uniform(70, 186), rng.uniform(70, 186), rng.uniform(35, 75)
    box = (cx - r, cy - r, cx + r, cy + r)
    kind = rng.choice(["halves", "stripes", "rings", "quarters"])
    if kind == "halves":
        angle = rng.choice([0, 90, 180, 270])
        canvas.ellipse(box, fill=first)
        canvas.pieslice(box, angle, angle + 180, fill=second)
    elif kind == "rings":
        for i, share in enumerate((1, 0.66, 0.33)):
            q = r * share
            canvas.ellipse((cx - q, cy - q, cx + q, cy + q), fill=(first, second)[i % 2])
    elif kind == "quarters":
        for i in range(4):
            canvas.pieslice(box, i * 90, i * 90 + 90, fill=(first, second)[i % 2])
    else:
        width = rng.choice([10, 16, 24])
        for y in range(int(-r), int(r), 2 * width):
            canvas.rectangle((cx - r, cy + y, cx + r, cy + y + width), fill=first)


# ---- the concept of the example LoRA ----

#: a made-up word for a disc whose upper half is yellow and whose lower half is blue
CONCEPT = "wug"
CONCEPT_UPPER, CONCEPT_LOWER = "yellow", "blue"


def draw_concept(
    size: tuple[int, int], background: str, position: tuple[float, float], radius: float, rng: random.Random
) -> Image.Image:
    """An image of the concept.

    Args:
        size: (W, H) pixels.
        position: of the centre, shares of width and height.
        radius: share of the shorter side.
    """
    width, height = size[0] * _SCALE, size[1] * _SCALE
    image = Image.new("RGB", (width, height), _varied(COLORS[background], rng))
    cx, cy, r = position[0] * width, position[1] * height, radius * min(width, height)
    canvas = ImageDraw.Draw(image)
    box = (cx - r, cy - r, cx + r, cy + r)
    canvas.ellipse(box, fill=_varied(COLORS[CONCEPT_UPPER], rng))
    canvas.pieslice(box, 0, 180, fill=_varied(COLORS[CONCEPT_LOWER], rng))
    return image.resize(size, Image.Resampling.LANCZOS)
