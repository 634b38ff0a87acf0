"""BagSource: where a cohort's bags come from; a store, a folder of feature files, or arrays in memory."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from features.interop import FeatureFile, read_facts, read_features
from features.selection import Selection, select_rows, selection_facts
from features.store import GOOD, FeatureStore, SlideStore
from mil.bag import Bag
from wsi.errors import BadFeaturesError, NotExtractedError, UsageError
from wsi.geojson import Frame
from wsi.grid import TileGrid

__all__ = [
    "ArraySource",
    "BagSource",
    "CachedSource",
    "FolderSource",
    "Place",
    "StoreSource",
    "checked_bag",
    "encoder_of",
    "has_features",
    "join_bags",
    "pool_bags",
]

_ROWS_AT_ONCE = 8192


class Place(NamedTuple):
    """Where a slide's tiles lie: its whole grid, the rows of it that the bag holds, and the slide's frame."""

    grid: TileGrid
    rows: NDArray[np.int64]
    frame: Frame


class BagSource(Protocol):
    """Reads bags by the names of slides.

    Attributes:
        facts: what the features are, as JSON: ``encoder`` (names), ``mpp``, ``tile_px``, where known. A trained model
            is only applied to features of equal facts.
        dim: length of a vector.
    """

    @property
    def facts(self) -> Mapping[str, Any]: ...

    @property
    def dim(self) -> int: ...

    def read(self, slide: str) -> Bag: ...

    def place(self, slide: str) -> Place: ...


class ArraySource:
    """Bags in memory."""

    def __init__(self, bags: Mapping[str, Bag], places: Mapping[str, Place] | None = None) -> None:
        self._bags = dict(bags)
        self._places = dict(places or {})
        widths = {bag.dim for bag in self._bags.values()}
        if len(widths) != 1:
            raise UsageError(f"all bags need vectors of one length, got {sorted(widths)}")
        (self._dim,) = widths

    @property
    def facts(self) -> Mapping[str, Any]:
        return {}

    @property
    def dim(self) -> int:
        return int(self._dim)

    def read(self, slide: str) -> Bag:
        return self._bags[slide]

    def place(self, slide: str) -> Place:
        try:
            return self._places[slide]
        except KeyError:
            raise UsageError(
                f"{slide}: came as an array, without places of its tiles; no heatmap can be drawn"
            ) from None


class StoreSource:
    """Bags of a feature store; several encoders' vectors side by side, tile by tile. Rows of bad tiles are left out.

    Args:
        select: a few tiles of each slide, by their features and places, in place of all.

    Raises:
        NotExtractedError: no slide has features of all of them.
    """

    def __init__(self, store: FeatureStore, encoders: Sequence[str], select: Selection | None = None) -> None:
        self.store = store
        self.encoders = tuple(encoders)
        self.select = select
        self._slides: dict[str, SlideStore] = {}
        self._chosen: dict[str, NDArray[np.int64]] = {}
        self._first = _first_with(store, self.encoders)

    @property
    def facts(self) -> Mapping[str, Any]:
        made_by = [self._first.features(name).manifest["encoder"] for name in self.encoders]
        return {
            "encoder": [str(encoder["name"]) for encoder in made_by],
            "weights_sha256": [encoder.get("weights_sha256") for encoder in made_by],
            "dim": [int(encoder["dim"]) for encoder in made_by],
            "mpp": self.store.tiling.mpp,
            "tile_px": self.store.tiling.tile_px,
            **({} if self.select is None else {"select": selection_facts(self.select)}),
        }

    @property
    def revisions(self) -> tuple[str | None, ...]:
        """The commit of each encoder's weights on the hub; None for weights from elsewhere."""
        return tuple(self._first.features(name).manifest["provenance"].get("revision") for name in self.encoders)

    @property
    def dim(self) -> int:
        return sum(self._first.features(name).shape[1] for name in self.encoders)

    def slide(self, slide: str) -> SlideStore:
        if slide not in self._slides:
            self._slides[slide] = self.store.slide(slide)
        return self._slides[slide]

    def n_good(self, slide: str) -> int:
        """How many tiles a bag would have, at most, judged by the manifests alone."""
        found = self.slide(slide)
        counts = [found.features(name).manifest for name in self.encoders]
        return min(int(m["n_tiles"]) - int(m["n_unreadable"]) - int(m["n_nonfinite"]) for m in counts)

    def lacks(self, slide: str) -> str | None:
        """Why there is no bag of a slide, in words; None where there is one."""
        lacking = [name for name in self.encoders if not has_features(self.slide(slide), name)]
        if lacking:
            return f"no features of {', '.join(lacking)}"
        return "no tiles" if self.n_good(slide) == 0 else None

    def _rows(self, slide: str) -> NDArray[np.int64]:
        found = self.slide(slide)
        good = np.logical_and.reduce([found.features(name).status == GOOD for name in self.encoders])
        return np.flatnonzero(good)

    def read(self, slide: str) -> Bag:
        found, rows = self.slide(slide), self._rows(slide)
        vectors = _side_by_side([_taken(found.features(name).numpy(), rows) for name in self.encoders])
        if self.select is not None:
            mpp = tuple(found.manifest["slide"]["mpp"])
            chosen = select_rows(found.grid.take(rows), vectors, mpp, self.select)
            if len(rows) and not len(chosen):
                raise BadFeaturesError(
                    f"{found.path}: none of {len(rows)} tiles is chosen by {selection_facts(self.select)}; ask for less, or "
                    f"take the slide out of the table of labels"
                )
            vectors, rows = vectors[chosen], rows[chosen]
            self._chosen[slide] = rows
        return checked_bag(vectors, found.grid.xy[rows], slide, where=str(found.path))

    def place(self, slide: str) -> Place:
        if self.select is not None and slide not in self._chosen:
            self.read(slide)
        rows = self._rows(slide) if self.select is None else self._chosen[slide]
        return Place(self.slide(slide).grid, rows, stored_frame(self.slide(slide)))


