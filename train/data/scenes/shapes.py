"""Silhouettes of objects: a list of parts in the unit square (x to the right, y down), drawn from first to last."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from train.data.scenes.canvas import Colour, Size, cloudy_noise

Part = tuple[str, tuple[float, ...], "float | str"]
"""Kind, coordinates, paint: a factor of the object's own colour, or a colour of its own.

``box`` and ``oval`` have two corners; ``poly`` has all corners; ``line`` (and ``ring``, an oval's outline) have two
points and a thickness as a share of the height.
"""

DARK, GLASS, SKIN, LEAF = "#191919", "#33414d", "#b98a6c", "#3c6b2a"

WHEELED: dict[str, list[Part]] = {
    "car": [
        ("poly", (0, 0.88, 0.01, 0.5, 0.16, 0.44, 0.3, 0.05, 0.7, 0.05, 0.87, 0.44, 0.99, 0.52, 1, 0.88), 1.0),
        ("poly", (0.22, 0.45, 0.33, 0.13, 0.67, 0.13, 0.79, 0.45), GLASS),
        ("line", (0.5, 0.1, 0.5, 0.45, 0.05), 1.0),
        ("oval", (0.1, 0.66, 0.31, 1), DARK),
        ("oval", (0.69, 0.66, 0.9, 1), DARK),
    ],
    "truck": [
        ("box", (0, 0, 0.68, 0.82), 1.0),
        ("poly", (0.7, 0.88, 0.7, 0.2, 0.9, 0.2, 1, 0.52, 1, 0.88), 0.6),
        ("poly", (0.76, 0.5, 0.76, 0.27, 0.89, 0.27, 0.96, 0.5), GLASS),
        ("box", (0, 0.82, 1, 0.89), DARK),
        *(("oval", (x, 0.76, x + 0.15, 1), DARK) for x in (0.06, 0.24, 0.78)),
    ],
    "bus": [
        ("box", (0, 0, 1, 0.92), 1.0),
        *(("box", (x, 0.14, x + 0.13, 0.5), GLASS) for x in (0.03, 0.19, 0.35, 0.51, 0.67)),
        ("box", (0.84, 0.14, 0.97, 0.88), GLASS),
        ("oval", (0.14, 0.76, 0.27, 1), DARK),
        ("oval", (0.68, 0.76, 0.81, 1), DARK),
    ],
    "train": [
        ("poly", (0, 0.9, 0, 0.02, 0.86, 0.02, 0.97, 0.4, 1, 0.9), 1.0),
        ("box", (0.02, 0.16, 0.8, 0.44), GLASS),
        ("poly", (0.84, 0.4, 0.84, 0.16, 0.9, 0.16, 0.95, 0.4), GLASS),
        ("box", (0, 0.58, 0.98, 0.68), 1.6),
        ("box", (0, 0.9, 1, 1), DARK),
        ("line", (0.3, 0, 0.4, 0.02, 0.03), DARK),
    ],
    "motorcycle": [
        ("ring", (0, 0.5, 0.36, 1, 0.13), DARK),
        ("ring", (0.64, 0.5, 1, 1, 0.13), DARK),
        ("poly", (0.16, 0.55, 0.5, 0.3, 0.74, 0.22, 0.72, 0.6, 0.5, 0.82, 0.3, 0.78), 1.0),
        ("line", (0.68, 0.05, 0.82, 0.75, 0.07), DARK),
        ("line", (0.1, 0.36, 0.5, 0.34, 0.12), DARK),
    ],
    "bicycle": [
        ("ring", (0, 0.42, 0.42, 1, 0.05), DARK),
        ("ring", (0.58, 0.42, 1, 1, 0.05), DARK),
        *(("line", (*ends, 0.06), 1.0) for ends in (
            (0.21, 0.71, 0.35, 0.3), (0.35, 0.3, 0.69, 0.28), (0.35, 0.3, 0.48, 0.72), (0.48, 0.72, 0.69, 0.28),
            (0.21, 0.71, 0.48, 0.72), (0.66, 0.1, 0.79, 0.71),
        )),
        ("line", (0.26, 0.2, 0.44, 0.2, 0.07), DARK),
    ],
}  # fmt: skip

PEOPLE: dict[str, list[Part]] = {
    "person": [
        ("poly", (0.28, 0.5, 0.72, 0.5, 0.66, 1, 0.52, 1, 0.5, 0.62, 0.44, 1, 0.3, 1), 0.45),
        ("poly", (0.2, 0.18, 0.8, 0.18, 0.94, 0.52, 0.8, 0.54, 0.74, 0.56, 0.27, 0.56, 0.18, 0.54, 0.06, 0.5), 1.0),
        ("oval", (0.34, 0, 0.66, 0.16), SKIN),
    ],
    "rider": [
        ("poly", (0.12, 0.2, 0.62, 0.2, 1, 0.5, 0.94, 0.58, 0.56, 0.42, 0.5, 0.62, 0.1, 0.62), 1.0),
        ("poly", (0.1, 0.58, 0.5, 0.56, 0.72, 0.78, 0.52, 1, 0.4, 1, 0.5, 0.8, 0.2, 0.74), 0.45),
        ("oval", (0.36, 0, 0.8, 0.24), DARK),
    ],
}

ROADSIDE: dict[str, list[Part]] = {
    "pole": [("box", (0, 0, 1, 1), 1.0)],
    "traffic light": [
        ("box", (0, 0, 1, 1), DARK),
        ("oval", (0.2, 0.05, 0.8, 0.33), "#d22015"),
        ("oval", (0.2, 0.37, 0.8, 0.63), "#4a3a10"),
        ("oval", (0.2, 0.67, 0.8, 0.95), "#123d24"),
    ],
    "round sign": [("oval", (0, 0, 1, 1), "#c02020"), ("oval", (0.18, 0.18, 0.82, 0.82), "#e8e8e8")],
    "square sign": [("box", (0, 0, 1, 1), "#1f4fa8"), ("line", (0.5, 0.2, 0.5, 0.8, 0.18), "#e8e8e8")],
    "warning sign": [
        ("poly", (0.5, 0, 1, 1, 0, 1), "#c02020"),
        ("poly", (0.5, 0.3, 0.78, 0.86, 0.22, 0.86), "#e8e8e8"),
    ],
}

LEGS: list[Part] = [("box", (x, 0.6, x + 0.06, 1), 0.8) for x in (0.14, 0.24, 0.62, 0.72)]

OTHERS: dict[str, list[Part]] = {
    "aeroplane": [
        ("poly", (0.02, 0.1, 0.14, 0.1, 0.26, 0.45, 0.1, 0.5), 0.8),
        ("oval", (0, 0.36, 1, 0.66), 1.0),
        ("poly", (0.4, 0.5, 0.6, 0.5, 0.34, 1, 0.22, 1), 0.7),
        ("line", (0.3, 0.46, 0.86, 0.46, 0.05), GLASS),
    ],
    "bird": [
        ("poly", (0, 0.6, 0.3, 0.5, 0.3, 0.7, 0.02, 0.78), 0.7),
        ("oval", (0.16, 0.36, 0.8, 0.86), 1.0),
        ("oval", (0.64, 0.14, 0.9, 0.5), 1.1),
        ("poly", (0.88, 0.26, 1, 0.34, 0.88, 0.38), "#c98a1b"),
        ("poly", (0.2, 0.5, 0.62, 0.46, 0.34, 0), 0.7),
    ],
    "boat": [
        ("line", (0.46, 0, 0.46, 0.75, 0.03), DARK),
        ("poly", (0.49, 0.02, 0.49, 0.66, 0.9, 0.66), "#d8d8d2"),
        ("poly", (0, 0.72, 1, 0.68, 0.84, 1, 0.14, 1), 1.0),
    ],
    "bottle": [
        ("box", (0.36, 0, 0.64, 0.3), 0.8),
        ("poly", (0.36, 0.25, 0.64, 0.25, 1, 0.45, 1, 1, 0, 1, 0, 0.45), 1.0),
        ("box", (0, 0.55, 1, 0.8), "#d5cdb8"),
    ],
    "cat": [
        ("poly", (0.5, 0.34, 0.52, 0, 0.66, 0.16, 0.8, 0.16, 0.95, 0, 0.96, 0.36), 1.0),
        ("oval", (0.48, 0.1, 0.98, 0.5), 1.0),
        ("oval", (0.2, 0.34, 0.84, 1), 0.9),
        ("line", (0.26, 0.92, 0.03, 0.5, 0.08), 0.8),
    ],
    "chair": [
        ("box", (0.06, 0, 0.2, 0.62), 1.0),
        ("box", (0.06, 0.5, 0.9, 0.64), 0.85),
        *(("box", (x, 0.6, x + 0.08, 1), 0.7) for x in (0.06, 0.34, 0.8)),
    ],
    "cow": [
        *LEGS,
        ("box", (0.06, 0.22, 0.8, 0.68), 1.0),
        ("oval", (0.16, 0.26, 0.4, 0.52), DARK),
        ("oval", (0.5, 0.36, 0.72, 0.62), DARK),
        ("poly", (0.76, 0.2, 0.98, 0.24, 1, 0.5, 0.88, 0.54), 0.9),
        ("line", (0.8, 0.22, 0.78, 0.06, 0.04), "#d8d0b8"),
    ],
    "diningtable": [
        *(("box", (x, 0.3, x + 0.06, 1), 0.6) for x in (0.08, 0.3, 0.64, 0.86)),
        ("oval", (0, 0.1, 1, 0.45), 1.0),
        ("oval", (0.3, 0.16, 0.56, 0.32), "#e0ddd5"),
    ],
    "dog": [
        *LEGS,
        ("box", (0.1, 0.36, 0.76, 0.68), 1.0),
        ("line", (0.12, 0.4, 0, 0.16, 0.09), 0.9),
        ("oval", (0.66, 0.12, 0.94, 0.52), 1.0),
        ("box", (0.84, 0.3, 1, 0.46), 0.9),
        ("oval", (0.64, 0.14, 0.76, 0.5), 0.6),
    ],
    "horse": [
        *(("box", (x, 0.55, x + 0.05, 1), 0.8) for x in (0.1, 0.2, 0.56, 0.66)),
        ("oval", (0.05, 0.34, 0.76, 0.68), 1.0),
        ("poly", (0.56, 0.42, 0.76, 0.06, 0.88, 0.1, 0.74, 0.6), 1.0),
        ("poly", (0.76, 0.04, 0.86, 0.02, 1, 0.26, 0.92, 0.3), 1.0),
        ("line", (0.58, 0.4, 0.76, 0.05, 0.06), DARK),
        ("line", (0.08, 0.42, 0.01, 0.8, 0.07), DARK),
    ],
    "pottedplant": [
        *(("oval", (x, y, x + 0.44, y + 0.36), LEAF) for x, y in ((0.02, 0.2), (0.28, 0), (0.54, 0.18), (0.28, 0.3))),
        ("poly", (0.22, 0.6, 0.78, 0.6, 0.68, 1, 0.32, 1), 1.0),
    ],
    "sheep": [
        *(("box", (x, 0.6, x + 0.06, 1), DARK) for x in (0.2, 0.32, 0.6, 0.7)),
        *(("oval", (x, y, x + 0.36, y + 0.4), 1.0)
          for x, y in ((0.04, 0.3), (0.2, 0.16), (0.4, 0.18), (0.5, 0.34), (0.3, 0.4), (0.1, 0.42))),
        ("oval", (0.78, 0.22, 1, 0.56), DARK),
    ],
    "sofa": [
        ("box", (0.06, 0.08, 0.94, 0.6), 0.85),
        ("line", (0.5, 0.1, 0.5, 0.6, 0.03), 0.5),
        ("box", (0.06, 0.5, 0.94, 0.9), 1.0),
        ("box", (0, 0.32, 0.14, 1), 0.75),
        ("box", (0.86, 0.32, 1, 1), 0.75),
    ],
    "tvmonitor": [
        ("poly", (0.4, 0.8, 0.6, 0.8, 0.74, 1, 0.26, 1), 0.7),
        ("box", (0, 0, 1, 0.84), 0.6),
        ("box", (0.06, 0.07, 0.94, 0.77), GLASS),
    ],
}  # fmt: skip

SHAPES = {**WHEELED, **PEOPLE, **ROADSIDE, **OTHERS, "motorbike": WHEELED["motorcycle"]}


def draw(
    rng: np.random.Generator, name: str, size: Size, colour: Colour, roughness: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """Draw an object, mirrored half of the time.

    Args:
        rng: source of randomness.
        name: key of `SHAPES`.
        size: height and width in pixels.
        colour: the object's own colour.
        roughness: strength of its texture.

    Returns:
        The picture float32 ``[h, w, 3]`` and the mask of its pixels, bool ``[h, w]``.
    """
    height, width = size
    picture = Image.new("RGBA", (width, height))
    pen = ImageDraw.Draw(picture)
    for kind, coordinates, paint in SHAPES[name]:
        thickness = max(1, round(coordinates[-1] * height)) if kind in ("line", "ring") else 0
        if thickness:
            coordinates = coordinates[:-1]
        points = [value * ((width - 1) if axis % 2 == 0 else (height - 1)) for axis, value in enumerate(coordinates)]
        fill = paint if isinstance(paint, str) else tuple(int(255 * min(1, max(0, paint * c))) for c in colour)
        match kind:
            case "box":
                pen.rectangle(points, fill)
            case "oval":
                pen.ellipse(points, fill)
            case "poly":
                pen.polygon(points, fill)
            case "line":
                pen.line(points, fill, thickness)
            case "ring":
                pen.ellipse(points, outline=fill, width=thickness)
    pixels = np.asarray(picture, np.float32) / 255
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    relief = roughness * cloudy_noise(rng, size, max(2.0, height / 4))
    return pixels[..., :3] * (1 + relief[..., None]), pixels[..., 3] > 0.5
