"""Dense path: a network at full resolution over a slide's tissue, tile by tile, into a probability map on disk.

For what a low-resolution picture does not show, such as glands. Tiles overlap and are blended, see ``segmentation.blend``;
memory grows with the slide's width, never with its height.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import shapely
import torch
from numpy.typing import NDArray

from features.encoder import Encoder, resolve_device
from segmentation.blend import Blend, WritableMap, hann_window, tile_corners
from segmentation.fit import Draw, Example, FitConfig, Fitted, Watch, as_input, fit
from segmentation.heat import Corners, ProbabilityMap, write_map
from segmentation.losses import IGNORE
from segmentation.models import SegmentationModel, build_network, check_hyper
from segmentation.models.tokens import TokenDecoder
from segmentation.place import MapPlace
from segmentation.raster import Raster
from segmentation.sampling import BACKGROUND, IGNORED, REGION, AnnotatedSlide, OpenSlides
from segmentation.saved import read_network, save_network
from wsi.annotation import Annotation
from wsi.errors import ModelMismatchError, UsageError
from wsi.grid import TileGrid, Tiling
from wsi.slide import Slide, region_of
from wsi.stream import TileStream, default_read_threads

__all__ = [
    "CONTOUR",
    "TOKENS",
    "DenseConfig",
    "DenseLook",
    "DenseSegmenter",
    "Predict",
    "contours_of",
    "dense_grid",
    "draw_from",
    "over_turns",
    "segment_slide",
    "train_dense",
]

CONTOUR: Final = "contour"  # the class of objects' rims

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]

_KIND = "dense"
TOKENS: Final = "tokens"
_TRIES = 64  # for a point in the tissue of a tile
_FINER = 16  # than the width of a rim: how closely outlines are followed to draw it
_MOST_SQUARES = 256  # that training is judged by, over all slides


@dataclass(frozen=True)
class DenseConfig:
    """What a dense network sees and says; saved with it.

    Attributes:
        classes: names of the labels 1, 2, …
        mpp: microns per pixel of what it sees.
        network: a name in ``segmentation.models.NETWORKS``, or ``"tokens"`` for a decoder on a foundation model.
        hyper: its hyper-parameters, where not those of the paper.
        tile_px: of the square that it sees.
        overlap_px: that neighbouring tiles share; a quarter of them by default.
        contour_um: width of objects' rims, which are then a class of their own, ``"contour"``, after the others, so that
            objects that touch can be told apart; None for areas, which need not be.
    """

    classes: tuple[str, ...]
    mpp: float = 1.0
    network: str = "u-net"
    hyper: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tile_px: int = 512
    overlap_px: int | None = None
    contour_um: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if not self.classes or len(set(self.names)) != len(self.names):
            raise ValueError(f"classes are different names, one at least, got {self.names}")
        if self.contour_um is not None and not 0 < self.contour_um < math.inf:
            raise ValueError(f"contour_um is positive, or None for no contours; got {self.contour_um}")
        self.tiling(0.0)

    @property
    def names(self) -> tuple[str, ...]:
        """The classes, and that of the contours if there is one."""
        return self.classes if self.contour_um is None else (*self.classes, CONTOUR)

    @property
    def labels(self) -> dict[str, int]:
        """The label of each of these."""
        return {name: label for label, name in enumerate(self.names, start=1)}

    def tiling(self, min_tissue: float) -> Tiling:
        """How slides are cut; tiles may stick out of them."""
        overlap_px = self.tile_px // 4 if self.overlap_px is None else self.overlap_px
        return Tiling(self.mpp, self.tile_px, overlap_px, min_tissue, edge="pad")


@dataclass(frozen=True)
class DenseLook:
    """How slides are looked at with a dense network; saved with the model.

    Attributes:
        tile_px, overlap_px: of the squares it sees, where they are not those of its training: a network takes larger ones,
            which have more of their surroundings in sight, and the overlap is half of them then unless it is given.
        turns: whether each is seen in its four quarter turns, and the answers averaged; four times the work.
        batch_size: squares at once.
    """

    tile_px: int | None = None
    overlap_px: int | None = None
    turns: bool = False
    batch_size: int = 4

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is at least 1, got {self.batch_size}")

    def of(self, config: DenseConfig) -> DenseConfig:
        """The same network, seeing these squares."""
        tile_px = self.tile_px or config.tile_px
        usual = config.overlap_px if tile_px == config.tile_px else tile_px // 2
        return replace(config, tile_px=tile_px, overlap_px=usual if self.overlap_px is None else self.overlap_px)


class DenseSegmenter:
    """A dense network with what it takes to use it.

    Attributes:
        config: what it sees and says.
        network: in eval mode.
    """

    def __init__(self, config: DenseConfig, network: SegmentationModel) -> None:
        self.config = config
        self.network = network.eval()

    @classmethod
    def untrained(
        cls, config: DenseConfig, *, encoder: Encoder | None = None, seed: int = 0, device: str = "auto"
    ) -> "DenseSegmenter":
        """A network with weights drawn from ``seed``; train it with ``segmentation.fit.fit``.

        Args:
            encoder: the foundation model of a ``"tokens"`` network, which runs where that does.

        Raises:
            UsageError: an encoder is missing, or there is one and nothing for it to do.
        """
        if (encoder is not None) != (config.network == TOKENS):
            raise UsageError(f"a network on {TOKENS} needs an encoder, and no other does; asked for {config.network}")
        if encoder is not None:
            check_hyper(TOKENS, TokenDecoder, config.hyper)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            network = (
                build_network(config.network, 3, len(config.names) + 1, **config.hyper).to(resolve_device(device))
                if encoder is None
                else TokenDecoder(encoder, len(config.names) + 1, **config.hyper)
            )
        return cls(config, network)

    @torch.inference_mode()
    def predict(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, 3, h, w) colours from 0 to 1 → (B, 1 + C, h, w) probabilities."""
        device = next(self.network.parameters()).device
        return np.asarray(self.network(torch.from_numpy(x).to(device)).logits.softmax(1).cpu().numpy())

    def save(self, path: str | os.PathLike[str], *, fitted: FitConfig | None = None) -> None:
        """Write the network with its facts; of a foundation model only which one it is."""
        encoder = self.network.encoder.identity if isinstance(self.network, TokenDecoder) else None
        facts = {
            "config": asdict(self.config), "fit": None if fitted is None else asdict(fitted), "encoder": encoder,
        }  # fmt: skip
        save_network(path, _KIND, facts, self.network)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, encoder: Encoder | None = None, device: str = "auto"
    ) -> "DenseSegmenter":
        """Read a network.

        Raises:
            ModelMismatchError: the file is none of ours, damaged, or the encoder is not the one it was trained on.
            UsageError: it needs an encoder and got none, or the other way round.
        """
        facts, tensors = read_network(path, _KIND)
        theirs = (facts.get("encoder") or {}).get("name")
        if encoder is None and theirs is not None:
            raise UsageError(f"{path}: was trained on tokens of {theirs}; pass that encoder")
        if encoder is not None and theirs is not None:
            ours = {key: encoder.identity[key] for key in ("name", "weights_sha256")}
            if any(facts["encoder"].get(key) != value for key, value in ours.items()):
                raise ModelMismatchError(f"{path}: was trained on other weights or another encoder than {ours['name']}")
        try:
            made = cls.untrained(DenseConfig(**facts["config"]), encoder=encoder, device=device)
            made.network.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelMismatchError(f"{path}: cannot be used as a dense network ({error})") from error
        return made


