"""Writing a store so that a kill at any moment leaves nothing half-done behind a good name.

Everything is made in ``.staging``, verified by reading it back, made durable, and renamed into place. An encoder's
features are staged shard by shard with a journal of digests; the next run adopts the staging folder, checks the
journaled shards against the disk, and goes on behind the last whole one.
"""

import errno
import hashlib
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from features.arrays import (
    SHARD_ROWS,
    array_facts,
    create_array,
    file_facts,
    group_bytes,
    manifest_digest,
    manifest_of,
    open_array,
    read_rows,
    row_blocks,
    rows_digest,
    seal,
    write_group,
)
from features.lease import Lease
from features.store import FORMAT_VERSION, GOOD, NONFINITE, FeatureStore, SlideStore
from wsi._files import fsync_folder, replace_atomically, write_atomically
from wsi._version import __version__
from wsi.errors import DiskFullError, EncoderChangedError, OutputNotWritableError, StoreCorruptError, StoreError
from wsi.grid import TileGrid

__all__ = [
    "FeatureWriter",
    "check_embedding",
    "check_encoder",
    "check_writable",
    "collect_garbage",
    "disk_errors",
    "replace_slide",
    "sweep",
    "write_embedding",
    "write_slide",
]

_SYNCS_AT_ONCE = 4


def write_slide(store: FeatureStore, key: str, grid: TileGrid, provenance: Mapping[str, object]) -> SlideStore:
    """Put a slide's grid into the store, whole. Where another process was faster, theirs is returned.

    Args:
        provenance: ``slide``, ``tissue`` and other JSON facts for the manifest.
    """
    staging = _new_staging(store, key)
    with disk_errors(store.root):
        try:
            group = staging / "group"
            arrays = {
                "coords": _write_array(group / "coords", grid.xy.astype(np.int32), ("tile", "xy")),
                "tissue_fraction": _write_array(group / "tissue_fraction", grid.tissue, ("tile",)),
            }
            write_group(group / "encoders", {})
            manifest = {
                "kind": "slide",
                "version": FORMAT_VERSION,
                **provenance,
                "grid": _grid_facts(grid),
                "arrays": arrays,
                "files": file_facts(group),
                "software": _software(),
                "finished_at": _now(),
            }
            seal(group, manifest)
            _publish(group, store.path_of(key))
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    found = store.find(key)
    if found is None or found.manifest["grid"]["fingerprint"] != grid.fingerprint:
        raise StoreError(f"{store.path_of(key)}: another process wrote a different grid meanwhile; run again")
    if found.manifest["arrays"] == arrays:
        found.grid = grid  # has just been read back
    return found


def replace_slide(store: FeatureStore, key: str) -> Path:
    """Move a slide out of the way, whole, into ``.replaced``, and say where it is."""
    aside = _aside(store, key)
    store.path_of(key).rename(aside)
    fsync_folder(store.root / "slides")
    return aside


def sweep(store: FeatureStore, *, older_than_s: float = 3600.0) -> int:
    """Delete what killed runs left and nobody can use: half-made grids and half-written files. Bytes freed.

    Staged features with a journal stay; the next run takes them up.
    """
    freed, now = 0, time.time()
    for folder in (store.root / ".staging").glob("*"):
        if not (folder / "journal.json").exists() and now - folder.stat().st_mtime > older_than_s:
            freed += _delete(folder)
    for folder in (store.root, store.root / "tissue", store.root / "thumbnails"):
        for file in folder.glob(".*.partial"):
            if now - file.stat().st_mtime > older_than_s:
                freed += _delete(file)
    return freed


def collect_garbage(store: FeatureStore, *, staging: bool) -> int:
    """Delete replaced slides and, with ``staging``, the staged work of interrupted runs. Bytes freed.

    Raises:
        SlideBusyError: a process is at work in the store.
    """
    for lock in (store.root / ".locks").glob("*.json"):
        with Lease(lock.parent, lock.stem):
            pass  # held by a dead process, if at all
    freed = sweep(store, older_than_s=0)
    for folder in (".replaced", *((".staging",) if staging else ())):
        freed += sum(_delete(path) for path in (store.root / folder).glob("*"))
    return freed


def check_encoder(slide: SlideStore, identity: Mapping[str, Any]) -> bool:
    """Whether this encoder's features are there already.

    Raises:
        EncoderChangedError: something else made the features of this name.
        StoreCorruptError: they are damaged.
    """
    path = slide.encoder_path(str(identity["name"]))
    manifest = manifest_of(path)
    if manifest is None:
        return False
    changed = [key for key, value in identity.items() if manifest["encoder"].get(key) != value]
    if changed:
        raise EncoderChangedError(
            f"{path}: holds features of {manifest['encoder']['name']} with other {', '.join(changed)}; write these under "
            f"another name with --name, or to another OUT"
        )
    return True


