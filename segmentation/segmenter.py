"""Segmenter: a trained model as a folder, and what it finds on a slide."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from features.encoder import resolve_device
from segmentation.classifier import NetworkOptions, PatchClassifier, exported_encoder
from segmentation.components import PixelRows
from segmentation.dense import CONTOUR, TOKENS, DenseLook, DenseSegmenter
from segmentation.export import OnnxBackbone, OnnxRunner, check_installed, fastest, fastest_classifier
from segmentation.heat import HeatOptions, ProbabilityMap
from segmentation.instances import InstanceOptions
from segmentation.place import MapPlace
from segmentation.prior import Prior
from segmentation.refine import ExportedRefiner, Refiner, Refines, refine
from segmentation.rows import KindRows, LabelRows, LikeliestRows
from segmentation.stages import DenseStage, PatchStage, Stage
from wsi._files import file_sha256, write_atomically
from wsi.annotation import Annotation
from wsi.errors import EnvironmentFaultError, ModelMismatchError, TooCoarseError, UsageError
from wsi.grid import TileGrid
from wsi.slide import Slide

__all__ = [
    "CLASSIFIER_FILE",
    "DENSE_FILE",
    "NETWORK_FILES",
    "REFINEMENT_FILE",
    "Found",
    "Runtime",
    "Segmenter",
    "export_model",
    "is_exported",
    "read_about",
    "write_model",
]

MODEL_FILE: Final = "model.json"
CLASSIFIER_FILE: Final = "classifier.safetensors"
REFINEMENT_FILE: Final = "refinement.safetensors"
DENSE_FILE: Final = "dense.safetensors"
NETWORK_FILES: Final = (CLASSIFIER_FILE, REFINEMENT_FILE, DENSE_FILE)
_FORMAT: Final = "wsi-segmentation-model"
_VERSION: Final = 1
_EXPORTED: Final = ".onnx"
_OF: Final = "weights_sha256"  # of the file that was exported

Runtime = Literal["auto", "torch"]


@dataclass(frozen=True, eq=False)
class Found:
    """What a model says of a slide.

    Attributes:
        probabilities: (1 + C, H, W) of each pixel of a map, background the first, NaN = not scored; a Zarr array, or numpy.
        place: where the map lies on the slide.
        classes: the name of each label.
        objects: how areas are parted into single objects; None where areas are what is looked for.
    """

    probabilities: Any
    place: MapPlace
    classes: Mapping[int, str]
    objects: InstanceOptions | None = None

    @classmethod
    def of_map(cls, heat: ProbabilityMap, objects: InstanceOptions | None = None) -> "Found":
        """What a first stage's map says."""
        return cls(heat.array, heat.place, dict(enumerate(heat.classes[1:], start=1)), objects)

    @property
    def labels(self) -> PixelRows:
        """(H, W) the likeliest class of each pixel, 0 background, rims of objects counted to these; read by rows."""
        if self.objects is None or self.rim is None:
            return LabelRows(self.probabilities)
        return KindRows(self.probabilities, self.rim, self.objects.threshold)

    @property
    def rim(self) -> int | None:
        """The label of objects' rims, where they are told."""
        return next((label for label, name in self.classes.items() if name == CONTOUR), None)

    @property
    def probability(self) -> PixelRows:
        """(H, W) that of the likeliest class; read by rows."""
        return LikeliestRows(self.probabilities)


