"""Files that are either whole or not there."""

import csv
import hashlib
import io
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = [
    "file_sha256",
    "fsync_folder",
    "fsync_tree",
    "make_folder_atomically",
    "nan_as_none",
    "replace_atomically",
    "write_atomically",
    "write_table",
]


@contextmanager
def replace_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside ``path`` that becomes ``path`` when the block ends well.

    The bytes are on the disk (fsync) before the name appears; on any error, KeyboardInterrupt included, nothing does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.partial")  # the name may be as long as the system allows
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def make_folder_atomically(path: Path) -> Iterator[Path]:
    """A name for a new folder beside ``path`` that becomes ``path`` when the block ends well; on any error nothing does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        yield temporary
        fsync_tree(temporary)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``: after a kill at any moment the old content or the new one is there, whole."""
    with replace_atomically(path) as file:
        file.write(data)


def write_table(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV, whole or not there; what is not known, None or NaN, is left empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(["" if _is_nan(value) else value for value in row] for row in rows)
    write_atomically(path, buffer.getvalue().encode())


def nan_as_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same for JSON, which has no NaN."""
    return {name: None if _is_nan(value) else value for name, value in values.items()}


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def file_sha256(path: Path) -> str:
    """The digest of a file, of which some is in memory at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable. Does nothing where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """Make every file and folder below ``root``, and ``root`` itself, durable."""
    for folder, _, names in os.walk(root):
        for name in names:
            descriptor = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_folder(Path(folder))
