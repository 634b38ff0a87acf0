"""PatchIndex: the places on slides where patches of known class lie; and patches drawn from there, never stored.

>>> index = PatchIndex.of((index_slide(slide, options) for slide in slides), options)
>>> rows = Draw(index, ("grade", "slide", "class")).rows(10_000, np.random.default_rng(0))
>>> for batch in read_patches(index, rows, batch_size=64):
...     batch.pixels, batch.labels
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from wsi.annotation import Annotation
from wsi.errors import CohortError, UsageError
from wsi.grid import TileGrid, Tiling, tissue_fractions
from wsi.readers.base import Pixels
from wsi.slide import Slide, region_of
from wsi.stream import TileBatch, TileJob, default_read_threads, stream_jobs

__all__ = [
    "BACKGROUND",
    "IGNORED",
    "REGION",
    "AnnotatedSlide",
    "Draw",
    "OpenSlides",
    "PatchBatch",
    "PatchIndex",
    "PatchOptions",
    "SlidePatches",
    "index_slide",
    "read_patches",
    "weigh_hard",
    "weigh_regions",
]

BACKGROUND: Final = "background"
IGNORED: Final = "Ignore*"  # QuPath's own class for what is not to be looked at
REGION: Final = "Region*"  # and for what somebody chose to look at
_OPEN_SLIDES: Final = 32
_ROUNDING: Final = 1e-6


@dataclass(frozen=True)
class PatchOptions:
    """What patches there are, and of which class each is. Saved with the model.

    A patch is of the class that covers most of it, if that is at least ``min_coverage`` of it; it is background if it
    lies in no class with at least ``min_background`` of it and holds enough tissue (``tiling.min_tissue``). Others, and
    those that touch what is to be ignored, are of no use and left out.

    Attributes:
        classes: of annotations, without background; where they overlap, the later one is on top.
        tiling: the lattice of places; more of them where patches overlap.
        min_coverage: of a class. The defaults are those of DRU-Net.
        min_background: outside of all classes.
        ignored: annotations of this class are no background and no class.
        region: annotations of this class say where to look; on slides that have them, background is only inside.
        most: patches kept of each class of a slide, drawn by chance from ``seed``; bounds the memory.
        seed: of that draw.
    """

    classes: tuple[str, ...]
    tiling: Tiling = field(default_factory=lambda: Tiling(mpp=1.0, tile_px=256, min_tissue=0.25, spare=1.0))
    min_coverage: float = 0.25
    min_background: float = 0.9
    ignored: str = IGNORED
    region: str = REGION
    most: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        names = (BACKGROUND, *self.classes)
        if not self.classes or len(set(names)) < len(names) or {self.ignored, self.region} & set(names):
            raise UsageError(
                f"classes are different names, none of {BACKGROUND}, {self.ignored}, {self.region}; got {self.classes}"
            )
        if not 0 < self.min_coverage <= 1 or not 0 < self.min_background <= 1:
            raise UsageError(
                f"coverages are above 0 up to 1, got {self.min_coverage} of a class, {self.min_background} of background"
            )
        if self.most < 1:
            raise UsageError(f"at least one patch of a class is kept, got {self.most}")

    @property
    def names(self) -> tuple[str, ...]:
        """All classes; a patch's label is a place in here."""
        return (BACKGROUND, *self.classes)


@dataclass(frozen=True)
class AnnotatedSlide:
    """A slide and what was drawn on it.

    Attributes:
        location: a file or an fsspec address.
        annotations: in level-0 pixels, of valid shape, as ``wsi.annotations.read_annotations`` gives them.
        facts: what else is known of it (``{"grade": "2"}``); each can be a level of the hierarchy.
        mpp: (x, y) of level 0, where the file is silent or wrong.
        tissue: outlines; looked for where there are none.
    """

    location: str | Path
    annotations: Sequence[Annotation]
    facts: Mapping[str, str] = field(default_factory=dict)
    mpp: tuple[float, float] | None = None
    tissue: Sequence[Annotation] | None = None

    def open(self) -> Slide:
        """The slide, opened."""
        return Slide.open(self.location, mpp=self.mpp)


@dataclass(frozen=True, eq=False)
class SlidePatches:
    """The patches of one slide.

    Attributes:
        slide: where to read them.
        grid: (N) their places.
        labels: (N,) int16 class of each.
        in_region: (N,) whether it lies in a region that somebody chose.
        clusters: (N,) int16 what kind of its class it is; all 0 before anybody told them apart.
    """

    slide: AnnotatedSlide
    grid: TileGrid
    labels: NDArray[np.int16]
    in_region: NDArray[np.bool_]
    clusters: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.grid)