class FolderSource:
    """Bags of feature files of TRIDENT, CLAM or STAMP; several folders are joined tile by tile, by place.

    Args:
        files: for each slide its file in each folder.
    """

    def __init__(self, files: Mapping[str, Sequence[Path]]) -> None:
        self._files = {slide: tuple(paths) for slide, paths in files.items()}

    @cached_property
    def _first(self) -> list[FeatureFile]:
        return [read_facts(path) for path in next(iter(self._files.values()))]

    @property
    def facts(self) -> Mapping[str, Any]:
        first = self._first
        return {
            "encoder": [facts.encoder for facts in first],
            "dim": [facts.dim for facts in first],
            "mpp": first[0].mpp,
            "tile_px": first[0].tile_px,
        }

    @property
    def dim(self) -> int:
        return sum(facts.dim for facts in self._first)

    def read(self, slide: str) -> Bag:
        bags = []
        for path, first in zip(self._files[slide], self._first, strict=True):
            loaded = read_features(path)
            if (loaded.encoder, loaded.dim) != (first.encoder, first.dim):
                raise BadFeaturesError(
                    f"{path}: {loaded.dim} features of {loaded.encoder or 'an unnamed encoder'}, where {first.path} has "
                    f"{first.dim} of {first.encoder or 'an unnamed encoder'}; keep each encoder in a folder of its own"
                )
            bags.append(checked_bag(loaded.features, loaded.xy, slide, where=str(path)))
        return bags[0] if len(bags) == 1 else join_bags(bags)

    def place(self, slide: str) -> Place:
        path = self._files[slide][0]
        facts = read_features(path)
        if facts.xy is None or facts.side is None or facts.frame is None:
            raise BadFeaturesError(
                f"{path}: says neither tile size nor slide size; a heatmap needs a store, or TRIDENT"
            )
        side = (facts.side, facts.side)
        grid = TileGrid(
            xy=facts.xy, tile_px=facts.tile_px or facts.side, side=side, stride=side, mpp=(facts.mpp or 1.0,) * 2
        )
        return Place(grid, np.arange(len(grid)), facts.frame)


class CachedSource:
    """Another source's bags, kept in memory as far as they fit.

    Once the budget is full, what is there stays: an epoch touches every bag once, so that throwing out the oldest would
    throw out each one just before it is needed.
    """

    def __init__(self, source: BagSource, budget_bytes: int) -> None:
        self.source = source
        self._left = budget_bytes
        self._bags: dict[str, Bag] = {}

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.source.facts

    @property
    def dim(self) -> int:
        return self.source.dim

    def read(self, slide: str) -> Bag:
        if slide in self._bags:
            return self._bags[slide]
        bag = self.source.read(slide)
        size = bag.features.nbytes + (0 if bag.xy is None else bag.xy.nbytes)
        if size <= self._left:
            self._left -= size
            self._bags[slide] = bag
        return bag

    def place(self, slide: str) -> Place:
        return self.source.place(slide)


