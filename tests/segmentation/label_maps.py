"""Label maps made to be nasty: noise, holes in holes, thin lines, touching classes, pixels that touch at a point."""

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["nasty_map"]


def nasty_map(seed: int, largest: int = 60) -> NDArray[np.int64]:
    """(H, W) labels from 0 to at most 4, of a kind and size that the seed decides."""
    rng = np.random.default_rng(seed)
    height, width = (int(value) for value in rng.integers(1, largest, 2))
    n_labels = int(rng.integers(1, 5))
    match int(rng.integers(0, 4)):
        case 0:  # single pixels that touch in every way
            return rng.integers(0, n_labels + 1, (height, width))
        case 1:  # smooth areas within each other
            noise = cv2.GaussianBlur(rng.random((height, width)), (0, 0), 2)
            return np.asarray(noise * 40, np.int64) % (n_labels + 1)
        case 2:  # blocks that touch at corners: bow-ties
            return np.repeat(np.repeat(rng.integers(0, n_labels + 1, (height, width)), 3, axis=0), 3, axis=1)
    drawn = np.zeros((height, width), np.uint8)
    for _ in range(8):  # discs and rings over each other
        x, y, radius, label = (
            int(rng.integers(low, high)) for low, high in ((0, 60), (0, 60), (1, 25), (0, n_labels + 1))
        )
        cv2.circle(drawn, (x, y), radius, label, int(rng.choice([-1, 1, 2])))
    return drawn.astype(np.int64)
