"""Stages: what sees a slide's tissue tile by tile, and leaves a probability map: a patch classifier or a dense network."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from features.encoder import Encoder
from features.runner import EncoderRunner
from segmentation.classifier import PatchFacts
from segmentation.dense import DenseLook, DenseSegmenter, Predict, dense_grid, segment_slide
from segmentation.heat import HeatOptions, ProbabilityMap, heat_grid, write_heat
from segmentation.instances import InstanceOptions
from wsi.annotation import Annotation
from wsi.grid import TileGrid
from wsi.slide import Slide

__all__ = ["DenseStage", "PatchStage", "Stage"]

Watch = Callable[[int], None]


class Stage(Protocol):
    """What a segmenter asks of its first stage.

    Attributes:
        busy_s: seconds that its network has worked so far.
        made_of: JSON values; two stages with the same make the same maps.
        objects: how areas of its maps are parted; None where areas are what is looked for.
    """

    @property
    def busy_s(self) -> float: ...
    @property
    def made_of(self) -> Sequence[object]: ...
    @property
    def objects(self) -> InstanceOptions | None: ...

    def grid(self, slide: Slide, tissue: Sequence[Annotation] | None = None) -> TileGrid:
        """The tiles it looks at."""
        ...

    def score(self, slide: Slide, path: Path, grid: TileGrid, watch: Watch | None = None) -> ProbabilityMap:
        """The map of a slide, written to ``path``; ``watch`` is told how many tiles were seen since it was last."""
        ...


class PatchStage:
    """A patch classifier; see ``segmentation.heat.write_heat``."""

    objects = None

    def __init__(self, encoder: Encoder, facts: PatchFacts, options: HeatOptions) -> None:
        """A stage of a classifier's ``encoder()`` and facts."""
        self._runner, self._facts, self._options = EncoderRunner(encoder), facts, options

    @property
    def busy_s(self) -> float:
        return self._runner.busy_s

    @property
    def made_of(self) -> Sequence[object]:
        return self._runner.encoder.weights_sha256, self._options.steps, self._options.min_tissue

    def grid(self, slide: Slide, tissue: Sequence[Annotation] | None = None) -> TileGrid:
        return heat_grid(slide, self._facts, self._options, tissue)

    def score(self, slide: Slide, path: Path, grid: TileGrid, watch: Watch | None = None) -> ProbabilityMap:
        return write_heat(path, slide, self._runner, self._facts, self._options, grid=grid, watch=watch)


class DenseStage:
    """A dense network; see ``segmentation.dense.segment_slide``."""

    def __init__(
        self,
        network: DenseSegmenter,
        look: DenseLook,
        objects: InstanceOptions,
        *,
        weights_sha256: str,
        predict: Predict | None = None,
    ) -> None:
        """A stage of a network.

        Args:
            objects: how areas are parted where the network tells objects' rims.
            weights_sha256: of the network's file.
            predict: what to ask in place of the network itself.
        """
        self.objects = objects if network.config.contour_um is not None else None
        self.busy_s = 0.0
        self._network, self._look, self._sha256 = network, look, weights_sha256
        self._predict = predict or network.predict

    @property
    def made_of(self) -> Sequence[object]:
        return self._sha256, asdict(self._look.of(self._network.config).tiling(0.0)), self._look.turns

    def grid(self, slide: Slide, tissue: Sequence[Annotation] | None = None) -> TileGrid:
        return dense_grid(slide, self._network.config, self._look, tissue)

    def score(self, slide: Slide, path: Path, grid: TileGrid, watch: Watch | None = None) -> ProbabilityMap:
        return segment_slide(self._network, slide, path, self._look, grid=grid, predict=self._timed, watch=watch)

    def _timed(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        began = time.perf_counter()
        answer = self._predict(x)
        self.busy_s += time.perf_counter() - began
        return answer