class FeatureWriter:
    """Takes one slide's vectors in grid order and makes them appear, complete and verified, when all have come.

    Args:
        encoder: what decides the vectors (``Encoder.identity``); ``name`` and ``dim`` among it.
        provenance: how they came to be (``Encoder.provenance``).

    Attributes:
        rows_done: how many rows an earlier, interrupted run has left; begin there.
    """

    def __init__(
        self,
        store: FeatureStore,
        slide: SlideStore,
        encoder: Mapping[str, Any],
        provenance: Mapping[str, Any],
        *,
        dtype: str,
    ) -> None:
        self._store = store
        self._slide = slide
        self._encoder = dict(encoder)
        self._provenance = dict(provenance)
        self._final = slide.encoder_path(str(encoder["name"]))
        self._n, dim, self._dtype = len(slide.grid), int(encoder["dim"]), np.dtype(dtype)
        # The slide's manifest names its file, grid and reader: rows of one file are never continued with another's.
        work = [self._encoder, provenance.get("precision"), dtype, manifest_digest(slide.manifest)]
        self._facts = json.loads(json.dumps(work))  # as it will read back from the journal
        name = hashlib.sha256(f"{slide.key}/{self._final.name}".encode()).hexdigest()[:20]
        with disk_errors(store.root):
            self._staging, self._blocks = _adopt(store, name, self._facts) or (_new_staging(store, name), [])
            features = self._staging / "group" / "features"
            if not self._blocks:
                self._array = create_array(features, (self._n, dim), self._dtype.str, ("tile", "feature"))
                self._write_journal()
            else:
                self._array = zarr.open_array(store=features, mode="r+")
        self.rows_done = self._blocks[-1]["stop"] if self._blocks else 0
        self._status = np.zeros(self._n, np.uint8)
        for block in self._blocks:
            self._status[block["start"] : block["stop"]] = _expand(block["status"])
        self._buffer = np.empty((SHARD_ROWS, dim), self._dtype)
        self._filled = 0

    def write(self, vectors: NDArray[np.float32], status: NDArray[np.uint8]) -> None:
        """The next rows: (B, D) vectors and (B,) status. A vector that is not finite as stored is marked and made NaN."""
        with np.errstate(over="ignore", invalid="ignore"):
            rows = np.asarray(vectors).astype(self._dtype)
        status = np.where((status == GOOD) & ~np.isfinite(rows).all(axis=1), NONFINITE, status).astype(np.uint8)
        rows[status != GOOD] = np.nan
        if self.rows_done + self._filled + len(rows) > self._n:
            raise ValueError(f"more rows than the {self._n} tiles of the grid")
        while len(rows):
            take = min(len(rows), SHARD_ROWS - self._filled)
            self._buffer[self._filled : self._filled + take] = rows[:take]
            start = self.rows_done + self._filled
            self._status[start : start + take] = status[:take]
            self._filled += take
            rows, status = rows[take:], status[take:]
            if self._filled == SHARD_ROWS or self.rows_done + self._filled == self._n:
                self._flush()

    @property
    def status(self) -> NDArray[np.uint8]:
        """(N,) status so far."""
        return self._status

    def finish(self, provenance: Mapping[str, object]) -> None:
        """Verify what is on disk and rename it into place.

        Args:
            provenance: further JSON facts for the manifest, such as timings.

        Raises:
            StoreCorruptError: what reads back is not what was written.
        """
        if self.rows_done != self._n:
            raise ValueError(f"{self.rows_done} of {self._n} rows are written")
        with disk_errors(self._store.root):
            folder = self._staging / "group"
            shutil.rmtree(folder / "status", ignore_errors=True)
            arrays = {
                "features": array_facts(self._array, [block["sha256"] for block in self._blocks]),
                "status": _write_array(folder / "status", self._status, ("tile",)),
            }
            manifest = {
                "kind": "features",
                "version": FORMAT_VERSION,
                "encoder": self._encoder,
                "provenance": self._provenance,
                "grid_fingerprint": self._slide.manifest["grid"]["fingerprint"],
                "n_tiles": self._n,
                "n_unreadable": int((self._status == 1).sum()),
                "n_nonfinite": int((self._status == NONFINITE).sum()),
                **provenance,
                "arrays": arrays,
                "files": file_facts(folder),
                "software": _software(),
                "finished_at": _now(),
            }
            seal(folder, manifest)
            _publish(folder, self._final)
        self.discard()

    def discard(self) -> None:
        """Remove what is staged."""
        shutil.rmtree(self._staging, ignore_errors=True)

    def _flush(self) -> None:
        rows = self._buffer[: self._filled]
        stop = self.rows_done + self._filled
        with disk_errors(self._store.root):
            self._array[self.rows_done : stop] = rows
            status = self._status[self.rows_done : stop]
            self._blocks.append(
                {"start": self.rows_done, "stop": stop, "sha256": rows_digest(rows), "status": _runs(status)}
            )
            self._write_journal()
        self.rows_done, self._filled = stop, 0

    def _write_journal(self) -> None:
        metadata = _metadata_digest(self._staging / "group")
        journal = {"facts": self._facts, "metadata_sha256": metadata, "blocks": self._blocks}
        new = (
            self._staging / "journal.new"
        )  # not synced, like the shards it names: all are compared before they are believed
        new.write_bytes(json.dumps(journal).encode())
        new.replace(self._staging / "journal.json")