def segment_slide(
    segmenter: DenseSegmenter,
    slide: Slide,
    path: Path,
    look: DenseLook | None = None,
    *,
    tissue: Sequence[Annotation] | None = None,
    grid: TileGrid | None = None,
    predict: Predict | None = None,
    watch: Callable[[int], None] | None = None,
) -> ProbabilityMap:
    """Run a dense network over a slide's tissue; the map at ``path``, float16, is whole or not there.

    Args:
        tissue: outlines to use instead of looking for them; tiles that touch them are seen.
        grid: what ``dense_grid`` gave, where it is at hand.
        predict: what to ask in place of the network itself, such as ``segmentation.export.fastest``'s choice.
        watch: is told how many tiles were seen since it was last.

    Raises:
        UsageError: there is something at ``path`` already.
        TooCoarseError: the scan is too coarse for the network.
    """
    look, config, predict = look or DenseLook(), segmenter.config, predict or segmenter.predict
    grid = dense_grid(slide, config, look, tissue) if grid is None else grid
    place = MapPlace((grid.side[0] / grid.tile_px, grid.side[1] / grid.tile_px), slide.mpp.xy)
    ask = over_turns(predict) if look.turns else predict

    def fill(out: WritableMap) -> Corners:
        with Blend(out, hann_window(grid.tile_px)) as blend:
            corners = tile_corners(grid, place)
            for batch in TileStream(slide, grid, look.batch_size, default_read_threads()):
                predictions = ask(as_input(list(batch.pixels), [_no_heat(grid.tile_px)] * len(batch)))
                predictions[~batch.readable] = np.nan
                blend.add(corners[batch.start : batch.start + len(batch)], predictions)
                if watch is not None:
                    watch(len(batch))
                batch.release()
        unscored = place.to_level0(np.array(blend.unscored, np.float64).reshape(-1, 2))
        return tuple((round(x), round(y)) for x, y in unscored.tolist())

    facts = {"mpp": config.mpp, "patch_px": 1, "options": {"steps": 1, **asdict(look)}, "patches": len(grid)}
    return write_map(path, slide, place, (BACKGROUND, *config.names), fill, facts, dtype="float16")


