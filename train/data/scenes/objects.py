"""Pictures of one to three objects before a background, with the 21 classes of PASCAL VOC."""

from __future__ import annotations

import numpy as np

from train.data.classes import VOC as CLASSES
from train.data.scenes.canvas import (
    IGNORED,
    Canvas,
    Size,
    any_colour,
    cloudy_noise,
    photograph,
    shade,
    smooth_noise,
    textured,
)
from train.data.scenes.shapes import draw

PLACES = {
    "sky": ("aeroplane", "bird"),
    "water": ("boat", "bird", "person"),
    "grass": ("cow", "horse", "sheep", "dog", "bird", "person", "aeroplane"),
    "road": ("bicycle", "bus", "car", "motorbike", "train", "person", "dog"),
    "room": ("bottle", "cat", "chair", "diningtable", "pottedplant", "sofa", "tvmonitor", "person", "dog"),
}
"""What is seen where."""

ASPECTS = {
    "aeroplane": 2.6, "bicycle": 1.6, "bird": 1.2, "boat": 1.2, "bottle": 0.36, "bus": 2.2, "car": 2.2, "cat": 1.0,
    "chair": 0.7, "cow": 1.6, "diningtable": 1.8, "dog": 1.4, "horse": 1.4, "motorbike": 1.6, "person": 0.42,
    "pottedplant": 0.8, "sheep": 1.4, "sofa": 2.0, "train": 2.6, "tvmonitor": 1.3,
}  # fmt: skip
"""Width of each object as a multiple of its height."""

ANIMALS = ("bird", "cat", "cow", "dog", "horse", "sheep")
MOST = 0.85  # of the image's height or width that one object takes


def draw_objects(rng: np.random.Generator, size: Size, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture: image uint8 ``[H, W, 3]`` and class ids uint8 ``[H, W]``; 255 on the borders of objects.

    Args:
        rng: source of all randomness.
        size: height and width in pixels.
        index: number of the image, which decides what class it surely has.
    """
    subject = CLASSES[1 + index % (len(CLASSES) - 1)]
    place = str(rng.choice([place for place, things in PLACES.items() if subject in things]))
    canvas = Canvas(size)
    canvas.paint(np.ones(size, bool), 0, _background(rng, size, place))
    others = rng.choice(PLACES[place], rng.integers(3)).tolist()
    for thing in [*others, subject]:  # the subject last, so that nothing hides it
        _put(rng, canvas, thing, largest=MOST if thing == subject else 0.65 * MOST)
    label = canvas.label
    outline = np.zeros(size, bool)
    for axis in (0, 1):
        step = np.diff(label.astype(np.int16), axis=axis) != 0
        outline |= np.pad(step, [(int(a == axis), 0) for a in (0, 1)])
        outline |= np.pad(step, [(0, int(a == axis)) for a in (0, 1)])
    label[outline] = IGNORED
    return photograph(rng, canvas.image), label


def _put(rng: np.random.Generator, canvas: Canvas, thing: str, largest: float) -> None:
    rows, columns = canvas.label.shape
    aspect = ASPECTS[thing] * rng.uniform(0.8, 1.2)
    height = rng.uniform(0.6, 1.0) * largest * min(rows, columns / aspect)
    size = max(6, round(height)), max(4, round(height * aspect))
    fur = rng.uniform((0.1, 0.08, 0.05), (0.8, 0.7, 0.6)) if rng.random() < 0.6 else shade(rng, 0.1, 0.85)
    colour = fur if thing in ANIMALS else any_colour(rng)
    picture, where = draw(rng, thing, size, colour, roughness=0.45 if thing in ANIMALS else 0.15)
    top = int(rng.uniform(0.35, 1.0) * (rows - size[0]))
    canvas.paste(picture, where, CLASSES.index(thing), top, int(rng.uniform(0, columns - size[1])))


def _background(rng: np.random.Generator, size: Size, place: str) -> np.ndarray:
    """Two zones, split by a horizon or the edge of a floor."""
    blobs, grain = cloudy_noise(rng, size, size[1] / 4), smooth_noise(rng, size, 1.5)
    sky = textured(rng.uniform((0.4, 0.5, 0.6), (0.85, 0.85, 0.95)), 0.25 * blobs)
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    match place:
        case "sky":
            return sky
        case "water":
            waves = 0.3 * np.sin(y * 0.9 + 3 * smooth_noise(rng, size, size[1] / 8))
            lower = textured(rng.uniform((0.1, 0.25, 0.3), (0.4, 0.5, 0.6)), waves)
        case "grass":
            lower = textured(rng.uniform((0.2, 0.3, 0.05), (0.5, 0.5, 0.25)), 0.35 * grain)
        case "road":
            lower = textured(shade(rng, 0.2, 0.5), 0.12 * grain)
            front = (x // rng.integers(8, 16) % 2 > 0) & (y // rng.integers(8, 16) % 2 > 0)
            sky = textured(shade(rng, 0.3, 0.75, 0.1), 0.15 * blobs - 0.4 * front)
        case _:
            planks = x % rng.integers(7, 14) == 0
            lower = textured(rng.uniform((0.25, 0.15, 0.1), (0.65, 0.5, 0.4)), 0.1 * blobs - 0.4 * planks)
            stripes = (x // rng.integers(4, 20) % 2) * rng.choice([0.0, 0.15])
            sky = textured(shade(rng, 0.3, 0.85, 0.12), stripes + 0.05 * blobs)
    floor = size[0] * rng.uniform(0.35, 0.65)
    return np.where((y > floor)[..., None], lower, sky)