def checked_bag(features: NDArray[Any] | None, xy: NDArray[np.int64] | None, key: str, *, where: str) -> Bag:
    """A bag of vectors that can be learned from; ``where`` is the file they came from.

    Raises:
        BadFeaturesError: there are no tiles, or vectors that are not finite.
    """
    if features is None or len(features) == 0:
        raise BadFeaturesError(f"{where}: no tiles; take the slide out of the table of labels")
    features = features if features.dtype in (np.float16, np.float32) else features.astype(np.float32)
    # Some rows at a time: a mask of all values would be half as large as a bag in half precision.
    starts = range(0, len(features), _ROWS_AT_ONCE)
    bad = np.concatenate([~np.isfinite(features[i : i + _ROWS_AT_ONCE]).all(axis=1) for i in starts])
    if bad.any():
        raise BadFeaturesError(
            f"{where}: {int(bad.sum())} of {len(bad)} vectors are not finite (the first is row {int(bad.argmax())}); "
            f"extract the slide again, or take it out of the table of labels"
        )
    return Bag(features, xy, key)


def join_bags(bags: Sequence[Bag]) -> Bag:
    """Vectors of several encoders side by side, for the tiles whose places all of them have, in the first one's order.

    Raises:
        BadFeaturesError: places are missing, occur twice, or none is common.
    """
    rows: list[dict[tuple[int, int], int]] = []
    for bag in bags:
        if bag.xy is None:
            raise BadFeaturesError(f"{bag.key}: features without places cannot be joined with another encoder's")
        at = {(x, y): i for i, (x, y) in enumerate(bag.xy.tolist())}
        if len(at) != len(bag.xy):
            raise BadFeaturesError(f"{bag.key}: two tiles lie at one place; encoders cannot be joined")
        rows.append(at)
    common = [place for place in rows[0] if all(place in at for at in rows[1:])]
    if not common:
        raise BadFeaturesError(f"{bags[0].key}: the encoders have no tile in common; extract them with one tiling")
    picked = [bag.features[[at[place] for place in common]].numpy() for bag, at in zip(bags, rows, strict=True)]
    return Bag(_side_by_side(picked), np.array(common, np.int64), bags[0].key)


def pool_bags(bags: Sequence[Bag], key: str) -> Bag:
    """Several slides of a patient as one bag, without places: they would mean different slides."""
    return bags[0] if len(bags) == 1 else Bag(torch.cat([bag.features for bag in bags]), None, key)


def _taken(vectors: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[Any]:
    """These rows; not copied where they are all."""
    return vectors if len(rows) == len(vectors) else vectors[rows]


def _side_by_side(vectors: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """(N, D1), (N, D2), … as (N, D1 + D2) in the widest of their dtypes; a single one is not copied."""
    if len(vectors) == 1:
        return vectors[0]
    return np.concatenate([each.astype(np.result_type(*vectors), copy=False) for each in vectors], axis=1)


def _first_with(store: FeatureStore, encoders: Sequence[str]) -> SlideStore:
    """A slide that has features of all these encoders."""
    for slide in store:
        if all(has_features(slide, name) for name in encoders):
            return slide
    nowhere = [name for name in encoders if not any(has_features(slide, name) for slide in store)]
    there = sorted({name for slide in store for name in slide.encoders})
    raise NotExtractedError(
        f"{store.root}: no slide has features of {' and '.join(nowhere or encoders)} (there are: "
        f"{', '.join(there) or 'none yet'}); run wsi extract with --encoder {(nowhere or encoders)[0]}"
    )


def has_features(slide: SlideStore, encoder: str) -> bool:
    """Whether this slide has complete features of the encoder."""
    try:
        slide.features(encoder)
    except NotExtractedError:
        return False
    return True


def encoder_of(store: FeatureStore | str | Path) -> str:
    """The one encoder whose features a store holds.

    Raises:
        UsageError: there are several.
        NotExtractedError: there is none.
    """
    store = store if isinstance(store, FeatureStore) else FeatureStore(store)
    there = sorted({name for slide in store for name in slide.encoders})
    if not there:
        raise NotExtractedError(f"{store.root}: holds no features yet; run wsi extract with --encoder")
    if len(there) > 1:
        raise UsageError(f"{store.root}: holds features of {', '.join(there)}; say which with --encoder")
    return there[0]


def stored_frame(slide: SlideStore) -> Frame:
    """The frame that annotations of a stored slide leave in, as ``Slide.frame`` of the slide itself."""
    about = slide.manifest["slide"]
    bounds = about.get("bounds")
    return Frame(
        slide=str(about.get("location", slide.relpath)).replace("\\", "/").rsplit("/", 1)[-1],
        size=tuple(about["size"]),
        mpp=tuple(about["mpp"]),
        origin=(bounds[0], bounds[1]) if bounds else (0, 0),
    )