def index_slide(annotated: AnnotatedSlide, options: PatchOptions, slide: Slide | None = None) -> SlidePatches:
    """Find the patches of known class on a slide. Coverages are exact areas of the polygons, not of a drawing of them.

    Args:
        slide: the same, where it is open already.

    Raises:
        SlideError: the slide cannot be used.
    """
    if slide is None:
        with annotated.open() as opened:
            return index_slide(annotated, options, opened)
    lattice = slide.lattice(options.tiling)
    coverage = _coverages(lattice, annotated.annotations, options)  # (N, K) classes from background on
    ignored = tissue_fractions(lattice, region_of(_of_class(annotated.annotations, options.ignored)))
    labels = coverage[:, 1:].argmax(axis=1) + 1
    known = coverage[np.arange(len(lattice)), labels] >= options.min_coverage - _ROUNDING
    chosen = _of_class(annotated.annotations, options.region)
    region = tissue_fractions(lattice, region_of(chosen)) >= 0.5
    empty = np.flatnonzero(~known & (coverage[:, 0] >= options.min_background - _ROUNDING) & (region | (not chosen)))
    tissue = slide.tissue() if annotated.tissue is None else annotated.tissue
    outlines = region_of(tissue, holes=options.tiling.holes)
    enough = tissue_fractions(lattice.take(empty), outlines) >= max(options.tiling.min_tissue - _ROUNDING, _ROUNDING)
    labels[empty[enough]] = 0
    known[empty[enough]] = True
    known &= ignored == 0
    rng = np.random.default_rng([options.seed, *slide.name.encode()])
    kept = [np.flatnonzero(known & (labels == label)) for label in range(len(options.names))]
    kept = [of if len(of) <= options.most else rng.choice(of, options.most, replace=False) for of in kept]
    rows = np.sort(np.concatenate(kept))
    return SlidePatches(
        annotated, lattice.take(rows), labels[rows].astype(np.int16), region[rows], np.zeros(len(rows), np.int16)
    )


def _of_class(annotations: Sequence[Annotation], name: str) -> list[Annotation]:
    return [annotation for annotation in annotations if annotation.class_name == name]


def _coverages(grid: TileGrid, annotations: Sequence[Annotation], options: PatchOptions) -> NDArray[np.float32]:
    """(N, K) the share of each tile that each class has, background first."""
    coverage = np.zeros((len(grid), len(options.names)), np.float32)
    above: shapely.Geometry = shapely.MultiPolygon()
    for label, name in reversed(list(enumerate(options.classes, start=1))):
        drawn = region_of(_of_class(annotations, name))
        coverage[:, label] = tissue_fractions(grid, shapely.difference(drawn, above))
        above = shapely.union(above, drawn)
    coverage[:, 0] = 1 - coverage[:, 1:].sum(axis=1)
    return coverage


@dataclass(frozen=True, eq=False)
class PatchIndex:
    """The patches of several slides; row i is patch i of all of them in order.

    Attributes:
        slides: none of them without patches.
        names: of the classes, background first.
    """

    slides: tuple[SlidePatches, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, slides: Iterable[SlidePatches], options: PatchOptions) -> "PatchIndex":
        """An index of those slides that have patches.

        Raises:
            CohortError: none has, or a class has none.
        """
        kept = tuple(each for each in slides if len(each))
        if not kept:
            raise CohortError(
                "no slide has patches of a known class; look at the annotations' classes and at min_coverage"
            )
        index = cls(kept, options.names)
        missing = [name for name, count in index.counts().items() if not count]
        if missing:
            raise CohortError(
                f"no slide has a patch of {', '.join(missing)}; look at the annotations, or leave the class out"
            )
        return index

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum([len(each) for each in self.slides])]).astype(np.int64)

    @cached_property
    def labels(self) -> NDArray[np.int16]:
        """(N,) class of each patch."""
        return np.concatenate([each.labels for each in self.slides])

    @cached_property
    def clusters(self) -> NDArray[np.int16]:
        """(N,) what kind of its class each patch is."""
        return np.concatenate([each.clusters for each in self.slides])

    @cached_property
    def in_region(self) -> NDArray[np.bool_]:
        """(N,) whether each lies in a region that somebody chose."""
        return np.concatenate([each.in_region for each in self.slides])

    @cached_property
    def slide_of(self) -> NDArray[np.int32]:
        """(N,) the number of each patch's slide."""
        return np.repeat(np.arange(len(self.slides), dtype=np.int32), np.diff(self._starts))

    def counts(self) -> dict[str, int]:
        """How many patches each class has."""
        found = np.bincount(self.labels, minlength=len(self.names))
        return dict(zip(self.names, found.tolist(), strict=True))

    def with_clusters(self, clusters: NDArray[np.integer[Any]]) -> "PatchIndex":
        """The same patches, told apart by (N,) clusters."""
        parts = np.split(np.asarray(clusters, np.int16), self._starts[1:-1])
        slides = tuple(replace(each, clusters=part) for each, part in zip(self.slides, parts, strict=True))
        return replace(self, slides=slides)

    def codes(self, level: str) -> NDArray[np.int64]:
        """(N,) the number of each patch's group at one level of the hierarchy.

        Args:
            level: ``slide``, ``class``, ``cluster`` or the name of a fact.

        Raises:
            CohortError: a slide does not say this fact.
        """
        if level == "slide":
            return self.slide_of.astype(np.int64)
        if level == "class":
            return self.labels.astype(np.int64)
        if level == "cluster":
            return self.clusters.astype(np.int64)
        silent = [str(each.slide.location) for each in self.slides if level not in each.slide.facts]
        if silent:
            raise CohortError(
                f"{silent[0]}: no {level!r} is known of it, nor of {len(silent) - 1} others; leave the level out"
            )
        values = [each.slide.facts[level] for each in self.slides]
        return np.unique(values, return_inverse=True)[1].astype(np.int64)[self.slide_of]

    def grids(self, rows: NDArray[np.int64]) -> Iterator[tuple[SlidePatches, TileGrid]]:
        """The places of patches in the order of ``rows``, a grid for each stretch of one slide."""
        slides = self.slide_of[rows]
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(slides)) + 1):
            if len(part):
                number = int(slides[part[0]])
                yield self.slides[number], self.slides[number].grid.take(rows[part] - self._starts[number])


