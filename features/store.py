"""FeatureStore, SlideStore, Features: reading what ``wsi-extract`` wrote. Format: docs/store.md.

::

    OUT/
      wsi-store.json                    format, version, and the tiling and selection of tiles every slide shares
      slides/<key>.zarr/                one slide: a Zarr v3 group that appears whole, by one rename
        coords, tissue_fraction         (N, 2) int32 level-0 pixels; (N,) float32
        encoders/<encoder>/             one encoder's group, likewise
          features, status              (N, D); (N,) uint8: 0 good, 1 unreadable pixels, 2 non-finite vector
        embeddings/<name>/              one vector of the whole slide, in named parts, likewise
      tissue/<key>.geojson   thumbnails/<key>.jpg   report.jsonl
      .staging/   .locks/   .replaced/
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.arrays import array_facts, check_files, manifest_of, open_array, read_rows, row_blocks
from features.embedding import SlideEmbedding, StoredEmbedding
from features.keys import readable_part, safe_name, slide_key
from wsi._files import write_atomically
from wsi._version import __version__
from wsi.errors import NotExtractedError, StoreCorruptError, StoreFormatError, UsageError
from wsi.grid import TileGrid, Tiling

if TYPE_CHECKING:
    import dask.array
    import torch
    import zarr

__all__ = ["FORMAT_VERSION", "GOOD", "NONFINITE", "UNREADABLE", "FeatureStore", "Features", "Problem", "SlideStore"]

FORMAT_VERSION = 1
GOOD, UNREADABLE, NONFINITE = 0, 1, 2  # status of a tile's vector

_NAME = "wsi-store.json"


class Problem(NamedTuple):
    """Something ``verify`` found: which slide, which part of it, what is wrong."""

    slide: str
    part: str
    what: str


class Features:
    """One encoder's vectors of one slide: (N, D), row i is tile i of the slide's grid.

    Rows whose ``status`` is not 0 are NaN: nothing is ever made up for a tile that could not be read.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @property
    def shape(self) -> tuple[int, int]:
        n, dim = self.manifest["arrays"]["features"]["shape"]
        return n, dim

    @cached_property
    def array(self) -> "zarr.Array[Any]":
        """The zarr array; slicing it reads only what is asked for."""
        return open_array(self.path / "features")

    @cached_property
    def status(self) -> NDArray[np.uint8]:
        """(N,) 0 good, 1 pixels unreadable, 2 not finite."""
        return np.asarray(read_rows(open_array(self.path / "status"), slice(0, self.shape[0])))

    def numpy(self, *, good_only: bool = False) -> NDArray[Any]:
        """(N, D) in memory, or only the rows of good tiles."""
        rows = read_rows(self.array, slice(0, self.shape[0]))
        return rows[self.status == GOOD] if good_only else rows

    def torch(self, *, good_only: bool = False) -> "torch.Tensor":
        """(N, D) tensor in memory, or only the rows of good tiles."""
        import torch

        return torch.from_numpy(self.numpy(good_only=good_only))

    def dask(self) -> "dask.array.Array":
        """(N, D) lazy dask array in blocks of one shard."""
        import dask.array

        return dask.array.from_array(self.array, chunks=self.array.shards or self.array.chunks, name=str(self.path))

    def __repr__(self) -> str:
        return f"<Features {self.manifest['encoder']['name']}: {self.shape[0]} x {self.shape[1]} {self.array.dtype}>"


