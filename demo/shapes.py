"""How each object of the demo's world is drawn.

A shape draws with a `Pen` in units of the object's radius around its centre, y downwards.
"""

import math
from dataclasses import dataclass

from PIL import ImageDraw

CREAM, EDGE, DARK, WHITE, BARK = (244, 232, 204), (150, 124, 84), (36, 32, 36), (252, 252, 252), (104, 66, 38)


@dataclass
class Pen:
    """Draws in units of the object's radius around its centre, y downwards."""

    draw: ImageDraw.ImageDraw
    cx: float
    cy: float
    r: float
    colour: tuple[int, int, int]

    @property
    def shade(self) -> tuple[int, int, int]:
        return tuple(int(c * 0.62) for c in self.colour)

    @property
    def tint(self) -> tuple[int, int, int]:
        return tuple(int(c + (255 - c) * 0.55) for c in self.colour)

    def points(self, points):
        return [(self.cx + x * self.r, self.cy + y * self.r) for x, y in points]

    def outline(self, fill):
        return {None: self.shade, CREAM: EDGE}.get(fill)

    def polygon(self, points, fill=None):
        self.draw.polygon(self.points(points), fill=fill or self.colour, outline=self.outline(fill), width=3)

    def ellipse(self, x0, y0, x1, y1, fill=None):
        (left, top), (right, bottom) = self.points([(x0, y0), (x1, y1)])
        self.draw.ellipse((left, top, right, bottom), fill=fill or self.colour, outline=self.outline(fill), width=3)

    def dot(self, x, y, radius, fill):
        self.ellipse(x - radius, y - radius, x + radius, y + radius, fill)

    def line(self, points, width, fill):
        self.draw.line(self.points(points), fill=fill, width=max(1, round(width * self.r)), joint="curve")

    def dome(self, x0, y0, x1, y1, fill=None):
        """The upper half of an ellipse whose flat side is at y1."""
        rx, cx, height = (x1 - x0) / 2, (x0 + x1) / 2, y1 - y0
        arc = [math.pi * i / 24 for i in range(25)]
        self.polygon([(cx - rx * math.cos(a), y1 - height * math.sin(a)) for a in arc], fill)


def _ball(p):
    p.ellipse(-0.9, -0.9, 0.9, 0.9)
    p.dot(-0.32, -0.36, 0.22, p.tint)


def _box(p):
    p.polygon([(-0.85, -0.7), (0.85, -0.7), (0.85, 0.85), (-0.85, 0.85)])
    p.line([(-0.85, -0.25), (0.85, -0.25)], 0.12, p.shade)
    p.line([(0, -0.7), (0, -0.25)], 0.16, p.tint)


def _triangle(p):
    p.polygon([(0, -0.95), (0.98, 0.8), (-0.98, 0.8)])


def _star(p):
    radii = (1.0, 0.42)
    angles = [(-math.pi / 2 + math.pi * i / 5, radii[i % 2]) for i in range(10)]
    p.polygon([(r * math.cos(a), 0.05 + r * math.sin(a)) for a, r in angles])


def _heart(p):
    ts = [2 * math.pi * i / 40 for i in range(40)]
    heart = [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16) for t in ts
    ]
    p.polygon([(0.95 * x, 0.95 * y - 0.08) for x, y in heart])


def _moon(p):
    outer = [math.radians(a) for a in range(50, 311, 8)]
    inner = [math.radians(a) for a in range(290, 69, -8)]
    p.polygon(
        [(0.15 + math.cos(a), math.sin(a)) for a in outer] + [(0.52 + 0.82 * math.cos(a), 0.82 * math.sin(a)) for a in inner]
    )


def _tree(p):
    p.polygon([(-0.16, 0.1), (0.16, 0.1), (0.22, 1.0), (-0.22, 1.0)], BARK)
    for x, y, r in ((-0.45, -0.05, 0.45), (0.45, -0.05, 0.45), (0, -0.5, 0.5)):
        p.dot(x, y, r, p.shade)
    for x, y, r in ((-0.45, -0.08, 0.38), (0.45, -0.08, 0.38), (0, -0.5, 0.43), (0, -0.1, 0.3)):
        p.dot(x, y, r, p.colour)


def _house(p):
    p.polygon([(-0.7, -0.1), (0.7, -0.1), (0.7, 0.9), (-0.7, 0.9)])
    p.polygon([(-0.98, -0.1), (0, -0.95), (0.98, -0.1)], p.shade)
    p.polygon([(-0.2, 0.3), (0.2, 0.3), (0.2, 0.9), (-0.2, 0.9)], p.tint)


