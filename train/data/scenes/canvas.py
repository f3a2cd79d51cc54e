"""What scenes are painted on, and the random textures and light that they are painted with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

Colour = Sequence[float] | np.ndarray  # red, green, blue of 0 to 1
Size = tuple[int, int]  # height, width in pixels
IGNORED = 255


class Canvas:
    """An image float32 ``[H, W, 3]`` of 0 to 1 and its class ids uint8 ``[H, W]``, painted from far to near."""

    def __init__(self, size: Size) -> None:
        self.image = np.zeros((*size, 3), np.float32)
        self.label = np.full(size, IGNORED, np.uint8)

    def paint(self, where: np.ndarray, label: int, colour: Colour) -> None:
        """Give the pixels ``where`` (bool ``[H, W]``) a class and a colour (one, or one a pixel, ``[H, W, 3]``)."""
        self.label[where] = label
        self.image[where] = np.broadcast_to(np.asarray(colour, np.float32), self.image.shape)[where]

    def paste(self, picture: np.ndarray, where: np.ndarray, label: int, top: int, left: int) -> None:
        """Paint a ``picture`` ``[h, w, 3]`` where its mask ``where`` ``[h, w]`` is set; what is outside is lost."""
        height, width = self.label.shape
        rows = slice(max(0, -top), max(0, min(where.shape[0], height - top)))
        columns = slice(max(0, -left), max(0, min(where.shape[1], width - left)))
        picture, where = picture[rows, columns], where[rows, columns]
        window = (slice(max(0, top), max(0, top) + where.shape[0]), slice(max(0, left), max(0, left) + where.shape[1]))
        self.image[window][where] = picture[where]
        self.label[window][where] = label


def smooth_noise(rng: np.random.Generator, size: Size, grain: float) -> np.ndarray:
    """Noise of -1 to 1 whose blobs are about ``grain`` pixels wide, float32 ``[H, W]``."""
    coarse = rng.uniform(-1, 1, [max(2, round(side / grain) + 1) for side in size]).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)).clip(-1, 1)


def cloudy_noise(rng: np.random.Generator, size: Size, grain: float) -> np.ndarray:
    """Sum of `smooth_noise` at ``grain``, a half and a quarter of it, float32 ``[H, W]``, about -1 to 1."""
    return sum(smooth_noise(rng, size, grain / 2**octave) * 0.6 / 2**octave for octave in range(3))


def textured(colour: Colour, relief: np.ndarray) -> np.ndarray:
    """A colour made lighter and darker by ``relief`` ``[H, W]``, float32 ``[H, W, 3]``."""
    return (np.asarray(colour, np.float32) * (1 + relief[..., None])).astype(np.float32)


def shade(rng: np.random.Generator, low: float, high: float, tint: float = 0.06) -> np.ndarray:
    """A random grey of ``low`` to ``high`` with a slight random tint: the colour that many classes share."""
    return rng.uniform(low, high) + rng.uniform(-tint, tint, 3)


def any_colour(rng: np.random.Generator) -> np.ndarray:
    """A random colour of paint or clothes, grey half of the time."""
    return shade(rng, 0.08, 0.85) if rng.random() < 0.5 else rng.uniform(0.05, 0.85, 3)


def photograph(rng: np.random.Generator, image: np.ndarray, rendered: bool = False) -> np.ndarray:
    """Light, colour cast, uneven exposure and noise, different for each image; uint8 ``[H, W, 3]``.

    Args:
        rng: source of randomness.
        image: float32 ``[H, W, 3]`` of 0 to 1.
        rendered: the look of a game instead of a camera's: saturated, contrasty, warm, without noise.
    """
    size = (image.shape[0], image.shape[1])
    cast = rng.uniform(0.9, 1.1, 3)
    light = rng.uniform(0.65, 1.25) * (1 + 0.25 * smooth_noise(rng, size, max(size) / 2))
    image = (image * cast * light[..., None]).clip(0, 1) ** rng.uniform(0.8, 1.3)
    if rendered:
        grey = image.mean(-1, keepdims=True)
        image = (grey + 1.5 * (image - grey)) * (1.08, 1.0, 0.86)
        image = image.clip(0, 1) ** 1.25
    else:
        image = image + rng.normal(0, rng.uniform(0.01, 0.045), image.shape)
    return (image.clip(0, 1) * 255).astype(np.uint8)