def dense_grid(
    slide: Slide, config: DenseConfig, look: DenseLook, tissue: Sequence[Annotation] | None = None
) -> TileGrid:
    """The tiles of a slide that touch tissue, in rows; those at its right and lower edge stick out.

    Raises:
        TooCoarseError: the scan is too coarse for the network.
    """
    return slide.grid(look.of(config).tiling(0.0), tissue=tissue)


def over_turns(predict: Predict) -> Predict:
    """The mean of what ``predict`` says of squares (B, C, h, h) in their four quarter turns; four times the work."""

    def turned(x: NDArray[np.float32]) -> NDArray[np.float32]:
        seen = (predict(np.ascontiguousarray(np.rot90(x, quarters, (2, 3)))) for quarters in range(4))
        back = [np.rot90(each, -quarters, (2, 3)) for quarters, each in enumerate(seen)]
        return np.asarray(np.mean(back, axis=0), np.float32)

    return turned


def train_dense(
    slides: Sequence[AnnotatedSlide],
    config: DenseConfig,
    fit_config: FitConfig | None = None,
    validation: Sequence[AnnotatedSlide] = (),
    *,
    encoder: Encoder | None = None,
    device: str = "auto",
    watch: Watch | None = None,
) -> tuple[DenseSegmenter, Fitted]:
    """Train a dense network from its start on slides that people drew on; see ``draw_from`` for what it is shown.

    Args:
        validation: slides that decide which weights are kept, by squares of their tissue, up to 256 in all.
        encoder: the foundation model of a ``"tokens"`` network.
        watch: as ``segmentation.fit.fit``.

    Raises:
        UsageError: there are no slides, or one without tissue.
        SlideError: a slide cannot be used.
    """
    fit_config = fit_config or FitConfig()
    segmenter = DenseSegmenter.untrained(config, encoder=encoder, seed=fit_config.seed, device=device)
    with closing(OpenSlides()) as opened:
        trained, judged = (
            [_Squares(partial(opened.reading, each), each.annotations, config, tissue=each.tissue) for each in part]
            for part in (slides, validation)
        )
        looked_at = [square for squares in judged for square in squares.some(-(-_MOST_SQUARES // len(judged)))]
        fitted = fit(segmenter.network, _draw_of(trained), fit_config, looked_at, watch=watch)
    return segmenter, fitted


def draw_from(
    slides: Sequence[tuple[Slide, Sequence[Annotation]]],
    config: DenseConfig,
    *,
    tissue: Sequence[Sequence[Annotation]] | None = None,
) -> Draw:
    """Draws squares of annotated slides: a slide at random, then a place in its tissue, which is the square's middle.

    The later of two classes in ``config.classes`` is on top where they overlap, and rims, where there are any, on all.
    What is drawn as ``Ignore*`` counts for nothing; on slides with ``Region*``, neither does what lies outside, and squares
    lie around places inside.

    Args:
        tissue: outlines for each slide, to use instead of looking for them.

    Raises:
        UsageError: there are no slides, or one without tissue.
    """
    outlines = [None] * len(slides) if tissue is None else tissue
    given = zip(slides, outlines, strict=True)
    return _draw_of(
        [_Squares(partial(_as_it_is, slide), truth, config, tissue=known) for (slide, truth), known in given]
    )


def _as_it_is(slide: Slide) -> AbstractContextManager[Slide]:
    return nullcontext(slide)


def _draw_of(slides: "Sequence[_Squares]") -> Draw:
    if not slides:
        raise UsageError("there is no slide to draw examples from")
    return lambda rng: slides[int(rng.integers(len(slides)))].draw(rng)


class _Squares:
    """The squares of a slide that a network is trained on."""

    def __init__(
        self,
        reading: Callable[[], AbstractContextManager[Slide]],
        annotations: Sequence[Annotation],
        config: DenseConfig,
        *,
        tissue: Sequence[Annotation] | None,
    ) -> None:
        self._reading = reading
        self._chosen = [a for a in annotations if a.class_name == REGION]
        with reading() as slide:
            self._size, self._mpp = slide.size, slide.mpp.xy
            self._tissue = region_of(slide.tissue() if tissue is None else tissue, self._chosen or None)
            self._grid = slide.lattice(replace(config.tiling(0.0), overlap_px=0)).keep(self._tissue, 0.0)
            if not len(self._grid):
                raise UsageError(f"{slide.name}: holds no tissue to draw examples from")
        shapely.prepare(self._tissue)
        self._labels = {**config.labels, IGNORED: IGNORE}
        truth = list(annotations)
        if config.contour_um is not None:
            objects = [a for a in annotations if a.class_name in config.classes]
            truth += contours_of(objects, config.contour_um, MapPlace((1.0, 1.0), self._mpp), CONTOUR)
        self._truth = [a for a in truth if a.class_name in self._labels]
        self._tree = shapely.STRtree([a.geometry for a in self._truth])

    def draw(self, rng: np.random.Generator) -> Example:
        """The square around a place in the tissue, kept on the slide where that is large enough."""
        grid = self._grid
        places = grid.xy[rng.integers(len(grid), size=_TRIES)] + rng.random((_TRIES, 2)) * grid.side
        inside = shapely.contains_xy(self._tissue, places)
        middle = places[int(inside.argmax())]  # the first one inside; of a sliver of tissue, one beside it
        step, side = np.array(grid.downsample), np.array(grid.side)
        last = np.maximum(0, (np.array(self._size) - side) // step)
        xy = np.clip(np.rint((middle - side / 2) / step).astype(np.int64), 0, last) * step
        return self._square(replace(grid, xy=xy[None], tissue=grid.tissue[:1]), 0)

    def some(self, most: int) -> Iterator[Example]:
        """The squares that touch tissue, side by side; of more than ``most`` so many, evenly."""
        rows = np.linspace(0, len(self._grid) - 1, min(most, len(self._grid))).round().astype(int)
        return (self._square(self._grid, row) for row in rows.tolist())

    def _square(self, grid: TileGrid, row: int) -> Example:
        xy, px = grid.xy[row], grid.tile_px
        scale = (grid.side[0] / px, grid.side[1] / px)
        place = MapPlace(scale, self._mpp, (float(xy[0]), float(xy[1])))
        here = np.sort(self._tree.query(shapely.box(*xy, *(xy + grid.side))))
        mask = Raster([self._truth[i] for i in here], place, (px, px), self._labels)[:].astype(np.uint8)
        if self._chosen:
            mask[Raster(self._chosen, place, (px, px), {REGION: 1})[:] == 0] = IGNORE
        with self._reading() as slide:
            return Example(slide.read_tile(grid, row), _no_heat(px), mask)


def contours_of(objects: Sequence[Annotation], width_um: float, place: MapPlace, name: str) -> list[Annotation]:
    """The rims of objects as annotations of the class ``name``: what is within ``width_um`` of their borders, inside.

    The width is kept to within a sixteenth. Objects that touch are parted by both of their rims, which
    ``segmentation.instances.part_by_contour`` needs.
    """
    width = width_um / math.sqrt(place.mpp[0] * place.mpp[1])
    rims = []
    for one in objects:
        shape = shapely.make_valid(one.geometry)
        inner = shapely.buffer(shapely.simplify(shape, width / _FINER), -width)  # outlines of masks have many corners
        rims.append(Annotation(shapely.difference(shape, inner), name))
    return rims


def _no_heat(tile_px: int) -> NDArray[np.float32]:
    return np.empty((0, tile_px, tile_px), np.float32)