class Segmenter:
    """A trained model, ready to look at slides.

    Attributes:
        about: the facts that were saved with it: method, classes, settings, how it was made.
        first: the stage that sees a slide's tissue tile by tile, whose map ``find`` needs; None for the method picture.
        said: a line for each exported network that is not used, and why.
    """

    def __init__(self, about: Mapping[str, Any], first: Stage | None, refiner: Refines | None) -> None:
        """A model of these networks.

        Args:
            refiner: None for a method without a second network.
        """
        self.about = about
        self.first = first
        self.said: list[str] = []
        self._refiner = refiner

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
            runtime: ``"auto"`` takes ONNX Runtime on a CPU for those networks that ``export_model`` found it faster for;
                ``"torch"`` does not look.
            trunk_weights: of a frozen trunk, where they are not the published ones.

        Raises:
            ModelMismatchError: the folder holds no whole model, or one of another release.
        """
        folder = Path(folder)
        about = read_about(folder)
        where = resolve_device(device)
        exported, said = _exported(folder, about) if runtime == "auto" and where.type == "cpu" else ({}, [])
        config = about["config"]
        first: Stage | None = None
        refiner: Refines | None = None
        for name, digest in about["files"].items():
            path, runner = folder / name, exported.get(name)
            if name == CLASSIFIER_FILE:
                first = _patch_stage(path, HeatOptions(**config["heat"]), where, runner, trunk_weights)
            elif name == DENSE_FILE:
                network = _dense_network(path, config, str(where), trunk_weights)
                look, objects = DenseLook(**config["look"]), InstanceOptions(**config["objects"])
                first = DenseStage(network, look, objects, weights_sha256=digest, predict=runner)
            else:
                refiner = _refiner(path, str(where), runner)
        made = cls(about, first, refiner)
        made.said += said
        return made

    def first_alone(self) -> "Segmenter":
        """What the first stage says without the second one, to compare.

        Raises:
            UsageError: there is no first stage.
        """
        return Segmenter({**self.about, "method": "patches"}, self._stage, None)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, without background."""
        return tuple(self.about["classes"])

    @property
    def _stage(self) -> Stage:
        if self.first is None:
            raise UsageError(f"a model by the method {self.about['method']} has no first stage")
        return self.first

    @property
    def busy_s(self) -> float:
        """Seconds that the first stage's network has worked so far."""
        return 0.0 if self.first is None else self.first.busy_s

    def grid(self, slide: Slide, tissue: Sequence[Annotation] | None = None) -> TileGrid:
        """The tiles that the first stage looks at.

        Raises:
            TooCoarseError: the slide is too coarse for the model.
        """
        try:
            return self._stage.grid(slide, tissue)
        except TooCoarseError as error:
            raise TooCoarseError(
                error.fact, "this model needs a sharper scan, or train one with a larger --mpp"
            ) from None

    def heat_name(self, fingerprint: Mapping[str, object]) -> str:
        """A file name that the first stage's maps of a slide share if, and only if, they would be the same."""
        made_of = [*self._stage.made_of, sorted(fingerprint.items())]
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
        """The first stage: a slide's probability map, written to ``path``.

        Args:
            tissue: outlines to use instead of looking for them.
            grid: what ``grid`` gave, where it is at hand.
            watch: is told how many tiles were scored since it was last.
        """
        grid = self.grid(slide, tissue) if grid is None else grid
        return self._stage.score(slide, path, grid, watch)

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
                raise UsageError(f"{self.about['method']}: what is found is told from the first stage's map; give it")
            return Found.of_map(heat, self._stage.objects)
        prior = None if heat is None else Prior.of_classes(heat, self.classes)
        refined = refine(self._refiner, slide, prior)
        return Found(refined.probabilities, refined.place, refined.classes)


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
        if not (folder / name).is_file() or file_sha256(folder / name) != digest:
            raise ModelMismatchError(f"{folder / name}: is missing or damaged; copy the model again, or train it again")
    return about


def write_model(folder: Path, about: Mapping[str, Any]) -> None:
    """Declare the networks in ``folder`` a whole model, with facts as JSON values: method, classes, config, how it was made."""
    files = {name: file_sha256(folder / name) for name in NETWORK_FILES if (folder / name).is_file()}
    content = {"format": _FORMAT, "version": _VERSION, **about, "files": files}
    write_atomically(folder / MODEL_FILE, json.dumps(content, indent=1).encode())


