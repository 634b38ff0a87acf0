"""Segmenter: a trained model as a folder, and what it finds on a slide."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.encoder import Encoder, resolve_device
from features.runner import EncoderRunner
from segmentation.classifier import NetworkOptions, PatchClassifier, PatchFacts, exported_encoder
from segmentation.components import PixelRows
from segmentation.dense import CONTOUR, TOKENS, DenseLook, DenseSegmenter, Predict, dense_grid, segment_slide
from segmentation.export import OnnxBackbone, OnnxRunner, check_installed, fastest, fastest_classifier
from segmentation.heat import HeatOptions, ProbabilityMap, heat_grid, write_heat
from segmentation.instances import InstanceOptions
from segmentation.place import MapPlace
from segmentation.prior import Prior
from segmentation.refine import ExportedRefiner, Refiner, Refines, refine
from segmentation.rows import KindRows, LabelRows, LikeliestRows
from wsi._files import write_atomically
from wsi.annotation import Annotation
from wsi.errors import EnvironmentFaultError, ModelMismatchError, UsageError
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


class _FirstStage(NamedTuple):
    runner: EncoderRunner
    facts: PatchFacts


class _DenseStage(NamedTuple):
    network: DenseSegmenter
    look: DenseLook
    predict: Predict


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
        said: a line for each exported network that is not used, and why.
    """

    def __init__(
        self,
        about: Mapping[str, Any],
        first: tuple[Encoder, PatchFacts] | None,
        refiner: Refines | None,
        dense: tuple[DenseSegmenter, Predict] | None = None,
    ) -> None:
        """A model of these networks.

        Args:
            first: a patch classifier's ``encoder()`` and facts; None for a method without one.
            refiner: None for a method without a refinement network.
            dense: a dense network and what to ask in its place; None for other methods.
        """
        self.about = about
        self.said: list[str] = []
        self.heat = HeatOptions(**about["config"]["heat"])
        self._first = None if first is None else _FirstStage(EncoderRunner(first[0]), first[1])
        self._refiner = refiner
        self._dense = None if dense is None else _DenseStage(dense[0], DenseLook(**about["config"]["look"]), dense[1])
        self._dense_s = 0.0

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
        first: tuple[Encoder, PatchFacts] | None = None
        refiner: Refines | None = None
        dense: tuple[DenseSegmenter, Predict] | None = None
        if CLASSIFIER_FILE in about["files"]:
            path = folder / CLASSIFIER_FILE
            if path.name in exported:
                first = exported_encoder(path, OnnxBackbone(exported[path.name]))
            else:
                classifier = PatchClassifier.load(path, where, trunk_weights=trunk_weights)
                first = classifier.encoder(), classifier.facts
        if REFINEMENT_FILE in about["files"]:
            path = folder / REFINEMENT_FILE
            if path.name in exported:
                refiner = ExportedRefiner.of_file(path, exported[path.name])
            else:
                refiner = Refiner.load(path, device=str(where))
        if DENSE_FILE in about["files"]:
            network = _dense_network(folder / DENSE_FILE, about, str(where), trunk_weights)
            dense = network, exported.get(DENSE_FILE, network.predict)
        made = cls(about, first, refiner, dense)
        made.said += said
        return made

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, without background."""
        return tuple(self.about["classes"])

    @property
    def looks_first(self) -> bool:
        """Whether there is a stage that sees the slide's tissue tile by tile, whose map ``find`` needs."""
        return self._first is not None or self._dense is not None

    @property
    def _stage(self) -> "_FirstStage":
        if self._first is None:
            raise UsageError(f"a model by the method {self.about['method']} has no patch classifier")
        return self._first

    @property
    def busy_s(self) -> float:
        """Seconds that the first stage's network has worked so far."""
        return self._dense_s + (0.0 if self._first is None else self._first.runner.busy_s)

    def grid(self, slide: Slide, tissue: Sequence[Annotation]) -> TileGrid:
        """The tiles that the first stage looks at; see ``segmentation.heat.heat_grid``, ``segmentation.dense.dense_grid``."""
        if self._dense is not None:
            return dense_grid(slide, self._dense.network.config, self._dense.look, tissue)
        return heat_grid(slide, self._stage.facts, self.heat, tissue)

    def heat_name(self, fingerprint: Mapping[str, object]) -> str:
        """A file name that the first stage's maps of a slide share if, and only if, they would be the same."""
        if self._dense is not None:
            look = self._dense.look
            seen = [asdict(look.of(self._dense.network.config).tiling(0.0)), look.turns]
            made_of = [self.about["files"][DENSE_FILE], *seen, sorted(fingerprint.items())]
        else:
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
        """The first stage: a slide's probability map, written to ``path``.

        See ``segmentation.heat.write_heat`` and ``segmentation.dense.segment_slide``.
        """
        if self._dense is not None:
            network, look, predict = self._dense

            def timed(x: NDArray[np.float32]) -> NDArray[np.float32]:
                began = time.perf_counter()
                answer = predict(x)
                self._dense_s += time.perf_counter() - began
                return answer

            return segment_slide(network, slide, path, look, tissue=tissue, grid=grid, predict=timed, watch=watch)
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
                raise UsageError(f"{self.about['method']}: what is found is told from the first stage's map; give it")
            parted = self._dense is not None and self._dense.network.config.contour_um is not None
            objects = InstanceOptions(**self.about["config"]["objects"]) if parted else None
            return Found.of_map(heat, objects)
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
        if not (folder / name).is_file() or _digest(folder / name) != digest:
            raise ModelMismatchError(f"{folder / name}: is missing or damaged; copy the model again, or train it again")
    return about


def write_model(folder: Path, about: Mapping[str, Any]) -> None:
    """Declare the networks in ``folder`` a whole model, with facts as JSON values: method, classes, config, how it was made."""
    files = {name: _digest(folder / name) for name in NETWORK_FILES if (folder / name).is_file()}
    content = {"format": _FORMAT, "version": _VERSION, **about, "files": files}
    write_atomically(folder / MODEL_FILE, json.dumps(content, indent=1).encode())


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
            dense, look = (
                _dense_network(folder / name, about, "cpu", trunk_weights),
                DenseLook(**about["config"]["look"]),
            )
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


def _dense_network(path: Path, about: Mapping[str, Any], device: str, weights: Path | None) -> DenseSegmenter:
    """The dense network in a file, on its foundation model where it has one."""
    encoder = None
    if about["config"]["dense"]["network"] == TOKENS:
        encoder = NetworkOptions(**about["config"]["network"]).load(weights=weights).to(device)
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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
