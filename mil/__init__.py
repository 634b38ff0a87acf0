"""Vectors into slide answers: multiple-instance learning, prototypes, slide embeddings.

>>> from mil import Cohort, TrainConfig, cross_validate
>>> result = cross_validate(Cohort.from_store("OUT", "cohort.csv", target="subtype"), TrainConfig(model="abmil"))
>>> print(result.summary())
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mil.bag import Bag, Batch, collate
    from mil.cohort import Cohort
    from mil.config import TrainConfig
    from mil.metrics import compare
    from mil.models import MODELS, build_model
    from mil.predict import Predictor
    from mil.result import Result
    from mil.run import cross_validate
    from mil.target import Labels

__all__ = [
    "MODELS",
    "Bag",
    "Batch",
    "Cohort",
    "Labels",
    "Predictor",
    "Result",
    "TrainConfig",
    "build_model",
    "collate",
    "compare",
    "cross_validate",
]

# Loaded when first asked for, so that `import mil` does not wait for torch.
_HOME = {
    **dict.fromkeys(("Bag", "Batch", "collate"), "mil.bag"),
    "Cohort": "mil.cohort",
    "Labels": "mil.target",
    **dict.fromkeys(("MODELS", "build_model"), "mil.models"),
    "Predictor": "mil.predict",
    "Result": "mil.result",
    "TrainConfig": "mil.config",
    "compare": "mil.metrics",
    "cross_validate": "mil.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mil' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
