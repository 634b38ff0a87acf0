"""Temperature: one number that makes probabilities mean what they say, fitted on cases the model was not trained on.

Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, ICML 2017, section 4.2.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["fit_temperature"]

_LIMITS = (0.05, 20.0)


def fit_temperature(logits: NDArray[np.float64], y: NDArray[np.int64]) -> float:
    """The temperature T for which softmax(logits / T) has the highest likelihood, from 0.05 to 20.

    Args:
        logits: (n, C).
        y: (n,) class index.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    rows = np.arange(len(y))

    def loss(log_temperature: float) -> float:
        return -float(log_softmax(logits / np.exp(log_temperature), axis=1)[rows, y].mean())

    # The loss is convex in 1 / T, so it has one minimum in log T as well.
    found = minimize_scalar(loss, bounds=tuple(np.log(_LIMITS)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))