class SlideStore:
    """One slide of a store: its grid, tissue fractions, provenance, and the features of every encoder run on it."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @property
    def key(self) -> str:
        return str(self.manifest["slide"]["key"])

    @property
    def relpath(self) -> str:
        """The slide file's path below the cohort's root."""
        return str(self.manifest["slide"]["relpath"])

    @cached_property
    def grid(self) -> TileGrid:
        """The slide's tiles; row i belongs to row i of every array."""
        facts = self.manifest["grid"]
        rows = slice(0, facts["n_tiles"])
        grid = TileGrid(
            xy=read_rows(open_array(self.path / "coords"), rows).astype(np.int64),
            tissue=read_rows(open_array(self.path / "tissue_fraction"), rows),
            tile_px=facts["tile_px"],
            side=tuple(facts["side"]),
            stride=tuple(facts["stride"]),
            mpp=tuple(facts["mpp"]),
            level=facts["level"],
            downsample=tuple(facts["downsample"]),
        )
        if grid.fingerprint != facts["fingerprint"]:
            raise StoreCorruptError(f"{self.path}: the grid on disk is not the one that was written; run wsi verify")
        return grid

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the encoders whose features are complete."""
        return tuple(sorted(str(manifest["encoder"]["name"]) for _, manifest in self._groups("encoders")))

    def features(self, encoder: str) -> Features:
        """One encoder's features.

        Raises:
            NotExtractedError: they are not there.
        """
        path = self.encoder_path(encoder)
        manifest = manifest_of(path)
        if manifest is None and encoder.startswith("timm:"):  # timm:resnet18 is stored with the tag of its weights
            tagged = [name for name in self.encoders if name.startswith(f"{encoder}.")]
            if len(tagged) == 1:
                return self.features(tagged[0])
        if manifest is None:
            there = ", ".join(self.encoders) or "none yet"
            raise NotExtractedError(
                f"{self.path}: no features of {encoder!r} (there are: {there}); run wsi-extract with --encoder {encoder}"
            )
        return Features(path, manifest)

    def encoder_path(self, encoder: str) -> Path:
        """Where the features of this encoder are, or will be."""
        return self.path / "encoders" / safe_name(encoder)

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Names of the slide's embeddings that are complete."""
        return tuple(sorted(str(manifest["name"]) for _, manifest in self._groups("embeddings")))

    def embedding(self, name: str) -> SlideEmbedding:
        """The slide's vector of this name, such as ``"panther-uni2-h"``.

        Raises:
            NotExtractedError: it is not there.
        """
        path = self.embedding_path(name)
        manifest = manifest_of(path)
        if manifest is None:
            there = ", ".join(self.embeddings) or "none yet"
            raise NotExtractedError(
                f"{self.path}: no embedding {name!r} (there are: {there}); make it with wsi prototypes embed"
            )
        return SlideEmbedding(path, manifest)

    def embedding_path(self, name: str) -> Path:
        """Where the slide's vector of this name is, or will be."""
        return self.path / "embeddings" / safe_name(name)

    def verify(self, *, deep: bool = False) -> list[Problem]:
        """Compare what is on disk with what the manifests promise.

        Shallow: every file is there with its size. Deep: every byte, every value, and that vectors are finite exactly
        where their status says so. Never raises for damage; it is what is looked for.
        """
        problems = [
            Problem(self.key, "grid", what) for what in check_files(self.path, self.manifest["files"], deep=deep)
        ]
        if deep and not problems:
            problems += self._compare(self.path, self.manifest, "grid")
            try:
                _ = self.grid
            except StoreCorruptError as error:
                problems.append(Problem(self.key, "grid", str(error)))
        return problems + self._verify_groups("encoders", deep) + self._verify_groups("embeddings", deep)

    def _verify_groups(self, kind: str, deep: bool) -> list[Problem]:
        problems = []
        for folder in sorted((self.path / kind).iterdir()) if (self.path / kind).is_dir() else []:
            if not folder.is_dir():
                continue
            part = folder.name if kind == "encoders" else f"{kind}/{folder.name}"
            try:
                manifest = manifest_of(folder)
            except StoreCorruptError as error:
                problems.append(Problem(self.key, part, str(error)))
                continue
            if manifest is None:
                continue  # it went away meanwhile
            found = [Problem(self.key, part, what) for what in check_files(folder, manifest["files"], deep=deep)]
            if manifest["grid_fingerprint"] != self.manifest["grid"]["fingerprint"]:
                found.append(
                    Problem(
                        self.key, part, f"{'features belong' if kind == 'encoders' else 'it belongs'} to another grid"
                    )
                )
            if deep and not found:
                found = self._compare(folder, manifest, part)
                if kind == "encoders":
                    found = found or self._hidden_nan(Features(folder, manifest))
            problems += found
        return problems

    def _compare(self, folder: Path, manifest: dict[str, Any], part: str) -> list[Problem]:
        problems = []
        for name, promised in manifest["arrays"].items():
            try:
                if array_facts(open_array(folder / name)) != promised:
                    problems.append(Problem(self.key, part, f"{name} holds other values than were written"))
            except StoreCorruptError as error:
                problems.append(Problem(self.key, part, f"{name} cannot be read: {error}"))
        return problems

    def _hidden_nan(self, features: Features) -> list[Problem]:
        for rows in row_blocks(features.shape[0]):
            finite = np.isfinite(read_rows(features.array, rows)).all(axis=1)
            if not np.array_equal(finite, features.status[rows] == GOOD):
                return [Problem(self.key, features.path.name, "vectors are not finite exactly where status says so")]
        return []

    def _groups(self, kind: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        folder = self.path / kind
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            manifest = manifest_of(path) if path.is_dir() else None
            if manifest is not None:
                yield path, manifest

    def __repr__(self) -> str:
        n = self.manifest["grid"]["n_tiles"]
        return f"<SlideStore {self.relpath}: {n} tiles, {', '.join(self.encoders) or 'no features'}>"


class FeatureStore:
    """A folder of slides with their features, as ``wsi-extract`` writes it.

    >>> store = FeatureStore("OUT")
    >>> for slide in store:
    ...     x = slide.features("uni2-h").torch()
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        facts = _read_facts(self.root)
        self.tiling = Tiling(**facts["tiling"])
        self.select: dict[str, Any] | None = facts.get("select")  # stores of before there were selections have none

    @classmethod
    def create(cls, root: str | Path, tiling: Tiling, select: Mapping[str, Any] | None = None) -> "FeatureStore":
        """Open the store at ``root``, or make an empty one.

        Args:
            select: which tiles of a slide are taken, as ``features.selection`` says it in JSON; None for all of them.

        Raises:
            UsageError: there is one already, with another tiling or selection. Tiles of two kinds are never mixed.
        """
        root = Path(root)
        try:
            store = cls(root)
        except NotExtractedError:
            facts = {"format": "wsi-store", "version": FORMAT_VERSION, "tiling": asdict(tiling)}
            if select is not None:
                facts["select"] = dict(select)
            facts["created_by"] = f"wsi-engine {__version__}"
            (root / "slides").mkdir(parents=True, exist_ok=True)
            write_atomically(root / _NAME, json.dumps(facts, indent=1).encode())
            return cls(root)
        if store.tiling != tiling:
            mine, theirs = asdict(tiling), asdict(store.tiling)
            changed = ", ".join(
                f"{key} {theirs[key]} there, {mine[key]} asked" for key in mine if mine[key] != theirs[key]
            )
            raise UsageError(
                f"{root}: this store was made with another tiling ({changed}); give another OUT, or the same tiling"
            )
        if store.select != (None if select is None else dict(select)):
            there, asked = (_words(each) for each in (store.select, select))
            raise UsageError(
                f"{root}: this store was made with another selection of tiles ({there} there, {asked} asked); give another "
                f"OUT, or the same --select"
            )
        return store

    def path_of(self, key: str) -> Path:
        """Where the slide of this key is, or will be."""
        return self.root / "slides" / f"{key}.zarr"

    @property
    def embeddings(self) -> tuple[StoredEmbedding, ...]:
        """The vectors that slides have, by name; those of one name that were made differently stand apart."""
        found = Counter(
            (each.name, each.made_by, each.encoders, each.size)
            for slide in self
            for each in map(slide.embedding, slide.embeddings)
        )
        return tuple(StoredEmbedding(*about, n_slides) for about, n_slides in sorted(found.items()))

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of all slides, sorted."""
        folder = self.root / "slides"
        if not folder.is_dir():
            raise StoreCorruptError(f"{folder}: the folder of slides is missing; restore it, or write to another OUT")
        return tuple(
            sorted(p.name.removesuffix(".zarr") for p in folder.iterdir() if p.suffix == ".zarr" and p.is_dir())
        )

    def find(self, key: str) -> SlideStore | None:
        """The slide of this key, or None. Raises StoreCorruptError when it is damaged."""
        path = self.path_of(key)
        manifest = manifest_of(path)
        return None if manifest is None else SlideStore(path, manifest)

    def key_of(self, name: str) -> str:
        """The key of the slide that is called so: by key, relative path, file name or stem, where that is unique.

        Raises:
            NotExtractedError: none, or several, are called so.
        """
        keys = self.keys
        for key in (name, slide_key(name)):
            if key in keys:
                return key
        names = {key: PurePosixPath(readable_part(key)) for key in keys}
        matches = [key for key, path in names.items() if name in (path.name, path.stem)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            paths = ", ".join(str(names[key]) for key in matches)
            raise NotExtractedError(f"{self.root}: {name!r} is ambiguous: {paths}; give the relative path")
        raise NotExtractedError(f"{self.root}: holds no slide {name!r}; wsi info {self.root} lists what it holds")

    def slide(self, name: str) -> SlideStore:
        """The slide of this key, relative path, file name or stem; see ``key_of``."""
        found = self.find(self.key_of(name))
        if found is None:
            raise NotExtractedError(f"{self.root}: {name} was taken out meanwhile")
        return found

    def __iter__(self) -> Iterator[SlideStore]:
        for key in self.keys:
            found = self.find(key)
            if found is not None:
                yield found

    def __len__(self) -> int:
        return len(self.keys)

    def verify(self, *, deep: bool = False) -> list[Problem]:
        """Every problem of every slide; empty when all is as it was written."""
        return [problem for key in self.keys for problem in self.verify_slide(key, deep=deep)]

    def verify_slide(self, key: str, *, deep: bool = False) -> list[Problem]:
        """Every problem of one slide; damage is what is looked for, so it is never raised."""
        try:
            found = self.find(key)
        except StoreCorruptError as error:
            return [Problem(key, "grid", str(error))]
        return [] if found is None else found.verify(deep=deep)

    def __repr__(self) -> str:
        return f"<FeatureStore {self.root}: {len(self)} slides, {self.tiling.tile_px} px at {self.tiling.mpp:g} mpp>"


def _words(select: Mapping[str, Any] | None) -> str:
    """A selection as it is written on the command line."""
    if select is None:
        return "all tiles"
    return f"{select['method']}:" + ",".join(f"{key}={value}" for key, value in select.items() if key != "method")


def _read_facts(root: Path) -> dict[str, Any]:
    path = root / _NAME
    try:
        facts = json.loads(path.read_bytes())
        kind, version = facts["format"], facts["version"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotExtractedError(
            f"{root}: no feature store here ({_NAME} is missing); make one with wsi-extract"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreFormatError(
            f"{path}: not the description of a feature store; restore it or use another folder"
        ) from error
    if kind != "wsi-store" or version != FORMAT_VERSION:
        raise StoreFormatError(
            f"{path}: a {kind} of version {version}; this release reads version {FORMAT_VERSION}: use the wsi-engine that made it"
        )
    return dict(facts)
