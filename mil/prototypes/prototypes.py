"""Prototypes: typical tiles of a cohort, fitted once; a Zarr group on disk. Format: docs/store.md."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from features.arrays import (
    array_facts,
    create_array,
    file_facts,
    manifest_of,
    open_array,
    read_rows,
    rows_digest,
    seal,
)
from features.writing import disk_errors
from wsi._files import make_folder_atomically
from wsi._version import __version__
from wsi.errors import NotExtractedError, RunMismatchError, StoreCorruptError, StoreFormatError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMAT_VERSION", "Prototypes"]

FORMAT_VERSION = 1
_KIND = "prototypes"


@dataclass(frozen=True, eq=False)
class Prototypes:
    """K typical tiles, the most common first.

    Attributes:
        centres: (K, D) float32.
        shares: (K,) float64, share of the tiles they were fitted on that is nearest to each; sums to one.
        scale: (D,) float32, what each feature is divided by before distances are taken; None where they are taken as they
            are. Centres are in the features' own units all the same.
        features: of what tiles they are, as ``BagSource.facts``: encoder, weights, dim, mpp, tile_px; empty for arrays.
        provenance: how they were fitted, as JSON: seed, method, restarts, tiles, slides, and so on.

    Raises:
        UsageError: shapes that do not fit, or values that are not finite.
    """

    centres: NDArray[np.float32]
    shares: NDArray[np.float64]
    features: Mapping[str, Any]
    provenance: Mapping[str, Any]
    scale: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        centres = np.array(self.centres, np.float32)
        shares = np.array(self.shares, np.float64)
        if centres.ndim != 2 or 0 in centres.shape or not np.isfinite(centres).all():
            raise UsageError(f"prototypes are finite vectors (K, D), not {centres.shape}")
        if shares.shape != centres.shape[:1] or not abs(shares.sum() - 1) < 1e-6 or shares.min() < 0:
            raise UsageError(f"{len(centres)} prototypes need as many shares that sum to one, not {shares}")
        arrays: list[tuple[str, NDArray[Any]]] = [("centres", centres), ("shares", shares)]
        if self.scale is not None:
            scale = np.array(self.scale, np.float32)
            if scale.shape != centres.shape[1:] or not np.isfinite(scale).all() or scale.min() <= 0:
                raise UsageError(f"a scale is {centres.shape[1]} finite numbers above 0, not {scale}")
            arrays.append(("scale", scale))
        for name, array in arrays:
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        """Number of prototypes."""
        return len(self.centres)

    @property
    def k(self) -> int:
        """Number of prototypes."""
        return len(self.centres)

    @property
    def dim(self) -> int:
        """Length of a tile's vector."""
        return int(self.centres.shape[1])

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the encoders whose tiles these are; none for arrays."""
        return tuple(str(name) for name in self.features.get("encoder", ()))

    @cached_property
    def digest(self) -> str:
        """32 hex digits of the bytes of centres and scale: equal for equal prototypes, whoever fitted them."""
        words = f"{self.dim}:{rows_digest(self.centres)}"
        if self.scale is not None:
            words += f":{rows_digest(self.scale)}"
        return hashlib.sha256(words.encode()).hexdigest()[:32]

    @cached_property
    def tensor(self) -> "Tensor":
        """The centres as a (K, D) tensor."""
        import torch

        return torch.from_numpy(self.centres.copy())

    @cached_property
    def scale_tensor(self) -> "Tensor | None":
        """The scale as a (D,) tensor."""
        import torch

        return None if self.scale is None else torch.from_numpy(self.scale.copy())

    def check(self, features: Mapping[str, Any], *, where: str) -> None:
        """Refuse features that differ from those the prototypes were fitted on.

        Raises:
            RunMismatchError: another encoder, weights, length, or tiling; one line names them.
        """
        differ = [key for key, value in self.features.items() if key in features and features[key] != value]
        if differ:
            words = "; ".join(f"{key} {features[key]} here, {self.features[key]} there" for key in differ)
            raise RunMismatchError(
                f"{where}: other features than the prototypes were fitted on ({words}); fit prototypes on these, or "
                f"take the encoder that those are of"
            )

    def save(self, path: str | Path) -> None:
        """Write a Zarr group that appears whole or not at all.

        Raises:
            UsageError: there is something of this name.
        """
        path = Path(path)
        if path.exists():
            raise UsageError(f"{path}: is there already; give another name, or delete it")
        with disk_errors(path.parent), make_folder_atomically(path) as staging:
            staging.mkdir()
            arrays = {}
            written: list[tuple[str, tuple[str, ...], NDArray[Any]]] = [
                ("centres", ("prototype", "feature"), self.centres),
                ("shares", ("prototype",), self.shares),
            ]
            if self.scale is not None:
                written.append(("scale", ("feature",), self.scale))
            for name, names, rows in written:
                array = create_array(staging / name, rows.shape, rows.dtype.str, names)
                array[:] = rows
                arrays[name] = array_facts(array, [rows_digest(rows)])
            manifest = {
                "kind": _KIND,
                "version": FORMAT_VERSION,
                "digest": self.digest,
                "features": dict(self.features),
                "provenance": dict(self.provenance),
                "arrays": arrays,
                "files": file_facts(staging),
                "created_by": f"wsi-engine {__version__}",
            }
            seal(staging, manifest)

    @classmethod
    def load(cls, path: str | Path) -> "Prototypes":
        """Read prototypes.

        Raises:
            NotExtractedError: there are none.
            StoreFormatError: the folder holds something else.
            StoreCorruptError: the bytes are not those that were written.
        """
        path = Path(path)
        try:
            manifest = manifest_of(path)
        except StoreCorruptError as error:
            raise StoreCorruptError(
                f"{path}: not prototypes, or damaged; fit them again with wsi prototypes fit"
            ) from error
        if manifest is None:
            raise NotExtractedError(f"{path}: there are no prototypes; make them with wsi prototypes fit")
        kind, version = manifest.get("kind"), manifest.get("version")
        if (kind, version) != (_KIND, FORMAT_VERSION):
            raise StoreFormatError(
                f"{path}: holds {kind} of version {version}; this release reads {_KIND} {FORMAT_VERSION}"
            )
        read = {}
        for name, promised in manifest["arrays"].items():
            try:
                array = open_array(path / name)
                facts, rows = array_facts(array), read_rows(array, slice(0, array.shape[0]))
            except StoreCorruptError as error:
                raise StoreCorruptError(f"{path}: {name} are damaged; fit the prototypes again") from error
            if facts != promised:
                raise StoreCorruptError(f"{path}: {name} are not those that were written; fit the prototypes again")
            read[name] = rows
        return cls(read["centres"], read["shares"], manifest["features"], manifest["provenance"], read.get("scale"))

    def __repr__(self) -> str:
        return f"<Prototypes {self.k} × {self.dim}, {' and '.join(self.encoders) or 'of arrays'}, {self.digest[:8]}>"
