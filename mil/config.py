"""TrainConfig: everything that decides a training run, and nothing else."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from mil.cohort import Fusion
from wsi.errors import UsageError
from wsi.settings import check_known, read_values, values_from_json

__all__ = ["Loss", "Pace", "SplitBy", "TrainConfig"]

Loss = Literal["auto", "cross_entropy", "focal", "mse", "ordinal", "nll", "cox"]
SplitBy = Literal["random", "site", "column"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


class Pace(NamedTuple):
    """Bags a forward pass; passes and optimizer steps an epoch; epochs."""

    batch_size: int
    passes: int
    steps: int
    epochs: int


@dataclass(frozen=True)
class TrainConfig:
    """How models are trained. Checks itself; goes to JSON and back; an unknown key is an error.

    Attributes:
        model: a name of ``mil.models.MODELS``.
        hyper: arguments of the model beyond its width and number of outputs.
        loss: ``"auto"`` is cross-entropy for classes, ordinal for grades, squared error for values, discrete-time
            likelihood for survival. With several targets a loss that is named is taken for those it is for.
        task_weights: with several targets, the weights of their losses by name; 1 where not named.
        class_weights: ``"balanced"`` gives each class equal weight in the loss, ``"none"`` each case.
        fusion: several slides of a patient: ``"late"`` averages predictions, ``"early"`` pools tiles, ``"none"`` lets each
            slide answer.
        split_by, folds: ``"random"`` folds, one a ``"site"``, or the table's own ``"column"``.
        members: models a fold, whose answers are averaged.
        inner: into how many parts the training patients are cut; each member is trained on all but one of them, another
            for each, which decides when it stops and calibrates it. At least ``members``. 1: nobody decides: members
            differ by chance alone and train for all epochs on everybody, which a cosine schedule and the average of
            weights allow, and which is worth more than stopping early where patients are few.
        epochs, warmup_epochs: length of the cosine schedule and of the linear rise before it. None: 15, and more where that
            is less than 480 steps, for with some dozens of bags an epoch is a few steps.
        patience: epochs without a better validation loss before a model stops.
        lr, weight_decay: of AdamW, which decays weights by their product at each step; biases and norms are not decayed.
            None takes the model's own ``learning_rate``: 1e-3 for attention pooling, 2e-4 for transformers.
        batch_size, accumulate: bags a forward pass, and passes a step. None: 16, and less where an epoch would have fewer
            than 12 passes.
        max_tiles: of larger bags, so many tiles are drawn anew each time (training only).
        tile_dropout: share of a bag's tiles left out each time.
        feature_dropout: share of a batch's feature values set to their mean.
        average: decay of the moving average of the weights, which is what is validated and kept; 0 keeps the last step's.
        scale: ``"standard"`` brings each feature to mean 0 and deviation 1 over the training tiles, ``"none"`` leaves it.
        calibrate: whether a temperature is fitted on the part that decides when a model stops (classes only). ``"auto"`` does
            where there is one; True with ``inner`` 1, where nobody could be calibrated on, is refused.
        bins: intervals of discrete-time survival.
        draws: of patients, for the intervals of the metrics.
        device, precision: where and how it is computed; ``"auto"`` is half precision on a GPU, float32 elsewhere.
        seed: of everything.
    """

    model: str = "abmil-gated"
    hyper: Mapping[str, Any] = field(default_factory=dict)
    loss: Loss = "auto"
    task_weights: Mapping[str, float] = field(default_factory=dict)
    class_weights: Literal["none", "balanced"] = "none"
    fusion: Fusion = "late"
    split_by: SplitBy = "random"
    folds: int = 5
    members: int = 3
    inner: int = 1
    epochs: int | None = None
    warmup_epochs: int = 1
    patience: int = 8
    lr: float | None = None
    weight_decay: float = 3.0
    batch_size: int | None = None
    accumulate: int = 1
    max_tiles: int = 4096
    tile_dropout: float = 0.5
    feature_dropout: float = 0.3
    average: float = 0.98
    scale: Literal["standard", "none"] = "standard"
    calibrate: Literal["auto"] | bool = "auto"
    bins: int = 4
    draws: int = 500
    device: str = "auto"
    precision: Precision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "hyper", dict(self.hyper))
        object.__setattr__(self, "task_weights", dict(self.task_weights))
        _one_of("loss", self.loss, get_args(Loss))
        _one_of("class_weights", self.class_weights, ("none", "balanced"))
        _one_of("fusion", self.fusion, get_args(Fusion))
        _one_of("split_by", self.split_by, get_args(SplitBy))
        _one_of("scale", self.scale, ("standard", "none"))
        _one_of("precision", self.precision, get_args(Precision))
        _check_numbers(self)
        for name, weight in self.task_weights.items():
            if not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise UsageError(f"the weight of a task is a number above 0, not {weight!r} for {name!r}")
        if self.inner > 1 and self.members > self.inner:
            raise UsageError(f"{self.members} members need as many parts to stop by; inner is {self.inner}")
        if self.calibrate != "auto" and not isinstance(self.calibrate, bool):
            raise UsageError(f"calibrate is auto, true or false, not {self.calibrate!r}")
        if self.calibrate is True and self.inner == 1:
            raise UsageError(
                "calibrate needs patients that a model was not trained on, and with inner 1 there are none; "
                f"set inner to {max(5, self.members)}, or calibrate to auto"
            )
        if self.loss == "cox" and self.batch_size == 1:
            raise UsageError("the cox loss compares the bags of a batch; batch_size must be at least 2")
        try:
            json.dumps(self.hyper, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UsageError(f"hyper holds what JSON cannot: {error}") from error

    @property
    def calibrates(self) -> bool:
        """Whether temperatures are fitted."""
        return self.calibrate is not False and self.inner > 1

    def pace(self, n_bags: int) -> Pace:
        """How training goes over so many bags, with what was left to the engine filled in."""
        batch_size = self.batch_size or min(16, max(2, n_bags // 12))
        passes = math.ceil(n_bags / batch_size)
        steps = math.ceil(passes / self.accumulate)
        return Pace(batch_size, passes, steps, self.epochs or max(15, math.ceil(480 / steps)))

    def to_json(self) -> str:
        """All settings as JSON."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, *, where: str = "the configuration") -> "TrainConfig":
        """Settings from JSON; those left out have their defaults.

        Raises:
            UsageError: no JSON object, an unknown key, or a value out of range.
        """
        return cls.of_values(values_from_json(text, where=where), where=where)

    @classmethod
    def read(cls, path: str | Path) -> "TrainConfig":
        """Settings from a JSON file."""
        return cls.of_values(read_values(Path(path)), where=str(path))

    @classmethod
    def of_values(cls, values: Mapping[str, Any], *, where: str) -> "TrainConfig":
        """Settings by name; those left out have their defaults.

        Raises:
            UsageError: an unknown name, or a value out of range.
        """
        check_known(values, [each.name for each in fields(cls)], where=where)
        try:
            return cls(**values)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} is one of {', '.join(allowed)}, not {value!r}")


def _check_numbers(config: TrainConfig) -> None:
    for name, least in (
        ("folds", 2), ("members", 1), ("inner", 1), ("epochs", 1), ("warmup_epochs", 0), ("patience", 1),
        ("batch_size", 1), ("accumulate", 1), ("max_tiles", 1), ("bins", 2), ("draws", 1), ("seed", 0),
    ):  # fmt: skip
        value = getattr(config, name)
        if name in ("epochs", "batch_size") and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(f"{name} is a whole number from {least}, not {value!r}")
    for name, low, high in (
        ("lr", 0, math.inf), ("weight_decay", 0, math.inf), ("tile_dropout", 0, 1), ("feature_dropout", 0, 1),
        ("average", 0, 1),
    ):  # fmt: skip
        value = getattr(config, name)
        if name == "lr" and value is None:
            continue
        if not isinstance(value, int | float) or not low <= value < high or (name == "lr" and value == 0):
            raise UsageError(f"{name} is a number from {low} to below {high:g}, not {value!r}")
