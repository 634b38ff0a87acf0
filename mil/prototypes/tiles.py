"""TilePool: tiles drawn from many slides, alike from each, to fit prototypes on; and SlideSet, the slides themselves."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from features.keys import readable_part
from features.store import FeatureStore
from mil.bag import Bag
from mil.cohort import LeftOut, SlideNames
from mil.models.base import Bags
from mil.prototypes.rows import Rows, StoredRows, TensorRows
from mil.sources import BagSource, CachedSource, StoreSource
from mil.table import SlideTable
from wsi.errors import BadFeaturesError, UsageError

__all__ = ["Balance", "HasSlides", "SlideSet", "TilePool", "draw_tiles", "rows_of"]

Balance = Literal["slides", "sites"]


class HasSlides(Protocol):
    """Slides with features: a ``Cohort``, or a ``SlideSet``, which needs no labels."""

    @property
    def source(self) -> BagSource: ...

    @property
    def slides(self) -> tuple[str, ...]: ...

    @property
    def sites(self) -> tuple[str, ...] | None: ...


@dataclass(frozen=True, eq=False)
class SlideSet:
    """Slides with features and without labels.

    Attributes:
        source: reads their bags.
        slides: (S,) names as the source knows them.
        sites: (S,) the centre of each, where known.
        left_out: slides that were asked for and have no tiles, and why.
    """

    source: BagSource
    slides: tuple[str, ...]
    sites: tuple[str, ...] | None = None
    left_out: tuple[LeftOut, ...] = ()

    def __post_init__(self) -> None:
        if not self.slides:
            reasons = Counter(each.reason for each in self.left_out)
            raise UsageError(
                "no slide with tiles" + "".join(f"; {n} left out ({reason})" for reason, n in reasons.items())
            )
        if self.sites is not None and len(self.sites) != len(self.slides):
            raise UsageError(f"{len(self.slides)} slides need as many sites, not {len(self.sites)}")

    @classmethod
    def from_store(cls, root: str | Path, encoder: str, table: str | Path | None = None) -> "SlideSet":
        """Slides of a feature store.

        Args:
            encoder: whose features.
            table: CSV that says which slides to take: a column of slides (``slide``, ``slide_id``, ``filename`` or ``file``) and
                perhaps one of centres (``site``, ``centre``, ``center`` or ``hospital``). All slides without it.

        Raises:
            CohortError: the table cannot be used.
            UsageError: no slide is left.
        """
        store = FeatureStore(root)
        source = StoreSource(store, [encoder])
        wanted = dict.fromkeys(store.keys, "")
        has_sites = False
        left_out = []
        if table is not None:
            read = SlideTable.read(table)
            slide, site = read.column("slide"), read.usual("site")
            has_sites = site is not None
            names, wanted = SlideNames({key: readable_part(key) for key in store.keys}), {}
            for row in read.rows:
                key = names.find(row[slide])
                if key is None:
                    left_out.append(LeftOut(row[slide], "not in the store"))
                else:
                    wanted[key] = row[site] if site is not None else ""
        kept = {}
        for key, where in wanted.items():
            if reason := source.lacks(key):
                left_out.append(LeftOut(key, reason))
            else:
                kept[key] = where
        return cls(source, tuple(kept), tuple(kept.values()) if has_sites else None, tuple(left_out))

    @classmethod
    def from_bags(cls, bags: Bags) -> "SlideSet":
        """Bags that are read when they are asked for; they are told apart by their place in ``bags``."""
        return cls(_BagList(bags), tuple(str(index) for index in range(len(bags))))


@dataclass(frozen=True, eq=False)
class TilePool:
    """Tiles of many slides.

    Attributes:
        x: (n, D) float32.
        slide: (n,) of which slide each is: an index into ``slides``.
        slides: names, sorted.
        features: of what the vectors are, as ``BagSource.facts``.
        provenance: how the tiles were drawn, as JSON.
    """

    x: NDArray[np.float32]
    slide: NDArray[np.int64]
    slides: tuple[str, ...]
    features: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.x)

    def __repr__(self) -> str:
        return f"<TilePool {len(self)} tiles × {self.x.shape[1]} of {len(self.slides)} slides>"


def draw_tiles(
    slides: HasSlides,
    n_tiles: int = 100_000,
    *,
    seed: int = 0,
    balance: Balance = "slides",
    done: Callable[[str], None] | None = None,
) -> TilePool:
    """Draw about ``n_tiles`` tiles, from each slide at most its equal share, reading one slide at a time.

    The order of the slides changes nothing, and which tiles of a slide are drawn depends on the seed, the slide's name and
    its share alone. Tiles that could not be read are never drawn.

    Args:
        balance: ``"sites"`` gives each site an equal share and each slide an equal part of its site's.
        done: is told each slide that has been read.

    Raises:
        UsageError: sites are asked for and not known.
    """
    if n_tiles < 1:
        raise UsageError(f"a pool has at least one tile, not {n_tiles}")
    shares = _shares(slides, n_tiles, balance)
    names = sorted(shares)
    dim = slides.source.dim
    x = np.empty((sum(shares.values()), dim), np.float32)  # takes memory only where it is filled
    of_slide, filled = [], 0
    for index, name in enumerate(names):
        rows = rows_of(slides.source, name)
        picked = _draw(rows, shares[name], np.random.default_rng([seed, _number(name)]))
        if picked.shape[1] != dim:
            raise BadFeaturesError(f"{name}: vectors of {picked.shape[1]}, where other slides have {dim}")
        x[filled : filled + len(picked)] = picked
        filled += len(picked)
        of_slide.append(np.full(len(picked), index, np.int64))
        if done is not None:
            done(name)
    provenance: dict[str, Any] = {
        "n_tiles": filled,
        "n_slides": len(names),
        "slides_sha256": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        "balance": balance,
        "draw_seed": seed,
    }
    if (store := _store_of(slides.source)) is not None:
        provenance["revision"] = list(store.revisions)
    return TilePool(x[:filled], np.concatenate(of_slide), tuple(names), dict(slides.source.facts), provenance)


def rows_of(source: BagSource, slide: str) -> Rows:
    """A slide's tiles: from a store of one encoder shard by shard, of anything else as the bag."""
    store = _store_of(source)
    if store is not None and len(store.encoders) == 1 and store.select is None:
        return StoredRows(store.slide(slide).features(store.encoders[0]))
    return TensorRows(source.read(slide).features)


