"""Streets in perspective, with the 19 classes of Cityscapes."""

from __future__ import annotations

import numpy as np

from train.data.classes import CITYSCAPES as CLASSES
from train.data.scenes.canvas import (
    IGNORED,
    Canvas,
    Colour,
    Size,
    any_colour,
    cloudy_noise,
    photograph,
    shade,
    smooth_noise,
    textured,
)
from train.data.scenes.shapes import draw

ID = {name: i for i, name in enumerate(CLASSES)}

BODIES = {
    "car": (0.95, 2.4), "truck": (2.0, 2.6), "bus": (1.95, 3.2), "train": (2.1, 4.2), "motorcycle": (0.72, 1.6),
    "bicycle": (0.75, 1.65), "person": (1.1, 0.4),
}  # fmt: skip
"""Height in camera heights (1 reaches the horizon at any distance) and width as a multiple of it."""

DEPTHS = {
    "car": (0.15, 0.5), "truck": (0.15, 0.4), "bus": (0.15, 0.4), "train": (0.12, 0.3), "motorcycle": (0.5, 0.85),
    "bicycle": (0.4, 0.85), "person": (0.2, 0.9), "tree": (0.1, 0.7), "pole": (0.2, 0.85),
}  # fmt: skip
"""Where each thing stands (depth as in `_Street`): big things never fill the image, small ones are not hidden."""

RARE = ("train", "bus", "truck", "motorcycle", "bicycle", "person")
"""One of these is in every image, in turn, so that small sets have (nearly always) every class."""

ROADSIDE = {"building": (2.2, 5.0), "vegetation": (1.6, 3.5), "wall": (0.8, 1.5), "fence": (0.7, 1.2)}
"""What stands along a street and how high, from and to."""


def draw_street(rng: np.random.Generator, size: Size, index: int, rendered: bool) -> tuple[np.ndarray, np.ndarray]:
    """A street scene: image uint8 ``[H, W, 3]`` and class ids uint8 ``[H, W]``, 255 = ignored.

    Args:
        rng: source of all randomness.
        size: height and width in pixels.
        index: number of the image, which decides what rare class it has.
        rendered: the look of GTA5 instead of that of Cityscapes.
    """
    street = _Street(rng, size)
    street.paint_sky()
    street.paint_ground()
    for side in (-1, 1):
        street.paint_roadside(side)
    things = [*rng.choice(["car", "car", "car", "person", "person", "bicycle", "pole", "pole", "tree"], 9), "pole"]
    things += [RARE[index % len(RARE)], "car"]
    for depth, thing in sorted((rng.uniform(*DEPTHS[thing]), str(thing)) for thing in things):
        street.place(thing, depth)
    street.paint_own_car()
    return photograph(rng, street.canvas.image, rendered), street.canvas.label


