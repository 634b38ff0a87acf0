"""Arrays of a store: how they lie on disk, their digests, and whether the files are still what was written."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore, StorePath

from wsi.errors import StoreCorruptError

__all__ = [
    "SHARD_ROWS",
    "array_facts",
    "check_files",
    "create_array",
    "file_facts",
    "group_bytes",
    "manifest_digest",
    "manifest_of",
    "open_array",
    "read_rows",
    "row_blocks",
    "rows_digest",
    "seal",
    "write_group",
]

CHUNK_ROWS = 512
SHARD_ROWS = 4096


def create_array(
    folder: Path, shape: tuple[int, ...], dtype: str, dimension_names: tuple[str, ...]
) -> "zarr.Array[Any]":
    """A new array in a new folder, at its full size, in shards of 4096 rows that are only ever written whole."""
    rows = shape[0]
    shard = SHARD_ROWS if rows > SHARD_ROWS else max(1, -(-rows // CHUNK_ROWS)) * CHUNK_ROWS
    about = json.loads(_description(shard, CHUNK_ROWS, shape[1:], dtype, dimension_names)) | {"shape": list(shape)}
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_bytes(json.dumps(about).encode())
    place = StorePath(LocalStore(folder))
    return zarr.Array(zarr.AsyncArray(about, place, config={"write_empty_chunks": True}))


@cache
def _description(
    shard_rows: int, chunk_rows: int, columns: tuple[int, ...], dtype: str, dimension_names: tuple[str, ...]
) -> bytes:
    """What zarr writes of such an array of one shard. It takes milliseconds, and thousands of arrays are alike.

    zarr's defaults would let flipped bits, lost chunks and half-written arrays read back as good data. Here a checksum
    is verified before any decompressor sees the bytes, every chunk is written, and the fill value of floats is NaN.
    """
    written: dict[str, Any] = {}
    zarr.create_array(
        store=written,
        shape=(shard_rows, *columns),
        dtype=dtype,
        chunks=(chunk_rows, *columns),
        shards=(shard_rows, *columns),
        compressors=(ZstdCodec(level=1), Crc32cCodec()),
        filters=None,
        fill_value=float("nan") if np.dtype(dtype).kind == "f" else 0,
        dimension_names=dimension_names,
    )
    return bytes(written["zarr.json"].to_bytes())


def open_array(path: Path) -> "zarr.Array[Any]":
    """An array that is there already, for reading.

    Raises:
        StoreCorruptError: it is not, or its metadata is damaged.
    """
    try:
        return zarr.open_array(store=path, mode="r")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise StoreCorruptError(
            f"{path}: the array's metadata cannot be read ({error}); run wsi verify, take the slide out with wsi remove "
            f"and run wsi-extract again"
        ) from error


def row_blocks(rows: int) -> Iterator[slice]:
    """The rows of each shard."""
    for start in range(0, rows, SHARD_ROWS):
        yield slice(start, min(rows, start + SHARD_ROWS))


def rows_digest(rows: NDArray[Any]) -> str:
    """sha256 of the values in row order, little-endian: the same whatever the chunks and codecs."""
    return hashlib.sha256(_bytes(rows)).hexdigest()


def array_facts(array: "zarr.Array[Any]", shards: Sequence[str] | None = None) -> dict[str, object]:
    """Shape, dtype and digest of what reads back from disk, shard by shard in bounded memory.

    Args:
        shards: the digest of each shard's rows as they were written, to be compared with.

    Raises:
        StoreCorruptError: a chunk cannot be decoded, or holds something else.
    """
    digest = hashlib.sha256()
    for index, block in enumerate(row_blocks(array.shape[0])):
        rows = read_rows(array, block)
        if shards is not None and rows_digest(rows) != shards[index]:
            raise StoreCorruptError(
                f"{array.store_path}: what reads back is not what was written; check the disk and run again"
            )
        digest.update(_bytes(rows))
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": digest.hexdigest()}


def read_rows(array: "zarr.Array[Any]", rows: slice) -> NDArray[Any]:
    """Rows as numpy; what cannot be decoded is an error that names the array."""
    try:
        return np.asarray(array[rows])
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise StoreCorruptError(
            f"{array.store_path}: rows {rows.start} to {rows.stop} cannot be decoded ({error}); take the "
            f"slide out with wsi remove and run wsi-extract again"
        ) from error


def file_facts(folder: Path, *, digests: bool = True) -> dict[str, dict[str, object]]:
    """Size and sha256 of every file below ``folder`` but its own zarr.json, by relative path."""
    facts: dict[str, dict[str, object]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != "zarr.json":
            facts[name] = {"bytes": path.stat().st_size}
            if digests:
                with path.open("rb") as file:
                    facts[name]["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return facts


def check_files(folder: Path, promised: Mapping[str, Mapping[str, object]], *, deep: bool) -> list[str]:
    """What is wrong with the promised files: missing or of another size; with ``deep``, of other content."""
    problems = []
    for name, facts in promised.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != facts["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {facts['bytes']}")
        elif deep:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                    problems.append(f"{name} has other content than was written")
    return problems


def seal(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Make a folder of arrays a group that holds a manifest, with a digest of itself: the last thing before it is renamed
    into place.
    """
    signed = {**manifest, "complete": True, "manifest_sha256": manifest_digest(manifest)}
    write_group(folder, {"wsi": signed})


def write_group(folder: Path, attributes: Mapping[str, Any]) -> None:
    """Make a folder a Zarr v3 group, https://zarr-specs.readthedocs.io/en/latest/v3/core/#group-metadata."""
    folder.mkdir(exist_ok=True)
    (folder / "zarr.json").write_bytes(group_bytes(attributes))


def group_bytes(attributes: Mapping[str, Any]) -> bytes:
    """The metadata document of a Zarr v3 group."""
    group = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    return json.dumps(group, allow_nan=False).encode()


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """The manifest of a sealed folder, or None when there is no such folder.

    Raises:
        StoreCorruptError: there is one, but it is not what was written.
    """
    try:
        manifest = json.loads((folder / "zarr.json").read_bytes())["attributes"]["wsi"]
        promised = manifest.pop("manifest_sha256")
        complete = manifest.pop("complete")
    except (FileNotFoundError, NotADirectoryError) as error:
        if not folder.exists():
            return None
        raise StoreCorruptError(
            f"{folder}: zarr.json is missing; take the slide out with wsi remove and run again"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreCorruptError(
            f"{folder}: zarr.json is damaged; take the slide out with wsi remove and run again"
        ) from error
    if complete is not True or promised != manifest_digest(manifest):
        raise StoreCorruptError(f"{folder}: the manifest is damaged; take the slide out with wsi remove and run again")
    return dict(manifest)


def manifest_digest(manifest: Mapping[str, object]) -> str:
    """sha256 of a manifest, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _bytes(rows: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("<")).tobytes()