def check_embedding(slide: SlideStore, name: str, facts: Mapping[str, Any]) -> bool:
    """Whether the slide's vector of this name is there already, made of the same.

    Raises:
        EncoderChangedError: it was made otherwise.
        StoreCorruptError: it is damaged.
    """
    path = slide.embedding_path(name)
    manifest = manifest_of(path)
    if manifest is None:
        return False
    there = manifest["facts"]
    changed = [
        f"{key} {there.get(key)} there, {facts.get(key)} asked"
        for key in sorted(there.keys() | facts.keys())
        if there.get(key) != facts.get(key)
    ]
    if changed:
        raise EncoderChangedError(
            f"{path}: holds an embedding made otherwise ({', '.join(changed)}); write this one under another name with "
            f"--name, or have it replaced with --replace"
        )
    return True


def write_embedding(
    store: FeatureStore,
    slide: SlideStore,
    name: str,
    facts: Mapping[str, Any],
    parts: Mapping[str, NDArray[np.float32]],
    *,
    replace: bool = False,
) -> None:
    """Put one vector of a whole slide into the store, complete and verified, or not at all.

    Where another process was faster, theirs stays.

    Args:
        facts: what decides the vector, as JSON.
        parts: arrays by name; the vector is all of them in this order, each flattened.
        replace: move one that is there into ``.replaced`` first.

    Raises:
        StoreCorruptError: what reads back is not what was written.
    """
    final = slide.embedding_path(name)
    staging = _new_staging(store, hashlib.sha256(f"{slide.key}/embeddings/{final.name}".encode()).hexdigest()[:20])
    with disk_errors(store.root):
        try:
            folder = staging / "group"
            arrays = {
                part: _write_array(folder / part, rows, (part, "feature")[: rows.ndim]) for part, rows in parts.items()
            }
            manifest = {
                "kind": "embedding",
                "version": FORMAT_VERSION,
                "name": name,
                "facts": dict(facts),
                "parts": list(parts),
                "grid_fingerprint": slide.manifest["grid"]["fingerprint"],
                "arrays": arrays,
                "files": file_facts(folder),
                "software": _software(),
                "finished_at": _now(),
            }
            seal(folder, manifest)
            final.parent.mkdir(exist_ok=True)
            if not (
                final.parent / "zarr.json"
            ).exists():  # a group too, and not among what the slide's manifest promises
                write_atomically(final.parent / "zarr.json", group_bytes({}))
            if replace and final.exists():
                final.rename(_aside(store, f"{slide.key[:100]}.{final.name[:50]}"))
            _publish(folder, final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def check_writable(root: Path) -> None:
    """Try in ``root`` what a store needs: write, fsync, rename a folder.

    Raises:
        OutputNotWritableError: one of them fails.
    """
    probe = root / f".probe-{uuid.uuid4().hex}"
    try:
        probe.mkdir(parents=True)
        with replace_atomically(probe / "from" / "file") as file:
            file.write(b"probe")
        (probe / "from").rename(probe / "to")
        if (probe / "to" / "file").read_bytes() != b"probe":
            raise OSError(errno.EIO, "a file read back differently")
        fsync_folder(probe)
    except OSError as error:
        raise OutputNotWritableError(
            f"{root}: cannot write, rename and sync files here ({error.strerror or error}); choose another OUT"
        ) from error
    finally:
        shutil.rmtree(probe, ignore_errors=True)


@contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turn 'no space left' into one clear line; everything staged so far stays and is taken up by the next run."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"{root}: no space left on this disk; free some and run again: nothing finished is lost"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise OutputNotWritableError(
                f"{root}: cannot write any more ({error.strerror}); run again when it can"
            ) from error
        raise


def _publish(folder: Path, final: Path) -> None:
    """Make ``folder`` durable and rename it to ``final``; if ``final`` is there already, keep what is there."""
    with ThreadPoolExecutor(_SYNCS_AT_ONCE) as pool:  # a disk settles several in the time of one
        list(pool.map(_sync, (folder, *folder.rglob("*"))))
    try:
        folder.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        manifest_of(final)  # raises where what is in the way is damaged
    fsync_folder(final.parent)


