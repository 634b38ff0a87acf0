"""Area resampling: the one way this project makes pixels smaller."""

import cv2
import numpy as np

from wsi.readers.base import Pixels

__all__ = ["area_resize"]


def area_resize(pixels: Pixels, size: tuple[int, int], out: Pixels | None = None) -> Pixels:
    """(H, W, 3) uint8 to ``size`` (w, h): each new pixel is the mean of the area it covers, rounded to nearest.

    For whole factors this is the exact mean of whole pixels. Where a side grows (upsampling) it is cubic interpolation.
    The result lies in ``out`` (h, w, 3), which may be a part of a larger array, where that is given.
    """
    h, w = pixels.shape[:2]
    if (w, h) == size:
        if out is None:
            return np.ascontiguousarray(pixels)
        out[...] = pixels
        return out
    grows = size[0] > w or size[1] > h
    resized: Pixels = cv2.resize(pixels, size, dst=out, interpolation=cv2.INTER_CUBIC if grows else cv2.INTER_AREA)
    return resized
