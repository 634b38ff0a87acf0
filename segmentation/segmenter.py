"""Segmenter: a trained model as a folder, and what it finds on a slide."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from features.encoder import resolve_device
from features.runner import EncoderRunner
from segmentation.classifier import PatchClassifier, PatchFacts
from segmentation.components import PixelRows
from segmentation.export import fastest, fastest_classifier
from segmentation.heat import HeatOptions, ProbabilityMap, heat_grid, write_heat
from segmentation.place import MapPlace
from segmentation.prior import Prior
from segmentation.refine import Predict, Refiner, refine
from segmentation.rows import LabelRows, LikeliestRows
from wsi._files import write_atomically
from wsi.annotation import Annotation
from wsi.errors import ModelMismatchError, UsageError
from wsi.grid import TileGrid
from wsi.slide import Slide

__all__ = ["CLASSIFIER_FILE", "REFINEMENT_FILE", "Found", "Runtime", "Segmenter", "read_about", "write_model"]

MODEL_FILE: Final = "model.json"
CLASSIFIER_FILE: Final = "classifier.safetensors"
REFINEMENT_FILE: Final = "refinement.safetensors"
_FORMAT: Final = "wsi-segmentation-model"
_VERSION: Final = 1

Runtime = Literal["auto", "torch"]


class _FirstStage(NamedTuple):
    runner: EncoderRunner
    facts: PatchFacts


@dataclass(frozen=True, eq=False)
class Found:
    """What a model says of a slide.

    Attributes:
        labels: (H, W) the likeliest class of each pixel of a map, 0 background; read by rows.
        probability: (H, W) that of the likeliest class; read by rows.
        place: where the map lies on the slide.
        classes: the name of each label.
    """

    labels: PixelRows
    probability: PixelRows
    place: MapPlace
    classes: Mapping[int, str]


class Segmenter:
    """A trained model, ready to look at slides.

    Attributes:
        about: the facts that were saved with it: method, classes, settings, how it was made.
        said: a line for each network about what runs it, and why.
    """

    def __init__(
        self, about: Mapping[str, Any], classifier: PatchClassifier | None, refiner: Refiner | None,
        *, runtime: Runtime = "auto",
    ) -> None:  # fmt: skip
        self.about = about
        self.said: list[str] = []
        self.heat = HeatOptions(**about["config"]["heat"])
        self._first: _FirstStage | None = None
        self._refiner = refiner
        self._predict: Predict | None = None
        if classifier is not None:
            encoder = classifier.encoder()
            if runtime == "auto" and encoder.device.type == "cpu" and encoder.spec.input_px is not None:
                encoder, choice = fastest_classifier(encoder)
                self.said.append(f"patch classifier: {choice.why}")
            self._first = _FirstStage(EncoderRunner(encoder), classifier.facts)
        if refiner is not None and runtime == "auto":
            config = refiner.config
            shape = (1, config.in_channels, config.side_px, config.side_px)
            chosen = fastest(refiner.network, np.random.default_rng(0).random(shape, np.float32), repeats=1)
            self.said.append(f"refinement: {chosen.why}")
            self._predict = chosen

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: str = "auto",
        runtime: Runtime = "auto",
        trunk_weights: Path | None = None,
    ) -> "Segmenter":
        """Read a model that ``segmentation.train.train`` wrote.

        Args:
            device: as ``features.encoder.EncoderRequest``.
            runtime: ``"auto"`` takes ONNX Runtime on a CPU where it is installed, agrees with PyTorch and is faster, measured
                now; ``"torch"`` does not look.
            trunk_weights: of a frozen trunk, where they are not the published ones.

        Raises:
            ModelMismatchError: the folder holds no whole model, or one of another release.
        """
        folder = Path(folder)
        about = read_about(folder)
        where = resolve_device(device)
        method = about["method"]
        classifier = refiner = None
        if method != "picture":
            classifier = PatchClassifier.load(folder / CLASSIFIER_FILE, where, trunk_weights=trunk_weights)
        if method != "patches":
            refiner = Refiner.load(folder / REFINEMENT_FILE, device=str(where))
        return cls(about, classifier, refiner, runtime=runtime)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, without background."""
        return tuple(self.about["classes"])

    @property
    def looks_first(self) -> bool:
        """Whether there is a first stage, whose map ``find`` needs."""
        return self._first is not None

    @property
    def _stage(self) -> "_FirstStage":
        if self._first is None:
            raise UsageError(f"a model by the method {self.about['method']} has no patch classifier")
        return self._first

    @property
    def busy_s(self) -> float:
        """Seconds that the first stage's network has worked so far."""
        return 0.0 if self._first is None else self._first.runner.busy_s

    def grid(self, slide: Slide, tissue: Sequence[Annotation]) -> TileGrid:
        """The patches that the first stage looks at; see ``segmentation.heat.heat_grid``."""
        return heat_grid(slide, self._stage.facts, self.heat, tissue)

    def heat_name(self, fingerprint: Mapping[str, object]) -> str:
        """A file name that the first stage's maps of a slide share if, and only if, they would be the same."""
        weights = self._stage.runner.encoder.weights_sha256
        made_of = [weights, self.heat.steps, self.heat.min_tissue, sorted(fingerprint.items())]
        return f"{sha256(json.dumps(made_of, default=str).encode()).hexdigest()[:12]}.zarr"

    def score(
        self,
        slide: Slide,
        path: Path,
        *,
        tissue: Sequence[Annotation] | None = None,
        grid: TileGrid | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> ProbabilityMap:
        """The first stage: a slide's probability map, written to ``path``; see ``segmentation.heat.write_heat``."""
        runner, facts = self._stage
        return write_heat(path, slide, runner, facts, self.heat, tissue=tissue, grid=grid, watch=watch)

    def find(self, slide: Slide, heat: ProbabilityMap | None = None) -> Found:
        """What is on a slide.

        Args:
            heat: the first stage's map, where there is a first stage.

        Raises:
            UsageError: the map is missing.
            SlideError: the slide cannot be read.
        """
        if self._refiner is None:
            if heat is None:
                raise UsageError("patches are told from the first stage's map; give it")
            classes = dict(enumerate(self.classes, start=1))
            return Found(LabelRows(heat.array), LikeliestRows(heat.array), heat.place, classes)
        prior = None if heat is None else Prior.of_classes(heat, self.classes)
        refined = refine(self._refiner, slide, prior, predict=self._predict)
        return Found(refined.labels, refined.probabilities.max(axis=0), refined.place, refined.classes)


def read_about(folder: Path) -> dict[str, Any]:
    """The facts of a saved model.

    Raises:
        ModelMismatchError: there is no whole model, a file of it is damaged, or it is of another release.
    """
    path = folder / MODEL_FILE
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found, files = (about["format"], about["version"]), dict(about["files"])
    except FileNotFoundError as error:
        raise ModelMismatchError(
            f"{folder}: holds no whole model ({MODEL_FILE} is missing); give the folder that wsi segment train wrote, or "
            f"run that again to finish it"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelMismatchError(f"{path}: cannot be read as a model ({error}); train it again") from error
    if found != (_FORMAT, _VERSION):
        raise ModelMismatchError(f"{path}: holds {found[0]} {found[1]}, this release reads {_FORMAT} {_VERSION}")
    for name, digest in files.items():
        if not (folder / name).is_file() or _digest(folder / name) != digest:
            raise ModelMismatchError(f"{folder / name}: is missing or damaged; copy the model again, or train it again")
    return about


def write_model(folder: Path, about: Mapping[str, Any]) -> None:
    """Declare the networks in ``folder`` a whole model, with facts as JSON values: method, classes, config, how it was made."""
    files = {name: _digest(folder / name) for name in (CLASSIFIER_FILE, REFINEMENT_FILE) if (folder / name).is_file()}
    content = {"format": _FORMAT, "version": _VERSION, **about, "files": files}
    write_atomically(folder / MODEL_FILE, json.dumps(content, indent=1).encode())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