def _fish(p):
    p.polygon([(0.35, 0), (1.0, -0.6), (1.0, 0.6)])
    p.ellipse(-1.0, -0.55, 0.6, 0.55)
    p.dot(-0.6, -0.14, 0.13, WHITE)
    p.dot(-0.62, -0.14, 0.07, DARK)


def _flower(p):
    for i in range(6):
        a = math.pi * i / 3
        p.ellipse(0.58 * math.cos(a) - 0.38, 0.58 * math.sin(a) - 0.38, 0.58 * math.cos(a) + 0.38, 0.58 * math.sin(a) + 0.38)
    p.dot(0, 0, 0.34, (255, 236, 130))
    p.dot(0, 0, 0.14, BARK)


def _umbrella(p):
    hook = [(0.17 - 0.17 * math.cos(a), 0.78 + 0.2 * math.sin(a)) for a in (0, 0.6, 1.2, 1.8, 2.4, 3.0)]
    p.line([(0, -0.9), (0, 0.78), *hook], 0.14, (112, 84, 72))
    arc = [math.pi * i / 24 for i in range(25)]
    scallops = [(1 - 2 * i / 24, 0.1 - 0.16 * abs(math.sin(3 * math.pi * i / 24))) for i in range(25)]
    p.polygon([(-math.cos(a), 0.1 - 0.9 * math.sin(a)) for a in arc] + scallops)
    for x in (-0.33, 0.33):
        p.line([(0, -0.78), (x, 0.02)], 0.07, p.shade)


def _stalk(p, half_top, half_bottom, top, bottom=0.95):
    p.polygon([(-half_top, top), (half_top, top), (half_bottom, bottom), (-half_bottom, bottom)], CREAM)


def _mushroom(p):
    _stalk(p, 0.26, 0.34, 0)
    p.dome(-0.95, -0.85, 0.95, 0.15)


def _toadstool(p):
    _stalk(p, 0.2, 0.28, 0)
    p.polygon([(-0.36, 0.3), (0.36, 0.3), (0.28, 0.48), (-0.28, 0.48)], WHITE)
    p.polygon([(-0.95, 0.15), (-0.5, -0.5), (0, -0.98), (0.5, -0.5), (0.95, 0.15)])
    for x, y, r in ((-0.45, -0.08, 0.15), (0.08, -0.5, 0.16), (0.45, -0.05, 0.15)):
        p.dot(x, y, r, WHITE)


def _morel(p):
    _stalk(p, 0.24, 0.32, 0.2)
    p.ellipse(-0.58, -1.0, 0.58, 0.42)
    for x, y in ((-0.25, -0.55), (0.2, -0.65), (-0.3, -0.1), (0.05, -0.25), (0.32, -0.15), (0.0, 0.12)):
        p.dot(x, y, 0.12, p.shade)


def _porcini(p):
    p.ellipse(-0.55, -0.1, 0.55, 0.98, CREAM)
    p.dome(-0.7, -0.8, 0.7, 0.05)


def _chanterelle(p):
    p.polygon([(-0.12, 0.1), (0.12, 0.1), (0.24, 0.98), (-0.24, 0.98)], CREAM)
    p.polygon([(-0.98, -0.75), (-0.5, -0.55), (0, -0.8), (0.5, -0.55), (0.98, -0.75), (0.2, 0.5), (-0.2, 0.5)])
    for x in (-0.4, 0, 0.4):
        p.line([(x, -0.5), (x * 0.25, 0.4)], 0.08, p.shade)


def _shiitake(p):
    _stalk(p, 0.16, 0.2, 0.1, 0.85)
    p.ellipse(-1.0, -0.55, 1.0, 0.3)
    p.line([(-0.45, -0.35), (0.45, 0.1)], 0.16, WHITE)
    p.line([(0.45, -0.35), (-0.45, 0.1)], 0.16, WHITE)


def _enoki(p):
    for x, top in ((-0.6, -0.35), (0.6, -0.25), (0, -0.75)):
        p.line([(x * 0.4, 0.98), (x, top)], 0.24, EDGE)
        p.line([(x * 0.4, 0.95), (x, top)], 0.14, CREAM)
        p.dome(x - 0.38, top - 0.25, x + 0.38, top + 0.25)


SHAPES = {
    "ball": _ball, "box": _box, "triangle": _triangle, "star": _star, "heart": _heart, "moon": _moon, "tree": _tree,
    "house": _house, "fish": _fish, "flower": _flower, "umbrella": _umbrella, "mushroom": _mushroom, "toadstool": _toadstool,
    "morel": _morel, "porcini": _porcini, "chanterelle": _chanterelle, "shiitake": _shiitake, "enoki": _enoki,
}  # fmt: skip