def _store_of(source: BagSource) -> StoreSource | None:
    """The store that bags are read from, if they are."""
    inner = source.source if isinstance(source, CachedSource) else source
    return inner if isinstance(inner, StoreSource) else None


class _BagList:
    """A ``BagSource`` of bags in a list, which may read them lazily."""

    def __init__(self, bags: Bags) -> None:
        self._bags = bags

    @property
    def facts(self) -> Mapping[str, Any]:
        return {}

    @property
    def dim(self) -> int:
        return self._bags[0].dim

    def read(self, slide: str) -> Bag:
        return self._bags[int(slide)]

    def place(self, slide: str) -> Any:
        raise UsageError(f"bag {slide}: came without places of its tiles")


def _shares(slides: HasSlides, n_tiles: int, balance: Balance) -> dict[str, int]:
    if balance == "slides":
        return dict.fromkeys(slides.slides, max(1, n_tiles // len(slides.slides)))
    if slides.sites is None:
        raise UsageError("tiles cannot be balanced over sites: no site is known; give the table a column of sites")
    sizes = Counter(slides.sites)
    return {
        name: max(1, n_tiles // (len(sizes) * sizes[site]))
        for name, site in zip(slides.slides, slides.sites, strict=True)
    }


def _draw(rows: Rows, share: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(n, D) of at most ``share`` rows, all equally likely, in their order."""
    n = len(rows)
    chosen = np.arange(n) if n <= share else np.sort(rng.choice(n, share, replace=False))
    picked, start = [], 0
    for block in rows:
        here = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, start + len(block))] - start
        picked.append(block[torch.from_numpy(here).to(block.device)].cpu().numpy())
        start += len(block)
    return np.concatenate(picked)


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "little")
