"""Golden numbers: what the published implementations put out, and how near to it ours has to come."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mil.bag import Bag, Batch, collate

FOLDER = Path(__file__).parents[1] / "golden"


@cache
def arrays(file: str) -> dict[str, NDArray[Any]]:
    """All arrays of one golden file by name."""
    with np.load(FOLDER / f"{file}.npz") as found:
        read = dict(found)
    for array in read.values():  # what many tests share
        array.flags.writeable = False
    return read


def number(file: str, name: str) -> Tensor:
    """One array as a tensor, half precision widened."""
    tensor = torch.from_numpy(arrays(file)[name].copy())
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def state(file: str, tag: str = "") -> dict[str, NDArray[Any]]:
    """The state dict under ``tag``, with the authors' names."""
    prefix = f"{tag}/sd/" if tag else "sd/"
    return {name.removeprefix(prefix): value for name, value in arrays(file).items() if name.startswith(prefix)}


def batch(*bags: Tensor) -> Batch:
    """Bags side by side."""
    return collate([Bag(features) for features in bags])


def assert_near(actual: Tensor, expected: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> None:
    """Equal to within the tolerances, which are those of the golden files' own README, after a change of shape alone."""
    torch.testing.assert_close(actual.detach().reshape(expected.shape), expected, atol=atol, rtol=rtol)