class Draw:
    """Draws patches: uniformly among the groups of the first level, then among the groups in that one, and so on.

    In the last group a patch is drawn by weight.

    Attributes:
        codes: (G, L) the groups of each leaf, a column a level.
        chances: (G,) the probability of each leaf.
        leaf_of: (N,) the leaf of each patch.
    """

    def __init__(
        self,
        index: PatchIndex,
        levels: Sequence[str] = ("slide", "class"),
        weights: NDArray[np.floating[Any]] | None = None,
    ) -> None:
        """Prepare to draw.

        Args:
            levels: from the top: ``slide``, ``class``, ``cluster``, or facts of slides.
            weights: (N,) from 0, of each patch within its leaf; all alike by default. A leaf of which all are 0 is drawn
                from as if all were alike.
        """
        everything = np.zeros(len(index), np.int64)  # the group that all are in
        codes = np.stack([everything, *(index.codes(level) for level in levels)], axis=1)
        leaves, leaf_of = np.unique(codes, axis=0, return_inverse=True)
        self.codes: NDArray[np.int64] = leaves[:, 1:]
        self.leaf_of: NDArray[np.int64] = leaf_of.ravel().astype(np.int64)
        self.chances = _chances(self.codes)
        weights = np.ones(len(index)) if weights is None else np.asarray(weights, np.float64)
        if weights.shape != (len(index),) or not np.isfinite(weights).all() or (weights < 0).any():
            raise UsageError(f"{len(index)} patches need as many finite weights from 0, got {weights.shape}")
        empty = np.bincount(self.leaf_of, weights)[self.leaf_of] == 0
        weights = np.where(empty, 1.0, weights)
        weights = weights / np.bincount(self.leaf_of, weights)[self.leaf_of]
        self._order = np.argsort(self.leaf_of, kind="stable")
        self._leaf_starts = np.searchsorted(self.leaf_of[self._order], np.arange(len(self.codes) + 1))
        self._edges = np.concatenate([[0.0], np.cumsum(weights[self._order])])

    def rows(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """(n,) rows of the index, with replacement; the same for the same generator state."""
        leaves = rng.choice(len(self.chances), n, p=self.chances)
        start, stop = self._leaf_starts[leaves], self._leaf_starts[leaves + 1]
        low, high = self._edges[start], self._edges[stop]
        at = np.searchsorted(self._edges, low + rng.random(n) * (high - low), side="right") - 1
        return np.asarray(self._order[np.minimum(at, stop - 1)], np.int64)


def _chances(codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """(G,) of leaves (G, L): at each level one over the number of groups that there are to choose from."""
    chances = np.ones(len(codes))
    above = np.zeros(len(codes), np.int64)  # the group a leaf is in so far
    for level in range(codes.shape[1]):
        _, first, here = np.unique(codes[:, : level + 1], axis=0, return_index=True, return_inverse=True)
        here = here.ravel()
        children = np.bincount(above[first], minlength=int(above.max()) + 1)
        chances /= children[above]
        above = here
    return chances


def weigh_regions(index: PatchIndex, share: float, levels: Sequence[str] = ("slide", "class")) -> NDArray[np.float64]:
    """(N,) weights by which regions that somebody chose come first: they get this share of what is drawn from a leaf.

    DRU-Net found patches from chosen regions to teach more than those of whole tumours; share 1 takes nothing else
    where a leaf has any, 0 everything but.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"a share is from 0 to 1, got {share}")
    leaf = Draw(index, levels).leaf_of
    inside = index.in_region
    n_in, n_out = np.bincount(leaf, inside)[leaf], np.bincount(leaf, ~inside)[leaf]
    return np.where(inside, share / np.maximum(n_in, 1), (1 - share) / np.maximum(n_out, 1))


def weigh_hard(losses: NDArray[np.floating[Any]], *, floor: float = 0.1) -> NDArray[np.float64]:
    """(N,) weights by which hard examples come more often: in proportion to the loss last seen.

    Args:
        losses: (N,) last loss of each patch; NaN where it was not drawn yet, which counts as the mean of the others.
        floor: of the mean loss: what is added to all, so that easy ones are looked at again.
    """
    seen = np.isfinite(losses)
    mean = float(losses[seen].mean()) if seen.any() else 1.0
    return np.where(seen, losses, mean).astype(np.float64) + max(floor * mean, 1e-12)


class PatchBatch(NamedTuple):
    """Patches and what they are. Patches that could not be read are not among them.

    Attributes:
        pixels: (B, H, W, 3) uint8.
        labels: (B,) int64 places in the index' ``names``.
        rows: (B,) int64 rows of the index.
    """

    pixels: Pixels
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]


def read_patches(
    index: PatchIndex, rows: NDArray[np.int64], *, batch_size: int = 64, threads: int | None = None
) -> Generator[PatchBatch, None, None]:
    """Read patches from their slides, batch after batch, decoded by threads while the caller works on the batch before.

    Which patches a batch holds depends on ``rows`` alone; within it they are sorted by slide and place, so that a file's
    tile that several need is decoded once. The pixels are the caller's to keep.

    Raises:
        SlideError: a slide cannot be opened.
    """
    batches = [np.sort(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    with closing(OpenSlides()) as slides:
        stream = stream_jobs(
            _jobs(index, batches, slides), batch_size=batch_size, threads=threads or default_read_threads()
        )
        with closing(stream):
            at = 0
            for batch in stream:
                for job in batch.ended:
                    slides.let_go(job.slide)
                for span in batch.spans:
                    if span.job.error is not None:
                        raise span.job.error
                if len(batch):
                    yield _with_labels(batch, batches[at], index)
                    at += 1


def _jobs(index: PatchIndex, batches: Sequence[NDArray[np.int64]], slides: "OpenSlides") -> Iterator[TileJob]:
    for rows in batches:
        for patches, grid in index.grids(rows):
            yield TileJob(slides.take(patches.slide), grid)


def _with_labels(batch: TileBatch, rows: NDArray[np.int64], index: PatchIndex) -> PatchBatch:
    pixels = batch.pixels[batch.readable]  # a copy
    batch.release()
    rows = rows[batch.readable]
    return PatchBatch(pixels, index.labels[rows].astype(np.int64), rows)


class OpenSlides:
    """The slides used last, open. One that is being read is never closed."""

    def __init__(self, most: int = _OPEN_SLIDES) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._slides: OrderedDict[int, Slide] = OrderedDict()
        self._in_use: Counter[Slide] = Counter()

    def take(self, annotated: AnnotatedSlide) -> Slide:
        """The slide, to be let go of later. Called by one thread at a time."""
        key = id(annotated)  # the index holds it as long as this is in use
        slide = self._slides.get(key) or annotated.open()
        with self._lock:
            self._slides[key] = slide
            self._slides.move_to_end(key)
            self._in_use[slide] += 1
            idle = [key for key, each in self._slides.items() if not self._in_use[each]]
            closed = [self._slides.pop(key) for key in idle[: max(0, len(self._slides) - self._most)]]
        for each in closed:
            each.close()
        return slide

    def let_go(self, slide: Slide) -> None:
        with self._lock:
            self._in_use[slide] -= 1
            self._in_use += Counter()  # forgets those at 0

    @contextmanager
    def reading(self, annotated: AnnotatedSlide) -> Iterator[Slide]:
        """The slide, for as long as it is read."""
        slide = self.take(annotated)
        try:
            yield slide
        finally:
            self.let_go(slide)

    def close(self) -> None:
        for slide in self._slides.values():
            slide.close()