class _Street:
    """Geometry of a straight street that runs to a vanishing point.

    ``depth`` is 0 at the horizon and 1 at the bottom of the image; ``lateral`` is the distance from the middle of the
    camera's lane, in pixels at depth 1; heights are in camera heights.
    """

    def __init__(self, rng: np.random.Generator, size: Size) -> None:
        self.rng, self.size = rng, size
        self.canvas = Canvas(size)
        height, width = size
        self.horizon, self.middle = height * rng.uniform(0.34, 0.5), width * rng.uniform(0.35, 0.65)
        self.ground = height - self.horizon  # camera height in pixels at depth 1
        self.y, self.x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
        curbs = width * np.array([rng.uniform(0.35, 0.8), rng.uniform(0.25, 0.6)])
        self.curbs = dict(zip((-1, 1), curbs, strict=True))
        self.fronts = {side: curb + width * rng.uniform(0.15, 0.4) for side, curb in self.curbs.items()}
        self.strips = {side: width * rng.uniform(0.15, 0.4) * (rng.random() < 0.5) for side in (-1, 1)}

    def paint_sky(self) -> None:
        """Sky with clouds and haze, and trees along the horizon."""
        rng = self.rng
        hue = np.array([(0.45, 0.62, 0.85), (0.75, 0.77, 0.8), (0.85, 0.72, 0.6)][rng.integers(3)])
        clouds = 0.2 * cloudy_noise(rng, self.size, self.size[1] / 4)
        haze = (self.y / self.horizon).clip(0, 1)[..., None]
        sky = textured(hue, clouds) * (1 - 0.5 * haze) + 0.9 * 0.5 * haze
        self.canvas.paint(self.y < self.size[0], ID["sky"], sky)
        far = self.horizon - self.ground * 0.08 * (1.5 + smooth_noise(rng, self.size, self.size[1] / 12))
        self.canvas.paint(self.y > far, ID["vegetation"], self._foliage())

    def paint_ground(self) -> None:
        """Road with markings, pavements of slabs, and on some sides a strip of grass."""
        rng = self.rng
        depth = ((self.y - self.horizon) / self.ground).clip(1e-3)
        lateral, distance = (self.x - self.middle) / depth, 1 / depth
        below = self.y > self.horizon
        side = np.where(lateral < 0, -1, 1)
        outward = np.abs(lateral)
        curb, front, strip = (np.where(side < 0, d[-1], d[1]) for d in (self.curbs, self.fronts, self.strips))
        grain = 0.1 * smooth_noise(rng, self.size, 1.5) + 0.12 * smooth_noise(rng, self.size, self.size[1] / 5)
        lane = self.size[1] * 0.02
        dashes = (np.abs(lateral - 0.55 * curb.min()) < lane) & (distance * 1.5 % 1 < 0.5)
        kerb_lines = np.abs(outward - 0.93 * curb) < lane
        road = textured(shade(rng, 0.22, 0.48), grain + 0.8 * (dashes | kerb_lines))
        slabs = (outward / self.size[1] * 9 % 1 < 0.12) | (distance * 5 % 1 < 0.12)
        pavement = textured(shade(rng, 0.3, 0.6), grain - 0.25 * slabs)
        grass = rng.uniform((0.25, 0.3, 0.08), (0.5, 0.5, 0.25))
        terrain = textured(grass, 0.3 * smooth_noise(rng, self.size, 1.2) + 0.2 * smooth_noise(rng, self.size, 20))
        self.canvas.paint(below & (outward <= curb), ID["road"], road)
        self.canvas.paint(below & (outward > curb), ID["sidewalk"], pavement)
        self.canvas.paint(below & (outward > front - strip), ID["terrain"], terrain)

    def paint_roadside(self, side: int) -> None:
        """Buildings, hedges, walls and fences one behind the other, on a plane that stands along the street."""
        rng, canvas = self.rng, self.canvas
        depth = side * (self.x - self.middle) / self.fronts[side]
        here = depth > 0.03
        depth = depth.clip(0.03)
        up = (self.horizon + depth * self.ground - self.y) / (depth * self.ground)
        along = 1 / depth
        edge = 1.0
        while edge < 1 / 0.03:
            kind = str(rng.choice([*ROADSIDE, "building", "nothing"]))
            end = edge * rng.uniform(1.2, 2.2)
            part = here & (up >= 0) & (along >= edge) & (along < end)
            edge = end
            if kind == "nothing" or not part.any():
                continue
            top = rng.uniform(*ROADSIDE[kind])
            if kind == "building":
                canvas.paint(part & (up < top), ID[kind], self._facade(along, up))
            elif kind == "vegetation":
                leaves = top + 0.5 * smooth_noise(rng, self.size, self.size[1] / 25)
                canvas.paint(part & (up < leaves), ID[kind], self._foliage())
            elif kind == "wall":
                courses = np.floor(up * 7)
                joints = (up * 7 % 1 < 0.2) | ((along * 9 + 0.5 * (courses % 2)) % 1 < 0.15)
                canvas.paint(part & (up < top), ID[kind], textured(shade(rng, 0.25, 0.65, 0.1), -0.3 * joints))
            else:
                bars = (along * 14 % 1 < 0.4) | (np.abs(up - 0.9 * top) < 0.06) | (np.abs(up - 0.2 * top) < 0.06)
                through = np.where(bars[..., None], shade(rng, 0.1, 0.6), canvas.image)
                canvas.paint(part & (up < top), ID[kind], through)

    def place(self, thing: str, depth: float) -> None:
        """Put an object on the ground: trees and poles beside the road, vehicles on it, persons on both."""
        rng = self.rng
        side = int(rng.choice([-1, 1]))
        beside = self.curbs[side] + rng.uniform(0.1, 0.9) * (self.fronts[side] - self.curbs[side])
        lateral = side * beside
        if thing in BODIES and (thing != "person" or rng.random() < 0.3):
            lateral = rng.uniform(-self.curbs[-1], self.curbs[1]) * 0.85
        left, right = (0.9 * (edge - self.middle) / depth for edge in (0, self.size[1]))
        lateral = min(max(lateral, left), right)  # so that it is in the image
        if thing == "tree":
            self._put_tree(lateral, depth)
        elif thing == "pole":
            self._put_pole(lateral, depth)
        else:
            growth = rng.uniform(0.9, 1.15)
            height, aspect = BODIES[thing]
            width = height * aspect * rng.uniform(0.75, 1.1)
            self._put(thing, thing, lateral, depth, growth * height, growth * width)
            if thing in ("motorcycle", "bicycle") and rng.random() < 0.75:
                self._put("rider", "rider", lateral, depth, 0.95 * growth, 0.5, lift=0.3)

    def paint_own_car(self) -> None:
        """The bonnet of the car that carries the camera, which is not a class."""
        if self.rng.random() < 0.6:
            width, height = self.size[1], self.size[0]
            rise = height * self.rng.uniform(0.03, 0.09) * (1 - ((self.x - width / 2) / (0.6 * width)) ** 2)
            self.canvas.paint(self.y > height - rise, IGNORED, shade(self.rng, 0.05, 0.3))

    def _put_tree(self, lateral: float, depth: float) -> None:
        rng = self.rng
        self._put("pole", "vegetation", lateral, depth, 1.6, 0.12, colour=(0.28, 0.2, 0.14))
        unit = depth * self.ground
        centre_x, centre_y = self.middle + lateral * depth, self.horizon + depth * self.ground - 2.2 * unit
        radius = unit * rng.uniform(0.7, 1.1)
        away = np.hypot(self.x - centre_x, self.y - centre_y) / radius
        crown = away + 0.35 * smooth_noise(rng, self.size, max(2.0, radius / 4)) < 1
        self.canvas.paint(crown, ID["vegetation"], self._foliage())

    def _put_pole(self, lateral: float, depth: float) -> None:
        rng = self.rng
        top = rng.uniform(1.9, 3.2)
        self._put("pole", "pole", lateral, depth, top, 0.09, colour=shade(rng, 0.15, 0.6))
        if rng.random() < 0.5:
            self._put("traffic light", "traffic light", lateral, depth, 0.6, 0.25, lift=top - 0.6)
        else:
            shape = str(rng.choice(["round sign", "square sign", "warning sign"]))
            self._put(shape, "traffic sign", lateral, depth, 0.48, 0.48, lift=top - rng.uniform(0.5, 0.9))

    def _put(
        self,
        shape: str,
        label: str,
        lateral: float,
        depth: float,
        height: float,
        width: float,
        lift: float = 0.0,
        colour: Colour | None = None,
    ) -> None:
        """Draw a shape whose foot is ``lift`` above the ground; height and width in camera heights."""
        unit = depth * self.ground
        size = max(3, round(height * unit)), max(2, round(width * unit))
        picture, where = draw(self.rng, shape, size, any_colour(self.rng) if colour is None else colour)
        top = round(self.horizon + depth * self.ground - lift * unit) - size[0]
        left = round(self.middle + lateral * depth - size[1] / 2)
        self.canvas.paste(picture, where, ID[label], top, left)

    def _facade(self, along: np.ndarray, up: np.ndarray) -> np.ndarray:
        """Windows in rows and columns; ``along`` and ``up`` are distances on the plane of the facade."""
        rng = self.rng
        columns, rows = rng.uniform(2.5, 5), rng.uniform(0.9, 1.6)
        glass = (along * columns % 1 > 0.4) & (up * rows % 1 > 0.45)
        plaster = textured(shade(rng, 0.25, 0.75, 0.12), 0.15 * cloudy_noise(rng, self.size, self.size[1] / 10))
        return np.where(glass[..., None], shade(rng, 0.1, 0.6), plaster)

    def _foliage(self) -> np.ndarray:
        rng = self.rng
        green = rng.uniform((0.12, 0.2, 0.04), (0.4, 0.42, 0.2))
        return textured(green, 0.7 * cloudy_noise(rng, self.size, self.size[1] / 30))
