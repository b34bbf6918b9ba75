"""The pictures of a clip of the toy benchmark."""
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from icf.data.toy.scene import EXTENT, SIDE, Scene, Shape, covers, local


def _texture(shape: Shape, u: NDArray, v: NDArray) -> NDArray:
    """0 or 1 for every point: which of the two tones it has."""
    u, v = u / shape.period, v / shape.period
    if shape.texture == "stripes":
        return np.floor(u + v).astype(int) % 2
    if shape.texture == "checks":
        return (np.floor(u) + np.floor(v)).astype(int) % 2
    if shape.texture == "dots":
        return (np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.32).astype(int)
    return shape.grid[np.floor(2 * u).astype(int) % 16, np.floor(2 * v).astype(int) % 16]


def draw(scene: Scene, time: float) -> tuple[NDArray, NDArray]:
    """The picture [SIDE,SIDE,3] uint8 at a time in s, and the shape seen at every pixel [SIDE,SIDE] int, or -1."""
    image = scene.background.copy()
    seen = np.full((SIDE, SIDE), -1)
    for index, shape in enumerate(scene.shapes):
        reach = EXTENT * shape.radius
        (x0, y0), (x1, y1) = ((shape.centre(time) + d).round().astype(int) for d in (-reach - 1, reach + 2))
        window = np.s_[max(y0, 0):min(y1, SIDE), max(x0, 0):min(x1, SIDE)]
        y, x = np.mgrid[window]
        inside = covers(shape, x, y, time)
        image[window][inside] = shape.tones[_texture(shape, *local(shape, x, y, time))[inside]]
        seen[window][inside] = index
    return np.round(image * 255).astype(np.uint8), seen