def is_exported(folder: Path) -> bool:
    """Whether ``export_model`` left a network in the folder of a model."""
    return any((folder / name).with_suffix(_EXPORTED).exists() for name in NETWORK_FILES)


def export_model(folder: str | os.PathLike[str], *, trunk_weights: Path | None = None) -> list[str]:
    """Write those networks of a model as ONNX, beside their files, that ONNX Runtime runs faster here than PyTorch.

    It must say the same within 1e-3. What an earlier export left is replaced.

    Args:
        trunk_weights: of a frozen trunk, where they are not the published ones.

    Returns:
        A line a network about what was measured.

    Raises:
        ModelMismatchError: the folder holds no whole model.
        EnvironmentFaultError: the extra is not installed.
    """
    folder = Path(folder)
    about = read_about(folder)
    check_installed()
    said = []
    for name, digest in about["files"].items():
        facts = {_OF: digest}
        if name == CLASSIFIER_FILE:
            encoder = PatchClassifier.load(folder / name, trunk_weights=trunk_weights).encoder()
            if encoder.spec.input_px is None:
                said.append(f"{name}: torch, as its trunk takes pixels as they are")
                continue
            choice = fastest_classifier(encoder, facts=facts)[1]
        elif name == REFINEMENT_FILE:
            refiner = Refiner.load(folder / name, device="cpu")
            shape = (1, refiner.config.in_channels, refiner.config.side_px, refiner.config.side_px)
            choice = fastest(refiner.network, _noise(shape), facts=facts)
        else:
            config = about["config"]
            dense, look = _dense_network(folder / name, config, "cpu", trunk_weights), DenseLook(**config["look"])
            if dense.config.network == TOKENS:
                said.append(f"{name}: torch, as it stands on a foundation model")
                continue
            side = look.of(dense.config).tile_px
            choice = fastest(dense.network, _noise((look.batch_size, 3, side, side)), facts=facts)
        path = folder / Path(name).with_suffix(_EXPORTED)
        if choice.model is None:
            path.unlink(missing_ok=True)
        else:
            write_atomically(path, choice.model)
        said.append(f"{name}: {choice.why}")
    return said


def _patch_stage(
    path: Path, options: HeatOptions, device: torch.device, runner: OnnxRunner | None, weights: Path | None
) -> PatchStage:
    if runner is not None:
        return PatchStage(*exported_encoder(path, OnnxBackbone(runner)), options)
    classifier = PatchClassifier.load(path, device, trunk_weights=weights)
    return PatchStage(classifier.encoder(), classifier.facts, options)


def _refiner(path: Path, device: str, runner: OnnxRunner | None) -> Refines:
    return Refiner.load(path, device=device) if runner is None else ExportedRefiner.of_file(path, runner)


def _dense_network(path: Path, config: Mapping[str, Any], device: str, weights: Path | None) -> DenseSegmenter:
    """The dense network in a file, on its foundation model where it has one."""
    encoder = None
    if config["dense"]["network"] == TOKENS:
        encoder = NetworkOptions(**config["network"]).load(weights=weights).to(device)
    return DenseSegmenter.load(path, encoder=encoder, device=device)


def _noise(shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.random.default_rng(0).random(shape, np.float32)


def _exported(folder: Path, about: Mapping[str, Any]) -> tuple[dict[str, OnnxRunner], list[str]]:
    """The networks that ``export_model`` wrote, by the name of their file, and a line about what is not used."""
    found, said = {}, []
    for name, digest in about["files"].items():
        path = folder / Path(name).with_suffix(_EXPORTED)
        if not path.exists():
            continue
        try:
            runner = OnnxRunner(path, keep_memory=name != REFINEMENT_FILE)
        except EnvironmentFaultError as error:
            said.append(f"{path.name}: {error}; PyTorch is used")
            continue
        if runner.facts.get(_OF) == digest:
            found[name] = runner
        else:
            said.append(
                f"{path.name}: is of other weights than {name}; PyTorch is used; run wsi segment export {folder}"
            )
    return found, said
