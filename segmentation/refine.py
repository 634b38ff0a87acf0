"""Refinement: a picture of the whole slide and rough probabilities in, areas with sharp borders out.

Pedersen et al.: H2G-Net, Frontiers in Medicine 2022, second stage: the slide's picture and the probability map of a patch
classifier, both brought to 1024 × 1024 pixels whatever the slide's shape, through a U-Net. Differs from the paper: any number
of classes; or at a stated resolution in overlapping tiles, which are blended. DRU-Net is the row ``dru-net`` at 1120 pixels.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from features.encoder import resolve_device
from segmentation.blend import Blend, hann_window
from segmentation.fit import Draw, Example, FitConfig, Fitted, Watch, as_input, fit
from segmentation.losses import IGNORE
from segmentation.models import SegmentationModel, build_network
from segmentation.place import MapPlace
from segmentation.prior import Prior
from segmentation.raster import Raster
from segmentation.sampling import IGNORED
from segmentation.saved import read_facts, read_network, save_network
from wsi.annotation import Annotation
from wsi.area import area_resize
from wsi.errors import ModelMismatchError, UsageError
from wsi.slide import Slide

__all__ = [
    "ExportedRefiner", "Predict", "RefineConfig", "Refinement", "Refiner", "Refines", "example_of", "refine",
    "slide_picture", "train_refiner",
]  # fmt: skip

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]

_KIND = "refinement"
_LONGEST_PX = 8192  # of the overview that a slide of any shape is brought to a square from


@dataclass(frozen=True)
class RefineConfig:
    """What a refinement network sees and says; saved with it.

    Attributes:
        classes: names of the labels 1, 2, …; the probability map has a channel for each, in this order.
        network: a name in ``segmentation.models.NETWORKS``.
        hyper: its hyper-parameters, where not those of the paper.
        heat: whether it sees the probability map of a first stage beside the picture; without it is the low-resolution U-Net
            that the paper compares with.
        side_px: of the square that the network sees.
        mpp: microns per pixel of the slide's picture, which is then seen in tiles; None for the whole slide in one square.
        overlap_px: that neighbouring tiles share, where there are tiles.
    """

    classes: tuple[str, ...]
    network: str = "u-net"
    hyper: Mapping[str, Any] = field(default_factory=dict, hash=False)
    heat: bool = True
    side_px: int = 1024
    mpp: float | None = None
    overlap_px: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes are different names, one at least, got {self.classes}")
        if self.side_px < 1:
            raise ValueError(f"side_px is at least 1, got {self.side_px}")
        if self.mpp is not None and not 0 < self.mpp < math.inf:
            raise ValueError(f"mpp is positive, or None for whole slides; got {self.mpp}")
        if self.mpp is not None and not 0 <= self.overlap_px < self.side_px:
            raise ValueError(f"overlap_px is from 0 to below side_px, got {self.overlap_px} of {self.side_px}")

    @property
    def labels(self) -> dict[str, int]:
        """The label of each class."""
        return {name: label for label, name in enumerate(self.classes, start=1)}

    @property
    def in_channels(self) -> int:
        return 3 + len(self.classes) * self.heat


class Refines(Protocol):
    """What ``refine`` asks: a ``Refiner``, or the same network in ONNX Runtime."""

    @property
    def config(self) -> RefineConfig: ...

    def predict(self, x: NDArray[np.float32], /) -> NDArray[np.float32]: ...


class ExportedRefiner:
    """A refinement network in the hands of something faster than PyTorch.

    Attributes:
        config: what it sees and says.
    """

    def __init__(self, config: RefineConfig, predict: Predict) -> None:
        self.config = config
        self._predict = predict

    @classmethod
    def of_file(cls, path: str | os.PathLike[str], predict: Predict) -> "ExportedRefiner":
        """Of the network that ``Refiner.save`` wrote, whose weights are left where they are.

        Raises:
            ModelMismatchError: the file is none of ours.
        """
        try:
            return cls(RefineConfig(**read_facts(path, _KIND)["config"]), predict)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelMismatchError(f"{path}: cannot be used as a refinement network ({error})") from error

    def predict(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """As ``Refiner.predict``."""
        return self._predict(x)


class Refiner:
    """A refinement network with what it takes to use it.

    Attributes:
        config: what it sees and says.
        network: in eval mode.
    """

    def __init__(self, config: RefineConfig, network: SegmentationModel) -> None:
        self.config = config
        self.network = network.eval()

    @classmethod
    def untrained(cls, config: RefineConfig, *, seed: int = 0, device: str = "auto") -> "Refiner":
        """A network with weights drawn from ``seed``; the caller's random numbers are left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            network = build_network(config.network, config.in_channels, len(config.classes) + 1, **config.hyper)
        return cls(config, network.to(resolve_device(device)))

    @torch.inference_mode()
    def predict(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, 3 + C, h, w) as ``segmentation.fit.as_input`` makes it → (B, 1 + C, h, w) probabilities."""
        device = next(self.network.parameters()).device
        return np.asarray(self.network(torch.from_numpy(x).to(device)).logits.softmax(1).cpu().numpy())

    def save(self, path: str | os.PathLike[str], *, fitted: FitConfig | None = None) -> None:
        """Write the network with its facts, and with how it was trained where that is given."""
        facts = {"config": asdict(self.config), "fit": None if fitted is None else asdict(fitted)}
        save_network(path, _KIND, facts, self.network)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str = "auto") -> "Refiner":
        """Read a network.

        Raises:
            ModelMismatchError: the file is none of ours, damaged, or of a network this release does not know so.
        """
        facts, tensors = read_network(path, _KIND)
        try:
            made = cls.untrained(RefineConfig(**facts["config"]), device=device)
            made.network.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, UsageError) as error:
            raise ModelMismatchError(f"{path}: cannot be used as a refinement network ({error})") from error
        return made


@dataclass(frozen=True, eq=False)
class Refinement:
    """What a refinement network says of a slide.

    Attributes:
        labels: (H, W) uint8, the likeliest class of each pixel, 0 background.
        probabilities: (1 + C, H, W) float32, background the first.
        place: where the map lies on the slide; its pixels need not be square.
        classes: the name of each label.
    """

    labels: NDArray[np.uint8]
    probabilities: NDArray[np.float32]
    place: MapPlace
    classes: Mapping[int, str]


def slide_picture(slide: Slide, config: RefineConfig) -> tuple[NDArray[np.uint8], MapPlace]:
    """The slide as the network sees it, (H, W, 3) uint8, and where its pixels lie."""
    if config.mpp is not None:
        image = slide.overview(mpp=config.mpp).image
    else:
        short, long = sorted(slide.size)
        image = slide.overview(max_px=min(_LONGEST_PX, math.ceil(config.side_px * long / short))).image
        image = area_resize(image, (config.side_px, config.side_px))
    return image, MapPlace.covering(slide.frame, image.shape)


def example_of(slide: Slide, heat: Prior | None, truth: Sequence[Annotation], config: RefineConfig) -> Example:
    """What a refinement network is trained on: the slide's picture, rough probabilities, and what people drew.

    Probabilities should come from a classifier that did not see the slide, or its errors will look smaller than they are.

    Raises:
        UsageError: there is no map for a network that sees one, or it has not a channel for each class.
    """
    image, place = slide_picture(slide, config)
    shape = image.shape[:2]
    labels = {**config.labels, IGNORED: IGNORE}
    mask = Raster(truth, place, shape, labels)[:].astype(np.uint8)
    return Example(image, _heat_on(heat, place, shape, config), mask)


def train_refiner(
    draw: Draw,
    config: RefineConfig,
    fit_config: FitConfig | None = None,
    validation: Sequence[Example] = (),
    *,
    device: str = "auto",
    watch: Watch | None = None,
) -> tuple[Refiner, Fitted]:
    """Train a network from its start.

    Args:
        draw: an example of any size for a generator. For whole slides it is brought to the network's square; otherwise a
            square is cut out of it at a random place.
        validation: examples that decide which weights are kept, likewise; squares are cut from their middle.
        watch: as ``segmentation.fit.fit``.
    """
    fit_config = fit_config or FitConfig()
    refiner = Refiner.untrained(config, seed=fit_config.seed, device=device)
    looked_at = [_fitted(example, config, None) for example in validation]
    fitted = fit(refiner.network, lambda rng: _fitted(draw(rng), config, rng), fit_config, looked_at, watch=watch)
    return refiner, fitted


def refine(refiner: Refines, slide: Slide, heat: Prior | None) -> Refinement:
    """Draw the borders of what a first stage found.

    Args:
        heat: its probabilities; None for a network that sees none.

    Raises:
        UsageError: there is no map for a network that sees one, or it has not a channel for each class.
    """
    config, predict = refiner.config, refiner.predict
    image, place = slide_picture(slide, config)
    shape = image.shape[:2]
    rough = _heat_on(heat, place, shape, config)
    whole = config.mpp is None
    probabilities = predict(as_input([image], [rough]))[0] if whole else _in_tiles(predict, image, rough, config)
    labels = probabilities.argmax(0).astype(np.uint8)
    return Refinement(labels, probabilities, place, dict(enumerate(config.classes, start=1)))


def _heat_on(heat: Prior | None, place: MapPlace, shape: tuple[int, int], config: RefineConfig) -> NDArray[np.float32]:
    if not config.heat:
        return np.empty((0, *shape), np.float32)
    if heat is None:
        raise UsageError("this network sees a probability map beside the picture; give the first stage's")
    if len(heat.values) != len(config.classes):
        raise UsageError(
            f"the probability map has {len(heat.values)} channels; the network wants one for each of {', '.join(config.classes)}"
        )
    return heat.on(place, shape)


def _in_tiles(
    predict: Predict, image: NDArray[np.uint8], heat: NDArray[np.float32], config: RefineConfig
) -> NDArray[np.float32]:
    """(1 + C, H, W) of overlapping tiles; beyond the slide the last row and column go on, without any heat."""
    side = config.side_px
    height, width = heat.shape[1:]
    ys, xs = (_starts(length, side, side - config.overlap_px) for length in (height, width))
    below, right = ys[-1] + side - height, xs[-1] + side - width
    image = np.pad(image, ((0, below), (0, right), (0, 0)), mode="edge")
    heat = np.pad(heat, ((0, 0), (0, below), (0, right)))
    out = np.empty((1 + len(config.classes), height, width), np.float32)
    with Blend(out, hann_window(side)) as blend:
        for y in ys:
            for x in xs:
                at = (slice(y, y + side), slice(x, x + side))
                blend.add([(x, y)], predict(as_input([image[at]], [heat[:, *at]])))
    return out


def _starts(length: int, side: int, step: int) -> list[int]:
    """Where tiles begin that cover ``length`` pixels, equally spaced."""
    return list(range(0, max(1, length - side + step), step))


def _fitted(example: Example, config: RefineConfig, rng: np.random.Generator | None) -> Example:
    """An example as the network sees it: resized, or a square cut from a random place, or from its middle.

    One on disk that has the right size already stays there.
    """
    side = config.side_px
    height, width = example.mask.shape
    if (height, width) == (side, side):
        return example
    if config.mpp is None:
        size = (side, side)
        # The first stage's map is coarse and smooth; the truth keeps its labels.
        smooth = np.empty((len(example.heat), side, side), np.float32)
        for channel, found in zip(example.heat, smooth, strict=True):
            cv2.resize(channel, size, dst=found, interpolation=cv2.INTER_LINEAR)
        mask = cv2.resize(example.mask, size, interpolation=cv2.INTER_NEAREST_EXACT)
        return Example(area_resize(example.image, size), smooth, mask)
    room = (max(1, height - side + 1), max(1, width - side + 1))
    y, x = ((n - 1) // 2 for n in room) if rng is None else (int(rng.integers(n)) for n in room)
    at = (slice(y, y + side), slice(x, x + side))
    square = Example(example.image[at], example.heat[:, *at], example.mask[at])
    below, right = max(0, side - height), max(0, side - width)
    if not below and not right:
        return square
    return Example(
        np.pad(square.image, ((0, below), (0, right), (0, 0)), mode="edge"),
        np.pad(square.heat, ((0, 0), (0, below), (0, right))),
        np.pad(square.mask, ((0, below), (0, right)), constant_values=IGNORE),
    )