def _aside(store: FeatureStore, name: str) -> Path:
    """A new name below ``.replaced``."""
    folder = store.root / ".replaced"
    folder.mkdir(exist_ok=True)
    return folder / f"{name}.{datetime.now(UTC):%Y%m%dT%H%M%S}.{uuid.uuid4().hex[:6]}.zarr"


def _sync(path: Path) -> None:
    if path.is_dir():
        fsync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _staging_path(store: FeatureStore, name: str) -> Path:
    folder = store.root / ".staging"
    folder.mkdir(exist_ok=True)
    return folder / f"{name}.{uuid.uuid4().hex[:12]}"


def _new_staging(store: FeatureStore, name: str) -> Path:
    path = _staging_path(store, name)
    path.mkdir()
    return path


def _adopt(store: FeatureStore, name: str, facts: object) -> tuple[Path, list[dict[str, Any]]] | None:
    """An interrupted run's staging folder with those of its blocks that are still as journaled, or None.

    The folder is renamed to one of our own first: whoever else might still think it theirs finds it gone.
    """
    for old in sorted((store.root / ".staging").glob(f"{name}.*")):
        mine = _staging_path(store, name)
        try:
            old.rename(mine)
        except FileNotFoundError:
            continue  # another process was faster
        blocks = _journaled(mine, facts)
        if blocks:
            features = mine / "group" / "features"
            blocks = blocks[: _first_bad(open_array(features), blocks)]
            for shard in (features / "c").iterdir():  # zarr reads what is there before it writes, even if it is damaged
                if int(shard.name) >= len(blocks):
                    shutil.rmtree(shard)
        if blocks:
            return mine, blocks
        shutil.rmtree(mine, ignore_errors=True)
    return None


def _journaled(staging: Path, facts: object) -> list[dict[str, Any]]:
    """The blocks a journal names, if it was kept for the same work; none when it is not there or half there."""
    try:
        journal = json.loads((staging / "journal.json").read_bytes())
        same = journal["facts"] == facts and journal["metadata_sha256"] == _metadata_digest(staging / "group")
        return list(journal["blocks"]) if same else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _metadata_digest(group: Path) -> str:
    return hashlib.sha256((group / "features" / "zarr.json").read_bytes()).hexdigest()


def _write_array(folder: Path, rows: NDArray[Any], dimension_names: tuple[str, ...]) -> dict[str, object]:
    """Write a whole array, and its facts as it reads back.

    Raises:
        StoreCorruptError: it reads back as something else.
    """
    array = create_array(folder, rows.shape, rows.dtype.str, dimension_names)
    if len(rows):
        array[:] = rows
    return array_facts(array, [rows_digest(rows[block]) for block in row_blocks(len(rows))])


def _first_bad(array: "zarr.Array[Any]", blocks: list[dict[str, Any]]) -> int | None:
    """Index of the first journaled block that does not read back as written."""
    for index, block in enumerate(blocks):
        try:
            rows = read_rows(array, slice(block["start"], block["stop"]))
        except StoreCorruptError:
            return index
        if rows_digest(rows) != block["sha256"]:
            return index
    return None


def _delete(path: Path) -> int:
    if path.is_file():
        size = path.stat().st_size
        path.unlink()
        return size
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    shutil.rmtree(path)
    return size


def _grid_facts(grid: TileGrid) -> dict[str, object]:
    return {
        "n_tiles": len(grid),
        "tile_px": grid.tile_px,
        "side": list(grid.side),
        "stride": list(grid.stride),
        "mpp": list(grid.mpp),
        "level": grid.level,
        "downsample": list(grid.downsample),
        "fingerprint": grid.fingerprint,
    }


def _runs(status: NDArray[np.uint8]) -> list[list[int]]:
    """Run lengths, as almost every tile is good."""
    edges = np.flatnonzero(np.diff(status)) + 1
    starts = np.concatenate([[0], edges]).astype(int)
    stops = np.concatenate([edges, [len(status)]]).astype(int)
    return [[int(status[a]), int(b - a)] for a, b in zip(starts, stops, strict=True)]


def _expand(runs: list[list[int]]) -> NDArray[np.uint8]:
    return np.concatenate([np.full(count, value, np.uint8) for value, count in runs])


@cache
def _software() -> dict[str, str]:
    """Versions of what decides pixels, vectors and bytes."""
    names = ("numpy", "opencv-python-headless", "openslide-bin", "tiffslide", "timm", "torch", "zarr")
    return {"wsi-engine": __version__, "python": platform.python_version()} | {name: version(name) for name in names}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
